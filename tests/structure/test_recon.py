"""Recon's two tools: where do the tasks conflict, and what if those layers weren't shared."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import torchmto
from torchmto.structure import TaskSpecific, conflict_scores, make_task_specific

TASKS = ("up", "down", "other")


def problem():
    """Two tasks pull the second layer in opposite directions; the third has a layer of its own."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"first": nn.Linear(3, 4), "second": nn.Linear(4, 1), "third": nn.Linear(4, 1)}).double()
    x = torch.randn(8, 3, dtype=torch.float64)

    def closure(asked):
        h = model["first"](x)
        every = {
            "up": lambda: model["second"](h.detach()).mean(),
            "down": lambda: -model["second"](h.detach()).mean() + model["first"](x).square().mean(),
            "other": lambda: model["third"](h).square().mean() + h.square().mean(),
        }
        return {t: every[t]() for t in asked}

    return model, closure


def test_layers_are_ranked_by_their_conflicts():
    model, closure = problem()
    scores = conflict_scores(model, [closure, closure], TASKS)
    assert scores["second"] == 2
    assert list(scores) == ["second", "first"]  # the third layer belongs to one task
    assert all(p.grad is None for p in model.parameters())


def test_task_specific_layers_end_the_conflict_and_train():
    model, closure = problem()
    make_task_specific(model, TASKS, ["second"])
    assert isinstance(model["second"], TaskSpecific)
    mt = torchmto.MultiTask(model, torch.optim.SGD(model.parameters(), lr=0.1), tasks=TASKS, method="pcgrad")
    info = mt.step(closure)
    assert info.num_forward == 3
    assert not mt.network.roles.is_shared("second.up.weight")
    assert mt.network.roles.is_shared("first.weight")
    assert model["second"].get_submodule("other").weight.grad is None
    assert set(conflict_scores(model, [closure], TASKS)) == {"first"}


def test_a_checkpointed_task_specific_layer():
    """The forward runs again inside the backward, for the same task."""
    scores = []
    for checkpointed in (True, False):
        model, _ = problem()
        make_task_specific(model, TASKS, ["second"])
        x = torch.ones(8, 3, dtype=torch.float64, requires_grad=True)

        def closure(asked, model=model, x=x, checkpointed=checkpointed):
            run = nn.Sequential(model["first"], model["second"])
            y = checkpoint(run, x, use_reentrant=False) if checkpointed else run(x)
            return {t: (y.mean() - i) ** 2 for i, t in enumerate(TASKS) if t in asked}

        scores.append(conflict_scores(model, [closure], TASKS))
    assert scores[0] == scores[1]


def test_mistakes():
    model, closure = problem()
    with pytest.raises(ValueError, match="paths of modules"):
        make_task_specific(model, TASKS, ["second", "fourth"])
    for tasks in (["weight"], ["task_names"], ["a.b"]):
        with pytest.raises(ValueError, match="state key"):
            make_task_specific(model, tasks, ["second"])
    with pytest.raises(ValueError, match="twice"):
        make_task_specific(model, ["a", "a"], ["second"])
    with pytest.raises(TypeError, match="sequence of task names"):
        make_task_specific(model, "ab", ["second"])
    assert isinstance(model["second"], nn.Linear)
    with pytest.raises(ValueError, match="threshold"):
        conflict_scores(model, [closure], TASKS, threshold=0.5)
    make_task_specific(model, TASKS, ["second"])
    with pytest.raises(RuntimeError, match="active_task"):
        closure(TASKS)
