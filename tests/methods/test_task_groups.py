"""Task groups as a method: order, tracking, groupings, costs."""

import copy

import pytest
import torch
from torch import nn

import torchmto
from torchmto.methods import Cost
from toy import same

TASKS = ("a", "b", "c", "d")


def setup(seed=0, tasks=TASKS, noise=0.0, **options):
    torch.manual_seed(seed)
    model = nn.ModuleDict(
        {
            "trunk": nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Dropout(noise)),
            "heads": nn.ModuleDict({t: nn.Linear(8, 1) for t in tasks}),
        }
    ).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    x = torch.randn(16, 5, dtype=torch.float64)
    y = {t: torch.randn(16, 1, dtype=torch.float64) for t in tasks}

    def losses(net, asked):
        features = net["trunk"](x)
        return {t: (net["heads"][t](features) - y[t]).square().mean() for t in asked}

    mt = torchmto.MultiTask(model, optimizer, tasks=tasks, method=torchmto.make_method("task_groups", **options))
    return model, mt, losses


def test_groups_are_updated_one_after_the_other_and_tracked():
    groups = [["a", "c"], ["b"], ["d"]]
    model, mt, losses = setup(groups=groups, measure_last=True, decay=0.1)
    expected = copy.deepcopy(model)
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.05)
    affinity = torchmto.ProximalAffinity(TASKS, decay=0.1)
    for _ in range(5):
        info = mt.step(lambda asked: losses(model, asked))
        affinity.new_batch()
        for group in info.records["order"]:
            values = losses(expected, TASKS)
            affinity.update(group, {t: v.item() for t, v in values.items()})
            optimizer.zero_grad()
            sum(values[t] for t in group).backward()
            optimizer.step()
        affinity.finish({t: v.item() for t, v in losses(expected, TASKS).items()})
        assert (info.num_forward, info.num_backward, info.num_optimizer_steps) == (4, 3, 3)
        assert sorted(info.records["order"]) == sorted(groups)
        torch.testing.assert_close(info.records["affinity"], affinity.matrix, rtol=1e-12, atol=0)
    for a, b in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-15)


def test_a_state_does_not_change_groups_that_were_given():
    _, saved, _ = setup(groups=[["a", "c"], ["b"], ["d"]])
    for groups in ("joint", "per_task", [["a"], ["b", "c", "d"]]):
        _, mt, _ = setup(groups=groups)
        before = mt.method.current
        mt.load_state_dict(saved.state_dict())
        assert mt.method.current == before


def test_heads_outside_a_group_are_left_alone():
    model, mt, losses = setup(groups="per_task")
    before = copy.deepcopy(model["heads"]["a"].state_dict())
    mt.step(lambda asked: {t: v for t, v in losses(model, asked).items() if t != "a"})
    assert all(torch.equal(v, before[k]) for k, v in model["heads"]["a"].state_dict().items())


@pytest.mark.parametrize(
    ("grouping", "sizes"),
    [("joint", [4]), ("per_task", [1, 1, 1, 1]), ("random", [2, 2]), ([["a", "b", "c"], ["d"]], [3, 1])],
)
def test_baseline_groupings(grouping, sizes):
    model, mt, losses = setup(groups=grouping)
    info = mt.step(lambda asked: losses(model, asked))
    assert [len(group) for group in info.records["groups"]] == sizes
    assert info.num_optimizer_steps == len(sizes) == mt.method.cost(4).num_optimizer_steps
    assert info.num_forward == mt.method.cost(4).num_forward


@pytest.mark.parametrize("grouping", ["adaptive", "heterogeneous"])
@pytest.mark.parametrize("cluster", ["affinity_propagation", "correlation"])
def test_groups_form_after_the_warmup(grouping, cluster):
    model, mt, losses = setup(groups=grouping, warmup=6, cluster=cluster)
    for step in range(12):
        info = mt.step(lambda asked: losses(model, asked))
        assert sorted(t for group in info.records["groups"] for t in group) == sorted(TASKS)
        if step < 6:
            assert info.records["groups"] == [[t] for t in TASKS]
    assert len(info.records["groups"]) < len(TASKS)


@pytest.mark.parametrize(("single", "forwards", "steps"), [("measure", 2, 1), ("twice", 2, 2), ("once", 1, 1)])
def test_a_single_group_stays_measurable(single, forwards, steps):
    model, mt, losses = setup(warmup=0, single=single)
    mt.method.current = [list(TASKS)]
    mt.method.regroup_every = 1000
    before = mt.method.affinity.matrix
    info = mt.step(lambda asked: losses(model, asked))
    assert (info.num_forward, info.num_optimizer_steps) == (forwards, steps)
    assert torch.equal(mt.method.affinity.matrix, before) == (single == "once")


def test_official_attribution_updates_a_single_group_twice():
    assert torchmto.make_method("task_groups", attribution="official").single == "twice"


@pytest.mark.parametrize(("attribution", "alone"), [("actor", 3), ("official", 4)])
def test_the_released_warmup_is_one_batch_longer(attribution, alone):
    """101 batches for 100: it compares a count that starts at 0 with "at most"."""
    model, mt, losses = setup(warmup=3, attribution=attribution)
    mt.method.affinity.groups = lambda *_: [list(TASKS)]
    groups = [mt.step(lambda asked: losses(model, asked)).records["groups"] for _ in range(6)]
    assert [len(group) for group in groups] == [len(TASKS)] * alone + [1] * (6 - alone)


def test_noise_floor():
    model, mt, losses = setup(noise_floor=True)
    quiet = mt.step(lambda asked: losses(model, asked))
    assert all(value == 0 for value in quiet.records["noise_floor"].values())
    model, mt, losses = setup(noise_floor=True, noise=0.5)
    noisy = mt.step(lambda asked: losses(model, asked))
    assert all(value != 0 for value in noisy.records["noise_floor"].values())
    assert noisy.num_forward == 5


def test_the_last_group_is_measured_with_the_noise_of_its_own_forward():
    """At a learning rate of 0 nothing changes, though every group's forward drops other features."""
    model, mt, losses = setup(groups=[["a"], ["b"], ["c", "d"]], noise=0.5, decay=1.0, measure_last=True)
    mt.network.optimizers.all[0].param_groups[0]["lr"] = 0.0
    info = mt.step(lambda asked: losses(model, asked))
    last = [TASKS.index(task) for task in info.records["order"][-1]]
    others = [row for row in range(len(TASKS)) if row not in last]
    assert not info.records["affinity"][last].any()
    assert info.records["affinity"][others].any(dim=1).all()


def test_a_gramian_method_inside_the_groups():
    model, mt, losses = setup(groups=[["a", "b", "c"], ["d"]], inner="pcgrad")
    info = mt.step(lambda asked: losses(model, asked))
    assert (info.num_forward, info.num_backward, info.num_optimizer_steps) == (2, 4, 2)
    assert mt.method.cost(4) == Cost(2, 4, 2)
    assert bool((info.records["affinity"] != 0).any())


def test_a_gramian_method_inside_the_groups_meets_missing_tasks_and_bad_losses():
    model, mt, losses = setup(groups=[["a", "b"], ["c", "d"]], inner="pcgrad")
    info = mt.step(lambda asked: {t: v for t, v in losses(model, asked).items() if t in "cd"})
    assert (set(info.losses), info.num_optimizer_steps, info.skipped) == ({"c", "d"}, 1, False)
    mt.on_nonfinite = "skip"
    calls = []

    def second_forward_is_bad(asked):
        calls.append(asked)
        scale = float("nan") if len(calls) == 2 else 1.0
        return {t: v * scale for t, v in losses(model, asked).items()}

    info = mt.step(second_forward_is_bad)
    assert (info.num_optimizer_steps, info.skipped) == (1, True)
    assert bool(mt.method.affinity.matrix.isfinite().all())


INNER = {
    "pcgrad": {},
    "wpcgrad": {"priority": "loss", "window": 2},
    "gradnorm": {"layer": "trunk"},
    "cr_mogm": {"method": torchmto.make_method("gradnorm", layer="trunk")},
    "modo": {"gamma": 0.1},
}


@pytest.mark.parametrize("name", INNER)
def test_all_tasks_in_one_group_are_the_inner_method_alone(name):
    """Its step, its state and what it reports, also where a task is missing."""
    inner = torchmto.make_method(name, **copy.deepcopy(INNER[name]))
    model, mt, losses = setup(groups="joint", inner=inner)
    alone = torchmto.make_method(name, **copy.deepcopy(INNER[name]))
    alone.seed(inner.generator.initial_seed())
    other = copy.deepcopy(model)
    expected = torchmto.MultiTask(other, torch.optim.SGD(other.parameters(), lr=0.05), tasks=TASKS, method=alone)
    for missing in ("", "b", "", "", "d", ""):
        info, by_itself = (
            each.step(lambda asked, net=net: losses(net, [t for t in asked if t != missing]))  # noqa: B023
            for each, net in ((mt, model), (expected, other))
        )
        (told,) = info.records["inner"]
        assert told == {"group": list(TASKS), "num_fallbacks": 0, **by_itself.records}
        assert same(inner.state_dict(), alone.state_dict())
        assert same(model.state_dict(), other.state_dict())


def test_the_inner_method_learns_from_every_group_that_was_updated():
    """Tasks on their own too, so that it knows them once they share a group; not those of a group left out."""
    inner = torchmto.make_method("wpcgrad", priority="loss", window=3)
    model, mt, losses = setup(groups=[["a", "b"], ["c"], ["d"]], inner=inner)
    info = mt.step(lambda asked: {t: v for t, v in losses(model, asked).items() if t != "d"})
    assert [entry["group"] for entry in info.records["inner"]] == [["a", "b"]]
    assert inner.priority.last.isnan().all()
    info = mt.step(lambda asked: losses(model, asked))
    assert inner.priority.last[:3].isfinite().any()
    mt.end_window()
    assert inner.priority.last.isfinite().all()


def test_an_inner_method_keeps_its_state_where_a_group_is_left_out():
    class Broken(type(torchmto.make_method("pcgrad"))):
        def weights(self, gramian, losses=None, indices=None):
            self.add_state("calls", getattr(self, "calls", 0) + 1)
            torch.rand(3, generator=self.generator)
            return torch.full((len(gramian),), torch.nan if self.calls == 2 else 1.0, dtype=torch.float64)

    inner = Broken()
    model, mt, losses = setup(groups=[["a", "b"], ["c", "d"]], inner=inner)
    mt.on_nonfinite = "skip"
    inner.add_state("calls", 0)
    expected = copy.deepcopy(inner.generator)
    info = mt.step(lambda asked: losses(model, asked))
    torch.rand(3, generator=expected)
    assert (info.skipped, info.num_optimizer_steps, inner.calls) == (True, 1, 1)
    assert len(info.records["inner"]) == 1
    assert torch.equal(inner.generator.get_state(), expected.get_state())


def test_norms_of_a_group_that_is_left_out_are_forgotten():
    """GradNorm keeps them from its weights to its update."""
    model = nn.Linear(3, 1)
    method = torchmto.make_method("task_groups", groups=[["a", "b"], ["c"]], inner="gradnorm")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    mt = torchmto.MultiTask(model, optimizer, tasks=[*"abc"], method=method, on_nonfinite="skip")

    def closure(asked):
        # Only the sum of the gradients of a and b overflows, once their weights are known.
        total = model.weight.sum()
        far = 0.7 * torch.finfo(total.dtype).max * (total - total.detach())
        return {task: total.square() + 1 + (far if task in "ab" else 0) for task in asked}

    orders = []
    for _ in range(4):
        info = mt.step(closure)
        assert (info.skipped, info.num_optimizer_steps) == (True, 1)
        assert "combined gradient isn't finite" in info.reason
        orders.append(info.records["order"][0])
    assert ["a", "b"] in orders


def test_fallbacks_inside_the_groups_are_counted():
    class Failing(type(torchmto.make_method("pcgrad"))):
        def weights(self, gramian, losses=None, indices=None):
            self.num_fallbacks += 1
            return torch.ones(len(gramian), dtype=gramian.dtype)

    model, mt, losses = setup(groups=[["a", "b"], ["c", "d"]], inner=Failing())
    for _ in range(2):
        assert mt.step(lambda asked: losses(model, asked)).num_fallbacks == 2


def test_affinities_are_of_the_batch_even_if_the_inner_method_looks_at_others():
    model, mt, losses = setup(groups=[["a", "b"], ["c", "d"]], inner="modo", decay=1.0, measure_last=True)
    model.requires_grad_(requires_grad=True)
    mt.network.optimizers.all[0].param_groups[0]["lr"] = 0.0
    other = [lambda asked, s=s: {t: s * v for t, v in losses(model, asked).items()} for s in (2.0, 5.0)]
    info = mt.step(lambda asked: losses(model, asked), independent=other)
    assert not info.records["affinity"].any()


@pytest.mark.parametrize("inner", [None, "pcgrad"])
@pytest.mark.parametrize("attribution", ["actor", "official"])
def test_a_group_without_labels_loses_nothing(inner, attribution):
    """The losses after the step before it are those before the step after it."""
    model, mt, losses = setup(groups=[["a"], ["b", "c"], ["d"]], inner=inner, decay=1.0, attribution=attribution)
    for _ in range(12):
        mt.method.affinity = torchmto.ProximalAffinity(TASKS, 1.0, attribution)
        info = mt.step(lambda asked: {t: v for t, v in losses(model, asked).items() if t in "ad"})
        first, last = (group for group in info.records["order"] if group in (["a"], ["d"]))
        (credited,) = first if attribution == "actor" else last
        moved = info.records["affinity"].any(1)
        assert [task for task, row in zip(TASKS, moved, strict=True) if row] == [credited]


def test_same_noise_makes_affinities_repeatable():
    model, mt, losses = setup(noise=0.5, groups="per_task")
    mt.same_noise = True
    seen = []

    def closure(asked):
        seen.append(torch.get_rng_state())
        return losses(model, asked)

    mt.step(closure)
    assert all(torch.equal(state, seen[0]) for state in seen)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": "best"}, "one of 'adaptive'"),
        ({"groups": [["a"], ["a", "b"]]}, "a partition"),
        ({"groups": [["a"], []]}, "a partition"),
        ({"decay": 0.0}, "decay"),
        ({"attribution": "next"}, "attribution"),
        ({"warmup": -1}, "an int >= 0"),
        ({"inner": "gd"}, "a Gramian method"),
        ({"inner": torchmto.make_method("pcgrad", refresh_every=2)}, "inner.refresh_every"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        torchmto.make_method("task_groups", **options)


def test_wrong_groups_are_named_when_tasks_are_known():
    with pytest.raises(ValueError, match="Unknown task `z`"):
        setup(groups=[["a", "b"], ["c", "d", "z"]])
    with pytest.raises(ValueError, match="a partition of all tasks"):
        setup(groups=[["a", "b"], ["c"]])


def test_ready_losses_are_refused():
    model, mt, losses = setup()
    with pytest.raises(ValueError, match="needs a closure"):
        mt.step(losses(model, TASKS))


@pytest.mark.parametrize("counts", [None, (3, 5)])
@pytest.mark.parametrize("weights", [None, "uw", "si", "rlw", {"a": 0.5}])
def test_groups_without_a_present_task_have_no_weights_and_no_gradients(weights, counts):
    """In micro-batches, where fixed weights are asked for before the first forward."""
    ends = []
    for parts in (1, 2):
        model, mt, losses = setup()
        optimizer = mt.network.optimizers.all[0]
        mt = torchmto.MultiTask(model, optimizer, tasks=TASKS, method="task_groups", weights=weights, seed=0)

        def counted(count, model=model, losses=losses):
            return lambda tasks: {t: (loss, count) if counts else loss for t, loss in losses(model, tasks).items()}

        for asked in (TASKS, ("a",), ("b", "d")):
            info = mt.step([counted(count) for count in (counts or (1, 1))[:parts]], tasks=asked)
            assert tuple(info.losses) == asked
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*ends, rtol=1e-9, atol=1e-12)
