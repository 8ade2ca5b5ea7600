"""Data sets with more tasks: copies of the tasks there are, exact or with noisy labels."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from torchmto.checks import check_integer, check_number
from torchmto.lab.data.base import MultiTaskDataset, Task, TensorData
from torchmto.lab.problem import Problem
from torchmto.lab.references import load_problem


def copies(*, of: str = "digits", num_tasks: int = 20, noise: float = 0.0, seed: int = 0, **options: Any) -> Problem:
    """A problem with so many tasks by copies, for recipes.

    Args:
        of: The problem.
        num_tasks: Number of tasks.
        noise: Of the copies' training labels, see `with_copies`.
        seed: Of the problem.
        **options: The problem's own.
    """
    return with_copies(load_problem(of, options, seed), num_tasks, noise=noise)


def with_copies(problem: Problem, count: int, *, noise: float = 0.0, seed: int = 0) -> Problem:
    """The data set with ``count`` tasks: its own, then copies of them in turn.

    Args:
        problem: A data set held in memory, of classification and regression tasks.
        count: Number of tasks; fewer than there are take the first of them.
        noise: Share of training labels of a copy that are drawn at random; for regression the standard deviation of the
            added noise relative to the labels'. Validation and test labels stay exact.
        seed: Of the noise.

    Raises:
        TypeError: If the data isn't held in memory.

    Example:
        >>> from torchmto.lab.data import load_data
        >>> problem = with_copies(load_data("digits", train=60, validation=10, test=10), 5)
        >>> [task.name for task in problem.tasks]
        ['left', 'right', 'offset', 'left_1', 'right_1']
    """
    check_integer("count", count, minimum=1)
    check_number("noise", noise, minimum=0)
    originals = problem.task_list
    tasks: list[Task] = []
    for number in range(count):
        task, copy = originals[number % len(originals)], number // len(originals)
        tasks.append(task if copy == 0 else replace(task, name=f"{task.name}_{copy}"))
    generator = torch.Generator().manual_seed(seed)

    def copied(part: MultiTaskDataset, amount: float) -> TensorData:
        if not isinstance(part, TensorData):
            raise TypeError(f"The data set `{problem.name}` isn't held in memory, so its tasks can't be copied.")
        targets = {}
        for number, task in enumerate(tasks):
            target = part.targets[originals[number % len(originals)].name]
            targets[task.name] = _noisy(target, task, amount if number >= len(originals) else 0.0, generator)
        return TensorData(tuple(tasks), part.inputs, targets)

    return replace(
        problem,
        tasks=tuple(tasks),
        train=copied(problem.train, noise),
        validation=copied(problem.validation, 0.0),
        test=copied(problem.test, 0.0),
    )


def _noisy(target: Tensor, task: Task, noise: float, generator: torch.Generator) -> Tensor:
    if noise == 0:
        return target
    if task.kind == "classification":
        drawn = torch.rand(target.shape, generator=generator) < noise
        labels = torch.randint(task.channels, target.shape, generator=generator, dtype=torch.int64)
        return torch.where(drawn, labels.to(target.dtype), target)
    return target + noise * target.float().std() * torch.randn(target.shape, generator=generator)
