"""The gradient matrix divided among the ranks: each holds all rows, but only its part of the columns."""

from collections.abc import Sequence

import torch
from torch import Tensor

from torchmto.gradients.ranks import Ranks, Wait
from torchmto.gradients.rows import Columns, views_of


class ShardedRows(Columns):
    """J [K, P] of which rank r holds the columns ``r * n`` to ``(r + 1) * n``, n = P / N rounded up.

    A task's whole row exists only in one scratch vector [P], from which the sum over the ranks is scattered while the next
    task's backward runs. Memory: ``K P / N + P`` instead of ``K P``. It offers what :class:`~torchmto.gradients.rows.Rows`
    offers, except views per parameter. :meth:`send` and a :meth:`grow` with rows are called by all ranks together.

    Args:
        num_tasks: K.
        ranks: The processes that share the matrix.
    """

    def __init__(self, num_tasks: int, ranks: Ranks) -> None:
        self._loaded: int | None = None
        self._work: Wait | None = None
        self._addend: tuple[int, Tensor] | None = None
        super().__init__(num_tasks, ranks, share=ranks.size)

    def begin(self) -> None:
        """Forget the last step's rows, too."""
        super().begin()
        self._loaded = None

    def _make_views(self) -> None:
        width = self._buffer.shape[1]
        self._whole = self._buffer.new_zeros(width * self._ranks.size)
        self._views = views_of(self._whole, self.parameters)
        self._own = self._whole[self._ranks.rank * width : (self._ranks.rank + 1) * width]

    def grow(self, parameters: Sequence[Tensor]) -> None:
        """Append columns for ``parameters``. The columns are divided anew, for which existing rows are gathered."""
        if not parameters:
            return
        self.wait()
        size = self.slices[-1].stop if self.slices else 0
        old = [self._ranks.gather_(self._whole, row)[:size].clone() for row in self.matrix]
        self._lay_out([*self.parameters, *parameters])
        for row, values in zip(self._buffer, old, strict=False):
            self._whole.zero_()
            self._whole[:size] = values
            row.copy_(self._own)

    def add(self, task: int, positions: Sequence[int], gradients: list[Tensor]) -> None:
        """Take this rank's gradients of one task; :meth:`send` sums them over the ranks and adds them to its row."""
        self.wait()
        self._whole.zero_()
        if positions:
            torch._foreach_copy_([self._views[i] for i in positions], gradients)
        self._filled.update(positions)
        self._loaded = task

    @torch.no_grad()
    def send(self, task: int) -> None:
        """Begin to add the sum of what the ranks brought for ``task`` to its row."""
        if self._loaded != task:
            self.add(task, [], [])
        self._loaded = None
        new = task not in self.tasks
        row = self.row_of(task)
        piece = self._buffer[row] if new else torch.empty_like(self._buffer[row])
        self._work = self._ranks.start_scatter(piece, self._whole)
        self._addend = None if new else (row, piece)

    def wait(self) -> None:
        """Wait for the sum that was started last."""
        if self._work is not None:
            self._work()
            self._work = None
            if self._addend is not None:
                row, piece = self._addend
                self._buffer[row].add_(piece)

    def put(self, task: int, parameter: Tensor, gradient: Tensor) -> None:
        """Add a gradient that is summed already to the row of ``task``."""
        self.wait()
        row = self.row_of(task)
        self._whole.zero_()
        self._views[self.position[id(parameter)]].copy_(gradient)
        self._buffer[row].add_(self._own)
        self._filled.add(self.position[id(parameter)])

    def combined(self) -> tuple[Tensor, list[Tensor]]:
        """A reused vector [n] for this rank's part of the combined gradient, and the parameters' views of the whole."""
        self.wait()
        return self._own, self._views

    def gather(self) -> None:
        """Complete the combined gradient with the other ranks' parts, in the views :meth:`combined` gave."""
        self._ranks.gather_(self._whole, self._own.clone())
