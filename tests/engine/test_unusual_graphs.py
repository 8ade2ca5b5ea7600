"""The layer-wise engine on graphs that it must not take a short cut through, and after steps that fail."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import torchmto
from torchmto.gradients import choice

Losses = Mapping[str, Tensor]


class Net(nn.Module):
    """A trunk that a test uses as it likes, and two heads."""

    def __init__(self, trunk: Mapping[str, nn.Module | nn.Parameter]) -> None:
        super().__init__()
        for name, part in trunk.items():
            setattr(self, name, part)
        self.a = nn.Linear(64, 1)
        self.b = nn.Linear(64, 1)

    def losses(self, features: Tensor) -> Losses:
        return {"a": self.a(features).square().mean(), "b": (self.b(features) - 1).square().mean()}


def masked() -> tuple[Net, Tensor]:
    net = Net({"first": nn.Linear(64, 64), "second": nn.Linear(64, 64)})
    mask = (torch.arange(64) < 8).float()
    net.first.weight.register_hook(lambda gradient: gradient * mask * 10)
    return net, net.second(net.first(torch.randn(4, 64)).tanh())


def idle_expert() -> tuple[Net, Tensor]:
    net = Net({"first": nn.Linear(64, 64), "expert": nn.Linear(64, 64)})
    features = net.first(torch.randn(4, 64))
    chosen = torch.zeros(4, dtype=torch.bool)
    return net, features.index_add(0, torch.zeros(0, dtype=torch.long), net.expert(features[chosen]))


def transposed_lookup() -> tuple[Net, Tensor]:
    net = Net({"table": nn.Parameter(torch.randn(64, 100))})
    return net, functional.embedding(torch.tensor([1, 5, 5, 99]), net.table.t())


def sparse_input() -> tuple[Net, Tensor]:
    net = Net({"weight": nn.Parameter(torch.randn(200, 64))})
    entries = torch.tensor([[0, 1, 2, 3], [7, 7, 150, 0]])
    return net, torch.mm(torch.sparse_coo_tensor(entries, torch.ones(4), (4, 200)), net.weight)


def root_of_relu() -> tuple[Net, Tensor]:
    """The root's derivative is infinite where ReLU lets nothing through."""
    net = Net({"first": nn.Linear(64, 64)})
    return net, net.first(torch.randn(4, 64)).relu().sqrt()


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("case", [masked, root_of_relu, idle_expert, transposed_lookup, sparse_input])
def test_equals_the_rows(case: Callable[[], tuple[Net, Tensor]]) -> None:
    found = []
    for gradients in ("parameters", "layerwise"):
        torch.manual_seed(0)
        net, features = case()
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        multitask = torchmto.MultiTask(net, optimizer, tasks=["a", "b"], method="upgrad", gradients=gradients)
        info = multitask.step(net.losses(features))
        found.append((info.cosines, [parameter.detach().clone() for parameter in net.parameters()]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


def test_overflow_that_only_the_formed_gradient_has() -> None:
    torch.manual_seed(0)
    net = Net({"first": nn.Linear(64, 64)})
    x = torch.randn(4, 64) * 1e4
    before = [parameter.detach().clone() for parameter in net.parameters()]
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    multitask = torchmto.MultiTask(net, optimizer, tasks=["a", "b"], method="upgrad", gradients="layerwise")

    def closure(tasks: tuple[str, ...]) -> Losses:
        with torch.autocast(x.device.type, torch.float16):
            features = net.first(x)
        features = features.float() * 1000
        return {"a": net.a(features).mean(), "b": net.b(features).mean()}

    with pytest.raises(torchmto.NonFiniteError, match="Nothing was updated"):
        multitask.step(closure)
    assert all(torch.equal(now, then) for now, then in zip(net.parameters(), before, strict=True))


@pytest.mark.parametrize("options", [{"gradients": "layerwise"}, {"gradients": "representation", "features": "first"}])
def test_failed_steps_keep_no_graph(options: dict[str, Any]) -> None:
    net = Net({"first": nn.Linear(64, 64)})
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    multitask = torchmto.MultiTask(net, optimizer, tasks=["a", "b"], method="upgrad", on_nonfinite="skip", **options)
    x = torch.randn(4, 64)

    def fails(tasks: tuple[str, ...]) -> Losses:
        net.first(x)
        raise KeyError("no labels")

    assert not multitask.step(lambda tasks: net.losses(net.first(x))).skipped
    assert multitask.step(lambda tasks: {n: loss * torch.nan for n, loss in net.losses(net.first(x)).items()}).skipped
    with pytest.raises(KeyError):
        multitask.step(fails)
    net.first(x)
    engine = vars(multitask.network.engine)
    assert not any(engine.get(name) for name in ("_graphs", "_outputs", "_listening"))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
@pytest.mark.parametrize("where", ["trunk", "head"])
def test_nested_tensors_take_the_rows(where: str, layout: torch.layout, monkeypatch: pytest.MonkeyPatch) -> None:
    """Although a walk down the graph would take less time."""
    for name in ("CPU", "GPU"):
        monkeypatch.setattr(choice, name, choice.Costs(node=0, call=0, task=0, formed=1, launch=0, batch=0, leaf=0))
    monkeypatch.setattr(choice, "LIVE", 0)
    found = []
    for gradients in ("parameters", "auto", "layerwise"):
        torch.manual_seed(0)
        net = Net({"first": nn.Linear(64, 64), "wide": nn.Linear(64, 256), "back": nn.Linear(256, 64)})
        sequences = [torch.randn(length, 64) for length in (2, 5, 3)]

        def closure(tasks: tuple[str, ...], net: Net = net, sequences: list[Tensor] = sequences) -> Losses:
            pooled = torch.stack([sequence.mean(0) for sequence in sequences])
            given = torch.nested.nested_tensor(sequences, layout=layout)
            nested = torch.nested.to_padded_tensor(net.first(given) * 2, 0.0).sum(1)
            features = net.back(net.wide(nested if where == "trunk" else net.first(pooled)).tanh())
            losses = net.losses(features)
            return losses if where == "trunk" else {**losses, "b": losses["b"] + nested.square().mean()}

        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        multitask = torchmto.MultiTask(net, optimizer, tasks=["a", "b"], method="upgrad", gradients=gradients)
        if gradients == "layerwise":
            with pytest.raises(ValueError, match="nested tensors"):
                multitask.step(closure)
            continue
        assert multitask.step(closure).engine == "parameters"
        found.append([parameter.detach().clone() for parameter in net.parameters()])
    torch.testing.assert_close(found[1], found[0])


class Noting(torch.autograd.Function):
    """Keeps something under the name by which the nodes of leaves know them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.variable = "x"
        return 2 * x

    @staticmethod
    def backward(ctx: Any, *given: Tensor) -> Tensor:
        return 2 * given[0]


@pytest.mark.parametrize("method", ["gd", "uw", "upgrad", "consmtl", "sequential"])
@pytest.mark.parametrize("gradients", ["parameters", "layerwise"])
def test_a_function_that_keeps_a_variable_is_no_leaf(gradients: str, method: str) -> None:
    ends = []
    for double in (Noting.apply, lambda x: 2 * x):
        torch.manual_seed(0)
        net = Net({"first": nn.Linear(8, 64)})
        features, options = torch.randn(4, 8), {"gradients": gradients} if method in ("upgrad", "consmtl") else {}

        def closure(_: tuple[str, ...], net: Net = net, double: Any = double, x: Tensor = features) -> Losses:
            return net.losses(double(net.first(x).tanh()))

        multitask = torchmto.MultiTask(
            net, torch.optim.SGD(net.parameters(), 0.1), tasks=["a", "b"], method=method, **options
        )
        for _ in range(2):
            multitask.step(closure)
        ends.append(torch.cat([parameter.detach().flatten() for parameter in net.parameters()]))
    torch.testing.assert_close(*ends)
