"""Memory of gradient rows across steps, and passes over their columns in pieces."""

import itertools
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


def counted(times: Tensor | int, tasks: Sequence[int], trained: Sequence[bool]) -> Tensor:
    """Counts of steps for every task and shared parameter, [K, n], after one more of ``tasks``.

    A parameter that turns shared is counted from then on: its columns of a memory start at zero, so that a correction for the
    start, or a rate that decays from there, has to start with them. One that isn't trained isn't counted, as its columns of a
    memory stay as they are.

    Example:
        >>> counted(torch.tensor([[3, 3], [2, 2]]), [0], [True, False, True])
        tensor([[4, 3, 1],
                [2, 2, 0]])
    """
    known, number = torch.as_tensor(times), len(trained)
    if known.dim() < 2:
        # Older states count for every task alone.
        known = known.reshape(-1, 1).expand(-1, number)
    grown = known.new_zeros(len(known), number)
    shared = min(number, known.shape[1])
    grown[:, :shared] = known[:, :shared]
    grown[list(tasks)] += torch.tensor(trained, dtype=grown.dtype)
    return grown


def spans(gradients: TaskGradients, times: Tensor | None = None) -> Iterator[tuple[slice, Tensor]]:
    """The columns of the parameters that are trained now, in pieces whose counts [K, n] are the same; and these counts [K].

    What is remembered of the other columns stays as it is, and has no part in a step.
    """
    times = torch.zeros(0, len(gradients.parameters)) if times is None else times
    kinds = list(zip(gradients.trained, times.T.tolist(), strict=True))
    for (trained, _), run in itertools.groupby(range(len(kinds)), kinds.__getitem__):
        if trained:
            places = list(run)
            first, last = (gradients.columns(gradients.parameters[place]) for place in (places[0], places[-1]))
            for piece in pieces(last.stop, first.start):
                yield piece, times[:, places[0]]


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
def remember_(memory: Tensor, gradients: TaskGradients, places: Sequence[int]) -> None:
    """Write the rows ``places`` of J [k, P] over those of their tasks in a memory [K, P]."""
    for span, _ in spans(gradients):
        for place in places:
            memory[gradients.indices[place], span] = gradients.matrix[place, span]


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
