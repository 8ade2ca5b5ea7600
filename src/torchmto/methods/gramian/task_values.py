"""Numbers per task, as arguments and as state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from torchmto.checks import check_number, found

TaskFloats = Mapping[str, float] | Sequence[float]
"""One number per task: task -> number, or numbers in the order of the tasks."""


class TaskValues:
    """One non-negative number per task, given by the user.

    Args:
        name: The argument's name, for messages.
        given: Task -> number, or a sequence in the order of the tasks.

    Raises:
        TypeError: If it is neither, or holds something that isn't a number.
        ValueError: If a number is negative or not finite.
    """

    def __init__(self, name: str, given: TaskFloats) -> None:
        if isinstance(given, str) or not isinstance(given, Mapping | Sequence):
            raise TypeError(found(name, "a mapping of task names to floats, or a sequence of floats", given))
        items = given.items() if isinstance(given, Mapping) else enumerate(given)
        self.values = [check_number(f"{name}[{key!r}]", value, minimum=0) for key, value in items]
        self.name = name
        self.given = given

    def bind(self, tasks: tuple[str, ...]) -> None:
        """Match the numbers with the tasks.

        Raises:
            ValueError: If a task has none, or there are numbers of other tasks.
        """
        if isinstance(self.given, Mapping):
            if set(self.given) != set(tasks):
                raise ValueError(found(self.name, f"a mapping with exactly the tasks {list(tasks)}", dict(self.given)))
            self.values = [float(self.given[name]) for name in tasks]
        elif len(self.given) != len(tasks):
            raise ValueError(found(self.name, f"a sequence of {len(tasks)} floats", list(self.given)))

    def of(self, num_tasks: int, indices: Sequence[int] | None) -> list[float]:
        """The numbers of the present tasks.

        Raises:
            ValueError: If there are fewer numbers than tasks.
        """
        present = range(num_tasks) if indices is None else indices
        if max(present) >= len(self.values):
            raise ValueError(found(self.name, f"a sequence of at least {max(present) + 1} floats", self.values))
        return [self.values[i] for i in present]


class Preference:
    """How much each task counts in a sum or mean of modified gradients.

    Args:
        given: One number per task (see :class:`TaskValues`), or None for the same for all.
        scale: Without ``given``: "sum": 1 for each task; "mean": 1/k for each of k present tasks.

    Raises:
        TypeError: As in :class:`TaskValues`.
        ValueError: As in :class:`TaskValues`.
    """

    def __init__(self, given: TaskFloats | None, scale: str) -> None:
        self.values = None if given is None else TaskValues("preference", given)
        self.scale = scale

    def bind(self, tasks: tuple[str, ...]) -> None:
        """Match the numbers with the tasks."""
        if self.values is not None:
            self.values.bind(tasks)

    def of(self, num_tasks: int, indices: Sequence[int] | None) -> list[float]:
        """The present tasks' preferences; those of absent tasks are shared out in proportion."""
        if self.values is None:
            return [1.0 if self.scale == "sum" else 1.0 / num_tasks] * num_tasks
        present = self.values.of(num_tasks, indices)
        total, left = sum(self.values.values), sum(present)
        return present if left in (total, 0.0) else [value * (total / left) for value in present]


def shares_of(state: Tensor, indices: Sequence[int]) -> Tensor:
    """The present tasks' entries of a point of the simplex [K], rescaled to sum 1: a point of the smaller simplex [k].

    Example:
        >>> shares_of(torch.tensor([0.25, 0.25, 0.5]), [0, 1])
        tensor([0.5000, 0.5000])
    """
    if len(indices) == len(state):
        return state.clone()
    part = state[list(indices)]
    total = part.sum()
    return part / total if bool(total > 0) else torch.full_like(part, 1 / len(part))


@torch.no_grad()
def set_shares(state: Tensor, indices: Sequence[int], shares: Tensor) -> None:
    """Put new shares of the present tasks back; absent tasks keep theirs, and the whole still sums to 1."""
    where = list(indices)
    if len(where) == len(state):
        state.copy_(shares)
    else:
        state[where] = shares.to(state) * state[where].sum()
