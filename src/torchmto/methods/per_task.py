"""Numbers per task, as arguments and in records."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from torchmto.checks import check_integer, check_number, found, unknown_task

TaskFloats = Mapping[str, float] | Sequence[float]
"""One number per task: task -> number, or numbers in the order of the tasks."""

Numbers = float | TaskFloats
"""One number for all tasks, or one per task."""


class ByTask(ABC):
    """What a method knows by task before the tasks are known. Methods bind those among their attributes as they are bound."""

    @abstractmethod
    def bind(self, tasks: tuple[str, ...]) -> None:
        """Match it with the tasks.

        Raises:
            ValueError: If it doesn't fit them.
        """


class PerTask(ByTask):
    """A hyper-parameter with one value per task.

    Args:
        name: The hyper-parameter's name, for error messages.
        given: A mapping of task names, a sequence in the order of the tasks, or one number for all tasks.
        common: Whether one number for all tasks is allowed.
        **bounds: What each value has to keep to; those of :func:`~torchmto.checks.check_number`.

    Attributes:
        unit: What messages call the values.

    Raises:
        TypeError: If it is neither.
        ValueError: If a value is out of range.
    """

    unit = "floats"

    def __init__(self, name: str, given: Numbers, *, common: bool = True, **bounds: float) -> None:
        self.name = name
        self.given = given
        self._values: list[float] | None = None
        self._common: float
        if common and isinstance(given, Real):
            self._common = check_number(name, given, **bounds)
            return
        if isinstance(given, str) or not isinstance(given, Mapping | Sequence):
            wanted = "a mapping of task names to floats, or a sequence of floats"
            raise TypeError(found(name, f"a number, {wanted}" if common else wanted, given))
        items = given.items() if isinstance(given, Mapping) else enumerate(given)
        self._values = [check_number(f"{name}[{key!r}]", value, **bounds) for key, value in items]

    def bind(self, tasks: tuple[str, ...]) -> None:
        """Match the values with the tasks.

        Raises:
            ValueError: If a task has none, or there are values of other tasks.
        """
        if isinstance(self.given, Mapping):
            if set(self.given) != set(tasks):
                raise ValueError(found(self.name, f"a mapping with exactly the tasks {list(tasks)}", dict(self.given)))
            self._values = [float(self.given[name]) for name in tasks]
        elif self._values is not None and len(self._values) != len(tasks):
            raise ValueError(found(self.name, f"a sequence of {len(tasks)} {self.unit}", self.given))

    def of(self, indices: Sequence[int]) -> Tensor:
        """The values of the tasks ``indices``, float64 on the CPU, [k].

        Raises:
            ValueError: If a task has none.
        """
        if self._values is None:
            return torch.full((len(indices),), self._common, dtype=torch.float64)
        if max(indices) >= len(self._values):
            raise ValueError(found(self.name, f"at least {max(indices) + 1} {self.unit}", self.given))
        return torch.tensor([self._values[i] for i in indices], dtype=torch.float64)

    @property
    def total(self) -> float:
        """The sum over all tasks, where every task has a value of its own."""
        return sum(self._values or ())


class Shares(PerTask):
    """A preference among the tasks: positive weights, used as shares of the present tasks (summing to 1).

    Args:
        name: The hyper-parameter's name.
        given: Task -> positive weight or a sequence; None: all alike.
    """

    def __init__(self, name: str, given: TaskFloats | None) -> None:
        super().__init__(name, 1.0 if given is None else given, above=0)

    def of(self, indices: Sequence[int]) -> Tensor:
        """The shares of the tasks ``indices``, float64 on the CPU, [k]."""
        values = super().of(indices)
        return values / values.sum()


class Primary(ByTask):
    """The task that leads, where one does: its name, or its number.

    Args:
        name: The hyper-parameter's name.
        given: The task's name, or a number from 0.

    Raises:
        TypeError: If it is neither.
        ValueError: If it is a negative number.
    """

    def __init__(self, name: str, given: Any) -> None:
        self.name = name
        self.given: str | int = given if isinstance(given, str) else check_integer(name, given, minimum=0)
        self.index = 0 if isinstance(self.given, str) else self.given

    def bind(self, tasks: tuple[str, ...]) -> None:
        """Match it with the tasks.

        Raises:
            ValueError: If there is no such task.
        """
        if isinstance(self.given, str):
            if self.given not in tasks:
                raise ValueError(unknown_task(self.given, tasks, f"in `{self.name}`"))
            self.index = tasks.index(self.given)
        elif self.given >= len(tasks):
            raise ValueError(found(self.name, f"the name or number of one of {len(tasks)} tasks", self.given))


class Baseline(PerTask):
    """The hyper-parameters ``baseline`` and ``higher_is_better``: single-task values, and how far behind them results are.

    Args:
        given: Task -> the single-task model's value.
        higher_is_better: Task -> whether larger values are better (missing ones are True), or one bool for all.

    Raises:
        TypeError: If a value isn't a number, or a direction isn't a bool.
        ValueError: If a value is 0.
    """

    def __init__(self, given: Mapping[str, float], higher_is_better: Any) -> None:
        super().__init__("baseline", given, common=False)
        for name, value in given.items():
            if value == 0:
                raise ValueError(found(f"baseline[{name!r}]", "different from 0", value))
        by_task = isinstance(higher_is_better, Mapping)
        directions = higher_is_better.values() if by_task else [higher_is_better]
        if not all(isinstance(direction, bool) for direction in directions):
            raise TypeError(found("higher_is_better", "a bool, or a mapping of task names to bools", higher_is_better))
        self.values = dict(given)
        self.directions: dict[str, bool] = dict(higher_is_better if by_task else dict.fromkeys(given, higher_is_better))

    def bind(self, tasks: tuple[str, ...]) -> None:
        """Check that every task has a value, and that directions are of these tasks."""
        super().bind(tasks)
        unknown = [name for name in self.directions if name not in tasks]
        if unknown:
            raise ValueError(unknown_task(unknown[0], tasks, "in `higher_is_better`"))

    def behind(self, task: str, value: float) -> float:
        """How far a result is behind, relative to the baseline's absolute value; negative where it is better."""
        sign = 1.0 if self.directions.get(task, True) else -1.0
        return sign * (self.values[task] - value) / abs(self.values[task])


def named(tasks: Sequence[str], values: Tensor) -> dict[str, float]:
    """One number per task under the tasks' names (their indices while no tasks are known)."""
    names = tuple(tasks) or tuple(str(i) for i in range(len(values)))
    return dict(zip(names, values.tolist(), strict=True))
