"""The losses of one forward, with graph; their sums over forwards; and those of a step, reduced."""

import contextlib
import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from torchmto.task_norms import active_task

Closure = Callable[[tuple[str, ...]], Mapping[str, Any]]
"""A forward-only callable: the wanted tasks -> one scalar loss, or ``(loss, count)``, for each one this batch has."""

Source = Closure | Mapping[str, Any]
"""A closure, or the ready losses of one forward."""

Weigh = Callable[[Tensor, tuple[int, ...]], Tensor]
"""(losses [k], indices of the present tasks) -> one weight per present task, [k]."""

Outside = Callable[[Tensor, Sequence[int]], str]
"""(losses [k] on the CPU, indices of the present tasks) -> why a method can't take them; empty if it can."""


class NonFiniteError(ValueError):
    """A loss or a gradient is NaN or infinite, or a loss lies outside the method's domain. Nothing was updated."""


def needs_closure(who: str) -> ValueError:
    """The error of ready losses where the model has to be run again; ``who`` runs it."""
    return ValueError(
        f"{who} runs the model more than once per step, so it needs a closure: pass `mt.step(closure)` with "
        "`closure(tasks) -> losses` instead of ready losses."
    )


def empty_batch(asked: Sequence[str], source: int = 0) -> ValueError:
    """The error of a batch, the step's own or an independent one, without any loss for the tasks ``asked``."""
    which = f"independent batch {source}" if source else "batch"
    return ValueError(
        f"Empty {which}: no loss was returned for any of the tasks {', '.join(asked)}. A step needs the loss of at least "
        "one task."
    )


@dataclass
class Chunk:
    """The losses of one call of a closure, by task index, with graph; and the counts behind them.

    Attributes:
        losses: Task index -> scalar loss, in the order of the tasks.
        counts: Task index -> number of samples (or pixels, ...) the loss is the mean of; 1 where that doesn't matter.
        active: The task whose norms were active in the forward, or None.
    """

    losses: dict[int, Tensor]
    counts: dict[int, float]
    active: str | None = None

    @functools.cached_property
    def stacked(self) -> Tensor:
        """The losses as one tensor with graph, [k], on the first one's device, float32 at least."""
        return stack(tuple(self.losses.values()))

    def activated(self) -> contextlib.AbstractContextManager[Any]:
        """Keep the forward's task active: checkpointed regions run their forward again inside the backward."""
        return contextlib.nullcontext() if self.active is None else active_task(self.active)


@dataclass
class Sums:
    """Losses summed over chunks, weighted by their counts.

    Attributes:
        totals: Task index -> sum of the counts.
        weighted: Task index -> sum of count times loss.
    """

    totals: dict[int, float] = field(default_factory=dict)
    weighted: dict[int, Tensor] = field(default_factory=dict)

    def add(self, chunk: Chunk) -> None:
        """Add one chunk's losses."""
        values = chunk.stacked.detach().unbind() if chunk.losses else ()
        for (index, count), value in zip(chunk.counts.items(), values, strict=True):
            if index in self.totals:
                self.weighted[index] = _sum(self.weighted[index], value * count)
                self.totals[index] += count
            else:
                self.weighted[index] = value * count if count != 1 else value
                self.totals[index] = count

    def merge(self, other: "Sums") -> None:
        """Add other sums."""
        for index, total in other.totals.items():
            known = index in self.totals
            added = other.weighted[index]
            self.weighted[index] = _sum(self.weighted[index], added) if known else added
            self.totals[index] = self.totals[index] + total if known else total


def _sum(one: Tensor, other: Tensor) -> Tensor:
    # A chunk's losses lie where its first one does, which needn't be where the former chunk's did.
    return one + other.to(one.device)


@dataclass
class Proportions:
    """Whether all micro-batches that bring any task bring the same ones in the same proportions.

    Attributes:
        alike: Whether those so far did.
        first: Task index -> count in the first of them.
    """

    alike: bool = True
    first: dict[int, float] = field(default_factory=dict)
    _own: dict[int, float] = field(default_factory=dict)

    def begin(self) -> None:
        """Before the first call of a micro-batch."""
        self.close()
        self._own = {} if self.first else self.first

    def add(self, counts: Mapping[int, float]) -> float:
        """Add the counts of one call; returns its micro-batch's size: the count of its first task."""
        self._own.update(counts)
        if not self._own:
            return 1.0
        lead = next(iter(self._own))
        size = self._own[lead]
        self.alike = self.alike and lead == next(iter(self.first), None)
        self.alike = self.alike and all(self.first.get(i, 0) * size == n * self.first[lead] for i, n in counts.items())
        return size

    def close(self) -> None:
        """After the last call of a micro-batch: has it brought all tasks, or none?"""
        self.alike = self.alike and (not self._own or self._own.keys() == self.first.keys())

    @property
    def lead(self) -> int:
        """The task that sizes are counts of."""
        return next(iter(self.first))

    @property
    def relative(self) -> list[tuple[int, float]]:
        """Every task with its count relative to that of the first."""
        return sorted((i, count / self.first[self.lead]) for i, count in self.first.items())


@dataclass
class Losses:
    """The losses of the present tasks, averaged over micro-batches and ranks, without graph.

    Attributes:
        indices: The present tasks, ascending.
        values: Their losses as the methods see them (times the user's weights), float [k].
        raw: Their losses as the closure returned them, float [k].
        totals: Task index -> total count over micro-batches and ranks.
        factors: The user's loss weights, float [k]; None for 1.
    """

    indices: tuple[int, ...]
    values: Tensor
    raw: Tensor
    totals: dict[int, float]
    factors: Tensor | None = None

    def only(self, tasks: Collection[int]) -> "Losses":
        """The losses of some tasks."""
        chosen = [position for position, index in enumerate(self.indices) if index in tasks]
        if len(chosen) == len(self.indices):
            return self
        return Losses(
            tuple(self.indices[position] for position in chosen),
            self.values[chosen],
            self.raw[chosen],
            {index: total for index, total in self.totals.items() if index in tasks},
            None if self.factors is None else self.factors[chosen],
        )


def stack(losses: Sequence[Tensor]) -> Tensor:
    """Losses as one tensor [k] on the first one's device, float32 at least."""
    first, losses = losses[0], list(losses)
    kinds = {(loss.dtype, loss.device) for loss in losses}
    if len(kinds) > 1 or first.dtype not in (torch.float32, torch.float64):
        wide = torch.float64 if any(dtype == torch.float64 for dtype, _ in kinds) else torch.float32
        losses = [loss.to(first.device, wide) for loss in losses]
    return torch.stack(losses)
