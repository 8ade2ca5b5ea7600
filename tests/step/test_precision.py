"""The step tells its methods how precise the rows are, and updates of gradients that cancel keep their promises."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchmto
from gradient_matrices import CANCELLING, cancelling
from torchmto import solvers
from torchmto.methods import GramianWeighting
from torchmto.step import network

METHODS = [("upgrad", {}), ("dualproj", {}), ("cagrad", {"c": 1.0})]


class Point(nn.Module):
    def __init__(self, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.point = nn.Parameter(torch.zeros(width, dtype=dtype))


def descend(J: Tensor, method: str | GramianWeighting, **options: Any) -> tuple[Tensor, torchmto.StepInfo]:
    """The step that SGD takes on linear losses with the gradients J."""
    model = Point(J.shape[1], J.dtype)
    tasks = [f"task{i}" for i in range(len(J))]
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    mt = torchmto.MultiTask(model, optimizer, tasks=tasks, method=method, **options)
    info = mt.step(lambda wanted: {task: (J[tasks.index(task)] * model.point).sum() for task in wanted})
    return -model.point.detach().double(), info


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("name", "options"), METHODS)
@pytest.mark.parametrize("kind", CANCELLING)
def test_updates_of_cancelling_gradients(kind: str, name: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    eps = torch.finfo(dtype).eps
    for num_tasks, width in ((3, 3), (3, 20_000), (12, 40), (40, 1000)):
        J = torch.tensor(cancelling(kind, num_tasks, width, seed=num_tasks)).to(dtype)
        update, info = descend(J, torchmto.make_method(name, **options))
        rows = J.double()
        lengths, mean = rows.norm(dim=1), rows.mean(0).norm()
        size = torch.maximum(mean, 2e-3 * lengths.mean())
        assert info.weights is not None
        assert max(info.weights.values()) < 2e3
        assert info.num_fallbacks == 0
        assert bool((rows @ update >= -(1e-3 + 2 * eps) * lengths * torch.maximum(size, update.norm())).all())
        if name == "cagrad":
            assert (update - rows.mean(0)).norm() <= mean + (1e-2 + eps) * size
        else:
            assert update.norm() <= (lengths.mean() if name == "upgrad" else mean) + (1e-2 + eps) * size


class Watch(GramianWeighting):
    """Equal weights; keeps what it is told."""

    told: float

    def weights(self, gramian: Tensor, losses: Any = None, indices: Any = None) -> Tensor:
        self.told = self.precision_of(gramian)
        return torch.ones(len(gramian), dtype=gramian.dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gradients", ["parameters", "layerwise"])
def test_the_precision_of_the_rows_is_told(dtype: torch.dtype, gradients: str) -> None:
    watch = Watch()
    descend(torch.eye(2, 3, dtype=dtype), watch, gradients=gradients)
    assert watch.told == torch.finfo(dtype).eps
    watch.weights(torch.eye(2, dtype=torch.float64))
    assert watch.told == torch.finfo(torch.float64).eps


def test_methods_inside_methods_are_told() -> None:
    for outer in ("cr_mogm", "task_groups"):
        watch = Watch()
        options: dict[str, Any] = (
            {"method": watch} if outer == "cr_mogm" else {"inner": watch, "groups": [["task0", "task1"]]}
        )
        descend(torch.eye(2, 3), torchmto.make_method(outer, **options))
        assert watch.told == torch.finfo(torch.float32).eps


@pytest.mark.parametrize("rows", [torch.eye(3), torch.diag(torch.tensor([1.0, 0.0, 1.0]))])
def test_mgda_is_told_beside_zero_gradients_too(monkeypatch: pytest.MonkeyPatch, rows: Tensor) -> None:
    told, original = [], solvers.min_norm
    monkeypatch.setattr(
        solvers, "min_norm", lambda *given, **options: told.append(options) or original(*given, **options)
    )
    descend(rows, "mgda")
    assert told == [{"precision": torch.finfo(torch.float32).eps}]


class Trunk(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(4, 4)
        self.heads = nn.ModuleList([nn.Linear(4, 1), nn.Linear(4, 1)])


@pytest.mark.parametrize("gradients", ["parameters", "layerwise", "representation"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_autocast_is_seen_in_the_graph(gradients: str, dtype: torch.dtype | None) -> None:
    model, watch = Trunk(), Watch()
    options = {"features": model.trunk} if gradients == "representation" else {}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    mt = torchmto.MultiTask(model, optimizer, tasks=["a", "b"], method=watch, gradients=gradients, **options)

    def closure(tasks: tuple[str, ...]) -> dict[str, Tensor]:
        with torch.autocast(model.trunk.weight.device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            hidden = model.trunk(torch.ones(3, 4))
            losses = {task: model.heads["ab".index(task)](hidden) for task in tasks}
        return {task: loss.float().square().mean() for task, loss in losses.items()}

    for _ in range(2):
        mt.step(closure)
    assert watch.told == torch.finfo(dtype or torch.float32).eps


def test_the_coarsest_of_mixed_types_counts() -> None:
    model, watch = Trunk(), Watch()
    model.trunk.bias.data = model.trunk.bias.data.bfloat16()
    mt = torchmto.MultiTask(model, torch.optim.SGD(model.parameters(), lr=0.1), tasks=["a", "b"], method=watch)

    def closure(tasks: tuple[str, ...]) -> dict[str, Tensor]:
        hidden = torch.ones(3, 4) @ model.trunk.weight + model.trunk.bias
        return {task: model.heads["ab".index(task)](hidden).square().mean() for task in tasks}

    mt.step(closure)
    assert watch.told == torch.finfo(torch.bfloat16).eps


def test_settings_of_tensorfloat_are_read() -> None:
    before = torch.get_float32_matmul_precision()
    try:
        for setting, expected in (("highest", False), ("high", True), ("medium", True)):
            torch.set_float32_matmul_precision(setting)
            assert network.multiplies_in_tf32() is expected
    finally:
        torch.set_float32_matmul_precision(before)


def test_rounding_errors_are_no_conflict() -> None:
    """Two orthogonal gradients, whose product in float32 is a little below zero."""
    for seed in range(20):
        J = torch.randn(2, 1000, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        J[1] -= (J[1] @ J[0]) / (J[0] @ J[0]) * J[0]
        assert descend(J.float(), "upgrad")[1].num_conflicts == 0
        assert descend(J.float(), "son_goku")[1].records["groups"] == [["task0", "task1"]]
    assert descend(torch.tensor([[1.0, 0.0], [-1e-3, 1.0]]), "upgrad")[1].num_conflicts == 1
