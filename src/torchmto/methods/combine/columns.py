"""Memory of gradient rows across steps, and passes over their columns in pieces."""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from torchmto.step import TaskGradients

PIECE = 1 << 20
"""Columns per piece: temporary matrices have at most K times this many entries."""


def pieces(stop: int, start: int = 0) -> Iterator[slice]:
    """Slices that cover the columns from ``start`` to ``stop`` one after the other.

    Example:
        >>> list(pieces(3))
        [slice(0, 3, None)]
    """
    for first in range(start, stop, PIECE):
        yield slice(first, min(first + PIECE, stop))


def counted(times: Tensor | int, tasks: Sequence[int], number: int) -> Tensor:
    """Counts of steps for every task and shared parameter, [K, n], after one more of ``tasks``.

    A parameter that turns shared is counted from then on: its columns of a memory start at zero, so that a correction for the
    start, or a rate that decays from there, has to start with them.

    Example:
        >>> counted(torch.tensor([[3], [2]]), [0], 2)
        tensor([[4, 1],
                [2, 0]])
    """
    known = torch.as_tensor(times)
    if known.dim() < 2:
        # Older states count for every task alone.
        known = known.reshape(-1, 1).expand(-1, number)
    grown = known.new_zeros(len(known), number)
    shared = min(number, known.shape[1])
    grown[:, :shared] = known[:, :shared]
    grown[list(tasks)] += 1
    return grown


def spans(times: Tensor, gradients: TaskGradients) -> Iterator[tuple[slice, Tensor]]:
    """The columns whose counts [K, n] are the same, where they lie next to each other, and these counts [K]."""
    number = times.shape[1]
    changes = (times[:, 1:] != times[:, :-1]).any(0).nonzero().flatten().tolist()
    starts = [0, *(change + 1 for change in changes)] if number else []
    for first, end in zip(starts, [*starts[1:], number], strict=False):
        columns = gradients.columns(gradients.parameters[first]), gradients.columns(gradients.parameters[end - 1])
        yield slice(columns[0].start, columns[1].stop), times[:, first]


@torch.no_grad()
def track_(rows: Iterable[Tensor], memory: Tensor, tasks: Sequence[int], shares: Sequence[tuple[float, float]]) -> None:
    """Turn rows of J [k, P] into moving averages of those in a memory [K, P], which stays as it is.

    Args:
        rows: Rows of J, changed in place.
        memory: The averages so far.
        tasks: The task of every row.
        shares: For every row the share of the past, and what its own values are multiplied with.
    """
    for row, task, (past, new) in zip(rows, tasks, shares, strict=True):
        row.mul_(new).add_(memory[task], alpha=past)


@torch.no_grad()
def remember_(memory: Tensor, rows: Iterable[Tensor], tasks: Sequence[int]) -> None:
    """Write rows of J [k, P] over those of their tasks in a memory [K, P]."""
    for row, task in zip(rows, tasks, strict=True):
        memory[task].copy_(row)


@torch.no_grad()
def averaged(memory: Tensor, rows: Iterable[Tensor], tasks: Sequence[int], decay: float, piece: slice) -> Tensor:
    """Some columns of a memory [K, P], the rows of J [k, P] averaged in; the memory stays as it is."""
    moved = memory[:, piece].clone()
    for row, task in zip(rows, tasks, strict=True):
        moved[task].mul_(decay).add_(row[piece], alpha=1 - decay)
    return moved


def fitted(memory: Tensor, num_tasks: int, matrix: Tensor) -> Tensor:
    """A memory [K, P] of past gradients that fits the matrix J [k, P]: its dtype, device and number of columns.

    Columns of the gradient matrix are only ever appended, as parameters become shared; a memory of fewer columns gets
    zeros in the new ones.
    """
    width = matrix.shape[1]
    if memory.shape == (num_tasks, width) and memory.dtype == matrix.dtype and memory.device == matrix.device:
        return memory
    grown = matrix.new_zeros(num_tasks, width)
    known = min(width, memory.shape[1])
    grown[:, :known] = memory[:, :known].to(matrix)
    return grown
