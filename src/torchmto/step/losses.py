"""What a closure returns, checked; and the losses of a step, reduced."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchmto.checks import unknown_task
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


@dataclass(frozen=True)
class Chunk:
    """The losses of one call of a closure, by task index, with graph; and the counts behind them.

    Attributes:
        losses: Task index -> scalar loss, in the order of the tasks.
        counts: Task index -> number of samples (or pixels, ...) the loss is the mean of; 1 where not given.
        active: The task whose norms were active in the forward, or None.
    """

    losses: dict[int, Tensor]
    counts: dict[int, float]
    active: str | None = None

    def activated(self) -> contextlib.AbstractContextManager[Any]:
        """Keep the forward's task active: checkpointed regions run their forward again inside the backward."""
        return contextlib.nullcontext() if self.active is None else active_task(self.active)


@dataclass(frozen=True)
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

    def only(self, tasks: Collection[int]) -> Losses:
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


_WITHOUT_LABELS = "If the batch has no labels for it, leave the task out, or give it count 0."


def _check_loss(task: str, loss: object, *, needs_graph: bool) -> Tensor:
    if not isinstance(loss, Tensor):
        raise TypeError(
            f"The loss of task `{task}` should be a scalar tensor. Found {type(loss).__name__}. {_WITHOUT_LABELS}"
        )
    if loss.dim() != 0:
        raise ValueError(f"The loss of task `{task}` should be a scalar tensor. Found shape {list(loss.shape)}.")
    if not loss.is_floating_point():
        raise TypeError(f"The loss of task `{task}` should be a floating-point tensor. Found dtype {loss.dtype}.")
    if needs_graph and not loss.requires_grad:
        raise ValueError(
            f"The loss of task `{task}` has no autograd graph, so it has no gradient. Was it computed under "
            f"torch.no_grad(), detached, or from frozen parameters only? {_WITHOUT_LABELS}"
        )
    return loss


def parse(
    result: object, tasks: Sequence[str], asked: Sequence[str], *, needs_graph: bool, active: str | None
) -> tuple[Chunk, str | None]:
    """Check what a closure returned for the tasks ``asked`` and sort it by task.

    Returns:
        The losses asked for, and a task whose loss nobody asked for, or None.

    Raises:
        TypeError: If it isn't a mapping of scalar floating-point tensors.
        ValueError: If it names an unknown task, or a loss isn't scalar or has no graph.
    """
    if not isinstance(result, Mapping):
        raise TypeError(
            f"A closure should return a mapping of task names to scalar losses. Found {type(result).__name__}."
        )
    unknown = [name for name in result if name not in tasks]
    if unknown:
        raise ValueError(unknown_task(unknown[0], tasks, "among the losses"))
    unasked = next((name for name in result if name not in asked), None)
    losses: dict[int, Tensor] = {}
    counts: dict[int, float] = {}
    for index, name in enumerate(tasks):
        if name not in result or name not in asked:
            continue
        value: object = result[name]
        count: Any = 1.0
        if isinstance(value, tuple):
            if len(value) != 2:
                raise ValueError(f"Task `{name}` should bring `loss` or `(loss, count)`. Found {len(value)} values.")
            value, count = value
            count = float(count) if isinstance(count, int | float | Tensor) else count
            if not isinstance(count, float) or not 0 <= count < float("inf"):
                raise ValueError(f"The count of task `{name}` should be a non-negative number. Found {count!r}.")
            if count == 0:
                continue
        losses[index] = _check_loss(name, value, needs_graph=needs_graph)
        counts[index] = float(count)
    return Chunk(losses, counts, active), unasked


def detached(loss: Tensor) -> Tensor:
    """A loss without its graph, float32 at least."""
    value = loss.detach()
    return value if value.dtype in (torch.float32, torch.float64) else value.float()


def stack(losses: Sequence[Tensor]) -> Tensor:
    """Detached losses as one tensor [k] on the first one's device, float32 at least."""
    device, dtypes = losses[0].device, {loss.dtype for loss in losses}
    if dtypes <= {torch.float32, torch.float64} and len(dtypes) == 1:
        return torch.stack([loss.to(device) for loss in losses])
    dtype = torch.float64 if torch.float64 in dtypes else torch.float32
    return torch.stack([loss.to(device, dtype) for loss in losses])
