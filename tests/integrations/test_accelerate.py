"""Accelerate: `mt.backward` under `accumulate()` with a prepared optimizer drops nothing."""

import pytest
import torch

import torchmto
from toy import Toy, batch, closure, flat, make

accelerate = pytest.importorskip("accelerate")
TASKS = ("a", "b", "c")


@pytest.fixture(autouse=True)
def _fresh():
    """Accelerate's state is the process's."""
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


@pytest.mark.parametrize("method", ["uw", "pcgrad", "nash_mtl"])
def test_accumulate_with_a_prepared_optimizer(method):
    """Seven batches by threes: three steps, the last on what is left, each on the rows of all its micro-batches."""
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=3)
    model = Toy(TASKS)
    data = [batch(TASKS, seed=seed) for seed in range(7)]
    loader = torch.utils.data.DataLoader(data, batch_size=None)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.9)
    wrapped, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    mt = torchmto.MultiTask(wrapped, optimizer, tasks=TASKS, method=method)
    for entry in loader:
        with accelerator.accumulate(wrapped):
            mt.backward(closure(wrapped, entry), final=accelerator.sync_gradients)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(wrapped.parameters(), 0.5)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    twin, other, own = make(method, optimizer=lambda p: torch.optim.Adam(p, lr=0.02), clip=0.5)
    by_hand = torch.optim.lr_scheduler.StepLR(other, 1, gamma=0.9)
    for start in (0, 3, 6):
        own.step([closure(twin, entry) for entry in data[start : start + 3]])
        by_hand.step()
    torch.testing.assert_close(flat(model), flat(twin), rtol=1e-6, atol=1e-10)
    assert {int(state["step"]) for state in optimizer.state.values()} == {3}


def test_a_whole_step_inside_accumulate_is_refused():
    """A step that the wrapper swallows is noticed, not lost."""
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = accelerator.prepare(Toy(TASKS))
    optimizer = accelerator.prepare(torch.optim.SGD(model.parameters(), lr=0.1))
    mt = torchmto.MultiTask(model, optimizer, tasks=TASKS, method="gd")
    with accelerator.accumulate(model), pytest.raises(RuntimeError, match=r"mt\.backward"):
        mt.step(closure(model, batch(TASKS)))


@pytest.mark.parametrize("method", ["gd", "pcgrad"])
def test_a_prepared_optimizer_s_own_scaler(method):
    """It divides gradients by a scale that MultiTask has to know, and steps through it, which mt.step can't follow."""
    accelerate.Accelerator(cpu=True)
    model, (twin, _, mt_twin) = Toy(TASKS), make(method, optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    optimizer = accelerate.optimizer.AcceleratedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), scaler=scaler)
    for other in (None, torch.amp.GradScaler("cpu")):
        with pytest.raises(ValueError, match=r"Parameter `scaler` should be.*`accelerator\.scaler`"):
            torchmto.MultiTask(model, optimizer, tasks=TASKS, method=method, scaler=other)
    mt = torchmto.MultiTask(model, optimizer, tasks=TASKS, method=method, scaler=scaler)
    before = flat(model)
    with pytest.raises(RuntimeError, match=r"by itself.*mt\.backward"):
        mt.step(closure(model, batch(TASKS)))
    assert torch.equal(flat(model), before)
    mt.backward(closure(model, batch(TASKS)))
    optimizer.step()
    mt_twin.step(closure(twin, batch(TASKS)))
    torch.testing.assert_close(flat(model), flat(twin))
