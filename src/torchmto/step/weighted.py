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
from torchmto.step.reduction import Sums
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
    if not held and fixed and reduction.weigh_fixed:
        known = _in_one_pass(parts, request, weigh, unit)
        if known is not None:
            return known
    sums = Sums()
    chunks: list[Chunk] = []
    if held:
        single = len(micro_batches) == 1 and not parts.several
        for chunk in forwards(parts, request, apart=apart):
            counts = dict.fromkeys(chunk.counts, 1.0) if single else chunk.counts
            chunks.append(Chunk(chunk.losses, counts, chunk.active))
            sums.add(chunks[-1])
    else:
        with parts.noise.rehearsal():
            for chunk in forwards(parts, request, grad=False):
                sums.add(chunk)
    losses = reduction.over_ranks(sums)
    weights = _weights(parts, weigh, losses.only(request.wanted))
    failure: BaseException | None = None
    try:
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


class _Proportions:
    """Whether all micro-batches bring the same tasks in the same proportions.

    Args:
        calls: Calls of the closure per micro-batch.

    Attributes:
        alike: Whether those so far did.
        first: Task index -> count in the first micro-batch.
    """

    def __init__(self, calls: int) -> None:
        self.alike = True
        self.first: dict[int, float] = {}
        self._calls = calls
        self._position = 0
        self._own = self.first

    def add(self, counts: Mapping[int, float]) -> float:
        """Add the counts of one call; returns its micro-batch's size: the count of its first task."""
        if self._position and self._position % self._calls == 0:
            self.close()
            self._own = {}
        self._position += 1
        self._own.update(counts)
        if not self._own:
            return 1.0
        lead = next(iter(self._own))
        size = self._own[lead]
        self.alike = self.alike and lead == next(iter(self.first), None)
        self.alike = self.alike and all(self.first.get(i, 0) * size == n * self.first[lead] for i, n in counts.items())
        return size

    def close(self) -> None:
        """After the last call of a micro-batch: has it brought all tasks?"""
        self.alike = self.alike and self._own.keys() == self.first.keys()

    @property
    def lead(self) -> int:
        """The task that sizes are counts of."""
        return next(iter(self.first))


def _in_one_pass(parts: Parts, request: Request, weigh: Weigh, unit: UnitHeads | None) -> Losses | None:
    """One pass over micro-batches that bring the same tasks in the same proportions, on all ranks.

    Returns:
        The losses; None if the micro-batches aren't like that. Then nothing has happened.
    """
    network, reduction = parts.network, parts.reduction
    micro_batches = parts.sources[request.source]
    nominal = len(micro_batches) * network.ranks.size
    # Fixed weights don't depend on the losses, so those of all tasks are known before the first forward.
    indices = tuple(sorted(request.wanted))
    ones = torch.ones(len(indices), dtype=torch.float64, device=network.device)
    user_factors = None if reduction.weigh is None else reduction.weigh(ones, indices)
    weights = _weights(parts, weigh, Losses(indices, ones, ones, {}, user_factors))
    sums = Sums()
    proportions = _Proportions(len(groups(parts, micro_batches[0], request.asked)))
    unit_size = 0.0
    with parts.noise.attempt() as undo:
        for chunk in forwards(parts, request, apart=unit is not None):
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
            relative = sorted((i, count / first[proportions.lead]) for i, count in first.items())
            sums, alike = reduction.tell(sums, counts=[len(micro_batches), relative] if alike else None)
        if not alike:
            network.zero_grad()
            undo()
            return None
        losses = reduction.average(sums)
    _settle(parts, unit, weights)
    left = nominal * unit_size / losses.totals[proportions.lead] if first else 1.0
    if left != 1:
        network.multiply(network.gradients(), left)
    return losses


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
