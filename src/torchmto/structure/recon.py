"""Recon: find the layers in which the tasks' gradients conflict most, and make them task-specific."""

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchmto.checks import check_number, check_tasks
from torchmto.gradients.torch_private import modules_of
from torchmto.structure.oracle import Closure, per_task
from torchmto.task_norms import PerTask, check_key_parts, current_tasks


class TaskSpecific(PerTask):
    """A layer with one copy per task; a call goes to the active task's copy."""

    def __init__(self, layer: nn.Module, tasks: Sequence[str]) -> None:
        super().__init__(layer, {task: copy.deepcopy(layer) for task in tasks})

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the active task's copy.

        Raises:
            RuntimeError: Not exactly one of its tasks is active.
        """
        tasks = current_tasks()
        if len(tasks) != 1 or tasks[0] not in self.task_names:
            raise RuntimeError(
                f"A task-specific layer needs one active task out of {list(self.task_names)}. Found {list(tasks)}. Run the "
                "forward pass inside `with torchmto.structure.active_task(name):`."
            )
        return self.get_submodule(tasks[0])(*args, **kwargs)


def conflict_scores(
    model: nn.Module,
    closures: Iterable[Closure],
    tasks: Sequence[str],
    *,
    threshold: float = -0.02,
) -> dict[str, int]:
    """How often two tasks' gradients conflict in each shared layer.

    A layer is a module that holds parameters itself. For every batch and every pair of tasks whose losses both reach
    the layer, it scores 1 if the cosine of their gradients on the layer's parameters is below ``threshold``.

    Gradients only are computed; ``.grad``, buffers and torch's random state should be kept by the caller
    (:func:`torchmto.structure.undisturbed`) if the forward passes change them.

    Args:
        model: The model; with split norms every task gets its own forward pass.
        closures: One ``closure(tasks) -> {task: loss}`` per batch.
        tasks: The names of the tasks.
        threshold: The paper's S, in [-1, 0].

    Returns:
        Path of every layer that two tasks share -> its score, the largest first.

    Raises:
        ValueError: ``threshold`` is out of range.

    Source: Shi et al., Recon: Reducing Conflicting Gradients from the Root for Multi-Task Learning, ICLR 2023
    (S-conflict scores).
    """
    threshold = check_number("threshold", threshold, minimum=-1, maximum=0)
    own_of = {
        path: [p for p in m.parameters(recurse=False) if p.requires_grad] for path, m in modules_of(model).items()
    }
    layers = {path: own for path, own in own_of.items() if own}
    everything = [parameter for own in layers.values() for parameter in own]
    scores: dict[str, int] = {}

    def gradient(loss: Tensor) -> tuple[Tensor | None, ...]:
        return torch.autograd.grad(loss, everything, retain_graph=True, allow_unused=True)

    for closure in closures:
        gradients = per_task(model, closure, tasks, gradient)
        start = 0
        for path, own in layers.items():
            parts = {task: rows[start : start + len(own)] for task, rows in gradients.items()}
            start += len(own)
            flat = [
                torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(own, part, strict=True)])
                for part in parts.values()
                if any(g is not None for g in part)
            ]
            if len(flat) < 2:
                continue
            unit = nn.functional.normalize(torch.stack(flat).double(), dim=1)
            below = (unit @ unit.T).triu(1) < threshold
            scores[path] = scores.get(path, 0) + int(below.sum())
    return dict(sorted(scores.items(), key=lambda entry: -entry[1]))


def make_task_specific(model: nn.Module, tasks: Sequence[str], layers: Iterable[str]) -> nn.Module:
    """Give each of the named layers one copy per task. The model is changed in place and returned.

    Copies start equal to the original. Call it before building the optimizer: the parameters are new. As the paper
    does, train the changed model anew; any method can train what stays shared. A forward pass then needs an active
    task, which :class:`torchmto.MultiTask` sets by itself.

    Args:
        model: Any module.
        tasks: The names of the tasks; they become parts of state keys.
        layers: Paths of modules, for instance the first few of :func:`conflict_scores`.

    Returns:
        ``model``.

    Raises:
        TypeError: A task that isn't a string, or a string instead of a sequence of them.
        ValueError: A path that doesn't exist or is the model itself, no task or one twice, or a name that can't be part of a
            state key.

    Source: Shi et al., Recon, ICLR 2023.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> sorted(make_task_specific(model, ["a", "b"], ["2"]).state_dict())
        ['0.bias', '0.weight', '2.a.bias', '2.a.weight', '2.b.bias', '2.b.weight']
    """
    names, paths = check_tasks(tasks), list(layers)
    known = modules_of(model)
    for path in paths:
        if not path or path not in known:
            raise ValueError(f"Parameter `layers` should hold paths of modules inside the model. Found {path!r}.")
        check_key_parts(names, known[path])
    for path in paths:
        parent, _, name = path.rpartition(".")
        setattr(known[parent], name, TaskSpecific(known[path], names))
    return model
