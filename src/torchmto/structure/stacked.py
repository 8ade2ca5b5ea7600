"""Several tasks in one batched pass through shared layers."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from torchmto.gradients.torch_private import tree_map
from torchmto.task_norms import active_task, active_tasks


def stacked(trunk: Callable[..., Any]) -> Callable[..., dict[str, Any]]:
    """Run a trunk with split norms for K tasks as one batched pass.

    The tasks' inputs are stacked along the batch dimension; convolutions and linear layers see one batch of K
    times the size, and every split norm works on each task's part with that task's copy. The numbers,
    BatchNorm statistics included, are those of K separate passes, up to the rounding of other kernel shapes.

    Limits: dimension 0 has to be the batch in the input and at every split norm (merging other dimensions
        *behind* it,
    as windows and heads do, is fine; sequence-first layouts aren't). Nothing but the split norms may look
    across
    examples: an unsplit BatchNorm would take its statistics over all tasks. Dropout draws a different mask
        for each
    task. Memory is that of K passes at once.

    Args:
        trunk: A module, or any callable that runs modules, with norms split by
            :func:`torchmto.structure.split_norms`.

    Returns:
        ``run(inputs, tasks, **kwargs) -> {task: output}``. ``inputs`` is one tensor for all tasks, or a
        mapping from task to tensor, all of one batch size; ``kwargs`` go to the trunk as they are. Every
        tensor in the trunk's output (tensor, tuple, list or dict) is cut along dimension 0.

    Raises:
        ValueError: (by ``run``) inputs of different batch sizes, or missing for a task.
        RuntimeError: (by ``run``) an output that can't be cut into one part per task.

    Example:
        >>> from torch import nn
        >>> from torchmto.structure import split_norms
        >>> trunk = split_norms(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), ["seg", "depth"])
        >>> features = stacked(trunk)(torch.randn(4, 3, 8, 8), ["seg", "depth"])
        >>> features["depth"].shape
        torch.Size([4, 8, 6, 6])
    """

    def run(inputs: Tensor | Mapping[str, Tensor], tasks: Sequence[str], **kwargs: Any) -> dict[str, Any]:
        tasks = tuple(tasks)
        if isinstance(inputs, Mapping):
            missing = [task for task in tasks if task not in inputs]
            if missing:
                raise ValueError(f"Parameter `inputs` should hold an input for every task. Missing: {missing}.")
            parts = [inputs[task] for task in tasks]
        else:
            parts = [inputs] * len(tasks)
        if len({part.shape[0] for part in parts}) > 1:
            raise ValueError(
                "Parameter `inputs` should hold batches of one size. Found "
                f"{ {task: part.shape[0] for task, part in zip(tasks, parts, strict=True)} }."
            )
        if len(tasks) == 1:
            with active_task(tasks[0]):
                return {tasks[0]: trunk(parts[0], **kwargs)}
        with active_tasks(tasks):
            output = trunk(torch.cat(parts), **kwargs)
        return {task: tree_map(lambda leaf, i=i: _part(leaf, i, len(tasks)), output) for i, task in enumerate(tasks)}

    return run


def _part(leaf: Any, index: int, count: int) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    if leaf.dim() == 0 or leaf.shape[0] % count:
        raise RuntimeError(
            f"The trunk's output should have one equal part per task along dimension 0, for {count} tasks. "
            f"Found a tensor of shape {tuple(leaf.shape)}."
        )
    return leaf.chunk(count)[index]
