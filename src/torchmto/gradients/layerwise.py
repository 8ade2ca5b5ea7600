"""The Gramian of the tasks' gradients without the K x P matrix: the graph is walked down in segments.

The backward graph of a forward is cut into segments of about a sixteenth of the shared parameters each. Segment by segment
from the top, one backward per task goes through the segment alone: it starts from what that task's backward has left at the
segment's upper boundary, and ends at its lower boundary. So at any time there are the K tasks' gradients of one segment's
parameters, which are reduced to their K x K products at once, and their K cotangents at one boundary; every segment is gone
through once per task, as in K whole backwards.

The weights of linear layers with few samples, and embeddings, don't even need their gradients (:mod:`.factors`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from torchmto.gradients.buckets import Buckets
from torchmto.gradients.engine import Engine, Piece, Take
from torchmto.gradients.factors import find_factors
from torchmto.gradients.graph import Graph, cut, read_graph
from torchmto.gradients.hooks import quiet
from torchmto.gradients.ranks import Ranks
from torchmto.gradients.walk import Walk


class Layerwise(Engine):
    """Computes Gramians segment by segment; keeps one scratch buffer between steps.

    Several forwards (micro-batches, or one per task) are walked side by side, so that a segment's gradients are summed before
    their products are taken; their graphs are all kept. Among several ranks each segment's K gradients are summed while
    the next segment is gone through.

    Hooks that change gradients: those on parameters count. Those on activations may run more than once, where a segment
    begins at the activation, or not at all, where a layer's gradients aren't formed; use the rows for such models.

    Args:
        ranks: The processes.
    """

    name: ClassVar[str] = "layerwise"
    adds: ClassVar[bool] = True

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._spare: list[Tensor] = []
        self._graphs: list[Graph] = []

    def begin(self) -> None:
        """Nothing: the graphs tell all."""

    def read(self, forwards: Sequence[Mapping[int, Tensor]]) -> dict[int, int]:
        """Read the whole graphs."""
        self._graphs = [read_graph(losses) for losses in forwards]
        reached: dict[int, int] = {}
        for graph in self._graphs:
            for key, (_, mask) in graph.reached.items():
                reached[key] = reached.get(key, 0) | mask
        return reached

    def forget(self) -> None:
        """Give up the graphs."""
        self._graphs = []

    def backward(self, pieces: Sequence[Piece], shared: Sequence[Tensor]) -> None:
        """One whole backward per forward."""
        self._graphs = []
        for piece in pieces:
            if piece.losses and shared:
                with piece.context(), quiet(shared):
                    torch.autograd.backward(
                        list(piece.losses.values()), list(piece.seeds.values()), inputs=list(shared)
                    )

    def gramian(
        self,
        pieces: Sequence[Piece],
        tasks: Sequence[int],
        *,
        shared: Sequence[Tensor],
        others: Sequence[Tensor],
        take: Take,
    ) -> Tensor:
        """J Jᵀ of the tasks' gradients on the shared parameters: exact."""
        walks = self._walks(pieces, len(tasks), shared, others)
        groups = self._groups(walks, shared)
        device = shared[0].device if shared else torch.device("cpu")
        buckets = Buckets(groups, len(tasks), ranks=self._ranks, spare=self._spare, device=device)
        row = {task: number for number, task in enumerate(tasks)}
        failure: Exception | None = None
        for number in range(max([len(groups), *(len(walk.segments) for walk in walks)])):
            try:
                for walk in walks:
                    _advance(walk, number, row, buckets, take)
            except Exception as error:
                if self._ranks.size == 1:
                    raise
                # The other ranks wait for this one's part of every bucket.
                failure, walks = error, []
            buckets.close(number)
        buckets.finish()
        product = self._ranks.sum_(buckets.product)
        if failure is not None:
            raise failure
        return product

    def _walks(
        self, pieces: Sequence[Piece], num_tasks: int, shared: Sequence[Tensor], others: Sequence[Tensor]
    ) -> list[Walk]:
        """The forwards, cut into segments."""
        times = Counter(key for graph in self._graphs for key in graph.reached)
        # Sums over forwards and ranks are sums of gradients, which factors don't have.
        alone = {id(p): p for p in shared if times[id(p)] == 1 and self._ranks.size == 1 and not p.is_complex()}
        sizes = {**dict.fromkeys(map(id, others), 0), **{id(p): p.numel() for p in shared}}
        walks = []
        for piece, graph in zip(pieces, self._graphs, strict=True):
            factors = find_factors(graph.order, graph.uses, alone, num_tasks)
            formed = {id(factor.leaf) for factor in factors.values()}
            wanted = {key: size for key, size in sizes.items() if key not in formed}
            walks.append(Walk(piece, cut(graph, wanted, factors)))
        return walks

    def _groups(self, walks: Sequence[Walk], shared: Sequence[Tensor]) -> list[list[Tensor]]:
        """The shared parameters whose gradients are complete after each segment, on all ranks."""
        last: dict[int, int] = {}
        for walk in walks:
            for number, segment in enumerate(walk.segments):
                for leaf in segment.leaves:
                    last[id(leaf)] = max(number + 1, last.get(id(leaf), 0))
        places = [last.get(id(parameter), 0) for parameter in shared]
        if self._ranks.size > 1 and shared:
            places = self._ranks.max_(torch.tensor(places, device=shared[0].device)).tolist()
        groups: list[list[Tensor]] = [[] for _ in range(max(places, default=0))]
        for parameter, place in zip(shared, places, strict=True):
            if place:
                groups[place - 1].append(parameter)
        return groups


def _advance(walk: Walk, number: int, row: Mapping[int, int], buckets: Buckets, take: Take) -> None:
    """Go through one segment with every task, and sort what is found."""
    factors = walk.factors(number)
    cotangents: list[list[Tensor | None]] = [[None] * len(row) for _ in factors]
    for found in walk.through(number):
        place = row[found.task]
        buckets.add(place, [pair for pair in found.gradients if pair[0] in buckets])
        for leaf, gradient in found.gradients:
            if leaf not in buckets:
                take(found.task, leaf, gradient)
        for kept, cotangent in zip(cotangents, found.cotangents, strict=True):
            kept[place] = cotangent
    for factor, kept in zip(factors, cotangents, strict=True):
        buckets.product += factor.products(kept)
