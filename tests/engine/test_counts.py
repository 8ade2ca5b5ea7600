"""A guard against slower steps that counts instead of timing: passes, large allocations, Python calls."""

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import torchmto
from torchmto import solvers

TASKS = tuple(f"t{i}" for i in range(5))
WIDTH = 64


class Allocations(TorchDispatchMode):
    """Counts new storages of at least ``size`` elements, and the elements of the largest."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.count = 0
        self.largest = 0
        self._known: set[int] = set()
        self._kept: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        before = {x.untyped_storage().data_ptr() for x in _tensors(args)} | self._known
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            numel = storage.nbytes() // tensor.element_size()
            if numel >= self.size and storage.data_ptr() not in before:
                # Kept, so that no address comes twice.
                self._kept.append(tensor)
                self._known.add(storage.data_ptr())
                self.count += 1
                self.largest = max(self.largest, numel)
        return result


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, list | tuple):
        return [tensor for entry in value for tensor in _tensors(entry)]
    return []


def _made(
    method: str, **options: Any
) -> tuple[torchmto.MultiTask, Callable[..., dict[str, Tensor]], list[nn.Parameter]]:
    """Three square layers, so that no single gradient has P elements."""
    torch.manual_seed(0)
    trunk = nn.Sequential(*[layer for _ in range(6) for layer in (nn.Linear(WIDTH, WIDTH), nn.Tanh())])
    heads = nn.ModuleDict({task: nn.Linear(WIDTH, 1) for task in TASKS})
    model = nn.ModuleDict({"trunk": trunk, "heads": heads})
    mt = torchmto.MultiTask(model, torch.optim.SGD(model.parameters(), lr=0.1), tasks=TASKS, method=method, **options)
    x = torch.randn(4, WIDTH)

    def losses(tasks: tuple[str, ...]) -> dict[str, Tensor]:
        features = trunk(x)
        return {task: heads[task](features).square().mean() for task in tasks}

    return mt, losses, list(trunk.parameters())


@pytest.mark.parametrize("method", ["pcgrad", "mgda", "cagrad", "nash_mtl", "upgrad", "wpcgrad", "gd", "uw"])
def test_no_allocation_of_the_size_of_the_parameters(method: str) -> None:
    mt, losses, trunk = _made(method)
    mt.step(losses)
    size = sum(p.numel() for p in trunk)
    with Allocations(size) as counted:
        info = mt.step(losses)
    # The matrix is reused from step to step, and the combination is written into it.
    assert counted.count == 0
    assert (info.num_forward, info.num_optimizer_steps) == (1, 1)


@pytest.mark.parametrize(("method", "backwards"), [("gd", 1), ("uw", 1), ("pcgrad", 5), ("cagrad", 5), ("graddrop", 5)])
def test_passes(method: str, backwards: int) -> None:
    mt, losses, _ = _made(method)
    calls = []

    def counting(tasks: tuple[str, ...]) -> dict[str, Tensor]:
        calls.append(tasks)
        return losses(tasks)

    info = mt.step(counting)
    assert (len(calls), info.num_forward, info.num_backward, info.num_optimizer_steps) == (1, 1, backwards, 1)


def test_layerwise_never_holds_the_matrix() -> None:
    mt, losses, trunk = _made("pcgrad", gradients="layerwise")
    mt.step(losses)
    size = sum(p.numel() for p in trunk)
    mt.network.engine.__init__(mt.network.ranks)
    with Allocations(1) as counted:
        mt.step(losses)
    # One of six layers at a time.
    assert counted.largest <= len(TASKS) * size / 6
    assert counted.largest < size


@pytest.mark.parametrize(
    "solve",
    [solvers.min_norm, solvers.cagrad, solvers.aligned, solvers.imtl_g, solvers.config, solvers.pcgrad],
    ids=lambda f: f.__name__,
)
def test_python_calls_of_the_solvers_do_not_grow_with_the_pairs(solve: Callable[[np.ndarray], object]) -> None:
    counts = []
    for num_tasks in (10, 40):
        rows = np.random.default_rng(0).normal(size=(num_tasks, 100))
        solve(rows @ rows.T)
        calls = 0

        def count(frame: Any, event: str, argument: Any) -> None:
            nonlocal calls
            calls += event in ("call", "c_call")

        sys.setprofile(count)
        try:
            solve(rows @ rows.T)
        finally:
            sys.setprofile(None)
        counts.append(calls)
    # Sixteen times the pairs: calls may grow with the tasks (fourfold), never with the pairs.
    assert counts[1] <= 8 * counts[0]
