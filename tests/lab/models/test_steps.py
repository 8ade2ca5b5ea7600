"""The models under `MultiTask`: steps that run the trunk per task, alone or stacked, checkpointed or not."""

import pytest
import torch

from torchmto import MultiTask, make_method
from torchmto.lab.data.base import Task
from torchmto.lab.losses import task_loss
from torchmto.lab.models import build_model

TASKS = (Task("seg", "segmentation", 3), Task("depth", "depth", 1))
SHAPE = (3, 32, 32)


def train(method, *, checkpointing, steps=3):
    torch.manual_seed(0)
    model = build_model("segnet", TASKS, SHAPE, width=2, task_norms=True, gradient_checkpointing=checkpointing)
    options = {"total_steps": steps} if method == "connection_strength" else {}
    mt = MultiTask(
        model,
        torch.optim.Adam(model.parameters(), 1e-3),
        tasks=[task.name for task in TASKS],
        method=make_method(method, **options),
        seed=0,
    )
    x = torch.rand(4, *SHAPE)
    targets = {"seg": (x[:, 0] * 3).long(), "depth": x.sum(dim=1, keepdim=True)}
    losses = {task.name: task_loss(task) for task in TASKS}
    history = []
    for _ in range(steps):
        info = mt.step(lambda names: {name: losses[name](y, targets[name]) for name, y in model(x, names).items()})
        history.append({name: float(loss) for name, loss in info.losses.items()})
    return history, model.state_dict()


@pytest.mark.parametrize("method", ["gd", "connection_strength", "task_groups"])
def test_steps_are_the_same_with_checkpointing(method):
    history, state = train(method, checkpointing=False)
    again, state_again = train(method, checkpointing=True)
    assert again == [pytest.approx(losses, rel=1e-4) for losses in history]
    assert sum(history[-1].values()) < sum(history[0].values())
    for key, value in state.items():
        torch.testing.assert_close(state_again[key], value, rtol=1e-3, atol=1e-4)
