"""One backward of the weighted sum of the losses."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from torchmto.gradients import quiet
from torchmto.step.forwards import Forwards
from torchmto.step.info import Passes
from torchmto.step.losses import Chunk, Losses, Weigh
from torchmto.step.network import Network
from torchmto.step.noise import Noise
from torchmto.step.rank_sums import average_statistics, sum_gradients
from torchmto.step.reduction import Reduction, Sums, shape_of
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


class WeightedBackward:
    """Forward and one backward of the weighted sum of the losses into ``.grad``.

    With several micro-batches the weights need all their losses first. So unless the weights are fixed (independent of the
    losses and of which tasks are present) and every micro-batch brings the same tasks and counts, the losses are read by a
    forward without gradient, and then every micro-batch is run again, with the same random state.

    Args:
        network: The model, whose ``.grad`` is set.
        forwards: The step's forwards.
        reduction: Averages the losses.
        noise: Undoes forwards that are run again.
        passes: Where backwards are counted.
    """

    def __init__(
        self, network: Network, forwards: Forwards, reduction: Reduction, noise: Noise, passes: Passes
    ) -> None:
        self._network = network
        self._forwards = forwards
        self._reduction = reduction
        self._noise = noise
        self._passes = passes

    def run(
        self, weigh: Weigh, asked: tuple[str, ...], wanted: set[int], source: int, *, fixed: bool, heads: str
    ) -> Losses:
        """The backward.

        Args:
            weigh: (losses [k], indices) -> weights [k].
            asked: The tasks the closure is asked for.
            wanted: The tasks whose losses are summed.
            source: Which independent batch.
            fixed: Whether ``weigh`` gives the same weights whatever the losses and the present tasks.
            heads: "weighted" or "unit".

        Returns:
            The losses of all tasks the closure was asked for.
        """
        network, reduction = self._network, self._reduction
        micro_batches = self._forwards.sources[source]
        unit = UnitHeads(network) if heads == "unit" else None
        apart = wanted if unit is not None else set()
        held = len(micro_batches) == 1 or all(isinstance(entry, Mapping) for entry in micro_batches)
        reduction.doing = f"one gradient {sorted(wanted)} of batch {source}"
        several = network.ranks.size > 1
        known: Losses | None = None
        if not held and fixed and reduction.weigh_fixed:
            known, done = self._evenly(weigh, asked, wanted, source, unit)
            if known is not None and done:
                return known
        single = len(micro_batches) == 1 and not several
        sums = Sums()
        chunks: list[Chunk] = []
        if held:
            for chunk in self._forwards.run(asked, source, apart=apart):
                counts = dict.fromkeys(chunk.counts, 1.0) if single else chunk.counts
                chunks.append(Chunk(chunk.losses, counts, chunk.active))
                sums.add(chunks[-1])
        elif known is None:
            with self._noise.rehearsal():
                for chunk in self._forwards.run(asked, source, grad=False):
                    sums.add(chunk)
        if known is None and several:
            sums, _ = reduction.tell(sums, counts=shape_of(micro_batches, chunks))
        losses = reduction.average(sums) if known is None else known
        weights = self._weights(weigh, losses, wanted)
        failure: Exception | None = None
        for chunk in chunks if held else self._forwards.run(asked, source, apart=apart):
            shares = {
                i: weights.share(i, chunk.counts[i] / losses.totals[i])
                for i in chunk.losses
                if i in weights.indices and chunk.counts[i]
            }
            try:
                self._backward(chunk, weights, shares, unit)
            except Exception as error:
                if not several:
                    raise
                failure = error
                break
        self._settle(unit, weights, failure)
        return losses

    def _evenly(
        self, weigh: Weigh, asked: tuple[str, ...], wanted: set[int], source: int, unit: UnitHeads | None
    ) -> tuple[Losses | None, bool]:
        """One pass over micro-batches that all bring the same tasks and counts, on all ranks.

        Returns:
            The losses, as far as they are known; and whether the gradients are computed. If not, nothing has happened.
        """
        network, reduction = self._network, self._reduction
        micro_batches = self._forwards.sources[source]
        several = network.ranks.size > 1
        share = 1.0 / (len(micro_batches) * network.ranks.size)
        # Fixed weights don't depend on the losses, so those of all tasks are known before the first forward.
        indices = tuple(sorted(wanted))
        ones = torch.ones(len(indices), dtype=torch.float64, device=network.device)
        user_factors = None if reduction.weigh is None else reduction.weigh(ones, indices)
        weights = self._weights(weigh, Losses(indices, ones, ones, {}, user_factors), wanted)
        sums = Sums()
        chunks: list[Chunk] = []
        failure: Exception | None = None
        per_source = len(self._forwards.groups(micro_batches[0], asked))
        with self._noise.attempt() as undo:
            even = True
            for chunk in self._forwards.run(asked, source, apart=wanted if unit is not None else ()):
                first = chunks[len(chunks) % per_source] if len(chunks) >= per_source else chunk
                even = even and (chunk.counts, chunk.active) == (first.counts, first.active)
                if not even and not several:
                    break
                chunks.append(Chunk({}, chunk.counts, chunk.active))
                sums.add(chunk)
                shares = {i: weights.share(i, share) for i in chunk.losses if i in wanted}
                try:
                    if even:
                        self._backward(chunk, weights, shares, unit)
                except Exception as error:
                    if not several:
                        raise
                    failure = error
                    break
            if several:
                counts = shape_of(micro_batches, chunks) if even else None
                sums, even = reduction.tell(sums, counts=counts, failure=failure)
            losses = reduction.average(sums) if several or even else None
            if not even:
                network.zero_grad()
                undo()
                return losses, False
        self._settle(unit, weights)
        return losses, True

    def _settle(self, unit: UnitHeads | None, weights: _Weights, failure: Exception | None = None) -> None:
        """After the last backward: own gradients on the heads, and what the ranks have in common."""
        self._network.tidy_sparse()
        if unit is not None and failure is None:
            unit.finish(weights.by_task)
        sum_gradients(self._network, failure)
        average_statistics(self._network)

    def _weights(self, weigh: Weigh, losses: Losses, wanted: set[int]) -> _Weights:
        """The method's weight of every present wanted task, and the user's factors if there are any."""
        losses = losses.only(wanted)
        if not losses.indices:
            return _Weights((), losses.values, None)
        values = weigh(losses.values, losses.indices).detach().to(losses.values)
        factors = None if losses.factors is None else losses.factors.to(values)
        self._reduction.weights = values if factors is None else values * factors
        return _Weights(losses.indices, values, factors)

    def _backward(
        self,
        chunk: Chunk,
        weights: _Weights,
        shares: Mapping[int, Tensor | float],
        unit: UnitHeads | None,
    ) -> None:
        """Backward of the sum of weight times share times loss."""
        if not shares:
            return
        network = self._network
        scale = network.scale(next(iter(chunk.losses.values())).device)
        parts = shares if scale is None else {i: scale.to(weights.values) * share for i, share in shares.items()}
        if network.sharded:
            # FSDP averages over the ranks what is to be summed.
            parts = {index: part * network.ranks.size for index, part in parts.items()}
        inputs: list[Tensor] | None = None if network.sharded else network.parameters
        if network.compiled and inputs is not None:
            inputs = [p for p in inputs if any(network.reaches(index, p) for index in parts)]
        before = network.without_gradient(tuple(parts))
        with chunk.activated(), quiet(network.parameters):
            if unit is not None:
                unit.before(chunk.losses, weights.by_task, parts)
            roots, seeds = [chunk.losses[index] for index in parts], weights.times(parts)
            if len(roots) > 1 and len({(root.dtype, root.device) for root in roots}) == 1:
                # PyTorch checks every root in Python: one takes less time than many.
                stacked = torch.stack(roots)
                torch.autograd.backward(stacked, seeds.to(stacked), inputs=inputs)
            else:
                starts = [seed.to(root) for root, seed in zip(roots, seeds.unbind(), strict=True)]
                torch.autograd.backward(roots, starts, inputs=inputs)
        self._passes.backward += 1
        network.explain(chunk, parts, before)
