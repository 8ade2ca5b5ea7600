"""The gradient matrix divided among the ranks: each holds all rows, but only its part of the columns."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from torchmto.gradients.finite import real
from torchmto.gradients.ranks import Pending, Ranks
from torchmto.gradients.rows import slices_of, views_of, widest


class ShardedRows:
    """J [K, P] of which rank r holds the columns ``r * n`` to ``(r + 1) * n``, n = P / N rounded up.

    A task's whole row exists only in one scratch vector [P], from which the sum over the ranks is scattered while the next
    task's backward runs. Memory: ``K P / N + P`` instead of ``K P``. It offers what :class:`~torchmto.gradients.Rows` offers,
    except views per parameter. :meth:`send` and a :meth:`grow` with rows are called by all ranks together.

    Args:
        num_tasks: K.
        ranks: The processes that share the matrix.
    """

    def __init__(self, num_tasks: int, ranks: Ranks) -> None:
        self.num_tasks = num_tasks
        self.parameters: list[Tensor] = []
        self.position: dict[int, int] = {}
        self.slices: list[slice] = []
        self.tasks: list[int] = []
        self._ranks = ranks
        self._filled: set[int] = set()
        self._loaded: int | None = None
        self._work: Pending | None = None
        self._addend: tuple[int, Tensor] | None = None
        self._lay_out([])

    @property
    def matrix(self) -> Tensor:
        """This rank's columns of the present tasks' rows, [k, n]."""
        return self._buffer[: len(self.tasks)]

    def begin(self) -> None:
        """Forget the last step's rows; the memory is kept, unless the parameters have changed type or place."""
        self.wait()
        self.tasks = []
        self._filled = set()
        self._loaded = None
        if any(
            p.dtype != dtype or p.device != device
            for p, (dtype, device) in zip(self.parameters, self._kinds, strict=True)
        ):
            self._lay_out(self.parameters)

    def _lay_out(self, parameters: list[Tensor]) -> None:
        self.parameters = parameters
        self.position = {id(parameter): i for i, parameter in enumerate(parameters)}
        parts = [real(parameter) for parameter in parameters]
        self.slices = slices_of(parts)
        self._size = self.slices[-1].stop if parts else 0
        self._kinds = [(parameter.dtype, parameter.device) for parameter in parameters]
        dtype = widest(parts)
        device = parameters[0].device if parameters else torch.device("cpu")
        width = -(-self._size // self._ranks.size)
        self._buffer = torch.zeros(self.num_tasks, width, dtype=dtype, device=device)
        self._whole = torch.zeros(width * self._ranks.size, dtype=dtype, device=device)
        self._views = views_of(self._whole, parameters)
        self._own = self._whole[self._ranks.rank * width : (self._ranks.rank + 1) * width]

    def grow(self, parameters: Sequence[Tensor]) -> None:
        """Append columns for ``parameters``. The columns are divided anew, for which existing rows are gathered."""
        if not parameters:
            return
        self.wait()
        old = [self._ranks.gather_(self._whole, row)[: self._size].clone() for row in self.matrix]
        size = self._size
        self._lay_out([*self.parameters, *parameters])
        for row, values in zip(self._buffer, old, strict=False):
            self._whole.zero_()
            self._whole[:size] = values
            row.copy_(self._own)

    def row_of(self, task: int) -> int:
        """The row of ``task``; a new zero row if it has none yet."""
        if task not in self.tasks:
            self._buffer[len(self.tasks)].zero_()
            self.tasks.append(task)
        return self.tasks.index(task)

    def add(self, task: int, positions: Sequence[int], gradients: Sequence[Tensor]) -> None:
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
            self._work.wait()
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

    def fill(self, positions: Iterable[int]) -> None:
        """Note that parameters were reached by a present task, on this rank or another."""
        self._filled.update(positions)

    def sort(self) -> None:
        """Bring the rows into the order of the tasks."""
        order = sorted(range(len(self.tasks)), key=self.tasks.__getitem__)
        if order != list(range(len(order))):
            self._buffer[: len(order)] = self._buffer[order]
            self.tasks = [self.tasks[i] for i in order]

    def reached(self) -> list[int]:
        """Positions of the parameters that at least one present task reached, in order."""
        return sorted(self._filled)

    def combined(self) -> tuple[Tensor, list[Tensor]]:
        """A reused vector [n] for this rank's part of the combined gradient, and the parameters' views of the whole."""
        self.wait()
        return self._own, self._views

    def gather(self) -> None:
        """Complete the combined gradient with the other ranks' parts, in the views :meth:`combined` gave."""
        self._ranks.gather_(self._whole, self._own.clone())
