"""Pieces that several loss weightings share: numbers per task, safe logarithms, names in records."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from torchmto.checks import check_number, found
from torchmto.methods.method import Method

Numbers = float | Mapping[str, float] | Sequence[float]
"""One number for all tasks, one per name, or one per task in the order of the tasks."""


class PerTask:
    """A hyper-parameter with one value per task.

    Args:
        name: The hyper-parameter's name, for error messages.
        given: One number for all tasks, a mapping of task names, or a sequence in the order of the tasks.
        minimum: Smallest allowed value.
        above: Values must be larger than this.

    Raises:
        TypeError: If it is neither.
        ValueError: If a value is out of range.
    """

    def __init__(self, name: str, given: Numbers, *, minimum: float = -math.inf, above: float = -math.inf) -> None:
        self.name = name
        self.given = given
        if isinstance(given, str) or not isinstance(given, int | float | Mapping | Sequence):
            raise TypeError(found(name, "a number, a mapping of task names or a sequence of numbers", given))
        self._values: list[float] | None = None
        if isinstance(given, int | float):
            self._common = check_number(name, given, minimum=minimum, above=above)
            return
        items = given.items() if isinstance(given, Mapping) else enumerate(given)
        self._values = [check_number(f"{name}[{key!r}]", value, minimum=minimum, above=above) for key, value in items]

    def bind(self, tasks: tuple[str, ...]) -> None:
        """Match the values with the tasks.

        Raises:
            ValueError: If they don't fit.
        """
        if isinstance(self.given, Mapping):
            if set(self.given) != set(tasks):
                raise ValueError(found(self.name, f"a mapping with exactly the tasks {list(tasks)}", dict(self.given)))
            self._values = [float(self.given[name]) for name in tasks]
        elif self._values is not None and len(self._values) != len(tasks):
            raise ValueError(found(self.name, f"a sequence of {len(tasks)} numbers", self.given))

    def of(self, indices: Sequence[int]) -> Tensor:
        """The values of the tasks ``indices``, float64 on the CPU, [k].

        Raises:
            ValueError: If a task has none.
        """
        if self._values is None:
            return torch.full((len(indices),), self._common, dtype=torch.float64)
        if max(indices) >= len(self._values):
            raise ValueError(found(self.name, f"at least {max(indices) + 1} numbers", self.given))
        return torch.tensor([self._values[i] for i in indices], dtype=torch.float64)


class Preference(PerTask):
    """A preference among the tasks: positive weights, used as shares of the present tasks (summing to 1).

    Args:
        given: Task -> weight, or a sequence; None: all tasks alike.
    """

    def __init__(self, given: Mapping[str, float] | Sequence[float] | None) -> None:
        super().__init__("preference", 1.0 if given is None else given, above=0)

    def of(self, indices: Sequence[int]) -> Tensor:
        """The shares of the tasks ``indices``, float64 on the CPU, [k]."""
        values = super().of(indices)
        return values / values.sum()


def safe_log(losses: Tensor) -> Tensor:
    """The logarithm; NaN, also in its derivative, where a loss isn't positive.

    The derivative of ``torch.log`` at a negative loss is a finite negative number, which would turn descent into
    ascent.
    """
    return (losses + torch.where(losses > 0, 0.0, torch.nan).to(losses)).log()


def by_task(method: Method, values: Tensor) -> dict[str, float]:
    """One number per task under the tasks' names (their indices as long as the method isn't bound)."""
    names = method.tasks or tuple(str(i) for i in range(len(values)))
    return dict(zip(names, values.tolist(), strict=True))
