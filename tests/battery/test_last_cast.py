"""One battery for every registered method: what reaches the optimizer, and what becomes of a step that doesn't get there."""

import copy
import functools
import importlib
import warnings

import pytest
import torch
from torch import nn

import torchmto
from battery.table import ROWS, build
from torchmto.methods import GramianWeighting, method_class
from toy import Toy, batch, closure, flat, same, state

NAMES = [name for name in torchmto.methods() if name in ROWS]
GRAMIAN = [name for name in NAMES if issubclass(method_class(name), GramianWeighting)]
ENGINES = [(name, "parameters") for name in NAMES] + [
    (name, "layerwise") for name in GRAMIAN if name not in ("modo", "sdmgrad")
]
TASKS = ("a", "b", "c")

every = pytest.mark.parametrize("name", NAMES)
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture
def few_copies(monkeypatch):
    """States as large as the rows aren't copied to undo an error: here from a few elements on."""
    monkeypatch.setattr(importlib.import_module("torchmto.methods.method"), "SMALL", 10)


def start(name, model, *, parameters=None, lr=0.05, **options):
    optimizer = torch.optim.SGD(model.parameters() if parameters is None else parameters, lr=lr)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torchmto.MultiTask(model, optimizer, tasks=TASKS, method=build(name, len(TASKS)), seed=3, **options)


# ---------------------------------------------------------------------- an overflow after the rows


class Half(nn.Module):
    """One shared float16 parameter, whose gradients are constant and of one sign."""

    def __init__(self):
        super().__init__()
        self.theta = nn.Parameter(torch.ones(16, dtype=torch.float16))

    def losses(self, slope):
        def closure(tasks):
            total = self.theta.float().sum()
            return {task: slope * (1 + 0.01 * TASKS.index(task)) * total for task in tasks}

        return closure


@pytest.mark.parametrize("factor", [1.0, 1e4], ids=["sum", "weighted"])
@pytest.mark.parametrize(("policy", "clip"), [("raise", None), ("skip", 1.0)])
@every
def test_overflowing_combination(name, policy, clip, factor, few_copies):
    """Gradients of 3e4, whose sum (or that times the user's weights) float16 can't hold: nothing moves, nothing is learnt.

    Methods whose update is short whatever the gradients take the step.
    """
    runs = []
    for slopes in ([1.0, 3e4, 1.0], [1.0, 1.0]):
        model = Half()
        weights = dict.fromkeys(TASKS, factor)
        mt = start(name, model, lr=1e-6, on_nonfinite=policy, clip=clip, weights=weights if factor > 1 else None)
        for slope in slopes:
            before = state(mt)
            try:
                info = mt.step(model.losses(slope))
                left_out = info.num_optimizer_steps == 0
            except torchmto.NonFiniteError:
                assert policy == "raise"
                left_out = True
            assert flat(model).isfinite().all()
            if left_out:
                assert slope > 1
                assert same(state(mt), before)
            elif slope > 1:
                assert name not in ("gd", "pcgrad", "graddrop", "static")
                return
        runs.append(state(mt))
    assert same(*runs)


# ---------------------------------------------------------------------- complex parameters


class Spectral(nn.Module):
    """A complex trunk with a complex and real heads; or the same with pairs of reals as leaves."""

    def __init__(self, *, pairs):
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def leaf(*shape):
            value = 0.4 * torch.randn(*shape, dtype=torch.complex128, generator=generator)
            return nn.Parameter(torch.view_as_real(value).clone() if pairs else value)

        self.pairs = pairs
        # An odd number of reals first, so that complex columns begin at an odd place.
        self.bias = nn.Parameter(0.1 * torch.randn(5, dtype=torch.float64, generator=generator))
        self.trunk, self.gain = leaf(4, 5), leaf(5)
        self.heads = nn.ParameterDict({"a": leaf(5), "b": leaf(5)})
        self.heads["c"] = nn.Parameter(torch.randn(5, dtype=torch.float64, generator=generator))

    def losses(self, tasks):
        def of(leaf):
            return torch.view_as_complex(leaf) if self.pairs and leaf.shape[-1] == 2 else leaf

        x, targets = batch(TASKS)
        features = torch.fft.ifft(x.to(torch.complex128) @ of(self.trunk)) * of(self.gain).conj() + self.bias
        outs = {task: (features @ of(self.heads[task]).to(features)).real for task in tasks}
        return {task: (out - targets[task][:, 0]).square().mean() for task, out in outs.items()}


@pytest.mark.parametrize(("name", "engine"), ENGINES)
def test_complex_parameters(name, engine):
    """They move as the pairs of reals that they are."""
    runs = []
    for pairs in (False, True):
        model = Spectral(pairs=pairs)
        mt = start(name, model, clip=1.0, gradients=engine)
        infos = [mt.step(model.losses) for _ in range(3)]
        moved = torch.cat(
            [
                torch.view_as_real(p.detach()).flatten() if p.is_complex() else p.detach().flatten()
                for p in model.parameters()
            ]
        )
        runs.append((moved, infos[-1]))
    (moved, info), (reference, right) = runs
    torch.testing.assert_close(moved, reference, rtol=1e-9, atol=1e-11)
    if right.cosines is not None:
        torch.testing.assert_close(info.cosines, right.cosines, rtol=1e-7, atol=1e-9)


# ---------------------------------------------------------------------- interrupted between unscale and update


@pytest.mark.parametrize("error", [RuntimeError("once"), KeyboardInterrupt()], ids=["error", "interrupt"])
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaler"])
@every
def test_interrupted_step(name, scaled, error, few_copies):
    """A hook of the optimizer raises, the first or the third time: a step repeated after the first equals one undisturbed."""
    runs = []
    for disturbed in (False, True):
        model = Toy(TASKS)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0) if scaled else None
        mt = start(name, model, scaler=scaler)
        if disturbed:
            pending = [error]

            def raise_once(*_, pending=pending):
                if pending:
                    raise pending.pop()

            mt.network.optimizers.all[0].register_step_pre_hook(raise_once)
            before = state(mt)
            with pytest.raises(type(error)):
                mt.step(closure(model, batch(TASKS)))
            assert same({**state(mt), "scaler": None}, {**before, "scaler": None})
        for seed in (1, 2):
            mt.step(closure(model, batch(TASKS, seed=seed)))
        runs.append(state(mt))
    assert same(*runs)


# ---------------------------------------------------------------------- a group leaves the optimizer


@every
def test_state_after_a_group_left(name):
    """Gradual freezing: steps go on, the state is taken back by its own object and by a new one, and steps go on alike."""

    def run(reload):
        model = Toy(TASKS)
        upper = nn.Linear(5, 5).double()
        with torch.no_grad():
            upper.weight.copy_(0.3 * torch.eye(5))
            upper.bias.zero_()
        model.upper = upper

        def losses(seed):
            x, targets = batch(TASKS, seed=seed)

            def inner(tasks):
                features = model.upper(model.trunk(x)).tanh()
                return {t: (model.heads[t](features) - targets[t]).square().mean() for t in tasks}

            return inner

        parts = [model.trunk, upper, *model.heads.values()]
        mt = start(name, model, parameters=[{"params": list(part.parameters())} for part in parts])
        mt.step(losses(1))
        optimizer = mt.network.optimizers.all[0]
        for parameter in [*optimizer.param_groups.pop(0)["params"], *optimizer.param_groups.pop()["params"]]:
            parameter.requires_grad_(requires_grad=False)
        mt.step(losses(2))
        if reload == "itself":
            mt.load_state_dict(mt.state_dict())
        elif reload == "anew":
            kept = mt.state_dict()
            mt = start(name, model, parameters=[p for p in model.parameters() if p.requires_grad])
            mt.load_state_dict(kept)
        mt.step(losses(3))
        return flat(model)

    plain, itself, anew = run(""), run("itself"), run("anew")
    assert same(plain, itself)
    torch.testing.assert_close(anew, plain, rtol=1e-12, atol=0)


# ---------------------------------------------------------------------- the layout of gradients


class Turned(nn.Module):
    """Parameters whose dimensions lie in memory in another order, complex and looked-up ones among them, and one with gaps."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def leaf(*shape, dtype=torch.float64):
            return torch.randn(*shape, dtype=dtype, generator=generator) / 2

        self.matrix = nn.Parameter(leaf(5, 4).T)
        self.mask = nn.Parameter(leaf(1, 5, 3).permute(2, 0, 1))
        self.modes = nn.Parameter(leaf(3, 5, dtype=torch.complex128).T)
        self.table = nn.Parameter(leaf(5, 9).T)
        self.gaps = nn.Parameter(leaf(10)[::2])
        self.heads = nn.ParameterDict({task: nn.Parameter(leaf(2, 5).T) for task in TASKS})

    def forward(self, x, tasks):
        f = (x @ self.matrix).unsqueeze(1) * self.mask.sum(0) + (self.mask * self.gaps).sum((0, 1))
        f = f.squeeze(1) + nn.functional.embedding(torch.arange(len(x)), self.table, sparse=True)
        f = torch.view_as_real(f @ self.modes.real + 1j * (f @ self.modes.imag)).sum(2) @ self.modes.real.T
        return {task: (f.tanh().unsqueeze(2) * self.heads[task]).sin().sum((1, 2)).unsqueeze(1) for task in tasks}


@pytest.mark.parametrize(("name", "engine"), ENGINES)
def test_layout_of_gradients(name, engine):
    """Whatever optimizer takes them, fused ones too: as autograd lays out what it accumulates."""
    model = Turned()
    mt = start(name, model, gradients=engine)
    seen = set()

    def look(optimizer, *_):
        for parameter in optimizer.param_groups[0]["params"]:
            gradient = parameter.grad
            if gradient is not None and not gradient.is_sparse:
                seen.add(id(parameter))
                expected = parameter if parameter is not model.gaps else torch.empty(5)
                assert gradient.stride() == expected.stride()

    mt.network.optimizers.all[0].register_step_pre_hook(look)
    mt.step(closure(model, batch(TASKS)))
    look(mt.network.optimizers.all[0])
    assert len(seen) > 4


@pytest.mark.parametrize(("name", "engine"), ENGINES)
def test_gradients_that_got_other_memory(name, engine):
    """As `model.half(); model.float()` or `model.cpu(); model.cuda()` between steps leave them: a trainer may do with its
    `.grad` what it wants, the next step takes its own."""
    results = []
    for moves in (False, True):
        model = Toy(TASKS)
        mt = start(name, model, gradients=engine)
        losses = closure(model, batch(TASKS))
        for _ in range(2):
            mt.step(losses)
            for parameter in model.parameters():
                if moves and parameter.grad is not None:
                    parameter.grad.data = torch.full_like(parameter.grad, 7)
        mt.step(losses)
        results.append(flat(model))
    assert torch.equal(*results)


# ---------------------------------------------------------------------- hooks of parameters


@pytest.mark.parametrize(("name", "engine"), ENGINES)
def test_post_accumulate_hooks(name, engine):
    """They run once for every optimizer step that moves their parameter, and what they make of the gradient counts."""
    model = Toy(TASKS)
    hooked = {"trunk": model.trunk[0].weight, "head": model.heads["b"].weight}
    seen = {key: [] for key in hooked}
    for key, parameter in hooked.items():

        def hook(parameter, key=key):
            assert parameter.grad is not None
            seen[key].append(float(parameter.grad.abs().sum()))
            parameter.grad[:, 0] = 0

        parameter.register_post_accumulate_grad_hook(hook)
    mt = start(name, model, gradients=engine, clip=100.0, scaler=torch.amp.GradScaler("cpu", init_scale=2.0**10))
    before = {key: parameter.detach().clone() for key, parameter in hooked.items()}
    info = mt.step([closure(model, batch(TASKS, seed=seed)) for seed in (1, 2)])
    assert len(seen["trunk"]) == info.num_optimizer_steps
    assert len(seen["head"]) <= 1
    for key, parameter in hooked.items():
        moved = parameter.detach() - before[key]
        assert not moved[:, 0].any()
        assert moved[:, 1:].any() == any(seen[key])


@pytest.mark.parametrize(("name", "engine"), ENGINES)
def test_tensor_hooks(name, engine):
    """A mask by a tensor hook holds for every method, though it sees one gradient or one per task."""
    model = Toy(TASKS)
    mask = torch.ones(5, 4, dtype=torch.float64)
    mask[:, 0] = 0
    weight = model.trunk[0].weight
    weight.register_hook(lambda gradient: gradient * mask)
    before = weight.detach().clone()
    mt = start(name, model, gradients=engine)
    mt.step(closure(model, batch(TASKS)))
    moved = weight.detach() - before
    assert not moved[:, 0].any()
    assert moved[:, 1:].any()


# ---------------------------------------------------------------------- reused weights


@pytest.mark.parametrize("name", GRAMIAN)
def test_a_resumed_run_records_what_the_whole_one_does(name):
    """Also in steps that reuse the weights of one before the break."""
    options = {**ROWS[name].options(len(TASKS)), "refresh_every": 3}
    try:
        torchmto.make_method(name, **options)
    except TypeError:
        pytest.skip("computes its weights in every step")
    runs = []
    for broken in (False, True):
        model = Toy(TASKS)
        records = []
        kept = None
        for seed in range(6):
            if kept is None or (broken and seed == 2):
                optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
                mt = torchmto.MultiTask(model, optimizer, tasks=TASKS, method=torchmto.make_method(name, **options))
                mt.load_state_dict(kept or mt.state_dict())
            records.append(dict(mt.step(closure(model, batch(TASKS, seed=seed))).records))
            kept = mt.state_dict()
        runs.append((flat(model), records))
    assert same(*runs)


# ---------------------------------------------------------------------- weightings in front


@every
def test_forwards_of_a_weighting_in_front_are_counted(name):
    model = Toy(TASKS)
    mt = start(name, model, weights="famo")
    inner, calls = closure(model, batch(TASKS)), []
    info = mt.step(lambda tasks: calls.append(tasks) or inner(tasks))
    assert info.num_forward == len(calls) == build(name, len(TASKS)).cost(len(TASKS)).num_forward + 1


@pytest.mark.parametrize("name", [n for n in NAMES if method_class(n).family != "loss weighting"])
def test_si_in_front_is_the_method_on_the_log_losses(name):
    """Wherever it takes gradients, also where parameters are moved before."""
    if method_class(name).properties.uses_losses:
        pytest.skip("it sees other losses")
    runs = []
    for weights in (None, "si"):
        model = Toy(TASKS)
        mt = start(name, model, weights=weights)
        if not getattr(mt.method, "only_weighs", True):
            pytest.skip("its second derivatives take the weights in front as constants")

        def losses(tasks, model=model, logs=weights is None, seed=0):
            values = closure(model, batch(TASKS, seed=seed))(tasks)
            # Positive, as some methods want losses.
            return {task: loss.log() + 20 for task, loss in values.items()} if logs else values

        for seed in range(3):
            mt.step(functools.partial(losses, seed=seed))
        runs.append(flat(model))
    torch.testing.assert_close(*runs, rtol=1e-7, atol=1e-9)


# ---------------------------------------------------------------------- a layer frozen in mid run


def memories(kept, parameters):
    """The states with a column for every entry of the shared parameters, and those with one for every parameter."""
    width = sum(p.numel() for p in parameters)
    tensors = [entry for entry in kept["method_state"].values() if isinstance(entry, torch.Tensor) and entry.dim() == 2]
    return [t for t in tensors if t.shape[1] == width], [t for t in tensors if t.shape[1] == len(parameters)]


@pytest.mark.parametrize("how", ["frozen", "left"])
@every
def test_a_frozen_layer_has_no_say(name, how):
    """What is remembered of it decides nothing while it isn't trained, and stays as it was until it is trained again."""
    model = Toy(TASKS)
    weight, bias = model.trunk[0].weight, model.trunk[0].bias
    mt = start(name, model, parameters=[{"params": [weight]}, {"params": [bias, *model.heads.parameters()]}])
    for seed in range(4):
        mt.step(closure(model, batch(TASKS, seed=seed)))
    optimizer = mt.network.optimizers.all[0]
    group = optimizer.param_groups[0]
    if how == "frozen":
        weight.requires_grad_(requires_grad=False)
    else:
        optimizer.param_groups.remove(group)
    before, shared = copy.deepcopy(model.state_dict()), [weight, bias]
    place = mt.network.roles.layout.index("trunk.0.weight") if mt.network.roles.layout else 0
    own = slice(0, weight.numel()) if place == 0 else slice(bias.numel(), None)
    outcomes, kept = [], mt.state_dict()
    for factor in (1.0, 1e3):
        model.load_state_dict(before)
        for memory in memories(kept, shared)[0]:
            memory[:, own] *= factor
        held = [[t.clone() for t in tensors] for tensors in memories(kept, shared)]
        mt.load_state_dict(kept)
        for seed in (5, 6):
            mt.step(closure(model, batch(TASKS, seed=seed)))
        outcomes.append(flat(model))
        entries, counts = memories(mt.state_dict(), shared)
        assert same([t[:, own] for t in entries], [t[:, own] for t in held[0]])
        assert same([t[:, place] for t in counts], [t[:, place] for t in held[1]])
    assert same(*outcomes)
    assert same(weight.detach(), before["trunk.0.weight"])
    if how == "frozen":
        weight.requires_grad_(requires_grad=True)
    else:
        optimizer.param_groups.append(group)
    mt.step(closure(model, batch(TASKS, seed=7)))
    assert not same(weight.detach(), before["trunk.0.weight"])
