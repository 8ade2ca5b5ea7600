"""The Gramian of the tasks' gradients without the K x P matrix: the graph is walked down with all tasks side by side.

The K backwards go through one node of the backward graph after the other, each node with the cotangents of all tasks before the
next: products of all cotangents with one matrix are one product. What autograd alone can go through (custom functions,
checkpointing) is gone through in runs of nodes, by one backward per task from what has arrived above the run down to what
lies below it.

:class:`Layerwise` reduces the gradients of about a sixteenth of the shared parameters at a time to their K x K products, and
keeps nothing; one more backward, of the weighted losses, combines them. :class:`Kept` keeps what the gradients can be
combined from, and needs no other backward: gradients where they are small, cotangents of layers with few samples.

The weights of linear layers and convolutions with few samples, and embeddings, don't even need their gradients
(:mod:`.factors`).
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torch.autograd.graph import Node

from torchmto.gradients.buckets import Buckets
from torchmto.gradients.engine import Engine, Piece, Take, Wanted, ratio
from torchmto.gradients.factors import Factor, find_factors
from torchmto.gradients.graph import Graph, Segment, cut, read_graph
from torchmto.gradients.hooks import quiet
from torchmto.gradients.ranks import Ranks
from torchmto.gradients.rows import products
from torchmto.gradients.stack import Stack, merge
from torchmto.gradients.torch_private import hooked, hooks_made
from torchmto.gradients.walk import Walk


class Layerwise(Engine):
    """Computes Gramians segment by segment; keeps one scratch buffer between steps.

    Several forwards (micro-batches, or one per task) are walked side by side, so that a segment's gradients are summed before
    their products are taken; their graphs are all kept. Among several ranks each segment's K gradients are summed while
    the next segment is gone through.

    Hooks that change gradients: those on parameters count. Where a forward sets hooks on activations, there is one segment,
    through which autograd goes with one task after the other, as for the rows. Ready losses hide that there are hooks, which
    then may not run at all: use a closure, or the rows.

    Args:
        ranks: The processes.
    """

    name: ClassVar[str] = "layerwise"
    adds: ClassVar[bool] = True

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._spare: list[Tensor] = []
        self._graphs: list[Graph] = []
        self._hooks = hooks_made()

    def begin(self) -> None:
        """Count the hooks that there are."""
        self._hooks = hooks_made()

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

    def backward(self, pieces: Sequence[Piece], shared: Sequence[Tensor]) -> int:
        """One whole backward per forward."""
        self._graphs = []
        pieces = [piece for piece in pieces if piece.losses and shared]
        for piece in pieces:
            # A loss in bfloat16 has its cotangent in bfloat16, so its weight is rounded here.
            seeds = [None if s is None else s.to(piece.losses[task]) for task, s in piece.seeds.items()]
            with piece.context(), quiet(shared):
                torch.autograd.backward(list(piece.losses.values()), seeds, inputs=list(shared))
        return len(pieces)

    def gramian(self, wanted: Wanted) -> Tensor:
        """J Jᵀ of the tasks' gradients on the shared parameters: exact."""
        pieces, tasks, shared, take = wanted.pieces, wanted.tasks, wanted.shared, wanted.take
        row = {task: number for number, task in enumerate(tasks)}
        walks = [Walk(piece, row) for piece in pieces]
        plans = self._plans(len(tasks), shared, wanted.others)
        groups = self._groups(plans, shared)
        device = shared[0].device if shared else torch.device("cpu")
        buckets = Buckets(groups, len(tasks), ranks=self._ranks, spare=self._spare, device=device)
        failure: BaseException | None = None
        for number in range(max([len(groups), *map(len, plans)])):
            try:
                for walk, plan in zip(walks, plans, strict=True):
                    if number < len(plan):
                        _advance(walk, plan[number], tasks, buckets, take)
            except BaseException as error:
                if not self._ranks.owing:
                    raise
                # The other ranks wait for this one's part of every bucket.
                failure, walks, plans = error, [], []
            with self._ranks.message():
                buckets.close(number)
        buckets.finish()
        product = self._ranks.sum_(buckets.product)
        if failure is not None:
            raise failure
        return product

    def _plans(self, num_tasks: int, shared: Sequence[Tensor], others: Sequence[Tensor]) -> list[list[Segment]]:
        """The segments of each forward."""
        times = Counter(key for graph in self._graphs for key in graph.reached)
        # Sums over forwards and ranks are sums of gradients, which factors don't have.
        alone = {id(p): p for p in shared if times[id(p)] == 1 and self._ranks.size == 1 and not p.is_complex()}
        return [self._plan(graph, alone, shared, others, num_tasks) for graph in self._graphs]

    def _plan(
        self,
        graph: Graph,
        alone: Mapping[int, Tensor],
        shared: Sequence[Tensor],
        others: Sequence[Tensor],
        num_tasks: int,
    ) -> list[Segment]:
        """The segments of one forward, which has ``alone`` of the shared parameters for itself."""
        whole = hooks_made() != self._hooks
        direct = not whole and not any(map(hooked, graph.common))
        factors = find_factors(graph.common, graph.uses, alone, num_tasks) if direct else {}
        return cut(graph, _sizes(shared, others, factors), factors, direct=direct, whole=whole)

    def _groups(self, plans: Sequence[Sequence[Segment]], shared: Sequence[Tensor]) -> list[list[Tensor]]:
        """The shared parameters whose gradients are complete after each segment, on all ranks."""
        last: dict[int, int] = {}
        for segments in plans:
            for number, segment in enumerate(segments):
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


class Kept(Engine):
    """Computes Gramians of one forward on one process, and keeps what combines the gradients without another backward."""

    name: ClassVar[str] = "mixed"

    def __init__(self) -> None:
        self.forget()

    def begin(self) -> None:
        """Nothing: the graph tells all."""

    def read(self, forwards: Sequence[Mapping[int, Tensor]]) -> dict[int, int]:
        """Read the whole graph."""
        self.graph = read_graph(forwards[0])
        return {key: mask for key, (_, mask) in self.graph.reached.items()}

    def forget(self) -> None:
        """Give up the graph and what was kept."""
        self.graph = Graph()
        self.factors: dict[Node, Factor] = {}
        self._cotangents: list[tuple[Factor, Stack]] = []
        self._formed: list[tuple[Tensor, Stack]] = []
        self._seeds: dict[int, Tensor | None] = {}

    def gramian(self, wanted: Wanted) -> Tensor:
        """J Jᵀ of the tasks' gradients on the shared parameters: exact."""
        pieces, tasks, shared = wanted.pieces, wanted.tasks, wanted.shared
        row = {task: number for number, task in enumerate(tasks)}
        known = set(map(id, shared))
        wide = torch.float32 if shared and shared[0].device.type == "mps" else torch.float64
        product = torch.zeros(len(tasks), len(tasks), dtype=wide, device=shared[0].device if shared else None)
        formed: dict[int, tuple[Tensor, list[Stack]]] = {}
        walk = Walk(pieces[0], row)
        for segment in cut(self.graph, _sizes(shared, wanted.others, self.factors), self.factors):
            for place, stack in walk.through(segment.runs):
                if isinstance(place, Factor):
                    _add(product, stack.rows, place.products(stack.values))
                    self._cotangents.append((place, stack))
                elif id(place) in known:
                    formed.setdefault(id(place), (place, []))[1].append(stack)
                else:
                    for number, gradient in zip(stack.rows, stack.parts, strict=True):
                        wanted.take(tasks[number], place, gradient)
        self._formed = [(leaf, merge(stacks)) for leaf, stacks in formed.values()]
        for rows, matrix in _matrices([stack for _, stack in self._formed]):
            _add(product, rows, products(matrix))
        self._seeds, self.graph = dict(pieces[0].seeds), Graph()
        return product

    def backward(self, pieces: Sequence[Piece], shared: Sequence[Tensor]) -> int:
        """Weighted sums of what was kept, and products with them."""
        weights = [float(ratio(weighted, self._seeds[task])) for task, weighted in pieces[0].seeds.items()]
        with torch.no_grad():
            for leaf, stack in self._formed:
                leaf.grad = _weighted(stack, weights).to(leaf)
            for factor, stack in self._cotangents:
                factor.leaf.grad = factor.combined(_weighted(stack, weights))
        self.forget()
        return 0


def _sizes(shared: Sequence[Tensor], others: Sequence[Tensor], factors: Mapping[Node, Factor]) -> dict[int, int]:
    """``id`` of a parameter whose gradients are formed -> its number of elements if it is shared, else 0."""
    left = {id(factor.leaf) for factor in factors.values()}
    sizes = {**dict.fromkeys(map(id, others), 0), **{id(p): p.numel() for p in shared}}
    return {key: size for key, size in sizes.items() if key not in left}


def _advance(walk: Walk, segment: Segment, tasks: Sequence[int], buckets: Buckets, take: Take) -> None:
    """Go through one segment, and sort what is found."""
    for place, stack in walk.through(segment.runs):
        if isinstance(place, Factor):
            _add(buckets.product, stack.rows, place.products(stack.values))
            continue
        for row, gradient in zip(stack.rows, stack.parts, strict=True):
            if place in buckets:
                buckets.add(row, [(place, gradient)])
            else:
                take(tasks[row], place, gradient)


def _add(product: Tensor, rows: Sequence[int], part: Tensor) -> None:
    """Add inner products of some rows."""
    if list(rows) == list(range(len(product))):
        product += part
    else:
        index = torch.tensor(rows, device=product.device)
        product[index[:, None], index] += part.to(product)


def _matrices(stacks: Collection[Stack]) -> list[tuple[tuple[int, ...], Tensor]]:
    """Gradients as matrices [k, elements], small ones next to each other."""
    small: dict[tuple[object, ...], list[Tensor]] = {}
    found = []
    for stack in stacks:
        values = stack.values.reshape(len(stack.rows), -1)
        values = values.to(torch.promote_types(values.dtype, torch.float32))
        if values.shape[1] < SMALL:
            small.setdefault((stack.rows, values.dtype, values.device), []).append(values)
        else:
            found.append((stack.rows, values))
    return found + [(key[0], torch.cat(parts, 1)) for key, parts in small.items()]  # type: ignore[misc]


SMALL = 2**14
"""Elements up to which a parameter's gradients are copied next to others': many small products take longer."""


def _weighted(stack: Stack, weights: Sequence[float]) -> Tensor:
    """The weighted sum of a stack, in float32 at least."""
    values = stack.values
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    total: Tensor = torch.tensordot(values.new_tensor([weights[row] for row in stack.rows]), values, 1)
    return total
