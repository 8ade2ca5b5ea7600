"""Which parameters are shared, and parameters: tied, frozen, grouped, laid out, compiled, checkpointed, wrapped."""

import contextlib
import copy
import shutil

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._functorch import config as functorch_config
from torch._inductor import config as inductor_config
from torch.utils.checkpoint import checkpoint

import torchmto
from torchmto.gradients import choice
from torchmto.structure import split_norms
from toy import Toy, batch, closure, flat, make, same

TASKS = ("a", "b", "c")
GRADIENT_METHODS = ("pcgrad", "wpcgrad")


def naive_rows(model, losses, shared):
    """J by one autograd call per task."""
    rows = []
    for loss in losses.values():
        grads = torch.autograd.grad(loss, shared, retain_graph=True, allow_unused=True)
        rows.append(
            torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(shared, grads, strict=True)])
        )
    return torch.stack(rows)


def capture(mt):
    """The rows and losses of the next steps, as the method sees them."""
    seen = []
    inner = mt.method.weights

    def weights(gramian, losses=None, indices=None):
        seen.append((gramian.clone(), mt.network.rows[0].matrix.clone()))
        return inner(gramian, losses, indices)

    mt.method.weights = weights
    return seen


def layout(mt):
    return mt.state_dict()["roles"]["layout"]


def test_rows_are_the_tasks_gradients():
    model, _, mt = make("pcgrad")
    seen = capture(mt)
    shared = list(model.trunk.parameters())
    expected = naive_rows(model, closure(model, batch(TASKS))(TASKS), shared)
    mt.step(closure(model, batch(TASKS)))
    gramian, rows = seen[0]
    torch.testing.assert_close(rows, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(gramian, expected @ expected.T, rtol=1e-12, atol=1e-14)
    assert layout(mt) == ["trunk.0.weight", "trunk.0.bias"]


def test_shared_given():
    """What is given alone is shared: the trunk's bias becomes everybody's head, and gets the sum."""
    model = Toy(TASKS)
    _, _, mt = make("wpcgrad", model=model, shared=(p for p in [model.trunk[0].weight]))
    losses = closure(model, batch(TASKS))(TASKS)
    expected = torch.autograd.grad(sum(losses.values()), model.trunk[0].bias)[0]
    mt.step(closure(model, batch(TASKS)))
    assert layout(mt) == ["trunk.0.weight"]
    torch.testing.assert_close(model.trunk[0].bias.grad, expected)


def test_a_parameter_outside_the_optimizer_gets_no_gradient():
    model = Toy(TASKS)
    optimizer = torch.optim.SGD([*model.trunk.parameters(), *model.heads["a"].parameters()], lr=0.1)
    for method in ("gd", "pcgrad", "sequential"):
        mt = torchmto.MultiTask(model, optimizer, tasks=TASKS, method=method)
        before = copy.deepcopy(model.heads["b"].state_dict())
        mt.step(closure(model, batch(TASKS)))
        assert same(dict(before), dict(model.heads["b"].state_dict()))
        assert model.heads["b"].weight.grad is None


def test_tied_parameters():
    """A head's weight that is the trunk's: one parameter, shared, counted once."""

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.trunk = nn.Linear(4, 4)
            self.heads = nn.ModuleDict({t: nn.Linear(4, 4) for t in TASKS})
            self.heads["a"].weight = self.trunk.weight
            self.double()

        def forward(self, x, tasks):
            return {t: self.heads[t](self.trunk(x).tanh()).sum(1, keepdim=True) for t in tasks}

    model = Tied()
    mt = torchmto.MultiTask(model, torch.optim.SGD(model.parameters(), lr=0.1), tasks=TASKS, method="pcgrad")
    seen = capture(mt)
    expected = naive_rows(model, closure(model, batch(TASKS))(TASKS), [model.trunk.weight, model.trunk.bias])
    mt.step(closure(model, batch(TASKS)))
    torch.testing.assert_close(seen[0][1], expected)


def test_frozen_parameters_and_frozen_in_between():
    for method in ("gd", "pcgrad", "sequential"):
        model = Toy(TASKS)
        model.trunk[0].bias.requires_grad_(False)
        _, _, mt = make(method, model=model, optimizer=lambda ps: torch.optim.Adam(ps, lr=0.01))
        data = closure(model, batch(TASKS))
        mt.step(data)
        assert model.trunk[0].bias.grad is None
        model.trunk[0].bias.requires_grad_(True)
        before = flat(model.trunk)
        mt.step(data)
        assert not torch.equal(flat(model.trunk)[-5:], before[-5:])
        model.trunk[0].weight.requires_grad_(False)
        model.heads["a"].weight.requires_grad_(False)
        weight, head = model.trunk[0].weight.clone(), model.heads["a"].weight.clone()
        mt.step(data)
        assert torch.equal(model.trunk[0].weight, weight)
        assert torch.equal(model.heads["a"].weight, head)
        assert model.trunk[0].weight.grad is None
        model.trunk[0].weight.requires_grad_(True)
        mt.step(data)
        assert not torch.equal(model.trunk[0].weight, weight)


def test_param_groups_and_add_param_group():
    for method in ("gd", "pcgrad", "sequential"):
        model = Toy(TASKS)
        optimizer = torch.optim.SGD(
            [{"params": model.heads["c"].parameters(), "lr": 0.0}, {"params": model.trunk[0].weight}], lr=0.1
        )
        mt = torchmto.MultiTask(model, optimizer, tasks=TASKS, method=method)
        start = copy.deepcopy(dict(model.state_dict()))
        mt.step(closure(model, batch(TASKS)))
        moved = {k for k, v in model.state_dict().items() if not torch.equal(v, start[k])}
        assert moved == {"trunk.0.weight"}
        optimizer.add_param_group({"params": [model.trunk[0].bias, *model.heads["a"].parameters()]})
        mt.step(closure(model, batch(TASKS)))
        moved = {k for k, v in model.state_dict().items() if not torch.equal(v, start[k])}
        assert moved == {"trunk.0.weight", "trunk.0.bias", "heads.a.weight", "heads.a.bias"}
        if method == "pcgrad":
            assert set(layout(mt)) == {"trunk.0.weight", "trunk.0.bias"}


def test_a_parameter_that_becomes_shared_in_mid_run():
    """From then on it has columns; the step in which it happens is already right."""
    model, _, mt = make("pcgrad")
    seen = capture(mt)
    data = batch(TASKS)
    mt.step(closure(model, data))
    assert "heads.a.weight" not in layout(mt)

    def crossing(tasks):
        losses = closure(model, data)(tasks)
        if "c" in losses:
            losses["c"] = losses["c"] + model(data[0], ["a"])["a"].square().mean()
        return losses

    shared = [*model.trunk.parameters(), *model.heads["a"].parameters()]
    expected = naive_rows(model, crossing(TASKS), shared)
    mt.step(crossing)
    assert layout(mt)[:2] == ["trunk.0.weight", "trunk.0.bias"]
    assert set(layout(mt)[2:]) == {"heads.a.weight", "heads.a.bias"}
    torch.testing.assert_close(seen[1][0], expected @ expected.T)
    mt.step(closure(model, data))
    assert seen[2][1].shape == expected.shape


class Conv(nn.Module):
    """Convolutions, for memory formats."""

    def __init__(self, tasks=TASKS):
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Conv2d(3, 4, 3)
        self.heads = nn.ModuleDict({t: nn.Conv2d(4, 1, 3) for t in tasks})
        self.double()

    def forward(self, x, tasks):
        return {t: self.heads[t](self.trunk(x).tanh()).mean((2, 3)) for t in tasks}


def images():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 3, 6, 6, generator=generator, dtype=torch.float64)
    return x, {t: torch.randn(4, 1, generator=generator, dtype=torch.float64) * (i + 1) for i, t in enumerate(TASKS)}


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("method", ["gd", "pcgrad", "sequential"])
def test_channels_last_and_transposed_parameters(method, late):
    """The layout of parameters, at the start or changed later, doesn't matter."""
    runs = []
    for changed in (False, True):
        model = Conv()
        x, targets = images()
        if changed and not late:
            model.to(memory_format=torch.channels_last)
        mt = torchmto.MultiTask(model, torch.optim.Adam(model.parameters(), lr=0.01), tasks=TASKS, method=method)
        mt.step(closure(model, (x, targets)))
        if changed and late:
            model.to(memory_format=torch.channels_last)
            assert not model.trunk.weight.is_contiguous()
        for _ in range(2):
            mt.step(closure(model, (x, targets)))
        if method == "pcgrad":
            view = mt.network.rows[0].view(model.trunk.weight)
            columns = mt.network.rows[0].slices[mt.network.rows[0].position[id(model.trunk.weight)]]
            rows = naive_rows(model, closure(model, (x, targets))(TASKS), [model.trunk.weight])
            mt.step(closure(model, (x, targets)))
            # The step's combination was written over the first row.
            torch.testing.assert_close(
                mt.network.rows[0].view(model.trunk.weight)[1:], rows.view(3, *model.trunk.weight.shape)[1:]
            )
            assert view.shape[1:] == model.trunk.weight.shape
            assert columns.stop - columns.start == model.trunk.weight.numel()
        runs.append(flat(model))
    torch.testing.assert_close(*runs, rtol=1e-10, atol=1e-12)


class Product(nn.Module):
    """Two products with matrices [in, out], as `transformers.pytorch_utils.Conv1D` takes them."""

    def __init__(self, wide, added):
        super().__init__()
        self.added = added
        self.first, self.second = nn.Parameter(torch.randn(32, wide) / 6), nn.Parameter(torch.randn(wide, 32) / wide)
        self.bias = nn.Parameter(torch.zeros(wide))

    def forward(self, x):
        h = torch.addmm(self.bias, x.flatten(1), self.first) if self.added else x.flatten(1) @ self.first + self.bias
        return h.tanh() @ self.second


def kernels(wide):
    """Convolutions, channels last, and one with a kernel of a single place."""
    layers = (
        nn.Conv2d(2, wide, 3),
        nn.Tanh(),
        nn.Conv2d(wide, wide, 2),
        nn.Tanh(),
        nn.Conv2d(wide, 32, 1),
        nn.Flatten(),
    )
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)


class Turned(nn.Module):
    """A head whose matrix lies in memory column by column, and whose mask has its dimensions in another order."""

    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(6, 32).T)
        self.mask = nn.Parameter(torch.randn(2, 3, 4).permute(2, 0, 1))

    def forward(self, f):
        return ((f @ self.matrix).view(-1, 1, 2, 3) * self.mask).tanh().mean((1, 2, 3))


TRUNKS = {
    "product": lambda wide: Product(wide, added=False),
    "sum and product": lambda wide: Product(wide, added=True),
    "convolutions": kernels,
    "lookups": lambda wide: nn.Sequential(nn.Embedding(30 * wide, 32), Pool()),
}


class Pool(nn.Module):
    def forward(self, x):
        return x.mean(1)


def strides(tensor):
    """Those that matter: of dimensions with more than one place."""
    return [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]


ENGINES = ("parameters", "layerwise", "representation", "mixed", "batched")


@pytest.mark.parametrize("kind", TRUNKS)
@pytest.mark.parametrize("engine", [*ENGINES, "weighted", "accumulated"])
def test_gradients_are_laid_out_as_fused_optimizers_take_them(engine, kind, monkeypatch):
    """A fused kernel goes through parameter and gradient from beginning to end, whatever their strides say."""
    if engine in ("mixed", "batched"):
        call, launch = (0, 0) if engine == "mixed" else (1e30, 1)
        monkeypatch.setattr(choice, "CPU", choice.Costs(0, call, 0, 0, launch, 0, 0))
        monkeypatch.setattr(choice, "FEW", 0)
        monkeypatch.setattr(choice, "LIVE", 0)

    def built():
        torch.manual_seed(0)
        trunk = TRUNKS[kind](128)
        if kind == "lookups":
            trunk[0].weight = nn.Parameter(trunk[0].weight.detach().T.contiguous().T)
        return nn.ModuleDict({"trunk": trunk, **{task: Turned() for task in TASKS}}).double()

    x = torch.randint(100, (2, 3)) if kind == "lookups" else torch.randn(2, 2, 4, 4, dtype=torch.float64)

    def losses(model):
        def closure(tasks):
            f = model["trunk"](x.to(memory_format=torch.channels_last) if kind == "convolutions" else x)
            return {t: (model[t](f) - TASKS.index(t)).square().mean() for t in tasks}

        return closure

    fused = [torch.optim.AdamW, torch.optim.SGD]
    if torch.get_default_device().type == "cpu":
        fused.append(torch.optim.Adagrad)
    for kind_of_optimizer in fused:
        plain, model = built(), built()
        made, other = (kind_of_optimizer(m.parameters(), lr=0.01, fused=True) for m in (plain, model))
        summed = engine in ("weighted", "accumulated")
        method = "gd" if summed else torchmto.make_method("constant", weights=[1.0] * len(TASKS))
        options = {"features": model["trunk"]} if engine == "representation" else {}
        gradients = "auto" if engine in ("mixed", "batched") or summed else engine
        mt = torchmto.MultiTask(model, other, tasks=TASKS, method=method, gradients=gradients, **options)
        for _ in range(3):
            made.zero_grad()
            sum(losses(plain)(TASKS).values()).backward()
            made.step()
            if engine == "accumulated":
                mt.backward(losses(model), final=False)
                mt.backward(losses(model))
                other.step()
            else:
                info = mt.step(losses(model))
                assert info.engine == (None if summed else "mixed" if engine == "batched" else engine)
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            assert strides(p.grad) == strides(q.grad) == strides(p)
            torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


def test_parameters_of_strange_memory():
    """A transposed parameter, one of a single element, an empty one and a scalar."""

    class Strange(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.transposed = nn.Parameter(torch.randn(4, 3).double().T)
            self.scalar = nn.Parameter(torch.ones(()).double())
            self.one = nn.Parameter(torch.ones(1, 1).double())
            self.empty = nn.Parameter(torch.zeros(0, 3).double())
            self.strided = nn.Parameter(torch.randn(6, 4).double()[::2])

        def forward(self, x, tasks):
            features = x @ (self.transposed.T @ (self.transposed + self.strided))
            extra = self.empty.sum()
            return {
                t: (features * (i + 1)).sin().sum(1, keepdim=True) * self.scalar + self.one * i + extra
                for i, t in enumerate(tasks)
            }

    for method in ("gd", "pcgrad", "sequential"):
        model = Strange()
        mt = torchmto.MultiTask(
            model, torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9), tasks=TASKS, method=method, clip=1.0
        )
        for _ in range(2):
            mt.step(closure(model, batch(TASKS)))
        assert torch.isfinite(flat(model)).all()
        if method == "pcgrad":
            shared = [mt.network.model.get_parameter(name) for name in layout(mt)]
            expected = naive_rows(model, closure(model, batch(TASKS))(TASKS), shared)
            seen = capture(mt)
            mt.step(closure(model, batch(TASKS)))
            torch.testing.assert_close(seen[0][0], expected @ expected.T)


@pytest.mark.parametrize("method", ["gd", "pcgrad", "wpcgrad", "sequential"])
def test_moving_the_model_to_another_dtype_in_mid_run(method):
    model, _, mt = make(method, model=Toy(TASKS, dtype=torch.float32))
    mt.step(closure(model, batch(TASKS, dtype=torch.float32)))
    model.double()
    mt.step(closure(model, batch(TASKS)))
    assert model.trunk[0].weight.dtype == torch.float64
    if method == "pcgrad":
        rows = naive_rows(model, closure(model, batch(TASKS))(TASKS), list(model.trunk.parameters()))
        seen = capture(mt)
        mt.step(closure(model, batch(TASKS)))
        torch.testing.assert_close(seen[0][1], rows, rtol=1e-12, atol=1e-14)


@pytest.mark.skipif(not hasattr(torch.empty(0), "grad_dtype"), reason="an older PyTorch")
@pytest.mark.parametrize("options", [{"method": "gd"}, {"clip": 0.1}, {"gradients": "layerwise"}], ids=str)
def test_gradients_of_another_type_than_their_parameters(options):
    """bfloat16 parameters whose gradients are to be in float32."""
    model = Toy(TASKS, dtype=torch.bfloat16)
    for parameter in model.parameters():
        parameter.grad_dtype = torch.float32
    _, _, mt = make(**{"method": "pcgrad", **options}, model=model)
    mt.backward(closure(model, batch(TASKS, dtype=torch.bfloat16)))
    assert {parameter.grad.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("method", ["gd", "pcgrad", "wpcgrad", "sequential"])
def test_bfloat16_parameters_beside_float32_ones(method):
    model = Toy(TASKS, dtype=torch.float32)
    model.heads["a"].to(torch.bfloat16)
    model.trunk[0].bias.data = model.trunk[0].bias.data.to(torch.bfloat16)

    def losses(tasks):
        x, targets = batch(TASKS, dtype=torch.float32)
        features = (x @ model.trunk[0].weight.T + model.trunk[0].bias.float()).tanh()
        result = {}
        for task in tasks:
            head = model.heads[task]
            out = head(features.to(head.weight.dtype))
            result[task] = (out - targets[task].to(out.dtype)).square().mean()
        return result

    _, _, mt = make(method, model=model, clip=1.0)
    for _ in range(3):
        info = mt.step(losses)
    assert info.num_optimizer_steps >= 1
    assert model.heads["a"].weight.grad is None or model.heads["a"].weight.grad.dtype == torch.bfloat16
    assert {p.dtype for p in model.parameters()} == {torch.float32, torch.bfloat16}
    assert torch.isfinite(flat(model)).all()


# ---------------------------------------------------------------------- sparse


def embedded(method, *, sparse, optimizer=torch.optim.SGD, number=1, **options):
    """Two tasks on a shared embedding, one of them on an embedding of its own, too; after two steps."""
    torch.manual_seed(0)
    model = nn.ModuleDict({name: nn.Embedding(6, 3, sparse=sparse) for name in ("shared", "own")}).double()
    ids = torch.tensor([0, 1, 1, 3])

    def losses(tasks):
        vectors = {"a": model["shared"](ids), "b": model["shared"](ids) + model["own"](ids)}
        return {t: (vectors[t] - 1).square().mean() for t in tasks}

    mt = torchmto.MultiTask(
        model, optimizer(model.parameters(), lr=0.1), tasks=("a", "b"), method=torchmto.make_method(method), **options
    )
    for _ in range(2):
        mt.step([losses] * number)
    return model, mt, losses


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("gd", {}),
        ("uw", {"clip": 0.01}),
        ("pcgrad", {"clip": 0.01}),
        ("mgda", {"gradients": "layerwise"}),
        ("sequential", {}),
    ],
)
def test_sparse_gradients(method, options, number):
    """The optimizer gets them as they are from loss weightings, made dense from others; the update is the same."""
    model, _, _ = embedded(method, sparse=True, number=number, **options)
    expected, _, _ = embedded(method, sparse=False, number=number, **options)
    torch.testing.assert_close(flat(model), flat(expected), rtol=1e-12, atol=1e-14)
    assert model["own"].weight.grad.is_sparse == (method in ("gd", "uw"))


def test_sparse_gradients_are_checked_and_sparse_adam_gets_them():
    model, mt, losses = embedded("gd", sparse=True, optimizer=torch.optim.SparseAdam)
    before = flat(model)
    # The root's gradient at 0 is infinite, and 0 times that is NaN, while the loss is finite.
    bad = {t: loss + (loss - loss.detach()).sqrt() * 0 for t, loss in losses(("a", "b")).items()}
    with pytest.raises(torchmto.NonFiniteError, match="gradient"):
        mt.step(bad)
    assert same(flat(model), before)
    mt.step(losses)
    assert not same(flat(model), before)


# ---------------------------------------------------------------------- compiled, checkpointed, wrapped


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("method", ["gd", "pcgrad", "sequential"])
def test_a_compiled_model(method, shared, fresh_compiler):
    """Roles come from one eager probe; other tasks' heads keep no gradient, so Adam leaves them alone."""
    runs = []
    for compiled in (False, True):
        model = Toy(TASKS, norm=nn.BatchNorm1d(5))
        run = torch.compile(model, backend="aot_eager") if compiled else model
        x, targets = batch(TASKS)

        def losses(tasks):
            outputs = run(x)  # noqa: B023 - all heads run, whatever is asked
            return {t: (outputs[t] - targets[t]).square().mean() for t in tasks if t != "b" or step}  # noqa: B023

        mt = torchmto.MultiTask(
            run,
            torch.optim.Adam(model.parameters(), lr=0.01),
            tasks=TASKS,
            method=method,
            shared=list(model.trunk.parameters()) if shared else None,
        )
        for step in range(3):
            mt.step(losses)
            if step == 0:
                assert model.heads["b"].weight.grad is None
                kept = mt.state_dict()
        assert layout(mt) == ["trunk.0.weight", "trunk.0.bias", "trunk.1.weight", "trunk.1.bias"]
        mt.load_state_dict(kept)
        mt.step(losses)
        runs.append((flat(model), dict(model.named_buffers())))
    torch.testing.assert_close(runs[0][0], runs[1][0], rtol=1e-9, atol=1e-10)
    for name, buffer in runs[0][1].items():
        torch.testing.assert_close(buffer, runs[1][1][name])


class Scaled(nn.Module):
    """Tables and masks that the backward needs, and a number of calls that the forward changes."""

    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.arange(5.0).cos())
        self.register_buffer("mask", torch.tensor([True, False, True, True, True]))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return torch.where(self.mask, x * self.table * self.calls, x)


@pytest.mark.parametrize("kind", ["norm in evaluation mode", "tables", "norm in training mode"])
@pytest.mark.parametrize("method", ["gd", "constant"])
def test_buffers_that_a_compiled_backward_needs(method, kind, fresh_compiler):
    """The one eager forward changes nothing of what the compiled one has saved: as plain PyTorch trains it."""
    runs = []
    for plain in (False, True):
        norm = Scaled() if kind == "tables" else nn.BatchNorm1d(5).train(kind == "norm in training mode")
        model = Toy(TASKS, norm=norm)
        run = torch.compile(model, backend="aot_eager")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        x, targets = batch(TASKS)

        def losses(tasks):
            outputs = run(x)  # noqa: B023 - called at once
            return {t: (outputs[t] - targets[t]).square().mean() for t in tasks}  # noqa: B023 - called at once

        hp = {"weights": [1.0] * len(TASKS)} if method == "constant" else {}
        mt = torchmto.MultiTask(run, optimizer, tasks=TASKS, method=torchmto.make_method(method, **hp))
        for _ in range(2):
            if plain:
                optimizer.zero_grad()
                sum(losses(TASKS).values()).backward()
                optimizer.step()
            else:
                mt.step(losses)
        runs.append((flat(model), dict(model.named_buffers())))
    torch.testing.assert_close(*runs, rtol=1e-9, atol=1e-10)


def test_ready_losses_of_a_compiled_model_need_shared(fresh_compiler):
    model = Toy(TASKS)
    run = torch.compile(model, backend="aot_eager")
    _, _, mt = make("pcgrad", model=model)
    x, targets = batch(TASKS)

    def losses():
        outputs = run(x)
        return {t: (outputs[t] - targets[t]).square().mean() for t in TASKS}

    with pytest.raises(ValueError, match=r"compiled.*`shared=`"):
        mt.step(losses())
    _, _, mt = make("pcgrad", model=model, shared=model.trunk.parameters())
    assert mt.step(losses()).num_optimizer_steps == 1


class Growing(nn.Module):
    """Layers that may be left out, and adapters of which each task's head may have any, or none."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first = nn.Linear(4, 5)
            self.layers = nn.ModuleList([nn.Linear(5, 5) for _ in range(3)])
            self.adapters = nn.ModuleDict({t: nn.Linear(5, 5) for t in TASKS})
            self.heads = nn.ModuleDict({t: nn.Linear(5, 1) for t in TASKS})
        self.double()
        self.layers_on = ()
        self.adapter_of = {}

    def trunk(self, x):
        x = torch.tanh(self.first(x))
        for place in self.layers_on:
            x = x + torch.tanh(self.layers[place](x))
        return x

    def forward(self, x):
        features = self.trunk(x)
        outputs = {}
        for t in TASKS:
            own = features
            if t in self.adapter_of:
                own = features + self.adapters[self.adapter_of[t]](features)
            outputs[t] = self.heads[t](own)
        return outputs


def squared_error(output, target):
    return (output - target).square().mean()


COMPILED_PARTS = ("model", "trunk", "loss", "head")


def growing_run(part, method, *, ready=False, tasks=(TASKS,), later=None, learns=None, **options):
    """The parameters and roles after steps that switch layers and adapters on, with a part of the model compiled or none."""
    model = Growing()
    x, targets = batch(TASKS)
    run, error = model, squared_error
    compiled = {"backend": "aot_eager"}
    if part == "model":
        run = torch.compile(model, **compiled)
    elif part == "trunk":
        model.trunk = torch.compile(model.trunk, **compiled)
    elif part == "loss":
        error = torch.compile(squared_error, **compiled)
    elif part == "head":
        model.heads["b"].forward = torch.compile(model.heads["b"].forward, **compiled)

    def losses(wanted):
        outputs = run(x)
        return {t: error(outputs[t], targets[t]) for t in wanted if t in present}

    hp = {"weights": [2.0, 1.0, 0.5]} if method == "constant" else {}
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    mt = torchmto.MultiTask(model, optimizer, tasks=TASKS, method=torchmto.make_method(method, **hp), seed=0, **options)
    steps = [((0,), {}), ((0,), {}), ((1,), {}), ((0, 1, 2), {"a": "a"}), ((0, 2), {"a": "a", "b": "a"})]
    steps += [((1, 2), {"a": "a", "b": "a", "c": "c"}), ((0, 1), dict.fromkeys(TASKS, "a"))]
    for number, (on, adapters) in enumerate(steps):
        model.layers_on, model.adapter_of = on, adapters
        present = tasks[number % len(tasks)]
        mt.step(losses(present) if ready and number else losses)
    return model, mt, optimizer


@pytest.mark.parametrize("part", COMPILED_PARTS)
@pytest.mark.parametrize(
    "method", ["gd", "uw", "sequential", "constant", "pcgrad parameters", "pcgrad layerwise", "pcgrad auto"]
)
@pytest.mark.parametrize("tasks", [(TASKS,), (("a",), ("b", "c"), TASKS)])
def test_what_a_compiled_model_runs_only_later(part, method, tasks, fresh_compiler, monkeypatch):
    """Layers and adapters that are switched on later are trained, and shared once a second task reads them."""
    monkeypatch.setattr(choice, "FEW", 0)
    method, *engine = method.split()
    options = {"gradients": engine[0]} if engine else {}
    eager, told, states = growing_run(None, method, tasks=tasks, **options)
    model, mt, optimizer = growing_run(part, method, tasks=tasks, **options)
    torch.testing.assert_close(flat(model), flat(eager), rtol=1e-9, atol=1e-10)
    if method in ("constant", "pcgrad"):
        # Those with one backward needn't know which tasks share what is shared.
        assert same(mt.state_dict()["roles"]["reached"], told.state_dict()["roles"]["reached"])
    # Nor does any parameter have momentum, or a gradient, that hasn't in eager mode.
    assert [p in optimizer.state for p in model.parameters()] == [p in states.state for p in eager.parameters()]


@pytest.mark.parametrize("part", ["trunk", "loss", "head"])
@pytest.mark.parametrize("method", ["gd", "pcgrad"])
def test_ready_losses_of_what_a_compiled_model_runs_only_later(part, method, fresh_compiler):
    """Regions of one output hide nothing: what leads to them leads to their inputs."""
    eager, _, _ = growing_run(None, method)
    model, _, _ = growing_run(part, method, ready=True)
    torch.testing.assert_close(flat(model), flat(eager), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("method", ["gd", "pcgrad"])
def test_ready_losses_that_hide_who_reads_a_new_layer(method, fresh_compiler):
    """Where no closure can tell, nothing is left untrained in silence."""
    with pytest.raises(ValueError, match=r"compiled.*`shared=`"):
        growing_run("model", method, ready=True)


def test_a_compiled_model_is_run_again_only_for_what_is_new(fresh_compiler):
    """Not for other batches, nor for tasks without labels in them."""
    model = Growing()
    run = torch.compile(model, backend="aot_eager")
    calls = []

    def losses(wanted):
        calls.append(wanted)
        outputs = run(x)
        return {t: squared_error(outputs[t], targets[t]) for t in wanted}

    mt = torchmto.MultiTask(model, torch.optim.SGD(model.parameters(), lr=0.1), tasks=TASKS, method="pcgrad")
    for on, tasks, more in (
        ((0,), "a", 1),
        ((0,), "a", 0),
        ((0,), "bc", 1),
        ((0,), "abc", 0),
        ((0,), "ac", 0),
        ((1,), "abc", 1),
        ((1,), "ab", 0),
        ((0,), "abc", 0),
        ((1,), "ac", 0),
    ):
        x, targets = batch(TASKS, seed=len(calls))
        model.layers_on = on
        calls.clear()
        mt.step(losses, tasks=tuple(tasks))
        assert len(calls) == 1 + more, (on, tasks)


@pytest.mark.parametrize("method", ["gd", "pcgrad", "sequential"])
def test_checkpointing_with_split_norms(method):
    """The forward that runs again inside the backward must use the same task's norms."""
    runs = []
    for checkpointed in (False, True):
        model = split_norms(Toy(TASKS, norm=nn.BatchNorm1d(5)), TASKS).double()
        with torch.no_grad():
            for i, task in enumerate(TASKS):
                model.get_parameter(f"trunk.1.{task}.weight").fill_(i + 1.0)
        if checkpointed:
            trunk = model.trunk
            inner = trunk.forward
            trunk.forward = lambda x, inner=inner: checkpoint(inner, x.requires_grad_(), use_reentrant=False)
        options = {"refresh_every": 2, "heads": "unit"} if method == "pcgrad" else {}
        mt = torchmto.MultiTask(
            model,
            torch.optim.Adam(model.parameters(), lr=0.01),
            tasks=TASKS,
            method=torchmto.make_method(method, **options),
        )
        data = batch(TASKS)
        for step in range(4):
            mt.step(closure(model, (data[0].clone(), data[1])))
            if step == 2:
                mt.step([closure(model, (data[0][:4].clone(), {t: y[:4] for t, y in data[1].items()}))] * 2)
        runs.append(flat(model))
    torch.testing.assert_close(*runs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"gradients": "layerwise"}], ids=str)
def test_checkpointing_moves_statistics_once(options):
    """However many tasks run the checkpointed part again: as without checkpoints, in ready micro-batches too."""
    runs = []
    for checkpointed in (False, True):
        model = Toy(TASKS, norm=nn.BatchNorm1d(5))
        if checkpointed:
            inner = model.trunk.forward
            model.trunk.forward = lambda x, inner=inner: checkpoint(inner, x, use_reentrant=False)
        _, _, mt = make("pcgrad", model=model, **options)
        mt.step(closure(model, batch(TASKS)))
        mt.step([closure(model, batch(TASKS, seed=seed))(TASKS) for seed in (2, 3)])
        runs.append(model.state_dict())
    torch.testing.assert_close(*runs, rtol=1e-9, atol=1e-12)


class Remembers(nn.Module):
    """A buffer that every forward changes, in place or by a new one, of any size."""

    def __init__(self, size, replaced):
        super().__init__()
        self.replaced = replaced
        self.register_buffer("kept", torch.zeros(size))

    def forward(self, x):
        if self.replaced:
            self.kept = self.kept + 1
        else:
            self.kept += 1
        return x


@pytest.mark.parametrize("options", [{}, {"gradients": "layerwise"}], ids=str)
@pytest.mark.parametrize("size", [3, 200_000])
@pytest.mark.parametrize("replaced", [False, True])
def test_checkpointing_moves_buffers_of_any_size_once(size, replaced, options):
    model = Toy(TASKS, norm=Remembers(size, replaced))
    inner = model.trunk.forward
    model.trunk.forward = lambda x: checkpoint(inner, x, use_reentrant=False)
    _, _, mt = make("pcgrad", model=model, **options)
    for number in range(1, 4):
        mt.step(closure(model, batch(TASKS)))
        assert model.trunk[1].kept.eq(number).all()


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("method", ["gd", "pcgrad", "sequential", "task_groups"])
def test_distributed_data_parallel(method, one_process):
    """The wrapper, with or without being given to MultiTask, changes nothing."""
    runs = []
    for wrap, give in ((False, False), (True, True), (True, False)):
        model = Toy(TASKS, norm=nn.BatchNorm1d(5))
        wrapper = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True) if wrap else model
        mt = torchmto.MultiTask(
            wrapper if give else model,
            torch.optim.SGD(model.parameters(), lr=0.05),
            tasks=TASKS,
            method=method,
            process_group=dist.group.WORLD,
        )
        for seed in range(3):
            mt.step(closure(wrapper, batch(TASKS, seed=seed), only=("a", "c") if seed == 1 else TASKS))
        assert not torchmto.make_method(method).needs_closure or mt.network.ranks.size == 1
        if not torchmto.make_method(method).needs_closure:
            mt.step(closure(wrapper, batch(TASKS))(TASKS))
        runs.append(flat(model))
    assert same(runs[0], runs[1])
    assert same(runs[0], runs[2])


def test_a_compiled_model_whose_first_batch_has_one_task(fresh_compiler):
    """That batch needs one backward, after which a compiled backward may give its buffers away: the next ones mustn't fail."""
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 8), nn.Softmax(1), nn.Linear(8, 3)).double()
    run = torch.compile(trunk, backend="aot_eager")
    x, targets = batch(TASKS)

    def losses(tasks):
        out = run(x)
        return {t: (out[:, i : i + 1] - targets[t]).square().mean() for i, t in enumerate(TASKS) if t in tasks}

    mt = torchmto.MultiTask(run, torch.optim.SGD(trunk.parameters(), lr=0.1), tasks=TASKS, method="pcgrad")
    mt.step(losses, tasks=["b"])
    assert mt.step(losses).num_backward == 3


class Sines(nn.Module):
    """A region whose compiled backward writes over what the forward has saved, if it may."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 16)])

    def forward(self, x):
        for layer in self.layers:
            x = torch.sin(layer(x))
        return x


def gramians_after(first):
    """The Gramian of two tasks in eager mode, and with the same model compiled, after it was run by something else."""
    gramians = []
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    for compiled in (False, True):
        model = Sines()
        run = torch.compile(model) if compiled else model

        def losses(tasks):
            out = run(x)  # noqa: B023 - called at once
            return {t: (out[:, i] - i).square().mean() for i, t in enumerate(tasks)}

        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)

        def multi_task(method):
            return torchmto.MultiTask(run, optimizer, tasks=("a", "b"), method=method)  # noqa: B023 - called at once

        if first == "plain":
            sum(losses(("a", "b")).values()).backward()
            optimizer.zero_grad()
        elif first is not None:
            multi_task(first).step(losses)
        mt = multi_task("pcgrad")
        seen = capture(mt)
        mt.step(losses)
        gramians.append(seen[0][0])
    return gramians


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles C++, and there is no compiler")
def test_a_graph_compiled_for_one_backward_never_serves_several(fresh_compiler, tmp_path, monkeypatch):
    """Neither the one in memory nor the one on disk, where what several processes have compiled meets."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    tags = torch.compiler.config
    with inductor_config.patch(compile_threads=1), tags.patch(cache_key_tag="mine"):
        refused = pytest.raises(ValueError, match=r"torch\.compiler\.reset\(\)")
        with refused if torch.get_default_device().type == "cpu" else contextlib.nullcontext():
            gramians_after("plain")
        for first in (None, "gd"):
            torch.compiler.reset()
            eager, compiled = gramians_after(first)
            torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-9)
        assert tags.cache_key_tag == "mine"
        assert functorch_config.donated_buffer


@pytest.mark.parametrize("shared", [False, True])
def test_parameters_are_laid_out_in_the_models_order(shared):
    """However the optimizer or `shared=` lists them, as sets do in every process; those outside the model come last."""
    layouts = []
    for turned in (False, True):
        model = Toy(("a", "b", "c"))
        outside = [nn.Parameter(torch.zeros((), dtype=torch.float64))]
        given = [*model.parameters(), *outside]
        optimizer = torch.optim.SGD(given[::-1] if turned else given, lr=0.1)
        trunk = list(model.trunk.parameters())
        options = {"shared": trunk[::-1] if turned else trunk} if shared else {}
        mt = torchmto.MultiTask(model, optimizer, tasks=("a", "b", "c"), method="graddrop", seed=0, **options)
        mt.step(closure(model, batch(("a", "b", "c"))))
        *inside, last = mt.network.names()
        assert inside == [name for name, _ in model.named_parameters()]
        assert last.startswith("param_groups")
        layouts.append((mt.state_dict()["roles"]["layout"], flat(model).tolist()))
    assert layouts[0] == layouts[1]
