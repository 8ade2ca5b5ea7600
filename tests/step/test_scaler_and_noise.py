"""GradScaler, schedulers and hooks; extra forwards, noise and buffers."""

import contextlib
import copy

import pytest
import torch
from torch import nn

import torchmto
from torchmto.structure import split_norms
from toy import Toy, batch, closure, flat, make, same, state

TASKS = ("a", "b", "c")


def scaler(scale=2.0**10, **options):
    return torch.amp.GradScaler("cpu", init_scale=scale, **options)


def run(method, scale=None, *, tasks=TASKS, steps=3, **options):
    made = None if scale is None else scaler(scale, growth_interval=2)
    model, _, mt = make(
        method,
        tasks,
        model=Toy(tasks, norm=nn.BatchNorm1d(5)),
        optimizer=lambda ps: torch.optim.Adam(ps, lr=0.01),
        scaler=made,
        **options,
    )
    infos = [mt.step(closure(model, batch(tasks, seed=seed))) for seed in range(steps)]
    return model, mt, infos


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("method", ["gd", "pcgrad", "wpcgrad", "sequential"])
def test_a_scaler_changes_nothing_but_itself(method, clip):
    """Powers of two are exact, so all scales give the same bits."""
    plain, _, _ = run(method, clip=clip)
    for scale in (1.0, 2.0**10):
        scaled, mt, infos = run(method, scale, clip=clip)
        if clip is None:
            assert same(dict(plain.state_dict()), dict(scaled.state_dict()))
        else:
            torch.testing.assert_close(flat(plain), flat(scaled), rtol=1e-6, atol=1e-9)
        steps = sum(info.num_optimizer_steps for info in infos)
        assert mt.network.scaler.get_scale() == scale * 2.0 ** (steps // 2), "one update per optimizer step"


@pytest.mark.parametrize("method", ["gd", "dwa", "pcgrad", "sequential", "task_groups"])
def test_a_scaler_leaves_out_optimizers_without_gradients(method):
    """Heads whose task a batch lacks, and frozen parts, each with an optimizer of its own."""
    ended = []
    for made in (None, scaler()):
        torch.manual_seed(0)
        model = Toy(TASKS)
        parts = [model.trunk, *(model.heads[task] for task in TASKS)]
        mt = torchmto.MultiTask(
            model,
            [torch.optim.Adam(part.parameters(), lr=0.01) for part in parts],
            tasks=TASKS,
            method=method,
            scaler=made,
        )
        for wanted in (TASKS, TASKS[:1], TASKS[1:], TASKS):
            losses = closure(model, batch(TASKS))
            mt.step(lambda tasks, losses=losses, wanted=wanted: losses(tuple(t for t in tasks if t in wanted)))
        model.trunk.requires_grad_(requires_grad=False)
        if method in ("gd", "dwa", "sequential"):
            mt.step(closure(model, batch(TASKS)))
        ended.append(dict(model.state_dict()))
    assert same(*ended)


def test_an_overflow_beside_an_optimizer_without_gradients():
    model = Toy(TASKS, dtype=torch.float32)
    optimizers = [torch.optim.SGD(part.parameters(), lr=0.1) for part in (model.trunk, model.heads)]
    mt = torchmto.MultiTask(model, optimizers, tasks=TASKS, method="gd", scaler=scaler())
    model.heads.requires_grad_(requires_grad=False)
    before = copy.deepcopy(dict(model.state_dict()))
    info = mt.step(overflowing(model))
    assert info.skipped
    assert mt.network.scaler.get_scale() == 2.0**9
    assert same(before, dict(model.state_dict()))


def test_a_disabled_scaler():
    plain, _, _ = run("pcgrad")
    model, _, mt = make(
        "pcgrad",
        model=Toy(TASKS, norm=nn.BatchNorm1d(5)),
        optimizer=lambda ps: torch.optim.Adam(ps, lr=0.01),
        scaler=torch.amp.GradScaler("cpu", enabled=False),
    )
    for seed in range(3):
        mt.step(closure(model, batch(TASKS, seed=seed)))
    assert same(dict(plain.state_dict()), dict(model.state_dict()))


def overflowing(model, where=None):
    """Finite losses whose gradients overflow once they are scaled by more than 1."""

    class Overflow(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            return g * torch.finfo(torch.float32).max

    inner = closure(model, batch(TASKS, dtype=torch.float32))

    def losses(tasks):
        return {t: Overflow.apply(loss) if where in (None, t) else loss for t, loss in inner(tasks).items()}

    return losses


@pytest.mark.parametrize("on_nonfinite", ["raise", "skip"])
@pytest.mark.parametrize("where", [None, "b"])
@pytest.mark.parametrize("method", ["gd", "pcgrad", "wpcgrad"])
def test_an_overflow_skips_the_step_and_lowers_the_scale(method, where, on_nonfinite):
    model = Toy(TASKS, norm=nn.BatchNorm1d(5), dtype=torch.float32)
    calls = []
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    mt = torchmto.MultiTask(model, optimizer, tasks=TASKS, method=method, scaler=scaler(), on_nonfinite=on_nonfinite)
    mt.step(closure(model, batch(TASKS, dtype=torch.float32)))
    before = state(mt)
    info = mt.step(overflowing(model, where))
    now = state(mt)
    assert info.skipped
    assert "scale" in info.reason
    assert info.num_optimizer_steps == 0
    assert len(calls) == 1
    assert mt.network.scaler.get_scale() == 2.0**9
    assert same(before["mt"], now["mt"])
    assert same(before["optimizer"], now["optimizer"])
    running = [k for k in before["model"] if "running" in k or "tracked" in k]
    assert same(
        {k: v for k, v in before["model"].items() if k not in running},
        {k: v for k, v in now["model"].items() if k not in running},
    )
    info = mt.step(closure(model, batch(TASKS, dtype=torch.float32)))
    assert not info.skipped
    assert len(calls) == 2


@pytest.mark.parametrize("method", ["sequential", "task_groups"])
def test_an_overflow_in_a_procedure_skips_its_sub_step(method):
    model = Toy(TASKS, dtype=torch.float32)
    mt = torchmto.MultiTask(
        model, torch.optim.Adam(model.parameters(), lr=0.01), tasks=TASKS, method=method, scaler=scaler()
    )
    info = mt.step(overflowing(model, "b"))
    assert info.skipped
    assert info.num_optimizer_steps == 2
    assert mt.network.scaler.get_scale() == 2.0**9
    info = mt.step(overflowing(model))
    assert info.num_optimizer_steps == 0
    assert mt.network.scaler.get_scale() == 2.0**6


def test_with_a_scaler_losses_are_governed_by_on_nonfinite():
    for method in ("gd", "pcgrad", "sequential"):
        for policy in ("raise", "skip"):
            model, _, mt = make(method, scaler=scaler(), on_nonfinite=policy)
            mt.step(closure(model, batch(TASKS)))
            before = state(mt)
            bad = lambda tasks: {t: v * float("nan") for t, v in closure(model, batch(TASKS))(tasks).items()}  # noqa: B023, E731
            if policy == "raise":
                with pytest.raises(torchmto.NonFiniteError):
                    mt.step(bad)
            else:
                assert mt.step(bad).skipped
            assert same(state(mt), before)
            assert not mt.step(closure(model, batch(TASKS))).skipped


def test_schedulers_and_hooks():
    for method, per_step in (("gd", 1), ("pcgrad", 1), ("sequential", 3)):
        model = Toy(TASKS)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
        calls = []
        optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))  # noqa: B023
        optimizer.register_step_post_hook(lambda *_: calls.append("post"))  # noqa: B023
        mt = torchmto.MultiTask(model, optimizer, tasks=TASKS, method=method)
        for i in range(3):
            info = mt.step(closure(model, batch(TASKS)))
            assert optimizer.param_groups[0]["lr"] == 0.1 * 0.5**i
            scheduler.step()
        assert info.num_optimizer_steps == per_step
        assert calls == ["pre", "post"] * 3 * per_step


# ---------------------------------------------------------------------- noise


class Probe:
    """A method's place to look: runs extra forwards at the end of a step."""

    def __init__(self, mt, **options):
        self.seen = []
        inner = mt.method.step

        def step(problem):
            info = inner(problem)
            before = (torch.get_rng_state(), copy.deepcopy(dict(mt.network.model.named_buffers())))
            self.seen.append(problem.losses(**options))
            self.untouched = same(before, (torch.get_rng_state(), dict(mt.network.model.named_buffers())))
            return info

        mt.method.step = step
        mt.method.needs_losses_after = True


class Replacing(nn.Module):
    """A layer that replaces its buffer by a new tensor in every forward, and one that is large."""

    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("large", torch.zeros(200_000))
        self.register_buffer("nothing", None)

    def forward(self, x):
        self.count = self.count + 1
        self.large += 1
        return x


def noisy(norm="batch"):
    norms = {"batch": nn.BatchNorm1d(5), "split": nn.BatchNorm1d(5), "replacing": nn.Sequential(Replacing())}
    model = Toy(TASKS, norm=norms[norm], dropout=0.5)
    return split_norms(model, TASKS) if norm == "split" else model


@pytest.mark.parametrize("norm", ["batch", "split", "replacing"])
@pytest.mark.parametrize("method", ["gd", "pcgrad"])
def test_extra_forwards_leave_no_trace_and_replay_the_noise(method, norm):
    """With a learning rate of 0 the extra losses are those of the step, dropout included."""
    runs = []
    for probing in (False, True):
        torch.manual_seed(5)
        model, _, mt = make(method, model=noisy(norm), optimizer=lambda ps: torch.optim.SGD(ps, lr=0.0))
        if probing:
            probe = Probe(mt)
        for seed in range(2):
            info = mt.step(closure(model, batch(TASKS, seed=seed)))
            if probing:
                assert probe.untouched
                assert probe.seen[-1].raw.tolist() == list(info.losses.values())
        runs.append((dict(model.state_dict()), torch.get_rng_state()))
    assert same(*runs)


@pytest.mark.parametrize("norm", ["batch", "split", "replacing"])
def test_an_error_puts_every_kind_of_buffer_back(norm):
    model, _, mt = make("pcgrad", model=noisy(norm))
    data = closure(model, batch(TASKS))
    mt.step(data)
    before = state(mt)
    with pytest.raises(ZeroDivisionError):
        mt.step(lambda tasks: [data(tasks), 1 / 0])
    assert same(state(mt), before)
    mt.step(data)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("famo", {}),
        ("samo", {}),
        ("dwa", {}),
        ("stch", {}),
        ("task_groups", {"measure_last": True}),
        ("task_groups", {"noise_floor": True}),
    ],
)
@pytest.mark.parametrize("number", [1, 2])
def test_closures_may_differentiate_by_themselves(name, options, number):
    """As the losses of physics-informed networks do; in forwards without a backward, too."""

    def run(around):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(1, 8), nn.Dropout(0.2), nn.Tanh(), nn.Linear(8, 1)).double()
        mt = torchmto.MultiTask(
            model,
            torch.optim.SGD(model.parameters(), lr=0.1),
            tasks=["pde", "start"],
            method=torchmto.make_method(name, **options),
        )

        def losses(tasks):
            x = torch.rand(16, 1, dtype=torch.float64, requires_grad=True)
            with around():
                u = model(x)
                (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
                known = {"pde": (slope - u).square().mean(), "start": (model(0 * x) - 1).square().mean()}
            return {task: known[task] for task in tasks}

        infos = [mt.step([losses] * number) for _ in range(3)]
        return dict(model.state_dict()), [info.losses for info in infos]

    assert same(run(torch.enable_grad), run(contextlib.nullcontext))


def test_same_noise():
    """Off: every forward of a batch has its own dropout masks. On: all have the same; the next batch has others."""
    for same_noise in (False, True):
        torch.manual_seed(0)
        model, _, mt = make("sequential", model=noisy(), same_noise=same_noise)
        masks = []

        def losses(tasks):
            masks.append(model.dropout(torch.ones(64)))  # noqa: B023
            return closure(model, batch(TASKS))(tasks)  # noqa: B023

        mt.step(losses)
        mt.step(losses)
        first, second, third, fourth, *_ = masks
        assert same(first, second) == same_noise
        assert same(first, third) == same_noise
        assert not same(third, fourth)


def test_same_noise_per_micro_batch():
    torch.manual_seed(0)
    model, _, mt = make("sequential", model=noisy(), same_noise=True)
    masks = []

    def losses(tasks):
        masks.append(model.dropout(torch.ones(64)))
        return closure(model, batch(TASKS))(tasks)

    mt.step([losses, losses])
    assert len(masks) == 6
    assert same(masks[0], masks[2])
    assert same(masks[1], masks[5])
    assert not same(masks[0], masks[1])


@pytest.mark.parametrize("method", ["gd", "pcgrad", "uw", "rlw"])
def test_micro_batches_run_twice_see_the_same_noise_and_move_the_statistics_once(method):
    """Losses that weights depend on are read first, and every micro-batch is then run again."""
    if method not in torchmto.methods():
        pytest.skip(f"no {method}")
    for ready in (False, True):
        torch.manual_seed(3)
        model, _, mt = make(method, model=noisy(), optimizer=lambda ps: torch.optim.SGD(ps, lr=0.1))
        sources = [closure(model, batch(TASKS, seed=seed)) for seed in range(2)]
        mt.step([source(TASKS) for source in sources] if ready else sources)
        if not ready:
            reference = state(mt), torch.get_rng_state()
    assert same(reference[0]["model"]["trunk.1.running_mean"], state(mt)["model"]["trunk.1.running_mean"])
    torch.testing.assert_close(
        reference[0]["model"]["trunk.0.weight"], state(mt)["model"]["trunk.0.weight"], rtol=1e-10, atol=1e-12
    )
    assert same(reference[1], torch.get_rng_state())
    assert int(model.trunk[1].num_batches_tracked) == 2


def test_no_method_draws_from_the_global_generator():
    for name in ("pcgrad", "wpcgrad", "sequential", "task_groups", "connection_strength"):
        model, _, mt = make(name)
        before = torch.get_rng_state()
        mt.step(closure(model, batch(TASKS)))
        assert same(before, torch.get_rng_state()), name
