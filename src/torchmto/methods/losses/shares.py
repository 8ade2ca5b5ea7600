"""A preference among the tasks, as shares."""

from collections.abc import Sequence

from torch import Tensor

from torchmto.methods.per_task import PerTask, TaskFloats


class Shares(PerTask):
    """A preference among the tasks: positive weights, used as shares of the present tasks (summing to 1).

    Args:
        preference: Task -> weight, or a sequence; None: all tasks alike.
    """

    def __init__(self, preference: TaskFloats | None) -> None:
        super().__init__("preference", 1.0 if preference is None else preference, above=0)

    def of(self, indices: Sequence[int]) -> Tensor:
        """The shares of the tasks ``indices``, float64 on the CPU, [k]."""
        values = super().of(indices)
        return values / values.sum()
