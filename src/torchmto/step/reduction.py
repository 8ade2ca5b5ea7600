"""From the losses of single forwards to those of the step: averaged over micro-batches and ranks, and weighted."""

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from torchmto.step.losses import Chunk, Losses, Weigh, stack
from torchmto.step.messages import Exchange
from torchmto.step.network import Network
from torchmto.step.plan import Plan


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
class Reduction:
    """Averages the losses of one step, telling the ranks where there are several.

    Attributes:
        network: The model and its ranks.
        plan: What all steps have in common.
        step: What this step is about; the same on all ranks.
        weigh: The user's loss weights, until they have been told of the step; see :class:`Plan`.
        doing: What the next exchange is for; the same on all ranks.
        first: The first losses of the step that aren't empty; the first ones at all until there are any.
        weights: The weights that losses were given last, [k], to explain gradients that aren't finite.
    """

    network: Network
    plan: Plan
    step: str
    weigh: Weigh | None
    doing: str = ""
    first: Losses | None = None
    weights: Tensor | None = None

    @functools.cached_property
    def _exchange(self) -> Exchange:
        return Exchange(self.network.ranks, len(self.plan.tasks), self.step)

    def tell(
        self, sums: Sums, *, counts: Sequence[object] | None = None, failure: BaseException | None = None
    ) -> tuple[Sums, bool]:
        """Sum losses over the ranks and agree on roles; also, whether all ranks have the same ``counts``."""
        network = self.network
        told = self._exchange(
            sums.totals,
            sums.weighted,
            doing=self.doing,
            device=network.device,
            disagree=network.agreement.needed,
            counts=counts,
            failure=failure,
        )
        if told.disagree:
            network.agree()
        return Sums(told.totals, told.weighted), told.even

    def agree(self, weights: Tensor | None = None, *, failure: BaseException | None = None) -> Tensor | None:
        """Before what can't be undone: no rank has failed; and all go on with the first one's ``weights`` [k].

        So the ranks' processors may differ.
        """
        network = self.network
        own = () if weights is None or network.ranks.rank else weights.unbind()
        self.doing = "what was decided"
        told, _ = self.tell(Sums(dict.fromkeys(range(len(own)), 1.0), dict(enumerate(own))), failure=failure)
        if weights is None:
            return None
        return torch.stack([told.weighted[place] for place in range(len(weights))]).to(weights)

    def check_same(self, chunk: Chunk, num_micro_batches: int) -> None:
        """With sharded parameters all ranks take part in every forward and backward."""
        _, same = self.tell(Sums(), counts=[num_micro_batches, *sorted(chunk.losses)])
        if not same:
            raise ValueError(
                "With sharded parameters (FSDP) every rank takes part in every backward, so every rank should return losses "
                "for the same tasks in as many micro-batches. A task without labels on one rank can be returned as a zero "
                "loss with graph, with a small count: `(0 * output.sum(), 1e-6)`."
            )

    def over_ranks(self, chunks: Iterable[Chunk]) -> Losses:
        """The losses of this rank's forwards -> the losses of the step."""
        chunks, several = list(chunks), self.network.ranks.size > 1
        if len(chunks) == 1 and chunks[0].losses and not several:
            (chunk,) = chunks
            if all(count == 1 for count in chunk.counts.values()):
                return self._weighted(tuple(chunk.losses), chunk.stacked.detach(), chunk.counts)
        sums = Sums()
        for chunk in chunks:
            sums.add(chunk)
        return self.average(self.tell(sums)[0] if several else sums)

    def average(self, sums: Sums) -> Losses:
        """Sums over all micro-batches and ranks -> the losses of the step, with the user's loss weights."""
        totals = sums.totals
        indices = tuple(sorted(totals))
        values = [sums.weighted[i] / totals[i] if totals[i] != 1 else sums.weighted[i] for i in indices]
        raw = stack(values) if values else torch.zeros(0, device=self.network.device)
        return self._weighted(indices, raw, totals)

    def _weighted(self, indices: tuple[int, ...], raw: Tensor, totals: dict[int, float]) -> Losses:
        losses = Losses(indices, raw, raw, totals)
        if self.weigh is not None and indices:
            losses.factors = self.weights = self.weigh(raw, indices).detach().to(raw)
            losses.values = raw * losses.factors
        if self.first is None or not self.first.indices:
            self.first = losses
        return losses
