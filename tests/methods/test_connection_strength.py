"""Connection strength as a method: phases, schedules, phase 2 against a computation by hand."""

import contextlib
import copy
import dataclasses
import io
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import torchmto
from torchmto import structure, task_norms

TASKS = ("seg", "depth", "normals")


class Net(nn.Module):
    """Two conv-norm pairs, then one linear head per task."""

    def __init__(self, tasks=TASKS):
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1, bias=False),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Conv2d(6, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(),
        )
        self.heads = nn.ModuleDict({task: nn.Conv2d(4, 1, 1) for task in tasks})

    def forward(self, x, task):
        return self.heads[task](self.trunk(x))


def setup(seed=0, tasks=TASKS, split=True, convolution=None, **options):
    torch.manual_seed(seed)
    model = Net(tasks).double()
    if convolution is not None:
        for place in (0, 3):
            model.trunk[place] = convolution(model.trunk[place])
    if split:
        structure.split_norms(model, tasks)
    for parameter in model.parameters():  # priorities differ only once the norms do
        parameter.data += 0.3 * torch.randn_like(parameter)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    method = torchmto.make_method("connection_strength", **options)
    mt = torchmto.MultiTask(model, optimizer, tasks=tasks, method=method)
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64)
    y = {task: torch.randn(4, 1, 5, 5, dtype=torch.float64) * (i + 1) for i, task in enumerate(tasks)}

    def closure(asked):
        return {task: (model(x, task) - y[task]).square().mean() for task in asked}

    return model, mt, closure


def test_phase_two_is_the_projection_of_every_layer_by_hand():
    model, mt, closure = setup(schedule="phase2")
    expected = copy.deepcopy(model)
    reference = {}
    gradients = {}
    losses = {}
    for task in TASKS:  # strengths are read after the step's forwards, which move the running variances
        with structure.active_task(task):
            x_loss = closure_of(expected, closure, model)((task,))[task]
        losses[task] = x_loss
        gradients[task] = dict(
            zip(
                [name for name, _ in expected.named_parameters()],
                torch.autograd.grad(x_loss, list(expected.parameters()), allow_unused=True),
                strict=True,
            )
        )
    for conv, norm in (("trunk.0", "trunk.1"), ("trunk.3", "trunk.4")):
        layer, split = expected.get_submodule(conv), expected.get_submodule(norm)
        strengths = torch.stack(
            [
                structure.connection_strength(
                    layer.weight, split.copy_for(t).weight, split.copy_for(t).running_var, split.copy_for(t).eps
                )
                for t in TASKS
            ]
        )
        top = structure.top_priority(structure.normalized_strength(strengths))
        names = [f"{conv}.weight"] + ([f"{conv}.bias"] if layer.bias is not None else [])
        stacked = [torch.stack([gradients[t][name] for t in TASKS]) for name in names]
        # Weight and bias of a channel are one group.
        flat = torch.cat([g.reshape(len(TASKS), len(top), -1) for g in stacked], dim=2)
        combined = structure.project_by_priority(flat, top)
        assert not torch.allclose(combined, flat.sum(0)) or conv == "trunk.0"
        widths = [g[0].numel() // len(top) for g in stacked]
        for name, part in zip(names, combined.split(widths, dim=1), strict=True):
            reference[name] = part.reshape(expected.get_parameter(name).shape)
    info = mt.step(closure)
    assert info.records["phase"] == 2
    assert (info.num_forward, info.num_backward, info.num_optimizer_steps) == (3, 3, 1)
    for name, parameter in model.named_parameters():
        if name in reference:
            torch.testing.assert_close(parameter.grad, reference[name], rtol=1e-12, atol=1e-12)
        else:
            own = [g[name] for g in gradients.values() if g[name] is not None]
            assert len(own) == 1
            torch.testing.assert_close(parameter.grad, own[0], rtol=1e-12, atol=1e-12)
    shares = info.records["priority_shares"]
    assert set(shares) == set(TASKS)
    assert sum(shares.values()) == pytest.approx(1)
    assert set(info.records["layer_priority_shares"]) == {"trunk.0", "trunk.3"}


def closure_of(other, closure, model):
    """The closure, run on another copy of the model."""

    def run(asked):
        cells = dict(zip(closure.__code__.co_freevars, (c.cell_contents for c in closure.__closure__), strict=True))
        x, y = cells["x"], cells["y"]
        return {task: (other(x, task) - y[task]).square().mean() for task in asked}

    return run


def test_phase_one_is_one_plain_step_per_task():
    model, mt, closure = setup(schedule="phase1")
    expected = copy.deepcopy(model)
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.05)
    run = closure_of(expected, closure, model)
    info = mt.step(closure)
    for task in TASKS:
        optimizer.zero_grad()
        with structure.active_task(task):
            run((task,))[task].backward()
        optimizer.step()
    assert (info.records["phase"], info.num_optimizer_steps) == (1, 3)
    for key, value in model.state_dict().items():
        assert torch.equal(value, expected.state_dict()[key]), key


@pytest.mark.parametrize("schedule", ["phase1", "phase2"])
def test_layers_of_heads_have_no_priority(schedule):
    torch.manual_seed(0)
    tasks = ("a", "b")
    trunk = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    heads = nn.ModuleDict({t: nn.Sequential(nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2)) for t in tasks})
    model = structure.split_norms(nn.ModuleDict({"trunk": trunk, "heads": heads}), tasks)
    mt = torchmto.MultiTask(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        tasks=tasks,
        method=torchmto.make_method("connection_strength", schedule=schedule),
    )
    x = torch.randn(2, 3, 4, 4)
    for _ in range(2):
        info = mt.step(lambda asked: {t: heads[t](trunk(x)).square().mean() for t in asked})
        assert set(info.records["layer_priority_shares"]) == {"trunk.0"}


def test_mix_moves_from_phase_one_to_phase_two():
    _, mt, closure = setup(total_steps=60)
    phases = [mt.step(closure).records["phase"] for _ in range(60)]
    assert phases[0] == 1
    assert phases[:20].count(1) > phases[-20:].count(1)
    assert mt.step(closure).records["phase"] == 2  # past the end


def test_sequence_switches_once():
    _, mt, closure = setup(total_steps=10, schedule="sequence", switch=0.3)
    assert [mt.step(closure).records["phase"] for _ in range(10)] == [1] * 3 + [2] * 7


def test_a_phase_drawn_per_epoch_holds_until_the_window_ends():
    _, mt, closure = setup(total_steps=40, draw="epoch")
    for _ in range(4):
        epoch = {mt.step(closure).records["phase"] for _ in range(10)}
        assert len(epoch) == 1
        mt.end_window()


@pytest.mark.parametrize("phase2", ["pcgrad", "gd"])
def test_any_method_can_be_the_second_phase_and_reports_as_it_does_alone(phase2):
    _, mt, closure = setup(schedule="phase2", phase2=phase2)
    alone, _, same_closure = setup(schedule="phase2")
    optimizer = torch.optim.SGD(alone.parameters(), lr=0.05)
    expected = torchmto.MultiTask(alone, optimizer, tasks=TASKS, method=phase2).step(same_closure)
    info = mt.step(closure)
    assert info.records["phase"] == 2
    assert set(info.records["layer_priority_shares"]) == {"trunk.0", "trunk.3"}
    for field in dataclasses.fields(info):
        if field.name == "gramian":
            assert (info.gramian is None) == (expected.gramian is None)
            assert info.gramian is None or torch.equal(info.gramian, expected.gramian)
        elif field.name != "records":
            assert getattr(info, field.name) == getattr(expected, field.name), field.name


@pytest.mark.parametrize("how", ["frozen", "not in the optimizer"])
def test_a_layer_keeps_its_priorities_where_only_its_weight_is_trained(how):
    model, _, closure = setup()
    bias = model.trunk[3].bias
    bias.requires_grad_(how != "frozen")
    trained = [p for p in model.parameters() if p is not bias]
    gradients = {}
    for phase2 in ("priority", "gd"):
        optimizer = torch.optim.SGD(trained, lr=0.0)
        method = torchmto.make_method("connection_strength", schedule="phase2", phase2=phase2)
        info = torchmto.MultiTask(model, optimizer, tasks=TASKS, method=method).step(closure)
        gradients[phase2] = model.trunk[3].weight.grad
        assert set(info.records["layer_priority_shares"]) == {"trunk.0", "trunk.3"}
        assert bias.grad is None
    assert not torch.allclose(gradients["priority"], gradients["gd"])


class Branching(nn.Module):
    """Nothing of it traces, norms are registered before their layers, and a task may leave before the second block."""

    def __init__(self, early=(), tasks=("a", "b", "c")):
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(2))
        self.convs = nn.ModuleList([nn.Conv2d(2, 4, 1), nn.Conv2d(4, 4, 1)])
        self.heads = nn.ModuleDict({task: nn.Conv2d(4, 1, 1) for task in tasks})
        self.early = set(early)

    def forward(self, x, tasks):
        y = self.norms[0](self.convs[0](x)).relu()
        if float(y.detach().sum()) > 1e9 or not set(tasks) & set(self.heads):
            return {}
        z = y if set(tasks) <= self.early else self.norms[1](self.convs[1](y)).relu()
        return {task: self.heads[task](z) for task in tasks}


def branching(seed=0, early=(), stacked=False, **options):
    tasks = ("a", "b", "c")
    torch.manual_seed(seed)
    model = structure.split_norms(Branching(early), tasks).double()
    method = torchmto.make_method("connection_strength", **{"schedule": "phase2", **options})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    mt = torchmto.MultiTask(model, optimizer, tasks=tasks, method=method, stacked=stacked)

    def closure_of_step(step, present=tasks):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(4, 2, 3, 3, dtype=torch.float64, generator=generator)

        def closure(asked):
            wanted = tuple(task for task in asked if task in present)
            copies = x.repeat(len(wanted), 1, 1, 1)
            with task_norms.active_tasks(wanted) if stacked and wanted else contextlib.nullcontext():
                out = model(copies, wanted)
            parts = {task: out[task].chunk(len(wanted))[i] for i, task in enumerate(wanted)}
            return {task: (y - tasks.index(task) * x[:, :1]).square().mean() for task, y in parts.items()}

        return closure

    return model, mt, closure_of_step


def fails(asked):
    raise RuntimeError("a corrupt image")


FIRST_STEPS = {
    "all tasks": (["abc"], {}),
    "an error before any forward": ([fails, "abc"], {}),
    "an error after a forward": (["a!", "abc"], {}),
    "a task that leaves early": (["c", "a", "b"], {"early": "c"}),
    "the same in phase 1": (["c", "c", "ab"], {"early": "c", "schedule": "phase1"}),
    "all tasks in one pass": (["abc"], {"stacked": True}),
    "another second phase": (["c", "ab"], {"early": "c", "phase2": "pcgrad"}),
}


@pytest.mark.parametrize("case", FIRST_STEPS)
def test_layers_are_found_whatever_the_first_steps_saw(case):
    first, options = FIRST_STEPS[case]
    _, mt, closure_of_step = branching(**options)
    for step, present in enumerate(first):
        good = closure_of_step(step, present.strip("!") if isinstance(present, str) else "abc")
        if isinstance(present, str) and "!" not in present:
            mt.step(good)
            continue
        before = mt.state_dict()["method_state"]["priorities"]
        with pytest.raises(RuntimeError, match="corrupt"):
            mt.step(fails if present is fails else lambda asked, good=good: good(asked) or fails(asked))
        assert mt.state_dict()["method_state"]["priorities"] == before
    info = mt.step(closure_of_step(9))
    assert set(info.records["layer_priority_shares"]) == {"convs.0", "convs.1"}
    pairs = mt.state_dict()["method_state"]["priorities"]["pairs"]
    assert pairs["convs.1"] == ["norms.1", None, "recorded"]


SCHEDULE = ("c", "ac", "c", "abc", "b", "abc")


@pytest.mark.parametrize("number", range(len(SCHEDULE)))
def test_a_resumed_training_has_the_same_layers(number):
    """Tasks come one after the other; wherever the training is cut, it goes on bit for bit."""
    whole, mt, closure_of_step = branching(early="c", degenerate="project")
    infos = []
    for step, present in enumerate(SCHEDULE):
        if step == number:
            saved = io.BytesIO()
            torch.save((whole.state_dict(), mt.state_dict()), saved)
        infos.append(mt.step(closure_of_step(step, present)))
    saved.seek(0)
    model_state, state = torch.load(saved, weights_only=True)
    model, resumed, closure_of_step = branching(seed=1, early="c", degenerate="project")
    model.load_state_dict(model_state)
    resumed.load_state_dict(state)
    for step in range(number, len(SCHEDULE)):
        assert resumed.step(closure_of_step(step, SCHEDULE[step])).records == infos[step].records
    for key, value in whole.state_dict().items():
        assert torch.equal(value, model.state_dict()[key]), key
    assert resumed.state_dict()["method_state"]["priorities"] == mt.state_dict()["method_state"]["priorities"]


@pytest.mark.parametrize(
    "pairs",
    [
        {"convs.7": ["norms.0", None, "fx"]},
        {"convs.0": ["norms.7", None, "fx"]},
        {"norms.0": ["norms.1", None, "fx"]},
        {"convs.0": [None, "norms.0", "fx"]},
        {"convs.0": ["norms.0"]},
    ],
)
def test_states_that_name_other_layers_are_refused(pairs):
    _, mt, closure_of_step = branching()
    mt.step(closure_of_step(0))
    state = mt.state_dict()
    wrong = copy.deepcopy(state)
    wrong["method_state"]["priorities"]["pairs"] = pairs
    with pytest.raises(ValueError, match=r"layer|don't fit|unpack"):
        mt.load_state_dict(wrong)
    assert mt.state_dict()["method_state"]["priorities"] == state["method_state"]["priorities"]


def test_a_state_from_before_pairs_were_saved():
    _, mt, closure_of_step = branching(early="c")
    mt.step(closure_of_step(0))
    state = mt.state_dict()
    expected = state["method_state"].pop("priorities")
    _, resumed, closure_of_step = branching(early="c")
    resumed.load_state_dict(state)
    for present in ("c", "ab"):
        resumed.step(closure_of_step(1, present))
    assert resumed.state_dict()["method_state"]["priorities"] == expected


@pytest.mark.parametrize("options", [{}, {"measure": "gradients"}, {"schedule": "phase1"}, {"phase2": "gd"}])
def test_a_task_that_never_reaches_a_layer_leads_none_of_its_channels(options):
    _, mt, closure_of_step = branching(early="c", **options)
    for step in range(6):
        info = mt.step(closure_of_step(step))
    shares = info.records["layer_priority_shares"]["convs.1"]
    assert shares["c"] == 0
    assert shares["a"] + shares["b"] == 1
    assert set(mt.step(closure_of_step(7, "c")).losses) == {"c"}  # nobody to lead it


@pytest.mark.parametrize("traceable", [True, False])
@pytest.mark.parametrize("excluded", [(), "heads"])
def test_a_norm_of_a_head_is_not_the_trunks(traceable, excluded):
    class Tasks(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.last = nn.Linear(4, 6), nn.Linear(6, 5)
            self.norm = nn.LayerNorm(6)
            self.heads = nn.ModuleDict({t: nn.Sequential(nn.LayerNorm(5), nn.Linear(5, 1)) for t in "ab"})

        def forward(self, x):
            y = self.norm(self.inner(x))
            y = self.last(y.relu() if traceable or float(y.detach().sum()) < 1e9 else y)
            return {task: head(y) for task, head in self.heads.items()}

    torch.manual_seed(0)
    model = structure.split_norms(Tasks(), ["a", "b"], exclude=excluded)
    method = torchmto.make_method("connection_strength", schedule="phase2")
    mt = torchmto.MultiTask(model, torch.optim.Adam(model.parameters()), tasks=["a", "b"], method=method)
    x = torch.randn(8, 4)
    for tasks in ("a", "ab", "ab"):
        info = mt.step(lambda asked, tasks=tasks: {t: model(x)[t].square().mean() for t in asked if t in tasks})
    # The norm before the last layer is of both tasks, so it goes with that.
    assert set(info.records["layer_priority_shares"]) == {"inner", "last"}
    assert mt.state_dict()["method_state"]["priorities"]["pairs"]["last"][:2] == [None, "norm"]


@pytest.mark.parametrize("measure", ["gradients", "saliency"])
def test_other_measures(measure):
    model, mt, closure = setup(schedule="phase2", measure=measure)
    info = mt.step(closure)
    assert sum(info.records["priority_shares"].values()) == pytest.approx(1)
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters())


def test_without_split_norms_it_warns_and_sums():
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="split_norms"):
        model, mt, closure = setup(split=False, schedule="phase2")
    plain = copy.deepcopy(model)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.05)
    mt.step(closure)
    sum(closure_of(plain, closure, model)(TASKS).values()).backward()
    optimizer.step()
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("schedule", ["phase1", "phase2"])
@pytest.mark.parametrize("normed", [parametrizations.weight_norm, parametrizations.spectral_norm, nn.utils.weight_norm])
def test_it_warns_once_where_the_weight_of_every_layer_is_computed(normed, schedule):
    _, mt, closure = setup(schedule=schedule, convolution=normed)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        mt.step(lambda asked: {t: v for t, v in closure(asked).items() if t != "depth"})
        assert not caught
        for _ in range(3):
            info = mt.step(closure)
    assert ["phase 2 is the plain sum" in str(warning.message) for warning in caught] == [True]
    assert "priority_shares" not in info.records
    # With one layer left that has channels of its own there is a priority.
    _, mt, closure = setup(schedule=schedule, convolution=lambda layer: normed(layer) if layer.bias is None else layer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        info = mt.step(closure)
    assert list(info.records["layer_priority_shares"]) == ["trunk.3"]


def test_missing_tasks():
    model, mt, closure = setup(schedule="phase2")
    info = mt.step(lambda asked: {t: v for t, v in closure(asked).items() if t != "depth"})
    assert set(info.losses) == {"seg", "normals"}
    assert model.heads["depth"].weight.grad is None


@pytest.mark.parametrize("measure", ["parameters", "gradients"])
@pytest.mark.parametrize("present", [("seg",), ("seg", "normals")])
def test_who_leads_in_the_absence_of_others_has_no_priority(measure, present):
    """What is recorded are the priorities among all tasks: what the norms say, where the batch needn't be asked."""
    _, mt, closure = setup(schedule="phase2", measure=measure)
    mt.step(closure)
    partly = mt.step(lambda asked: {t: v for t, v in closure(asked).items() if t in present})
    assert ("priority_shares" in partly.records) == (measure == "parameters")
    for group in mt.network.optimizers.all[0].param_groups:
        group["lr"] = 0.0
    whole, later = mt.step(closure), mt.step(lambda asked: {t: v for t, v in closure(asked).items() if t in present})
    if measure == "parameters":
        assert later.records == whole.records
        assert min(whole.records["priority_shares"].values()) > 0


@pytest.mark.parametrize("what", ["a layer", "a norm", "the trunk", "another trunk"])
@pytest.mark.parametrize("options", [{}, {"pairs": [("trunk.0", "trunk.1"), ("trunk.3", "trunk.4")]}])
def test_layers_that_are_replaced_keep_their_places(what, options):
    """In model and optimizer: the next step is that of a new method, whichever of the pairs are new."""
    model, mt, closure = setup(schedule="phase2", **options)
    mt.step(closure)
    other, _, _ = setup(seed=1, schedule="phase2", **options)
    if what == "the trunk":
        model.trunk = other.trunk
    elif what == "another trunk":
        model.trunk = nn.Sequential(nn.Identity(), *other.trunk) if not options else other.trunk
    else:
        model.trunk[3 if what == "a layer" else 4] = other.trunk[3 if what == "a layer" else 4]
    mt.network.optimizers.all[0].param_groups[0]["params"] = list(model.parameters())
    twin = copy.deepcopy(model)
    fresh = torchmto.MultiTask(
        twin,
        torch.optim.SGD(twin.parameters(), lr=0.05),
        tasks=TASKS,
        method=torchmto.make_method("connection_strength", schedule="phase2", **options),
    )
    for _ in range(2):
        info, expected = mt.step(closure), fresh.step(closure_of(twin, closure, model))
        assert info.records == expected.records
        assert set(info.records["layer_priority_shares"]) == (
            {"trunk.1", "trunk.4"} if what == "another trunk" and not options else {"trunk.0", "trunk.3"}
        )
        for a, b in zip(model.parameters(), twin.parameters(), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "sequence"}, "total_steps"),
        ({"schedule": "both"}, "one of 'mix'"),
        ({"total_steps": 0}, "an int >= 1"),
        ({"measure": "size"}, "one of 'parameters'"),
        ({"degenerate": "none"}, "one of 'sum'"),
        ({"draw": "day"}, "one of 'step'"),
        ({"phase2": "nothing"}, "Unknown method"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        torchmto.make_method("connection_strength", **options)
