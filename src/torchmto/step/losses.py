"""The losses of one forward, with graph, and those of a step, reduced."""

import contextlib
import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
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


def empty_batch(asked: Sequence[str]) -> ValueError:
    """The error of a batch without any loss for the tasks ``asked``."""
    return ValueError(
        f"Empty batch: no loss was returned for any of the tasks {', '.join(asked)}. A step needs the loss of at least "
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
