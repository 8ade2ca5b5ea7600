"""Gramian weightings that start from a preference among the tasks."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Unpack

from torch import Tensor

from torchmto.checks import check_choice
from torchmto.methods.method import GramianWeighting, WeightingOptions
from torchmto.methods.per_task import PerTask, TaskFloats
from torchmto.solvers.solution import Array, Solution


class Preference(PerTask):
    """How much each task counts in a sum or mean of modified gradients.

    Args:
        given: One non-negative number per task, by name or in their order; None for the same for all.
        scale: Without ``given``: "sum": 1 for each task; "mean": 1/k for each of k present tasks.

    Raises:
        TypeError: As in :class:`torchmto.methods.per_task.PerTask`.
        ValueError: Likewise.
    """

    def __init__(self, given: TaskFloats | None, scale: str) -> None:
        super().__init__("preference", 1.0 if given is None else given, minimum=0, common=given is None)
        self.scale = scale

    def among(self, indices: Sequence[int]) -> list[float]:
        """The present tasks' preferences; those of absent tasks are shared out in proportion."""
        if self._values is None:
            return [1.0 if self.scale == "sum" else 1.0 / len(indices)] * len(indices)
        present: list[float] = self.of(indices).tolist()
        total, left = self.total, sum(present)
        return present if left in (total, 0.0) else [value * (total / left) for value in present]


class PreferenceWeighting(GramianWeighting):
    """Weights solved for from the Gramian and a preference.

    Args:
        scale: "mean" or "sum"; without effect if there is a preference.
        preference: Task -> non-negative float, or a sequence in the order of the tasks.
        **options: ``heads``, ``refresh_every``.
    """

    def __init__(
        self, *, scale: str = "mean", preference: TaskFloats | None = None, **options: Unpack[WeightingOptions]
    ) -> None:
        super().__init__(**options)
        self.preference = Preference(preference, check_choice("scale", scale, ("mean", "sum")))

    def weights(self, gramian: Tensor, losses: Tensor | None = None, indices: Sequence[int] | None = None) -> Tensor:
        """The solution, [k]."""
        preference = self.preference.among(range(len(gramian)) if indices is None else indices)
        return self.accept(self.solve(self.as_array(gramian), preference, self.precision_of(gramian)), gramian)

    @abstractmethod
    def solve(self, gramian: Array, preference: list[float], precision: float) -> Solution:
        """The weights, [k], for a Gramian [k, k] of gradients of that machine precision and as many preferences."""
