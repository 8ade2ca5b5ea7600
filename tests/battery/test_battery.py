"""One battery for every registered method: what it declares, and what every method must do."""

import copy
import functools
import itertools
import re
import warnings

import pytest
import torch
from torch import nn

import torchmto
from battery.table import ROWS, build
from torchmto.methods import LossWeighting, method_class
from torchmto.solvers import min_norm
from toy import Toy, batch, closure, flat, inner, reentrant, same, state

NAMES = [name for name in torchmto.methods() if name in ROWS]
TASKS = ("a", "b", "c")

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def every(test):
    """Run a test on every method; skip where its row says so."""

    @functools.wraps(test)
    def run(name, *args, **kwargs):
        reason = ROWS[name].skip.get(test.__name__.removeprefix("test_"))
        if reason is not None:
            pytest.skip(reason)
        test(name, *args, **kwargs)

    return pytest.mark.parametrize("name", NAMES)(run)


def start(name, model=None, *, tasks=TASKS, optimizer=None, **options):
    model = Toy(tasks) if model is None else model
    make = optimizer or (lambda ps: torch.optim.SGD(ps, lr=0.05, momentum=0.9))
    made = make(model.parameters())
    return model, torchmto.MultiTask(model, made, tasks=tasks, method=build(name, len(tasks)), **options)


def properties(name):
    return method_class(name).properties


class Vector(nn.Module):
    """A single shared parameter."""

    def __init__(self, size, dtype=torch.float64):
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(size, dtype=dtype))


def linear(model, directions, constants=None):
    """Losses with the given constant gradients."""
    names = [f"t{i}" for i in range(len(directions))]

    def losses(tasks):
        values = directions @ model.theta + (2.0 if constants is None else constants)
        return {t: values[names.index(t)] for t in tasks}

    return losses


def names_of(count):
    return tuple(f"t{i}" for i in range(count))


def one_update(name, directions, constants=None, steps=1):
    """How far a few steps of learning rate 1 move the vector, from constant gradients."""
    model = Vector(directions.shape[1], directions.dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    tasks = names_of(len(directions))
    mt = torchmto.MultiTask(model, optimizer, tasks=tasks, method=build(name, len(tasks)))
    info = None
    for _ in range(steps):
        info = mt.step(linear(model, directions, constants))
    return model.theta.detach(), info


def random_directions(count, size=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, size, generator=generator, dtype=torch.float64)


# ---------------------------------------------------------------------- what a method declares


@every
def test_cost(name):
    """The declared cost is what StepInfo counts."""
    model, mt = start(name)
    declared = mt.method.cost(len(TASKS))
    for seed in range(3):
        info = mt.step(closure(model, batch(TASKS, seed=seed)))
        counted = (info.num_forward, info.num_backward, info.num_optimizer_steps)
        assert counted == (declared.num_forward, declared.num_backward, declared.num_optimizer_steps)


@every
def test_homogeneity(name):
    """Losses times s: the first update times s to the declared degree."""
    degree = properties(name).homogeneity
    if degree is None:
        pytest.skip("not homogeneous")

    def update(scale):
        model = Toy(TASKS)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        mt = torchmto.MultiTask(model, optimizer, tasks=TASKS, method=build(name, len(TASKS)))
        inner = closure(model, batch(TASKS))
        mt.step(lambda tasks: {t: loss * scale for t, loss in inner(tasks).items()})
        return torch.cat([p.grad.flatten() for p in model.trunk.parameters()])

    reference = update(1.0)
    for scale in (1e-8, 1e8):
        torch.testing.assert_close(
            update(scale) / scale**degree, reference, rtol=1e-5, atol=1e-7 * float(reference.norm())
        )


@every
def test_equivariance(name):
    """Naming the tasks in another order changes nothing."""
    if not properties(name).equivariant:
        pytest.skip("not equivariant")
    runs = []
    for order in (TASKS, ("c", "a", "b")):
        model, mt = start(name, Toy(TASKS), tasks=TASKS) if order == TASKS else (None, None)
        if model is None:
            model = Toy(TASKS)
            mt = torchmto.MultiTask(
                model,
                torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
                tasks=order,
                method=build(name, len(TASKS)),
            )
        for seed in range(3):
            mt.step(closure(model, batch(TASKS, seed=seed)))
        runs.append(flat(model))
    torch.testing.assert_close(*runs, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@every
def test_identity(name, optimizer):
    """One task is plain training, bit for bit."""
    if not properties(name).identity:
        pytest.skip("not the identity")
    make = {
        "sgd": lambda ps: torch.optim.SGD(ps, lr=0.05, momentum=0.9, weight_decay=0.01),
        "adam": lambda ps: torch.optim.Adam(ps, lr=0.01),
    }[optimizer]
    model, mt = start(name, Toy("a"), tasks=("a",), optimizer=make)
    plain = Toy("a")
    reference = make(plain.parameters())
    for seed in range(4):
        mt.step(closure(model, batch("a", seed=seed)))
        reference.zero_grad()
        closure(plain, batch("a", seed=seed))(("a",))["a"].backward()
        reference.step()
    assert same(flat(model), flat(plain))


def quadratics(num_tasks, seed=0, size=3):
    """Strictly convex quadratics with minima at different points; losses are at least 0.5."""
    generator = torch.Generator().manual_seed(seed)
    centres = 2 * torch.randn(num_tasks, size, generator=generator, dtype=torch.float64)
    curvatures = 0.3 + torch.rand(num_tasks, size, generator=generator, dtype=torch.float64)
    return centres, curvatures


@pytest.mark.parametrize("num_tasks", [2, 3])
@every
def test_pareto(name, num_tasks):
    """On convex quadratics the smallest convex combination of the gradients vanishes."""
    if not properties(name).pareto:
        pytest.skip("doesn't promise it")
    centres, curvatures = quadratics(num_tasks)
    model = Vector(3)
    with torch.no_grad():
        model.theta += 4
    tasks = names_of(num_tasks)
    steps = ROWS[name].steps
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    mt = torchmto.MultiTask(model, optimizer, tasks=tasks, method=build(name, num_tasks), clip=5.0)

    def losses(wanted):
        values = (curvatures * (model.theta - centres).square()).sum(1) / 2 + 0.5
        return {t: values[tasks.index(t)] for t in wanted}

    def stationarity():
        rows = curvatures * (model.theta.detach() - centres)
        gramian = (rows @ rows.T).numpy()
        weights = min_norm(gramian).weights
        return max(0.0, float(weights @ gramian @ weights)) ** 0.5

    first = stationarity()
    for i in range(steps):
        optimizer.param_groups[0]["lr"] = 0.2 * (1 - i / steps)
        mt.step(losses)
    assert stationarity() < 0.02 * first


@every
def test_nonconflicting(name):
    if not properties(name).nonconflicting:
        pytest.skip("doesn't promise it")
    for seed in range(5):
        for count, size in ((2, 3), (4, 3), (5, 8)):
            directions = random_directions(count, size, seed)
            moved, _ = one_update(name, directions)
            products = directions @ -moved
            assert float(products.min()) >= -1e-6 * float(moved.norm() * directions.norm(dim=1).max())


# ---------------------------------------------------------------------- what every method must do


def odd_gradients():
    base = random_directions(3)
    zero, duplicate, huge, opposite = base.clone(), base.clone(), base.clone(), base.clone()
    zero[1] = 0
    duplicate[2] = duplicate[0]
    huge[0] *= 1e8
    opposite[1] = -opposite[0]
    return {
        "identical": base[:1].repeat(3, 1),
        "zero": zero,
        "duplicate": duplicate,
        "huge": huge,
        "tiny": base * 1e-12,
        "opposite": opposite,
        "all zero": torch.zeros(3, 6, dtype=torch.float64),
        "rank one": base[:1] * torch.tensor([[1.0], [-2.0], [3.0]], dtype=torch.float64),
    }


@pytest.mark.parametrize("case", list(odd_gradients()))
@every
def test_odd_gradients(name, case):
    """Identical, zero, duplicate, opposite, huge and tiny gradients give finite updates."""
    directions = odd_gradients()[case]
    model = Vector(6)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    mt = torchmto.MultiTask(model, optimizer, tasks=names_of(3), method=build(name, 3))
    for _ in range(3):
        info = mt.step(linear(model, directions))
        gradient = torch.zeros(6).double() if model.theta.grad is None else model.theta.grad
        assert not info.skipped
        assert gradient.isfinite().all()
        assert not model.theta.any()
        assert info.weights is None or all(abs(w) < float("inf") for w in info.weights.values())
    if case == "all zero":
        assert not gradient.any()
    if case == "identical" and gradient.any() and "one direction" not in ROWS[name].skip:
        cosine = float(gradient @ directions[0] / (gradient.norm() * directions[0].norm()))
        assert abs(cosine) == pytest.approx(1.0), "no other direction than theirs"


@every
def test_dtypes(name):
    """float32 beside bfloat16; dtypes and devices are kept."""
    model = Toy(TASKS, dtype=torch.float32)
    model.heads["a"].to(torch.bfloat16)
    model.trunk[0].bias.data = model.trunk[0].bias.data.to(torch.bfloat16)
    x, targets = batch(TASKS, dtype=torch.float32)

    def losses(tasks):
        features = (x @ model.trunk[0].weight.T + model.trunk[0].bias.float()).tanh()
        outputs = {t: model.heads[t](features.to(model.heads[t].weight.dtype)) for t in tasks}
        return {t: (y - targets[t].to(y.dtype)).square().mean() for t, y in outputs.items()}

    kinds = {n: (p.dtype, p.device) for n, p in model.named_parameters()}
    _, mt = start(name, model)
    for _ in range(2):
        mt.step(losses)
    assert {n: (p.dtype, p.device) for n, p in model.named_parameters()} == kinds
    assert all(p.grad is None or p.grad.dtype == p.dtype for p in model.parameters())
    assert flat(model).isfinite().all()


@every
def test_micro_batches(name):
    """Parts of a batch, equal ones or unequal ones with counts, equal the batch."""
    x, targets = batch(TASKS)

    def part(model, chosen, *, count):
        return closure(model, (x[chosen], {t: y[chosen] for t, y in targets.items()}), count=count)

    runs = []
    for cuts in ((), (4,), (3,)):
        model, mt = start(name)
        bounds = [0, *cuts, 8]
        pieces = [slice(a, b) for a, b in itertools.pairwise(bounds)]
        sources = [part(model, piece, count=cuts == (3,)) for piece in pieces]
        for _ in range(3):
            mt.step(sources if cuts else sources[0])
        runs.append(flat(model))
    torch.testing.assert_close(runs[1], runs[0], rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(runs[2], runs[0], rtol=1e-6, atol=1e-8)


@every
def test_scaler(name):
    """The scale makes no difference."""
    runs = []
    for scale in (1.0, 2.0**10):
        model, mt = start(name, scaler=torch.amp.GradScaler("cpu", init_scale=scale))
        for seed in range(3):
            assert not mt.step(closure(model, batch(TASKS, seed=seed))).skipped
        runs.append(flat(model))
    torch.testing.assert_close(*runs, rtol=1e-9, atol=1e-12)


@every
def test_missing_tasks(name):
    """Every subset of the tasks, the first batch with one task only; heads of absent tasks stay as they are."""
    model, mt = start(name, optimizer=lambda ps: torch.optim.Adam(ps, lr=0.01))
    for step, present in enumerate(["b", "ab", "abc", "c", "ac", "abc", "bc", "a", "abc"]):
        before = {t: flat(model.heads[t]) for t in TASKS}
        data = batch(TASKS, seed=step)
        if step % 2:
            info = mt.step(closure(model, data, only=tuple(present)))
        else:
            info = mt.step(closure(model, data), tasks=tuple(present))
        assert list(info.losses) == list(present)
        assert info.weights is None or list(info.weights) == list(present)
        assert all(torch.equal(before[task], flat(model.heads[task])) for task in TASKS if task not in present)
        assert any(not torch.equal(before[task], flat(model.heads[task])) for task in present)
    assert flat(model).isfinite().all()


@every
def test_frozen_trunk(name):
    """A trunk frozen in the first steps: the heads are trained, or refused with the cause. Set free, the trunk is shared."""
    model, mt = start(name)
    model.trunk.requires_grad_(False)
    for seed in range(2):
        before, trunk, everything = state(mt), flat(model.trunk), flat(model)
        refusal = ""
        try:
            mt.step(closure(model, batch(TASKS, seed=seed)))
        except ValueError as error:
            refusal = str(error)
        assert same(flat(model.trunk), trunk)
        if refusal:
            assert re.search("share no parameters.*frozen", refusal)
            assert mt.method.cost(len(TASKS)).num_backward >= len(TASKS), "what needs no task's gradient needs no trunk"
            assert same(state(mt), before)
        else:
            assert not same(flat(model), everything)
    model.trunk.requires_grad_(True)
    for seed in range(2):
        mt.step(closure(model, batch(TASKS, seed=seed)))
    assert set(mt.network.roles.layout) == {"trunk.0.weight", "trunk.0.bias"}
    assert flat(model).isfinite().all()
    assert not same(flat(model.trunk), trunk)


@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize("kind", [reentrant, inner])
@every
def test_inner_backward(name, kind, steps):
    """Parameters that a backward of its own would train are noticed, in the first step and later."""
    model, mt = start(name)
    for _ in range(steps):
        mt.step(closure(model, batch(TASKS)))
    x, targets = batch(TASKS)

    def losses(tasks):
        features = kind(model.trunk, x.clone().requires_grad_())
        return {t: (model.heads[t](features) - targets[t]).square().mean() for t in tasks}

    before = state(mt)
    with pytest.raises(ValueError, match="reentrant checkpoint"):
        mt.step(losses)
    assert same(state(mt), before)


@every
def test_no_global_randomness(name):
    """Random choices come from the method's own generator: global state is left alone, and doesn't matter."""
    runs = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model, mt = start(name)
        before = torch.get_rng_state()
        for step in range(2):
            mt.step(closure(model, batch(TASKS, seed=step)))
        assert same(before, torch.get_rng_state())
        runs.append(flat(model))
    assert same(*runs)


@every
def test_seed(name):
    """The same seed gives the same run."""
    runs = []
    for _ in range(2):
        model, mt = start(name, seed=7)
        for step in range(2):
            mt.step(closure(model, batch(TASKS, seed=step)))
        runs.append(flat(model))
    assert same(*runs)


def bad_closures(model):
    data = closure(model, batch(TASKS))

    def nan(tasks):
        return {t: loss * float("nan") for t, loss in data(tasks).items()}

    def gradient(tasks):
        return {t: loss + (loss - loss.detach()).sqrt() * 0 for t, loss in data(tasks).items()}

    def graph(tasks):
        return {t: loss.detach() for t, loss in data(tasks).items()}

    def unknown(tasks):
        return {**data(tasks), "x": torch.zeros(())}

    def broken(tasks):
        data(tasks)
        raise KeyError("broken")

    return [nan, gradient, graph, unknown, broken]


@pytest.mark.parametrize("policy", ["raise", "skip"])
@every
def test_errors(name, policy):
    """After a bad batch everything, norm statistics included, is as before, and so are the next steps."""
    runs = []
    for bad in (True, False):
        model, mt = start(name, Toy(TASKS, norm=nn.BatchNorm1d(5)), on_nonfinite=policy)
        mt.step(closure(model, batch(TASKS)))
        before = state(mt)
        for number, source in enumerate(bad_closures(model) if bad else []):
            if policy == "skip" and number < 2:
                info = mt.step(source)
                assert info.skipped
                assert info.num_optimizer_steps == 0
            else:
                with pytest.raises((ValueError, KeyError)):
                    mt.step(source)
            assert same(state(mt), before)
        for seed in range(2):
            mt.step(closure(model, batch(TASKS, seed=seed)))
        runs.append(state(mt))
    assert same(*runs)


@pytest.mark.parametrize("num_tasks", [20, 40, 100])
@every
def test_many_tasks(name, num_tasks):
    directions = random_directions(num_tasks, 32)
    moved, info = one_update(name, directions)
    assert moved.isfinite().all()
    assert len(info.losses) == num_tasks


@every
def test_ready_losses(name):
    """They work wherever one forward is enough, and equal a closure."""
    model, mt = start(name)
    if mt.method.repeats:
        with pytest.raises(ValueError, match="closure"):
            mt.step(closure(model, batch(TASKS))(TASKS))
        return
    other, reference = start(name)
    for seed in range(2):
        mt.step(closure(model, batch(TASKS, seed=seed))(TASKS))
        reference.step(closure(other, batch(TASKS, seed=seed)))
    assert same(flat(model), flat(other))


@every
def test_split_norms_and_reports(name):
    """Task-specific norms, windows and reports, in any order."""
    model = torchmto.structure.split_norms(Toy(TASKS, norm=nn.BatchNorm1d(5)), TASKS).double()
    _, mt = start(name, model)
    for seed in range(4):
        info = mt.step(closure(model, batch(TASKS, seed=seed)))
        mt.report({"a": 0.3, "c": 0.6})
        mt.end_window()
    assert list(info.losses) == list(TASKS)
    assert flat(model).isfinite().all()


@every
def test_composition_with_loss_weights(name):
    """Any loss weighting may scale the losses of any method."""
    model, mt = start(name, weights="uw")
    for seed in range(2):
        info = mt.step(closure(model, batch(TASKS, seed=seed)))
    assert flat(model).isfinite().all()
    assert list(info.losses) == list(TASKS)


@every
def test_state_of_another_method_is_refused(name):
    """With a clear message, and without a change."""
    other = "gd" if name != "gd" else "rlw"
    _, foreign = start(other)
    model, mt = start(name)
    mt.step(closure(model, batch(TASKS)))
    before = state(mt)
    with pytest.raises(ValueError, match="saved state has method"):
        mt.load_state_dict(foreign.state_dict())
    assert same(state(mt), before)


@every
def test_state_survives_a_copy(name):
    """state_dict is a copy, and loading it into a new MultiTask goes on bit for bit."""
    model, mt = start(name)
    for seed in range(2):
        mt.step(closure(model, batch(TASKS, seed=seed)))
    kept = mt.state_dict()
    frozen = copy.deepcopy(kept)
    clone, again = start(name)
    clone.load_state_dict(model.state_dict())
    again.network.optimizers.all[0].load_state_dict(copy.deepcopy(mt.network.optimizers.all[0].state_dict()))
    again.load_state_dict(kept)
    mt.step(closure(model, batch(TASKS)))
    assert same(kept, frozen)
    again.step(closure(clone, batch(TASKS)))
    assert same(state(mt), state(again))


def test_loss_weightings_are_cheap():
    """Loss weightings take one backward, whatever the number of tasks."""
    for name in NAMES:
        cls = method_class(name)
        if issubclass(cls, LossWeighting):
            assert cls(**ROWS[name].options(3)).cost(7).num_backward == 1


def test_warnings_come_once():
    """A method may warn in its first step, not in the next ones."""
    for name in NAMES:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model, mt = start(name)
            mt.step(closure(model, batch(TASKS)))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            mt.step(closure(model, batch(TASKS)))
