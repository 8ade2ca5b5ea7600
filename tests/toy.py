"""Tiny models, batches and closures for the tests of the step and of the methods, and what a step must leave untouched."""

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import torchmto

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")),
]


class Toy(nn.Module):
    """A trunk (linear, optional norm and dropout) and one linear head per task."""

    def __init__(
        self,
        tasks: Sequence[str],
        *,
        norm: nn.Module | None = None,
        dropout: float = 0.0,
        width: int = 5,
        seed: int = 0,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.trunk = nn.Sequential(nn.Linear(4, width), nn.Identity() if norm is None else norm, nn.Tanh())
            self.dropout = nn.Dropout(dropout)
            self.heads = nn.ModuleDict({task: nn.Linear(width, 1) for task in tasks})
        self.to(dtype)

    def forward(self, x: Tensor, tasks: Iterable[str] | None = None) -> dict[str, Tensor]:
        features = self.dropout(self.trunk(x))
        return {task: self.heads[task](features) for task in (self.heads if tasks is None else tasks)}


Batch = tuple[Tensor, dict[str, Tensor]]


def batch(tasks: Sequence[str], *, size: int = 8, seed: int = 1, dtype: torch.dtype = torch.float64) -> Batch:
    """Random inputs and one random target per task. Losses differ between the tasks, and are never 0."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 4, generator=generator, dtype=torch.float64)
    targets = {
        task: (i + 1) * torch.randn(size, 1, generator=generator, dtype=torch.float64) for i, task in enumerate(tasks)
    }
    return x.to(dtype), {task: y.to(dtype) for task, y in targets.items()}


def closure(
    model: nn.Module, data: Batch, *, only: Sequence[str] | None = None, count: bool = False
) -> Callable[[tuple[str, ...]], dict[str, Any]]:
    """The squared errors of the tasks asked for (those of ``only`` that are), with their counts if wanted."""
    x, targets = data

    def losses(tasks: tuple[str, ...]) -> dict[str, Any]:
        present = [task for task in tasks if only is None or task in only]
        outputs = model(x, present)
        values = {task: (outputs[task] - targets[task]).square().mean() for task in present}
        return {task: (value, len(x)) for task, value in values.items()} if count else values

    return losses


def flat(model: nn.Module) -> Tensor:
    """All parameters in one vector."""
    return torch.cat([p.detach().flatten().double() for p in model.parameters()]).clone()


def flat_grad(parameters: Iterable[nn.Parameter]) -> Tensor:
    """All gradients in one vector, zero where there is none."""
    return torch.cat(
        [(torch.zeros_like(p) if p.grad is None else p.grad).flatten().double() for p in parameters]
    ).clone()


def same(a: Any, b: Any) -> bool:
    """Whether two nested states are equal, bit for bit."""
    if isinstance(a, Tensor):
        return (
            isinstance(b, Tensor)
            and a.dtype == b.dtype
            and a.shape == b.shape
            and bool(torch.equal(a.nan_to_num(), b.nan_to_num()) and torch.equal(a.isnan(), b.isnan()))
        )
    if isinstance(a, Mapping):
        return isinstance(b, Mapping) and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    both_nan = isinstance(a, float) and isinstance(b, float) and math.isnan(a) and math.isnan(b)
    return bool(a == b) or both_nan


def state(mt: torchmto.MultiTask) -> dict[str, Any]:
    """A deep copy of everything that an error must leave as it was."""
    network = mt.network
    scaler = network.scaler
    return copy.deepcopy(
        {
            "model": dict(network.model.state_dict()),
            "optimizer": network.optimizers.all[0].state_dict(),
            "mt": mt.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
        }
    )


def make(
    method: str | torchmto.Method = "gd",
    tasks: Sequence[str] = ("a", "b", "c"),
    *,
    model: nn.Module | None = None,
    optimizer: Callable[[Any], torch.optim.Optimizer] | None = None,
    **options: Any,
) -> tuple[Toy, torch.optim.Optimizer, torchmto.MultiTask]:
    """A model, its optimizer and the MultiTask that drives them."""
    model = Toy(tasks) if model is None else model
    made = torch.optim.SGD(model.parameters(), lr=0.05) if optimizer is None else optimizer(model.parameters())
    return model, made, torchmto.MultiTask(model, made, tasks=tasks, method=method, **options)


class Inner(torch.autograd.Function):
    """A reentrant checkpoint as people write it: its backward sets ``.grad`` of the module's parameters."""

    @staticmethod
    def forward(ctx: Any, module: nn.Module, x: Tensor) -> Tensor:
        ctx.module = module
        ctx.save_for_backward(x)
        return module(x.detach()).detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor | None]:
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            torch.autograd.backward(ctx.module(x), gradient)
        return None, x.grad


def reentrant(module: nn.Module, x: Tensor) -> Tensor:
    """A module under a reentrant checkpoint, which hides its parameters from the graph."""
    return checkpoint(module, x, use_reentrant=True)


def inner(module: nn.Module, x: Tensor) -> Tensor:
    """A module inside a function that hides its parameters."""
    return Inner.apply(module, x)


class Witness(torchmto.LossWeighting):
    """The plain sum, which notes what it is told."""

    name = "witness"

    def __init__(self) -> None:
        super().__init__()
        self.told: list[str] = []

    def bind(self, tasks: tuple[str, ...]) -> None:
        self.told.append("bind")
        super().bind(tasks)

    def attach(self, network: Any) -> None:
        self.told.append("attach")
        super().attach(network)

    def seed(self, seed: int) -> None:
        self.told.append("seed")
        super().seed(seed)

    def after_step(self, losses: Any, context: Any) -> None:
        self.told.append("after_step")

    def report(self, performance: Mapping[str, float]) -> None:
        self.told.append("report")

    def end_window(self) -> None:
        self.told.append("end_window")

    def objective(self, losses: Tensor, indices: Sequence[int] | None = None) -> Tensor:
        return losses.sum()
