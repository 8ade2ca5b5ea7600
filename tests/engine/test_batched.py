"""One batched backward for all tasks, which `gradients="auto"` takes where launches cost more than arithmetic."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchmto
from engine.test_engines import INTERLACED, ZOO, Sample, checkpointed, one_forward_per_task, shapes, unknown
from torchmto.gradients import choice
from torchmto.gradients.choice import Auto, Costs
from torchmto.gradients.engine import Piece, Wanted
from toy import Toy, batch, closure, flat, make

TASKS = ("a", "b", "c")
NOT_BATCHED = {checkpointed, unknown, shapes, one_forward_per_task, *INTERLACED}
"""What is recomputed, functions of others, writing into views; and nothing that tasks share."""
ALWAYS = Costs(node=0, call=1e30, task=0, formed=0, launch=1, batch=0, leaf=0)


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CPU", "GPU"):
        monkeypatch.setattr(choice, name, ALWAYS)
    monkeypatch.setattr(choice, "LIVE", 0)
    monkeypatch.setattr(choice, "FEW", 0)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each call of `torch.autograd.grad` was batched."""
    noted: list[bool] = []
    original = torch.autograd.grad
    inside = False

    def noting(*args: Any, **kwargs: Any) -> Any:
        nonlocal inside
        if inside:  # where there is a default device, PyTorch calls it by its name once more
            return original(*args, **kwargs)
        noted.append(kwargs.get("is_grads_batched", False))
        inside = True
        try:
            return original(*args, **kwargs)
        finally:
            inside = False

    monkeypatch.setattr(torch.autograd, "grad", noting)
    return noted


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("make_sample", ZOO, ids=lambda f: f.__name__)
def test_gramian_and_combination_are_exact(make_sample: Callable[[], Sample]) -> None:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    try:
        sample = make_sample()
    finally:
        torch.set_default_dtype(torch.float32)
    losses = dict(enumerate(sample.losses(("t0", "t1", "t2")).values()))
    parameters = list(sample.model.parameters())
    rows = [
        [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=True)]
        for gradients in (
            torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True) for loss in losses.values()
        )
    ]
    matrix = torch.stack([torch.cat([gradient.flatten() for gradient in row]) for row in rows])
    engine = Auto()
    engine.begin()
    engine._nodes = 0  # the graph was made before
    engine.read([losses])
    assert engine.pays(parameters, len(losses)) == (make_sample not in NOT_BATCHED)
    if make_sample in NOT_BATCHED:
        return
    wanted = Wanted([Piece(losses, dict.fromkeys(losses))], list(losses), parameters, [], lambda *_: None)
    torch.testing.assert_close(engine.gramian(wanted), matrix @ matrix.T, rtol=1e-10, atol=1e-12)
    weights = [0.5, -1.0, 2.0]
    seeds = {task: torch.tensor(weight, dtype=torch.float64) for task, weight in zip(losses, weights, strict=True)}
    assert engine.backward([Piece(losses, seeds)], parameters) == 0
    expected = torch.tensor(weights, dtype=torch.float64) @ matrix
    found = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("options", [{}, {"weights": {"a": 2.0}, "clip": 0.5}, {"weights": "uw"}])
@pytest.mark.parametrize(("name", "heads"), [("pcgrad", "unit"), ("upgrad", "unit"), ("cagrad", "weighted")])
def test_steps_equal_those_with_rows(name: str, heads: str, options: dict[str, Any], calls: list[bool]) -> None:
    ends = []
    for gradients in ("auto", "parameters"):
        method = torchmto.make_method(name, heads=heads)
        model, _, mt = make(method, model=Toy(TASKS, norm=nn.BatchNorm1d(5)), gradients=gradients, **options)
        for step, present in enumerate((TASKS, ("c",), TASKS, ("b", "c"))):
            calls.clear()
            info = mt.step(closure(model, batch(TASKS, seed=step), only=present))
            if gradients == "auto" and len(present) > 1:
                assert info.engine == "mixed"
                assert calls.count(True) == 1
                assert calls.count(False) == len(present), "one for each head"
        ends.append(flat(model))
    torch.testing.assert_close(*ends, rtol=1e-9, atol=1e-12)


@pytest.mark.usefixtures("always")
def test_what_has_no_batched_form_is_gone_through_task_by_task(calls: list[bool]) -> None:
    """Sparse gradients of an embedding."""

    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.table = nn.Embedding(9, 4, sparse=True)
            self.trunk, self.heads = nn.Linear(4, 4), nn.ModuleDict({task: nn.Linear(4, 1) for task in TASKS})

    ends = []
    for gradients in ("auto", "parameters"):
        net = Words().double()
        words = torch.tensor([1, 2, 2, 5])

        def losses(tasks: tuple[str, ...], net: Words = net, words: Tensor = words) -> dict[str, Tensor]:
            features = net.trunk(net.table(words)).tanh()
            return {task: (net.heads[task](features) - TASKS.index(task)).square().mean() for task in tasks}

        mt = torchmto.MultiTask(
            net, torch.optim.SGD(net.parameters(), 0.1), tasks=TASKS, method="pcgrad", gradients=gradients
        )
        for step in range(3):
            calls.clear()
            mt.step(losses)
            assert (True in calls) == (gradients == "auto" and step == 0), "one attempt"
        ends.append(flat(net))
    torch.testing.assert_close(*ends, rtol=1e-9, atol=1e-12)


def test_room_is_found_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where K cotangents of large activations would take more than the rows."""
    for name in ("CPU", "GPU"):
        monkeypatch.setattr(choice, name, ALWAYS)
    trunk = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 128, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    net = nn.ModuleDict({"trunk": trunk, **{task: nn.Linear(128, 1) for task in TASKS}})
    net.add_module("more", nn.Linear(128, 128))
    mt = torchmto.MultiTask(net, torch.optim.SGD(net.parameters(), 0.1), tasks=TASKS, method="pcgrad")
    for size, engine in ((6, "mixed"), (64, "parameters")):
        images = torch.randn(2, 3, size, size)

        def losses(tasks: tuple[str, ...], images: Tensor = images) -> dict[str, Tensor]:
            features = net["more"](net["trunk"](images))
            return {task: net[task](features).square().mean() for task in tasks}

        assert mt.step(losses).engine == engine


@pytest.mark.usefixtures("always")
def test_under_autocast() -> None:
    ends = []
    for gradients in ("auto", "parameters"):
        model, _, mt = make("pcgrad", model=Toy(TASKS, width=16, dtype=torch.float32), gradients=gradients)
        kind = next(model.parameters()).device.type
        for step in range(3):
            mt.step(torch.autocast(kind, torch.bfloat16)(closure(model, batch(TASKS, seed=step, dtype=torch.float32))))
        ends.append(flat(model))
    torch.testing.assert_close(*ends, rtol=0.02, atol=0.005)


@pytest.mark.usefixtures("always")
def test_operations_without_a_batched_form_are_no_warning(recwarn: pytest.WarningsRecorder) -> None:
    torch.manual_seed(0)
    trunk, heads = nn.Linear(4, 8), nn.ModuleDict({task: nn.Linear(8, 1) for task in TASKS})
    net = nn.ModuleList([trunk, heads])
    x = torch.randn(2, 6, 4)

    def losses(tasks: tuple[str, ...]) -> dict[str, Tensor]:
        given = trunk(x).unsqueeze(1)
        features = nn.functional.scaled_dot_product_attention(given, given, given)
        return {task: heads[task](features).square().mean() for task in tasks}

    mt = torchmto.MultiTask(net, torch.optim.SGD(net.parameters(), 0.1), tasks=TASKS, method="pcgrad")
    assert mt.step(losses).engine == "mixed"
    assert not [warning for warning in recwarn if "performance" in str(warning.message)]
