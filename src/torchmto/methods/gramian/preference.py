"""Gramian weightings that start from a preference among the tasks."""

from abc import abstractmethod

from torch import Tensor

from torchmto.methods import GramianWeighting, Indices, hyper
from torchmto.methods.per_task import PerTask, TaskFloats


class PreferenceWeighting(GramianWeighting):
    """Weights solved for from the Gramian and a preference.

    Args:
        scale: "mean" or "sum"; without effect if there is a preference.
        preference: Task -> non-negative float, or a sequence in the order of the tasks.
        **options: ``heads``, ``refresh_every``.
    """

    scale: str = hyper.choice("mean", "sum")
    preference: PerTask | None = hyper.per_task(None, TaskFloats | None, minimum=0, common=False)

    def among(self, indices: Indices) -> list[float]:
        """The present tasks' preferences; those of absent tasks are shared out in proportion."""
        if self.preference is None:
            return [1.0 if self.scale == "sum" else 1.0 / len(indices)] * len(indices)
        present: list[float] = self.preference.of(indices).tolist()
        total, left = self.preference.total, sum(present)
        return present if left in (total, 0.0) else [value * (total / left) for value in present]

    def weights(self, gramian: Tensor, losses: Tensor | None = None, indices: Indices | None = None) -> Tensor:
        """The solution, [k]."""
        preference = self.among(range(len(gramian)) if indices is None else indices)
        return self.solve(gramian, preference)

    @abstractmethod
    def solve(self, gramian: Tensor, preference: list[float]) -> Tensor:
        """The weights, [k], for a Gramian [k, k] and as many preferences."""
