"""The engines without a gradient matrix against the one with it, on models of many kinds."""

import gc
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import torchmto
from torchmto.gradients.choice import Auto
from torchmto.gradients.engine import Piece, Wanted
from torchmto.gradients.factors import find_factors
from torchmto.gradients.graph import cut, read_graph
from torchmto.gradients.layerwise import Layerwise
from torchmto.gradients.ranks import Ranks
from torchmto.gradients.torch_private import hooked
from torchmto.structure import split_norms
from toy import Toy, batch, closure, flat, make

K = 3


@dataclass
class Sample:
    """Shared parameters, heads and a closure."""

    model: nn.Module
    losses: Callable[[tuple[str, ...]], dict[str, Tensor]]


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        ctx.variable = x.detach()  # as leaves call their tensor
        return x * scale

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.scale, None


def _sample(model: nn.Module, outputs: Callable[[], list[Tensor]]) -> Sample:
    """K losses on the outputs: the outputs' own, repeated with other losses if there are fewer."""

    def losses(tasks: tuple[str, ...]) -> dict[str, Tensor]:
        found = outputs()
        result = {}
        for task in tasks:
            index = int(task[1:])
            value = found[index % len(found)]
            result[task] = (value - 0.3 * (index + 1)).square().mean() + 0.1 * index * value.sin().sum()
        return result

    return Sample(model, losses)


def chain() -> Sample:
    model = nn.ModuleList([nn.Sequential(*[nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(5)])])
    heads = nn.ModuleList([nn.Linear(6, 2) for _ in range(K)])
    model.append(heads)
    x = torch.randn(7, 6)

    def outputs() -> list[Tensor]:
        h = model[0](x)
        return [head(h) for head in heads]

    return _sample(model, outputs)


def residual() -> Sample:
    model = nn.Sequential(*[Residual(6) for _ in range(4)])
    x = torch.randn(7, 6)
    return _sample(model, lambda: [model(x)])


def checkpointed() -> Sample:
    model = nn.Sequential(*[Residual(6) for _ in range(4)])
    x = torch.randn(7, 6)

    def outputs() -> list[Tensor]:
        h = x
        for block in model:
            h = checkpoint(block, h, use_reentrant=False)
        return [h]

    return _sample(model, outputs)


def several_scales() -> Sample:
    blocks, head = nn.ModuleList([Residual(6) for _ in range(4)]), nn.Linear(18, 3)
    x = torch.randn(7, 6)

    def outputs() -> list[Tensor]:
        maps = [x]
        for block in blocks:
            maps.append(block(maps[-1]))
        return [head(torch.cat([maps[1], maps[2], maps[4]], 1)), maps[2], head(torch.cat([maps[3]] * 3, 1))]

    return _sample(nn.ModuleList([blocks, head]), outputs)


def convolutions() -> Sample:
    """A U-net with batch norms, a transposed convolution and skip connections, channels last."""
    model = nn.ModuleDict(
        {
            "one": nn.Conv2d(3, 4, 3, padding=1),
            "two": nn.Conv2d(4, 4, 3, padding=1, stride=2, groups=2),
            "up": nn.ConvTranspose2d(4, 4, 2, 2),
            "out": nn.Conv2d(8, 2, 1),
            "norm": nn.BatchNorm2d(4),
        }
    ).to(memory_format=torch.channels_last)
    image = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)

    def outputs() -> list[Tensor]:
        wide = model["norm"](model["one"](image)).relu()
        narrow = model["two"](wide).relu()
        return [model["out"](torch.cat([model["up"](narrow), wide], 1)), narrow]

    return _sample(model, outputs)


def tied() -> Sample:
    """A transformer whose embedding is its last layer as well."""
    embedding = nn.Embedding(11, 8)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=True)
    encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
    tokens = torch.randint(0, 11, (2, 5))

    def outputs() -> list[Tensor]:
        hidden = encoder(embedding(tokens))
        return [hidden @ embedding.weight.T, hidden]

    return _sample(nn.ModuleList([embedding, encoder]), outputs)


def recurrent() -> Sample:
    model = nn.GRU(4, 4, 2, batch_first=True)
    x = torch.randn(2, 3, 4)

    def outputs() -> list[Tensor]:
        sequence, last = model(x)
        first, second = sequence.chunk(2, -1)
        return [first * second, last, first]

    return _sample(model, outputs)


def unknown() -> Sample:
    """Operations of the user's own, bare parameters, and one that is used three times."""
    scale, shift = nn.Parameter(torch.randn(5)), nn.Parameter(torch.randn(()))
    linear = nn.Linear(5, 5)
    x = torch.randn(4, 5)

    def outputs() -> list[Tensor]:
        h = Doubled.apply(linear(x) * scale, 2.0) + shift
        h = linear(h.sin()) * scale
        return [linear(h) + shift, h, h.cos()]

    model = nn.ModuleList([linear, nn.ParameterList([scale, shift])])
    return _sample(model, outputs)


def one_forward_per_task() -> Sample:
    """Every task runs the trunk itself, so that the tasks' graphs have only the parameters in common."""
    model = nn.Sequential(*[Residual(6) for _ in range(3)])
    batches = torch.randn(K, 7, 6)

    def losses(tasks: tuple[str, ...]) -> dict[str, Tensor]:
        # The loss of one task comes before the forward of the next.
        return {
            task: (model(x) - 0.3 * i).square().mean() for i, (task, x) in enumerate(zip(tasks, batches, strict=True))
        }

    return Sample(model, losses)


def lookups() -> Sample:
    """Embeddings with padding, with a frequency scale, and larger than what is looked up; matrices used from the left side."""
    words, scaled = nn.Embedding(60, 6, padding_idx=2), nn.Embedding(60, 6, scale_grad_by_freq=True)
    mixing = nn.Parameter(torch.randn(30, 40))
    up = nn.Linear(6, 30, bias=False)
    tokens = torch.tensor([[2, 5, 5, 9], [1, 2, 5, 59]])

    def outputs() -> list[Tensor]:
        hidden = up(words(tokens) + scaled(tokens)).tanh()
        flat = hidden.view(8, 30) @ mixing
        return [flat, torch.addmm(flat, hidden.view(8, 30), mixing[:, :40] * 0.5, alpha=0.3), hidden]

    return _sample(nn.ModuleList([words, scaled, up, nn.ParameterList([mixing])]), outputs)


def wide() -> Sample:
    """Matrices on few samples, one of which the task `t1` alone uses."""
    model = nn.Sequential(nn.Linear(40, 50), nn.Tanh(), nn.Linear(50, 60), nn.Tanh())
    own, bare = nn.Linear(60, 70), nn.Parameter(torch.randn(60, 70))
    x = torch.randn(3, 40)

    def outputs() -> list[Tensor]:
        h = model(x)
        return [h, own(h), h.cos() @ bare]

    return _sample(nn.ModuleList([model, own, nn.ParameterList([bare])]), outputs)


def deep_convolutions() -> Sample:
    """Few positions, many inputs: kernels with strides, paddings and dilations of all kinds."""
    model = nn.Sequential(
        nn.Conv2d(8, 10, 3, stride=2, padding=1),
        nn.SiLU(),
        nn.Conv2d(10, 12, (3, 2), padding=(2, 1), dilation=(2, 1), bias=False),
        nn.GroupNorm(2, 12),
        nn.LeakyReLU(),
        nn.Conv2d(12, 14, 2),
        nn.Flatten(),
    )
    images = torch.randn(1, 8, 4, 4)
    return _sample(model, lambda: [model(images)])


def one_number_for_all_dimensions() -> Sample:
    """Convolutions of all kinds whose geometry is kept as one number."""
    flat = nn.Sequential(
        nn.Conv2d(8, 10, 2, padding="valid"), nn.SiLU(), nn.Conv2d(10, 12, 2, padding="valid", bias=False)
    )
    solid, line = nn.Conv3d(1, 3, 2, padding="valid"), nn.Conv1d(3, 4, 3, padding="valid")
    strided, turned = nn.Parameter(torch.randn(9, 12, 2, 2)), nn.Parameter(torch.randn(9, 6, 2, 2))
    grouped = nn.Parameter(torch.randn(6, 3, 1, 1))
    images = torch.randn(1, 8, 4, 4)

    def outputs() -> list[Tensor]:
        h = functional.conv2d(flat(images), strided, stride=[2], padding=[1], dilation=[1])
        h = functional.conv_transpose2d(h.tanh(), turned, stride=[2], padding=[0], output_padding=[1], dilation=[1])
        h = functional.conv2d(h, grouped, padding=[0], groups=2)
        h = solid(h.unsqueeze(1)).flatten(2)
        return [line(h).sin()]

    return _sample(nn.ModuleList([flat, solid, line, nn.ParameterList([strided, turned, grouped])]), outputs)


def _hooked(sample: Sample) -> Sample:
    for name, parameter in sample.model.named_parameters():
        if name.endswith("bias"):
            parameter.register_hook(lambda gradient: 2 * gradient)
    return sample


def hooked_linear() -> Sample:
    return _hooked(wide())


def hooked_convolutions() -> Sample:
    return _hooked(deep_convolutions())


def attention() -> Sample:
    """Two blocks of attention over tokens with packed projections, and a head on their mean."""
    layer = nn.TransformerEncoderLayer(12, 3, 20, dropout=0.0, activation="gelu", batch_first=True)
    model = nn.ModuleList(
        [nn.Linear(5, 12), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(12, 2)]
    )
    x = torch.randn(2, 3, 5)

    def outputs() -> list[Tensor]:
        hidden = model[1](model[0](x))
        return [model[2](hidden.mean(1)), hidden]

    return _sample(model, outputs)


def shapes() -> Sample:
    """Views, slices, broadcasts, stacks, changes in place and of dtype, on both sides of products."""
    first, second = nn.Linear(6, 12), nn.Linear(4, 5)
    scale, rows = nn.Parameter(torch.randn(1, 3, 1)), nn.Parameter(torch.randn(4))
    x = torch.randn(5, 6)

    def outputs() -> list[Tensor]:
        h = first(x).view(5, 3, 4).transpose(-1, -2).unsqueeze(1).expand(5, 2, 4, 3).permute(1, 0, 3, 2)
        h = (h * scale + rows).float().double() - 0.5 * rows
        h = h.clone().mul_(rows.exp())
        h[:, 1:3, 0] = h[:, 2:4, 1].sigmoid() / (1 + rows.square())
        parts = second(torch.stack([h[0], h[1] @ h[1].mT @ h[0]]).flatten(0, 2)).chunk(2)
        return [torch.cat(parts, -1), parts[0].pow(2.0).neg() * parts[1].cos(), h.select(-1, -1)]

    return _sample(nn.ModuleList([first, second, nn.ParameterList([scale, rows])]), outputs)


def _leaves(choose: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]) -> Sample:
    """Losses of a trunk that a slack is subtracted from, the slack, and a scale with a hook."""
    model = nn.Sequential(nn.Linear(40, 50), nn.Tanh(), nn.Linear(50, 1))
    slack, scale = nn.Parameter(torch.tensor(0.7)), nn.Parameter(torch.tensor(-0.4))
    scale.register_hook(lambda gradient: gradient * 3)
    x = torch.randn(3, 40)

    def losses(tasks: tuple[str, ...]) -> dict[str, Tensor]:
        return dict(zip(tasks, choose((model(x).abs() - slack).square().mean(), slack, scale), strict=True))

    return Sample(nn.ModuleList([model, nn.ParameterList([slack, scale])]), losses)


def losses_that_are_parameters() -> Sample:
    return _leaves(lambda fit, slack, scale: (fit * scale, slack, scale))


def one_parameter_for_two_losses() -> Sample:
    return _leaves(lambda fit, slack, scale: (scale, fit * scale, scale))


def a_parameter_that_no_other_task_reads() -> Sample:
    return _leaves(lambda fit, slack, scale: (fit, scale, fit.exp()))


class Injected(torch.autograd.Function):
    """Adds an auxiliary loss in its backward, as mixtures of experts do, and has no gradient to take where there is none."""

    runs = 0

    @staticmethod
    def forward(ctx, x: Tensor, loss: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.like = loss.detach()
        return x * 1.0

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor]:
        Injected.runs += 1
        return gradient * 1.0, torch.ones_like(ctx.like)


class Product(torch.autograd.Function):
    """A linear layer of the user's own."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight)
        return x @ weight

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor]:
        Injected.runs += 1
        x, weight = ctx.saved_tensors
        return gradient @ weight.T, x.T @ gradient


def learnt_scale() -> Sample:
    """A parameter that the trunk reads, and every task's own part: itself and transposed."""
    scale, square = nn.Parameter(torch.tensor(1.3)), nn.Parameter(torch.randn(6, 6))
    linear, router = nn.Linear(6, 6), nn.Linear(6, 2)
    x = torch.randn(5, 6)

    def losses(tasks: tuple[str, ...]) -> dict[str, Tensor]:
        h = (linear(x) * scale).tanh() @ square
        h = Injected.apply(linear(h), router(h * scale).softmax(-1).square().mean()).tanh()
        own = (h * scale, h @ square.T, scale * h.mean(0) + square)
        return {task: (part - 0.1 * i).square().mean() for i, (task, part) in enumerate(zip(tasks, own, strict=True))}

    return Sample(nn.ModuleList([linear, router, nn.ParameterList([scale, square])]), losses)


def features_before_and_after() -> Sample:
    """Functions of the user's own between the features that one task reads, and several between those of another."""
    first, second = nn.Linear(6, 6), nn.Linear(6, 6)
    x = torch.randn(5, 6)

    def outputs() -> list[Tensor]:
        early = first(x).tanh()
        middle = Injected.apply(second(early), early.square().mean()).tanh()
        late = Injected.apply(Injected.apply(first(middle), middle.mean()), early.mean()).tanh()
        return [torch.cat([early, late], 1), middle * late * early, late]

    return _sample(nn.ModuleList([first, second]), outputs)


def tied_products() -> Sample:
    """One parameter for all layers, which functions of the user's own multiply with; for a loss, too."""
    weight, slack = nn.Parameter(torch.randn(6, 6) / 3), nn.Parameter(torch.tensor(0.3))
    x = torch.randn(5, 6)

    def losses(tasks: tuple[str, ...]) -> dict[str, Tensor]:
        h = Injected.apply(x @ weight, slack)
        for _ in range(3):
            h = Injected.apply(Product.apply(h, weight).tanh(), slack * 2)
        values = (Product.apply(h, weight).mean() + slack, slack, h.square().sum() * slack)
        return dict(zip(tasks, values, strict=True))

    return Sample(nn.ParameterList([weight, slack]), losses)


def hooked_products() -> Sample:
    sample = tied_products()
    for parameter in sample.model.parameters():
        parameter.register_hook(lambda gradient: 2 * gradient)
    return sample


def checkpointed_functions() -> Sample:
    """What nobody may call, between features that a task reads."""
    first, second = nn.Linear(6, 6), nn.Linear(6, 6)
    x = torch.randn(5, 6)

    def outputs() -> list[Tensor]:
        early = checkpoint(first, x, use_reentrant=False).tanh()
        late = Injected.apply(checkpoint(second, early, use_reentrant=False), early.mean()).tanh()
        return [early * late, late, late.sin()]

    return _sample(nn.ModuleList([first, second]), outputs)


INTERLACED = [learnt_scale, features_before_and_after, tied_products, hooked_products, checkpointed_functions]
"""Samples with functions of the user's own between two things that one run of nodes is asked for."""

ZOO = [
    chain,
    losses_that_are_parameters,
    one_parameter_for_two_losses,
    a_parameter_that_no_other_task_reads,
    deep_convolutions,
    one_number_for_all_dimensions,
    hooked_linear,
    hooked_convolutions,
    attention,
    shapes,
    residual,
    checkpointed,
    several_scales,
    convolutions,
    tied,
    recurrent,
    unknown,
    lookups,
    wide,
    one_forward_per_task,
    *INTERLACED,
]


@pytest.mark.parametrize("make_sample", ZOO, ids=lambda f: f.__name__)
def test_layerwise_gramian_is_exact(make_sample: Callable[[], Sample]) -> None:
    torch.manual_seed(0)
    sample = make_sample()
    sample.model.double()
    tasks = [f"t{i}" for i in range(K)]
    torch.set_default_dtype(torch.float64)
    try:
        torch.manual_seed(0)
        sample = make_sample()
    finally:
        torch.set_default_dtype(torch.float32)
    losses = dict(enumerate(sample.losses(tuple(tasks)).values()))
    parameters = list(sample.model.parameters())
    rows = []
    for loss in losses.values():
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        rows.append(
            torch.cat(
                [
                    (torch.zeros_like(p) if g is None else g).flatten()
                    for p, g in zip(parameters, gradients, strict=True)
                ]
            )
        )
    matrix = torch.stack(rows)
    engine = Layerwise(Ranks())
    engine.begin()
    reached = engine.read([losses])
    assert {key: mask for key, mask in reached.items() if key in map(id, parameters)} == {
        id(p): sum(1 << i for i, g in enumerate(matrix) if _reached(losses[i], p)) for p in parameters
    }
    found = engine.gramian(Wanted([Piece(losses, dict.fromkeys(losses))], list(losses), parameters, [], _never))
    torch.testing.assert_close(found, matrix @ matrix.T, rtol=1e-10, atol=1e-12)
    if any(map(hooked, read_graph(losses).common)):
        return
    kept = Auto()
    kept.read([losses])
    wanted = {id(p): p for p in parameters}
    kept.factors = find_factors(kept.graph.common, kept.graph.uses, wanted, K)
    found = kept.gramian(Wanted([Piece(losses, dict.fromkeys(losses))], list(losses), parameters, [], _never))
    torch.testing.assert_close(found, matrix @ matrix.T, rtol=1e-10, atol=1e-12)
    weights = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    kept.backward([Piece(losses, dict(enumerate(weights.unbind())))], parameters)
    combined = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
    torch.testing.assert_close(combined, weights @ matrix, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("make_sample", INTERLACED, ids=lambda f: f.__name__)
def test_functions_of_the_users_own_run_once_for_each_task(make_sample: Callable[[], Sample]) -> None:
    torch.manual_seed(0)
    sample = make_sample()
    parameters = list(sample.model.parameters())
    runs = []
    for engine in (None, Layerwise(Ranks()), Auto()):
        losses = dict(enumerate(sample.losses(tuple(f"t{i}" for i in range(K))).values()))
        Injected.runs = 0
        if engine is None:
            for loss in losses.values():
                torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        else:
            engine.begin()
            engine.read([losses])
            engine.gramian(Wanted([Piece(losses, dict.fromkeys(losses))], list(losses), parameters, [], _never))
        runs.append(Injected.runs)
    assert runs[0] == runs[1] == runs[2] > 0


def _reached(loss: Tensor, parameter: Tensor) -> bool:
    return torch.autograd.grad(loss, parameter, retain_graph=True, allow_unused=True)[0] is not None


def _never(task: int, parameter: Tensor, gradient: Tensor) -> None:
    raise AssertionError("no parameter is a head here")


@pytest.mark.parametrize("method", ["pcgrad", "mgda", "cagrad", "gradnorm", "cr_mogm"])
@pytest.mark.parametrize("heads", ["unit", "weighted"])
def test_layerwise_steps_equal_those_with_rows(method: str, heads: str) -> None:
    data = batch(("a", "b", "c"))
    ends = []
    for engine in ("parameters", "layerwise"):
        hp = {} if method in ("gradnorm", "cr_mogm") else {"heads": heads}
        model, _, mt = make(torchmto.make_method(method, **hp), gradients=engine, weights={"a": 2.0}, clip=1.0)
        for number in range(4):
            info = mt.step(closure(model, data, only=("a", "c") if number == 2 else None))
        ends.append(flat(model))
    assert info.num_backward == 4
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-9, atol=1e-12)


FACTORED = {
    chain: 0,
    deep_convolutions: 3,
    one_number_for_all_dimensions: 3,
    residual: 4,
    checkpointed: 0,
    lookups: 1,
    wide: 4,
    hooked_linear: 1,
}
"""Samples -> how many parameters' gradients aren't formed: few samples, no other use, no hooks next to it, no checkpointing."""


@pytest.mark.parametrize("make_sample", FACTORED, ids=lambda f: f.__name__)
def test_gradients_that_need_not_be_formed_are_found(make_sample: Callable[[], Sample]) -> None:
    torch.manual_seed(0)
    sample = make_sample()
    graph = read_graph(dict(enumerate(sample.losses(tuple(f"t{i}" for i in range(K))).values())))
    wanted = {id(p): p for p in sample.model.parameters()}
    factors = find_factors(graph.order, graph.uses, wanted, K)
    assert len(factors) == FACTORED[make_sample]
    if factors:
        with pytest.raises(RuntimeError, match="weren't placed"):
            cut(graph, dict.fromkeys(wanted, 1), factors, direct=False)


@settings(max_examples=25, deadline=None)
@given(
    samples=st.integers(1, 6),
    inputs=st.integers(1, 40),
    outputs=st.integers(1, 40),
    num_tasks=st.integers(1, 4),
    present=st.integers(0, 15),
    seed=st.integers(0, 99),
)
def test_inner_products_of_a_linear_layer(**sizes: int) -> None:
    """Whatever way is taken: those of the formed gradients."""
    generator = torch.Generator().manual_seed(sizes["seed"])
    count, shape = sizes["num_tasks"], (sizes["samples"], sizes["inputs"])
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    weight = torch.randn(sizes["outputs"], sizes["inputs"], generator=generator, dtype=torch.float64).requires_grad_()
    other = torch.randn(sizes["outputs"], generator=generator, dtype=torch.float64).requires_grad_()
    out = nn.functional.linear(x, weight)
    # A task that isn't present in the bits doesn't reach the layer.
    losses = {t: (out - t).square().mean() if sizes["present"] >> t & 1 else other.sum() * 1.0 for t in range(count)}
    rows = [torch.autograd.grad(losses[t], weight, retain_graph=True, allow_unused=True)[0] for t in range(count)]
    matrix = torch.stack([(torch.zeros_like(weight) if row is None else row).flatten() for row in rows])
    engine = Layerwise(Ranks())
    engine.read([losses])
    found = engine.gramian(Wanted([Piece(losses, dict.fromkeys(losses))], list(losses), [weight], [], _never))
    torch.testing.assert_close(found, matrix @ matrix.T, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("mean", [0, 1, 30, 1000])
@pytest.mark.parametrize("kind", ["linear", "convolution", "few samples"])
def test_inner_products_of_inputs_that_are_not_centred(kind: str, mean: float) -> None:
    """Behind a batch norm the gradients of float32 cancel: what is left is as exact as the rows, not its square."""
    torch.manual_seed(0)
    if kind == "convolution":
        layer, norm = nn.Conv2d(64, 32, 3), nn.BatchNorm2d(32)
        x = torch.randn(2, 64, 6, 6) + mean
    else:
        layer, norm = nn.Linear(2048, 64), nn.BatchNorm1d(64)
        x = torch.randn(2 if kind == "few samples" else 32, 2048) + mean
    out = layer(x)
    features = norm(out).tanh() * torch.randn_like(out)
    losses = {i: (features * torch.randn_like(out)).sin().sum() for i in range(K)}
    graph = read_graph(losses)
    (factor,) = find_factors(graph.order, graph.uses, {id(layer.weight): layer.weight}, K).values()
    cotangents = [torch.autograd.grad(loss, out, retain_graph=True)[0] for loss in losses.values()]
    found = factor.products(torch.stack(cotangents)).double()
    layer, x = layer.double(), x.double()
    rows = torch.stack([torch.autograd.grad(layer(x), layer.weight, part.double())[0].flatten() for part in cotangents])
    norms = rows.norm(dim=1)
    assert ((found - rows @ rows.T).abs() / torch.outer(norms, norms)).max() < 1e-5


@pytest.mark.parametrize("heads", ["unit", "weighted"])
@pytest.mark.parametrize("kind", ["even", "uneven", "split norms"])
def test_layerwise_adds_up_forwards(kind: str, heads: str) -> None:
    """Micro-batches, and the forwards that task-specific norms need, one per task: the step with rows."""
    tasks = ("a", "b", "c")
    parts = [batch(tasks, seed=seed, size=size) for seed, size in ((1, 4), (2, 6))]
    ends = []
    for engine in ("parameters", "layerwise"):
        model = Toy(tasks, norm=nn.BatchNorm1d(5), width=5)
        if kind == "split norms":
            model = split_norms(model, tasks).double()
        model, _, mt = make(torchmto.make_method("pcgrad", heads=heads), model=model, gradients=engine, clip=0.5)
        for number in range(3):
            only = ("a", "c") if kind == "uneven" and number == 1 else None
            sources = [closure(model, part, only=only if i else None, count=True) for i, part in enumerate(parts)]
            info = mt.step(sources[0] if kind == "split norms" else sources)
        ends.append(flat(model))
    assert info.num_backward == {"split norms": 3 + 3, "even": 6 + 2, "uneven": 6 + 2}[kind]
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-9, atol=1e-12)


def test_layerwise_under_autocast() -> None:
    """With bfloat16 in the forward, a scaler and more samples than would pay for a layer: rows, to bfloat16's precision."""
    data = batch(("a", "b", "c"), dtype=torch.float32)
    grams, ends = [], []
    for engine in ("parameters", "layerwise"):
        model = Toy(("a", "b", "c"), width=40, dtype=torch.float32)
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
        model, _, mt = make("pcgrad", model=model, gradients=engine, scaler=scaler)
        inner = closure(model, data)

        def losses(tasks: tuple[str, ...], inner: Callable[..., dict[str, Tensor]] = inner) -> dict[str, Tensor]:
            with torch.autocast("cpu", torch.bfloat16):
                return {task: loss.float() for task, loss in inner(tasks).items()}

        grams.append(mt.step(losses).cosines)
        ends.append(flat(model))
    torch.testing.assert_close(grams[0], grams[1], rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-2, atol=1e-3)


def test_layerwise_with_a_scaler() -> None:
    data = batch(("a", "b", "c"))
    ends = []
    for engine in ("parameters", "layerwise", "representation"):
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        features = "trunk" if engine == "representation" else None
        model, _, mt = make("random", gradients=engine, features=features, scaler=scaler)
        mt.step(closure(model, data))
        ends.append(flat(model))
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(ends[0], ends[2], rtol=1e-12, atol=1e-15)


def test_representation_uses_the_features_gradients() -> None:
    data = batch(("a", "b", "c"))
    model, _, mt = make("pcgrad", gradients="representation", features="trunk")
    features = model.trunk(data[0])
    outputs = {task: (head(features) - data[1][task]).square().mean() for task, head in model.heads.items()}
    rows = [torch.autograd.grad(loss, features, retain_graph=True)[0].flatten() for loss in outputs.values()]
    matrix = torch.stack(rows)
    norms = matrix.norm(dim=1)
    info = mt.step(closure(model, data))
    assert info.num_forward == 1
    assert info.num_backward == 4
    torch.testing.assert_close(info.cosines, matrix @ matrix.T / torch.outer(norms, norms))


def test_representation_leaves_a_plain_sum_exact() -> None:
    data = batch(("a", "b"))
    ends = []
    for options in ({}, {"gradients": "representation", "features": "trunk"}):
        method = torchmto.make_method("constant", weights=[1.0, 1.0])
        model, _, mt = make(method, ("a", "b"), **options)
        mt.step(closure(model, data))
        ends.append(flat(model))
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-12, atol=1e-14)


class Scales(nn.Module):
    """Features of several scales, each computed from the one before, as tensors in a dict and a list."""

    def __init__(self, last: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 5)
        self.last = last

    def forward(self, x: Tensor) -> dict[str, object]:
        one = self.first(x).tanh()
        two = self.second(one).relu()
        three = self.last(self.third(two + one))
        return {"one": one, "rest": [two, three, three.view(-1, 5), two], "unread": three.exp()}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.inside(x).tanh()


class Nested(nn.Module):
    """Features that are computed from features, and heads that read some of them."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        last = {
            "custom": lambda x: Doubled.apply(x, 2.0),
            "checkpoint": lambda x: checkpoint(torch.sin, x, use_reentrant=False),
        }.get(kind, torch.sin)
        self.kind = kind
        self.stem = nn.Linear(4, 5)
        self.features = Block() if kind.startswith("repeated") else Scales(last)
        self.heads = nn.ModuleDict({task: nn.Linear(5, 1) for task in ("a", "b", "c")})

    def read(self) -> dict[str, list[Tensor]]:
        """What each head reads, for an input."""
        x = torch.randn(7, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        if isinstance(self.features, Block):
            one = self.features(self.stem(x))
            two = self.features(one.sin())
            return {task: [two] if self.kind == "repeated" else [one, two][: i + 1] for i, task in enumerate("abc")}
        found = self.features(x)
        one, (two, three, seen, again) = found["one"], found["rest"]
        if self.kind == "in place":
            three.mul_(2)
            again = again.mul(3)
        return {"a": [one, three], "b": [two, again, seen], "c": [one, two, three]}

    def losses(self, tasks: tuple[str, ...], read: dict[str, list[Tensor]] | None = None) -> dict[str, Tensor]:
        read = self.read() if read is None else read
        outputs = {task: sum(self.heads[task](part) for part in read[task]) for task in tasks}
        return {task: (output - "abc".index(task)).square().mean() for task, output in outputs.items()}


@pytest.mark.parametrize("kind", ["scales", "custom", "checkpoint", "in place", "repeated", "repeated and read"])
def test_representation_is_exact_where_features_are_computed_from_features(kind: str) -> None:
    """Also in a first step, in which one task alone has been seen."""
    ends = []
    for options in ({"gradients": "parameters"}, {"gradients": "representation", "features": "features"}):
        torch.manual_seed(0)
        model = Nested(kind).double()
        method = torchmto.make_method("constant", weights=[1.0, 0.3, 2.0])
        model, _, mt = make(method, model=model, **options)
        mt.step(lambda tasks, model=model: model.losses(("a",)))
        mt.step(lambda tasks, model=model: model.losses(tasks))
        ends.append(flat(model))
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-11, atol=1e-13)


def test_representation_takes_each_feature_as_it_is_read() -> None:
    """What a loss does to a scale by way of the next one is the next one's, as if the features were inputs of the heads."""
    torch.manual_seed(0)
    model = Nested("scales").double()
    model, _, mt = make("pcgrad", model=model, gradients="representation", features="features")
    leaves: dict[int, Tensor] = {}
    read = {
        task: [leaves.setdefault(id(part), part.detach().requires_grad_()) for part in parts]
        for task, parts in model.read().items()
    }
    inputs = list(leaves.values())
    rows = [
        torch.cat([g.flatten() for g in torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)])
        for loss in model.losses(("a", "b", "c"), read).values()
    ]
    info = mt.step(model.losses)
    torch.testing.assert_close(info.gramian, torch.stack(rows) @ torch.stack(rows).T)


@pytest.mark.parametrize("method", ["gd", "uw", "graddrop", "moco", "sequential", "connection_strength", "sdmgrad"])
@pytest.mark.filterwarnings("ignore")
def test_methods_that_need_more_than_a_gramian_are_refused(method: str) -> None:
    with pytest.raises(ValueError, match="layerwise"):
        make(method, gradients="layerwise")


def test_misuse_is_named() -> None:
    data = batch(("a", "b", "c"))
    with pytest.raises(ValueError, match=r'gradnorm.*gradients="layerwise": it takes the norms over one layer'):
        make(torchmto.make_method("gradnorm", layer="trunk"), gradients="layerwise")
    split = split_norms(Toy(("a", "b"), norm=nn.BatchNorm1d(5)), ("a", "b"))
    with pytest.raises(ValueError, match="task-specific norms"):
        make("pcgrad", ("a", "b"), model=split, gradients="representation", features="trunk")
    with pytest.raises(ValueError, match="gradients"):
        make("pcgrad", gradients="columns")
    with pytest.raises(TypeError, match="features"):
        make("pcgrad", gradients="representation")
    with pytest.raises(ValueError, match="features"):
        make("pcgrad", gradients="representation", features="nowhere")
    with pytest.raises(ValueError, match="features"):
        make("pcgrad", features="trunk")
    model, _, mt = make("pcgrad", gradients="representation", features="trunk")
    before = flat(model)
    with pytest.raises(ValueError, match=r"micro-batch.*layerwise"):
        mt.step([closure(model, data), closure(model, data)])
    model2, _, mt2 = make("pcgrad", gradients="representation", features="trunk.0")
    model2.trunk.append(nn.Linear(5, 5).double())
    model2, _, mt2 = make("pcgrad", model=model2, gradients="representation", features="trunk.0")
    with pytest.raises(ValueError, match="without passing"):
        mt2.step(closure(model2, data))
    assert torch.equal(flat(model), before)


def test_representation_listens_in_its_own_steps_alone() -> None:
    """No hook is left by a construction, a step or an error, and nothing keeps what drove the model alive."""
    data = batch(("a", "b", "c"))
    model, _, mt = make("pcgrad", gradients="representation", features="trunk")
    inside = []

    def losses(tasks: tuple[str, ...]) -> dict[str, torch.Tensor]:
        inside.append(len(model.trunk._forward_hooks))
        return closure(model, data)(tasks) if len(inside) == 1 else {}["a corrupt image"]

    assert not model.trunk._forward_hooks
    mt.step(losses)
    assert not model.trunk._forward_hooks
    with pytest.raises(KeyError):
        mt.step(losses)
    assert not model.trunk._forward_hooks
    assert inside == [1, 1]
    gone = weakref.ref(mt)
    del mt
    gc.collect()
    assert gone() is None


def test_representation_needs_features_that_tasks_share() -> None:
    data = batch(("a", "b", "c"))
    model, _, mt = make("pcgrad", gradients="representation", features="trunk")
    before = flat(model)
    each = closure(model, data)
    with pytest.raises(ValueError, match="no two tasks use the same output"):
        mt.step(lambda tasks: {task: each((task,))[task] for task in tasks})
    assert torch.equal(flat(model), before)


@pytest.mark.parametrize("engine", ["layerwise", "representation"])
def test_a_first_batch_with_one_task(engine: str) -> None:
    data = batch(("a", "b", "c"))
    ends = []
    for gradients in ("parameters", engine):
        features = "trunk" if gradients == "representation" else None
        model, _, mt = make("pcgrad", gradients=gradients, features=features)
        mt.step(closure(model, data, only=("a",)))
        ends.append(flat(model))
        mt.step(closure(model, data))
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-12, atol=1e-14)


def test_a_gradient_that_is_not_finite_is_named_and_leaves_no_trace() -> None:
    data = batch(("a", "b", "c"))
    model, _, mt = make("pcgrad", gradients="layerwise")
    before = flat(model)

    def broken(tasks: tuple[str, ...]) -> dict[str, Tensor]:
        losses = closure(model, data)(tasks)
        zero = (model.trunk[0].weight.sum() * 0).abs()
        return {**losses, "b": losses["b"] + zero.sqrt()}

    with pytest.raises(torchmto.NonFiniteError, match="`b`"):
        mt.step(broken)
    assert torch.equal(flat(model), before)


def test_graph_order_is_topological() -> None:
    sample = several_scales()
    losses = dict(enumerate(sample.losses(tuple(f"t{i}" for i in range(K))).values()))
    place = {node: i for i, node in enumerate(read_graph(losses).order)}
    for node, i in place.items():
        assert all(place.get(following, i + 1) > i for following, _ in node.next_functions)
