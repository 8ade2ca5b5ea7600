"""The gradients of K tasks with respect to the shared parameters, as the rows of one matrix."""

import functools
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from torchmto.gradients.finite import gapless, real
from torchmto.gradients.ranks import Ranks, Wait, local


def _kinds(parameters: Sequence[Tensor]) -> list[tuple[object, ...]]:
    """What the memory of a gradient matrix depends on."""
    return [(parameter.dtype, parameter.device, parameter.shape, parameter.stride()) for parameter in parameters]


def views_of(flat: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    """Views of ``flat`` [P] shaped (and, where possible, laid out in memory) like the parameters, complex ones as pairs."""
    views = []
    parts = [real(parameter) for parameter in parameters]
    for part, place in zip(parts, slices_of(parts), strict=True):
        if gapless(part):
            views.append(flat.as_strided(part.shape, part.stride(), flat.storage_offset() + place.start))
        else:
            views.append(flat[place].view(part.shape))
    return views


def slices_of(parts: Sequence[Tensor]) -> list[slice]:
    """Where the elements of each part are if all lie next to each other."""
    ends = itertools.accumulate(part.numel() for part in parts)
    return [slice(end - part.numel(), end) for part, end in zip(parts, ends, strict=True)]


def widest(parts: Iterable[Tensor]) -> torch.dtype:
    """The dtype that has room for all parts, float32 at least."""
    return functools.reduce(torch.promote_types, (part.dtype for part in parts), torch.float32)


def gramian(matrix: Tensor) -> Tensor:
    """G = J Jᵀ of J [k, P], as a float64 CPU tensor [k, k].

    The product runs on J's device in J's own precision, in blocks of columns whose products are added up in float64 (where
    the device has it): more exact than one long product, and for few tasks up to twice as fast. Where its squares over- or
    underflow (norms beyond about 1e±19 in float32), the rows are scaled by their largest entry first.
    """
    product = products(matrix).to(device="cpu", dtype=torch.float64)
    tiny = torch.finfo(matrix.dtype).tiny * 1e8
    values = product.numpy()
    if not math.isfinite(values.sum()) or values.diagonal().min(initial=tiny) < tiny:
        largest = matrix.abs().amax(dim=1, keepdim=True) if matrix.shape[1] else matrix.new_zeros(len(matrix), 1)
        scale = torch.where((largest > 0) & largest.isfinite(), largest, torch.ones_like(largest))
        scaled = matrix / scale
        factors = scale.to(device="cpu", dtype=torch.float64)
        product = products(scaled).to(device="cpu", dtype=torch.float64) * factors * factors.T
    return product


def wide_dtype(device: torch.device) -> torch.dtype:
    """float64 where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


BLOCK = 16384
"""Columns per block of the Gramian: K rows of it stay in the processor's cache."""


def products(matrix: Tensor) -> Tensor:
    """``matrix @ matrix.T``, block by block of columns, without a copy."""
    wide = wide_dtype(matrix.device)
    whole = matrix.shape[1] // BLOCK
    rest = matrix[:, whole * BLOCK :] if whole else matrix
    product = (rest @ rest.T).to(wide)
    if whole:
        blocks = torch.unflatten(matrix[:, : whole * BLOCK], 1, (whole, BLOCK)).transpose(0, 1)
        product += torch.bmm(blocks, blocks.transpose(1, 2)).sum(0, dtype=wide)
    return product


class Columns(ABC):
    """The rows of the tasks' gradients, with a column for each entry of the shared parameters.

    Rows are handed out in the order in which tasks first bring a gradient, so the rows of the present tasks are always
    ``matrix[:k]``. The buffer's dtype is the widest of the parameters', float32 at least; gradients of other dtypes are
    converted as they are written. A complex entry has two columns, its pair of reals.

    Args:
        num_tasks: K.
        ranks: The processes that sum their rows.
        share: How many of these hold a part of the columns each.

    Attributes:
        trained: The parameters that are trained now; shared ones that aren't keep their columns.
    """

    def __init__(self, num_tasks: int, ranks: Ranks, share: int = 1) -> None:
        self._num_tasks = num_tasks
        self._ranks = ranks
        self._share = share
        self.trained: Sequence[Tensor] = []
        self.tasks: list[int] = []
        self._filled: set[int] = set()
        self._lay_out([])

    def _lay_out(self, parameters: list[Tensor]) -> None:
        """A new buffer with columns for these parameters."""
        # Nothing known until all is: what an interrupt leaves half done the next step does anew.
        self._kinds: list[tuple[object, ...]] | None = None
        parts = [real(local(parameter)) for parameter in parameters]
        self.parameters = parameters
        self.position = {id(parameter): i for i, parameter in enumerate(parameters)}
        self.slices = slices_of(parts)
        width = -(-sum(part.numel() for part in parts) // self._share)
        device = parameters[0].device if parameters else torch.device("cpu")
        self._buffer = torch.empty(self._num_tasks, width, dtype=widest(parts), device=device)
        self._make_views()
        self._kinds = _kinds(parameters)

    @abstractmethod
    def _make_views(self) -> None:
        """The views into a new buffer."""

    @property
    def matrix(self) -> Tensor:
        """The rows of the present tasks, [k, P]; of this rank's columns."""
        return self._buffer[: len(self.tasks)]

    def begin(self) -> None:
        """Forget the last step's rows; the memory is kept, unless the parameters have changed type, place or layout."""
        self.wait()
        self.tasks = []
        self._filled = set()
        if _kinds(self.parameters) != self._kinds:
            self._lay_out(self.parameters)

    @abstractmethod
    def wait(self) -> None:
        """Wait for the sums over the ranks that were started."""

    def row_of(self, task: int) -> int:
        """The row of ``task``; a new zero row if it has none yet."""
        if task not in self.tasks:
            self._buffer[len(self.tasks)].zero_()
            self.tasks.append(task)
        return self.tasks.index(task)

    def fill(self, positions: Iterable[int]) -> None:
        """Note that parameters were reached by a present task, on this rank or another."""
        self._filled.update(positions)

    def reached(self) -> list[int]:
        """Positions of the parameters that at least one present task reached, in order."""
        return sorted(self._filled)

    def sort(self) -> None:
        """Bring the rows into the order of the tasks. A copy, needed only if micro-batches brought tasks unordered."""
        order = sorted(range(len(self.tasks)), key=self.tasks.__getitem__)
        if order != list(range(len(order))):
            self._buffer[: len(order)] = self._buffer[order]
            self.tasks = [self.tasks[i] for i in order]


class Rows(Columns):
    """One reused buffer J [K, P] with a view per task and parameter. Parameters a task doesn't reach are zero in its row."""

    def __init__(self, num_tasks: int, ranks: Ranks) -> None:
        self._sent: list[Wait] = []
        super().__init__(num_tasks, ranks)

    def _make_views(self) -> None:
        self._combined: Tensor | None = None
        parts = [local(parameter) for parameter in self.parameters]
        self._row_views = [views_of(row, parts) for row in self._buffer]

    def grow(self, parameters: Sequence[Tensor]) -> None:
        """Append columns for ``parameters``; what the rows hold is kept, new columns are zero in existing rows."""
        if parameters:
            old = self.matrix
            self._lay_out([*self.parameters, *parameters])
            self.matrix[:, : old.shape[1]] = old
            self.matrix[:, old.shape[1] :] = 0

    def add(self, task: int, positions: Sequence[int], gradients: list[Tensor]) -> None:
        """Add gradients of the parameters at ``positions`` to the row of ``task``."""
        new = task not in self.tasks
        row = len(self.tasks) if new else self.tasks.index(task)
        views = self._row_views[row]
        if new and len(positions) < len(views):
            missing = set(range(len(views))).difference(positions)
            torch._foreach_zero_([views[i] for i in sorted(missing)])
        if positions:
            write = torch._foreach_copy_ if new else torch._foreach_add_
            write([views[i] for i in positions], gradients)
        if new:
            self.tasks.append(task)
        self._filled.update(positions)

    def put(self, task: int, parameter: Tensor, gradient: Tensor) -> None:
        """Add one parameter's gradient to the row of ``task``, a new zero row if it has none yet."""
        self.add(task, [self.position[id(parameter)]], [gradient])

    @torch.no_grad()
    def send(self, task: int) -> None:
        """Begin to sum one task's row over the ranks, zeros where a rank hasn't the task, while backwards go on."""
        row = self.row_of(task)
        self._sent.append(self._ranks.start_sum(self.matrix[row]))

    def wait(self) -> None:
        """Wait for the sums that were started."""
        sent, self._sent = self._sent, []
        for wait in sent:
            wait()

    def view(self, parameter: Tensor) -> Tensor:
        """The present tasks' gradients of one parameter, a view [k, *parameter.shape] of the matrix ([..., 2] if complex)."""
        columns = self.matrix[:, self.slices[self.position[id(parameter)]]]
        parameter = real(local(parameter))
        if gapless(parameter):
            strides = (columns.stride(0), *parameter.stride())
            return columns.as_strided((len(columns), *parameter.shape), strides, columns.storage_offset())
        return columns.view(len(columns), *parameter.shape)

    def weighted_sum_(self, weights: Tensor) -> list[Tensor]:
        """``weights @ matrix``, written over the first row, so that nothing else of its size is needed.

        Returns:
            Views of that row, one per parameter.
        """
        first, factors = self._buffer[0], weights.to(self._buffer)
        if len(weights) > 1 or float(weights[0]) != 1:
            first.mul_(factors[0])
        if len(weights) > 1:
            first.addmv_(self.matrix[1:].T, factors[1:])
        return self._row_views[0]

    def combined(self) -> tuple[Tensor, list[Tensor]]:
        """A reused vector [P] for the combined gradient and its views, one per parameter."""
        if self._combined is None:
            self._combined = self._buffer.new_empty(self._buffer.shape[1])
            self._combined_views = views_of(self._combined, [local(parameter) for parameter in self.parameters])
        return self._combined, self._combined_views
