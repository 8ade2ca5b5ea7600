"""One backward of the weighted sum of the losses."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from torchmto.gradients import quiet
from torchmto.step.forwards import forwards, groups
from torchmto.step.losses import Chunk, Losses, Weigh
from torchmto.step.messages import average_statistics, sum_gradients
from torchmto.step.parts import Parts, Request
from torchmto.step.reduction import Proportions, Sums
from torchmto.step.unit_heads import UnitHeads


@dataclass
class _Weights:
    """What the losses of some tasks are multiplied with.

    Attributes:
        indices: The tasks, ascending.
        values: The method's weights, [k].
        factors: The user's weights, [k]; None for 1.
    """

    indices: tuple[int, ...]
    values: Tensor
    factors: Tensor | None

    @functools.cached_property
    def by_task(self) -> dict[int, Tensor]:
        """Task index -> the method's weight."""
        return dict(zip(self.indices, self.values.unbind(), strict=True))

    def share(self, index: int, share: float) -> Tensor | float:
        """A task's part in the sum beside its weight: the user's factor times its share of the counts."""
        if self.factors is None:
            return share
        factor = self.factors[self.indices.index(index)]
        return factor if share == 1 else factor * share

    def times(self, parts: Mapping[int, Tensor | float]) -> Tensor:
        """Every part times its task's weight, [len(parts)]."""
        if tuple(parts) == self.indices and all(isinstance(part, float) and part == 1 for part in parts.values()):
            return self.values
        return torch.stack([self.by_task[index] * part for index, part in parts.items()])


def weighted_backward(parts: Parts, request: Request, weigh: Weigh, *, fixed: bool, heads: str) -> Losses:
    """Forward and one backward of the weighted sum of the losses into ``.grad``.

    The weights need the losses of all micro-batches first. With one of them its graph is held meanwhile. With several, weights
    that are fixed (independent of the losses and of which tasks are present) allow one pass, in which every micro-batch is
    weighted by its count, if all bring the same tasks in the same proportions; what is left is a common factor. Otherwise the
    losses are read by a forward without gradient, and then every micro-batch is run again, with the same random state.

    Args:
        parts: The step's parts.
        request: Whose losses are summed, on which batch.
        weigh: (losses [k], indices) -> weights [k].
        fixed: Whether ``weigh`` gives the same weights whatever the losses and the present tasks.
        heads: "weighted" or "unit".

    Returns:
        The losses of all tasks the closure was asked for.
    """
    network, reduction = parts.network, parts.reduction
    micro_batches = parts.sources[request.source]
    unit = UnitHeads(network) if heads == "unit" else None
    apart = unit is not None
    held = len(micro_batches) == 1 or all(isinstance(entry, Mapping) for entry in micro_batches)
    reduction.doing = f"one gradient {sorted(request.wanted)} of batch {request.source}"
    known: Losses | None = None
    if not held and fixed and reduction.weigh_fixed:
        known, done = _in_one_pass(parts, request, weigh, unit)
        if known is not None and done:
            return known
    sums = Sums()
    chunks: list[Chunk] = []
    if held:
        single = len(micro_batches) == 1 and not parts.several
        for chunk in forwards(parts, request, apart=apart):
            counts = dict.fromkeys(chunk.counts, 1.0) if single else chunk.counts
            chunks.append(Chunk(chunk.losses, counts, chunk.active))
            sums.add(chunks[-1])
    elif known is None:
        with parts.noise.rehearsal():
            for chunk in forwards(parts, request, grad=False):
                sums.add(chunk)
    losses = reduction.over_ranks(sums) if known is None else known
    weights = _Weights((), losses.values[:0], None)
    failure: BaseException | None = None
    try:
        weights = _weights(parts, weigh, losses.only(request.wanted))
        for chunk in chunks if held else forwards(parts, request, apart=apart):
            shares = {
                i: weights.share(i, chunk.counts[i] / losses.totals[i]) for i in chunk.losses if i in weights.indices
            }
            _backward(parts, chunk, weights, shares, unit)
    except BaseException as error:
        if network.ranks.size == 1 or network.sharded:
            raise
        # The other ranks wait for this one's gradients.
        failure = error
    _settle(parts, unit, weights, failure)
    return losses


def _in_one_pass(parts: Parts, request: Request, weigh: Weigh, unit: UnitHeads | None) -> tuple[Losses | None, bool]:
    """One pass over micro-batches that bring the same tasks in the same proportions, on all ranks.

    Returns:
        The losses, as far as they are known, and whether the gradients are computed. If the micro-batches aren't like that
        nothing has happened; among several ranks, who exchange losses only once, the losses are known all the same.
    """
    network, reduction = parts.network, parts.reduction
    micro_batches = parts.sources[request.source]
    nominal = len(micro_batches) * network.ranks.size
    weights = _known_weights(parts, request, weigh)
    sums = Sums()
    proportions, calls = Proportions(), len(groups(parts, micro_batches[0], request.asked))
    unit_size = 0.0
    with parts.noise.attempt() as undo:
        for position, chunk in enumerate(forwards(parts, request, apart=unit is not None)):
            if position % calls == 0:
                proportions.begin()
            size = proportions.add(chunk.counts)
            # In one process equal sizes cancel before anything is rounded.
            unit_size = unit_size or (1.0 if parts.several else size)
            if not proportions.alike and not parts.several:
                break
            sums.add(chunk)
            if proportions.alike:
                share = size / unit_size / nominal
                shares = {i: weights.share(i, share) for i in chunk.losses if i in request.wanted}
                _backward(parts, chunk, weights, shares, unit)
        proportions.close()
        alike, first = proportions.alike, proportions.first
        if parts.several:
            sums, alike = reduction.tell(sums, counts=[len(micro_batches), proportions.relative] if alike else None)
        losses = reduction.average(sums) if alike or parts.several else None
        if losses is None or not alike:
            network.zero_grad()
            undo()
            return losses, False
    _settle(parts, unit, weights)
    left = nominal * unit_size / losses.totals[proportions.lead] if first else 1.0
    if left != 1:
        network.multiply(network.gradients(), left)
    return losses, True


def accumulate(parts: Parts, request: Request, weigh: Weigh, *, heads: str) -> None:
    """One more micro-batch of a batch that is accumulated over several calls, under fixed weights: its weighted gradient.

    It is kept beside ``.grad``.

    Raises:
        ValueError: If the micro-batch doesn't bring the same tasks in the same proportions as those before.
    """
    network, carried = parts.network, parts.left_by_earlier_calls(request.source)
    unit = UnitHeads(network) if heads == "unit" else None
    weights = _known_weights(parts, request, weigh)
    carried.proportions.begin()
    for chunk in forwards(parts, request, apart=unit is not None):
        size = carried.proportions.add(chunk.counts)
        carried.sums.add(chunk)
        _backward(parts, chunk, weights, {i: weights.share(i, size) for i in chunk.losses if i in request.wanted}, unit)
    carried.proportions.close()
    if not carried.proportions.alike:
        raise ValueError(
            "With fixed weights every micro-batch of an accumulated batch should bring the same tasks, their counts in the "
            "same proportions: one backward serves all of its tasks, so their shares can't be told apart later. Pass the list "
            "of all micro-batches to one call instead."
        )
    if unit is not None:
        unit.finish(weights.by_task)
    for parameter in network.parameters:
        if parameter.grad is not None:
            gradient, parameter.grad = parameter.grad, None
            known = carried.gradients.get(id(parameter))
            carried.gradients[id(parameter)] = gradient if known is None else known + gradient


def finish(parts: Parts, request: Request) -> Losses:
    """The mean of what :func:`accumulate` has kept, into ``.grad``; returns the losses."""
    network, reduction, carried = parts.network, parts.reduction, parts.left_by_earlier_calls(request.source)
    sums, proportions = carried.sums, carried.proportions
    if parts.several:
        reduction.doing = f"one gradient {sorted(request.wanted)} of batch {request.source}, accumulated"
        sums, alike = reduction.tell(sums, counts=proportions.relative)
        if not alike:
            raise ValueError("With fixed weights every rank should bring the same tasks in the same proportions.")
    for parameter in network.parameters:
        parameter.grad = carried.gradients.get(id(parameter))
    losses = reduction.average(sums)
    network.tidy_sparse()
    sum_gradients(network)
    average_statistics(network)
    if proportions.first:
        network.multiply(network.gradients(), 1 / losses.totals[proportions.lead])
    return losses


def _known_weights(parts: Parts, request: Request, weigh: Weigh) -> _Weights:
    """Fixed weights don't depend on the losses: those of all tasks are known before the first forward."""
    indices = tuple(sorted(request.wanted))
    ones = torch.ones(len(indices), dtype=torch.float64, device=parts.network.device)
    factors = None if parts.reduction.weigh is None else parts.reduction.weigh(ones, indices)
    return _weights(parts, weigh, Losses(indices, ones, ones, {}, factors))


def _settle(parts: Parts, unit: UnitHeads | None, weights: _Weights, failure: BaseException | None = None) -> None:
    """After the last backward: own gradients on the heads, and what the ranks have in common."""
    network = parts.network
    network.tidy_sparse()
    if unit is not None and failure is None:
        unit.finish(weights.by_task)
    sum_gradients(network, failure)
    average_statistics(network)


def _weights(parts: Parts, weigh: Weigh, losses: Losses) -> _Weights:
    """The method's weight of every one of the losses, and the user's factors if there are any."""
    if not losses.indices:
        return _Weights((), losses.values, None)
    values = weigh(losses.values, losses.indices).detach().to(losses.values)
    factors = None if losses.factors is None else losses.factors.to(values)
    parts.reduction.weights = values if factors is None else values * factors
    return _Weights(losses.indices, values, factors)


def _backward(
    parts: Parts,
    chunk: Chunk,
    weights: _Weights,
    shares: Mapping[int, Tensor | float],
    unit: UnitHeads | None,
) -> None:
    """Backward of the sum of weight times share times loss."""
    if not shares:
        return
    network = parts.network
    scale = network.scale(next(iter(chunk.losses.values())).device)
    if scale is not None:
        shares = {index: scale.to(weights.values) * share for index, share in shares.items()}
    if network.sharded:
        # FSDP averages over the ranks what is to be summed.
        shares = {index: share * network.ranks.size for index, share in shares.items()}
    inputs: list[Tensor] | None = None if network.sharded else network.parameters
    if network.compiled and inputs is not None:
        inputs = [p for p in inputs if any(network.reaches(index, p) for index in shares)]
    before = network.without_gradient(tuple(shares))
    with chunk.activated(), quiet(network.parameters):
        if unit is not None:
            unit.before(chunk.losses, weights.by_task, shares)
        roots, seeds = [chunk.losses[index] for index in shares], weights.times(shares)
        if len(roots) > 1 and len({(root.dtype, root.device) for root in roots}) == 1:
            # PyTorch checks every root in Python: one takes less time than many.
            stacked = torch.stack(roots)
            torch.autograd.backward(stacked, seeds.to(stacked), inputs=inputs)
        else:
            starts = [seed.to(root) for root, seed in zip(roots, seeds.unbind(), strict=True)]
            torch.autograd.backward(roots, starts, inputs=inputs)
    parts.num_backward += 1
    network.explain(chunk, shares, before)
