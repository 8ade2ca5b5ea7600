"""Which engine `gradients="auto"` takes, and that it takes the same step as the others."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import torchmto
from torchmto.gradients import choice
from toy import DEVICES, same

TASKS = ("a", "b", "c", "d")


@pytest.fixture(autouse=True)
def _one_rule_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the mix computes is tested at sizes where it pays on a processor."""
    monkeypatch.setattr(choice, "GPU", choice.CPU)


class Net(nn.Module):
    """A trunk of equal layers, and heads."""

    def __init__(self, width: int = 512, norm: Callable[[int], nn.Module] = nn.LayerNorm) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(
            *[layer for _ in range(3) for layer in (nn.Linear(width, width), norm(width), nn.GELU())]
        )
        self.heads = nn.ModuleDict({task: nn.Linear(width, 3) for task in TASKS})

    def losses(self, x: Tensor, tasks: tuple[str, ...]) -> dict[str, Tensor]:
        return self.spread(self.trunk(x), tasks)

    def spread(self, features: Tensor, tasks: tuple[str, ...]) -> dict[str, Tensor]:
        return {task: (self.heads[task](features) - 0.3 * TASKS.index(task)).square().mean() for task in tasks}


def _made(net: Net, gradients: str = "auto", **options: Any) -> torchmto.MultiTask:
    optimizer = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9)
    method = options.pop("method", "pcgrad")
    return torchmto.MultiTask(net, optimizer, tasks=TASKS, method=method, gradients=gradients, **options)


def _equal(nets: list[Net], rtol: float = 1e-8) -> None:
    for first, second in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(first, second, rtol=rtol, atol=1e-10)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("heads", ["unit", "weighted"])
@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.BatchNorm1d, nn.Identity])
def test_a_wide_network_takes_the_mix_and_the_same_steps(
    device: str, heads: str, norm: Callable[[int], nn.Module]
) -> None:
    nets = []
    x = torch.randn(16, 512, dtype=torch.float64, device=device)
    for gradients in ("auto", "parameters"):
        net = Net(norm=norm).double().to(device)
        method = torchmto.make_method("pcgrad", heads=heads)
        mt = _made(net, gradients, method=method, weights={"a": 2.0}, clip=1.0)
        for number in range(4):
            present = TASKS if number != 2 else ("b", "d")
            info = mt.step(
                lambda tasks, net=net, present=present: net.losses(x, tuple(t for t in tasks if t in present))
            )
            assert info.engine == ("mixed" if gradients == "auto" else "parameters")
            assert info.num_backward == len(present)
        nets.append(net)
    _equal(nets)


def test_complex_parameters() -> None:
    """As in Fourier neural operators."""

    class Spectral(Net):
        def __init__(self) -> None:
            super().__init__()
            self.modes = nn.Parameter(torch.randn(257, dtype=torch.cfloat))

        def losses(self, x: Tensor, tasks: tuple[str, ...]) -> dict[str, Tensor]:
            return self.spread(torch.fft.irfft(torch.fft.rfft(self.trunk(x)) * self.modes, 512), tasks)

    nets = []
    for gradients in ("auto", "parameters"):
        nets.append(Spectral())
        mt, x = _made(nets[-1], gradients), torch.randn(4, 512, generator=torch.Generator().manual_seed(0))
        for _ in range(2):
            info = mt.step(lambda tasks, x=x, net=nets[-1]: net.losses(x, tasks))
        assert info.engine == ("mixed" if gradients == "auto" else "parameters")
    for first, second in zip(*(net.parameters() for net in nets), strict=True):
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scaled", [False, True])
def test_half_precision_and_a_scaler(scaled: bool) -> None:
    nets = []
    x = torch.randn(16, 512)
    for gradients in ("auto", "parameters"):
        net = Net()
        mt = _made(
            net, gradients, method="upgrad", scaler=torch.amp.GradScaler("cpu", init_scale=256.0) if scaled else None
        )

        def losses(tasks: tuple[str, ...], net: Net = net) -> dict[str, Tensor]:
            with torch.autocast("cpu", torch.bfloat16):
                return {task: loss.float() for task, loss in net.losses(x, tasks).items()}

        assert mt.step(losses).engine == ("mixed" if gradients == "auto" else "parameters")
        nets.append(net)
    for first, second in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(first, second, rtol=2e-2, atol=2e-3)


class Passed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 2


def test_functions_of_the_users_own_are_part_of_the_mix() -> None:
    nets = []
    x = torch.randn(16, 512, dtype=torch.float64)
    for gradients in ("auto", "parameters"):
        net = Net().double()
        info = _made(net, gradients).step(
            lambda tasks, net=net: net.spread(net.trunk[3:](Passed.apply(net.trunk[:3](x))), tasks)
        )
        assert info.engine == ("mixed" if gradients == "auto" else "parameters")
        nets.append(net)
    _equal(nets)


MASK = torch.arange(512) % 7
"""Not the same for all tasks, so that a hook that runs twice or never is noticed."""


def _on_tensor(net: Net, x: Tensor, tasks: tuple[str, ...]) -> dict[str, Tensor]:
    features = net.trunk(x)
    features.register_hook(lambda gradient: gradient * MASK)
    return net.spread(features, tasks)


def _checkpointed(net: Net, x: Tensor, tasks: tuple[str, ...]) -> dict[str, Tensor]:
    return net.spread(net.trunk[3:](checkpoint(net.trunk[:3], x, use_reentrant=False)), tasks)


def _offloaded(net: Net, x: Tensor, tasks: tuple[str, ...]) -> dict[str, Tensor]:
    with torch.autograd.graph.save_on_cpu():
        return net.losses(x, tasks)


CAUTIOUS: dict[str, tuple[Callable[..., dict[str, Tensor]], Callable[[Net], object]]] = {
    "hook on an activation": (_on_tensor, lambda net: None),
    "hook on a module": (
        Net.losses,
        lambda net: net.trunk[3].register_full_backward_hook(lambda m, i, o: (i[0] * MASK,)),
    ),
    "hook on a parameter": (
        Net.losses,
        lambda net: net.trunk[3].weight.register_hook(lambda gradient: gradient * MASK),
    ),
    "checkpointing": (_checkpointed, lambda net: None),
    "offloading": (_offloaded, lambda net: None),
}


@pytest.mark.parametrize("part", ["losses", "features"])
@pytest.mark.parametrize("hooked", [False, True])
def test_rows_for_what_was_computed_before_the_step(part: str, hooked: bool) -> None:
    """It hides whether there are hooks, whether a closure goes on from features or gives only the losses."""
    nets = []
    x = torch.randn(16, 512, dtype=torch.float64)
    for engine in ("auto", "parameters"):
        net = Net().double()
        mt = _made(net, engine)
        for _ in range(2):
            features = net.trunk[:3](x)
            if hooked:
                features.register_hook(lambda gradient: gradient * 0.5)
            features = net.trunk[3:](features)
            losses = net.spread(features, TASKS)

            def closure(tasks, net=net, features=features, losses=losses):
                return losses if part == "losses" else net.spread(features, tasks)

            assert mt.step(closure).engine == "parameters"
        nets.append(net)
    _equal(nets)


@pytest.mark.parametrize("gradients", ["auto", "layerwise"])
@pytest.mark.parametrize("case", CAUTIOUS)
def test_rows_where_something_else_could_surprise(case: str, gradients: str) -> None:
    losses, prepare = CAUTIOUS[case]
    nets = []
    x = torch.randn(16, 512, dtype=torch.float64, requires_grad=True)
    for engine in (gradients, "parameters"):
        net = Net().double()
        prepare(net)
        info = _made(net, engine).step(lambda tasks, net=net: losses(net, x, tasks))
        assert info.engine == ("layerwise" if engine == "layerwise" else "parameters")
        nets.append(net)
    _equal(nets)


def test_rows_for_ready_losses_micro_batches_small_networks_and_many_samples() -> None:
    net, x = Net(), torch.randn(16, 512)

    def closure(tasks: tuple[str, ...]) -> dict[str, Tensor]:
        return net.losses(x, tasks)

    mt = _made(net)
    assert mt.step(closure).engine == "mixed"
    assert mt.step([closure, closure]).engine == "parameters"
    assert mt.step(net.losses(x, TASKS)).engine == "parameters"
    assert mt.step(lambda tasks: net.losses(torch.randn(1200, 512), tasks)).engine == "parameters"
    assert _made(net, method="gd").step(closure).engine is None
    assert _made(net, method="graddrop").step(closure).engine == "parameters"
    assert _made(net, "layerwise").step(closure).engine == "layerwise"
    small = Net(20)
    assert _made(small).step(lambda tasks: small.losses(torch.randn(64, 20), tasks)).engine == "parameters"


@pytest.mark.parametrize(
    ("layers", "num_tasks", "large", "engine"),
    [
        (5, 2, choice.LARGE, "parameters"),
        (5, 20, choice.LARGE, "mixed"),
        (16, 2, choice.LARGE, "parameters"),
        (16, 8, choice.LARGE, "mixed"),
        (16, 8, 1, "parameters"),
    ],
)
def test_where_launches_cost_more_than_arithmetic_they_decide(
    layers: int, num_tasks: int, large: int, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rule for GPUs, here on any device; measured on one (docs/speed.md)."""
    monkeypatch.undo()
    monkeypatch.setattr(choice, "CPU", choice.GPU)
    monkeypatch.setattr(choice, "LARGE", large)
    trunk = nn.Sequential(*[layer for _ in range(layers) for layer in (nn.Linear(256, 256), nn.ReLU())])
    tasks = tuple(f"t{i}" for i in range(num_tasks))
    heads = nn.ModuleDict({task: nn.Linear(256, 2) for task in tasks})
    x = torch.randn(16, 256)

    def losses(wanted: tuple[str, ...]) -> dict[str, Tensor]:
        features = trunk(x)
        return {task: heads[task](features).square().mean() for task in wanted}

    net = nn.ModuleList([trunk, heads])
    mt = torchmto.MultiTask(net, torch.optim.SGD(net.parameters(), 0.05), tasks=tasks, method="pcgrad")
    assert mt.step(losses).engine == engine


def test_steps_after_loading_are_the_same_to_the_bit() -> None:
    x = torch.randn(16, 512)
    net = Net()
    mt = _made(net)
    ends = []
    for _ in range(2):
        assert mt.step(lambda tasks: net.losses(x, tasks)).engine == "mixed"
    other = Net()
    other.load_state_dict(net.state_dict())
    again = _made(other)
    again.load_state_dict(mt.state_dict())
    again.network.optimizers.all[0].load_state_dict(copy.deepcopy(mt.network.optimizers.all[0].state_dict()))
    for made, model in ((mt, net), (again, other)):
        for _ in range(2):
            made.step(lambda tasks, model=model: model.losses(x, tasks))
        ends.append(dict(model.state_dict()))
    assert same(ends[0], ends[1])


def test_a_gradient_that_is_not_finite_leaves_no_trace() -> None:
    net, x = Net(), torch.randn(16, 512)
    mt = _made(net)
    mt.step(lambda tasks: net.losses(x, tasks))
    before = copy.deepcopy(dict(net.state_dict()))

    def broken(tasks: tuple[str, ...]) -> dict[str, Tensor]:
        losses = net.losses(x, tasks)
        return {**losses, "b": losses["b"] + (net.trunk[0].weight.sum() * 0).abs().sqrt()}

    with pytest.raises(torchmto.NonFiniteError, match="`b`"):
        mt.step(broken)
    assert same(before, dict(net.state_dict()))
    assert not mt.network.engine.graph.order
