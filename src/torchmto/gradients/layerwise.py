"""The Gramian of the tasks' gradients without the K x P matrix: the graph is walked down with all tasks side by side.

The K backwards go through one node of the backward graph after the other, each node with the cotangents of all tasks before the
next: products of all cotangents with one matrix are one product. What autograd alone can go through (custom functions,
checkpointing) is gone through in runs of nodes, by one backward per task from what has arrived above the run down to what
lies below it.

:class:`Layerwise` reduces the gradients of about a sixteenth of the shared parameters at a time to their K x K products, and
keeps nothing; one more backward, of the weighted losses, combines them. :class:`~torchmto.gradients.choice.Auto` goes the same
way and keeps everything.

The weights of linear layers and convolutions with few samples, and embeddings, don't even need their gradients
(:mod:`.factors`).
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.autograd.graph import Node

from torchmto.gradients.backwards import quiet
from torchmto.gradients.engine import Engine, Piece, Wanted
from torchmto.gradients.factors import Factor, find_factors
from torchmto.gradients.finite import real
from torchmto.gradients.graph import Graph, Run, cut, read_graph
from torchmto.gradients.ranks import Ranks, Wait
from torchmto.gradients.reach import is_nested
from torchmto.gradients.rows import products, slices_of, wide_dtype, widest
from torchmto.gradients.stack import Stack, merge
from torchmto.gradients.torch_private import hooked, hooks_made
from torchmto.gradients.walk import Walk

SMALL = 2**14
"""Elements up to which a parameter's gradients are copied next to others': many small products take longer."""

SMALL_ELSEWHERE = 2**18
"""The same on other devices, where a launch takes as long as copying many."""

Formed = dict[Tensor, Stack]
"""Shared parameters -> the tasks' gradients that have arrived, summed, in float32 at least."""


@dataclass(frozen=True)
class Flat:
    """Gradients of some tasks for some parameters, next to each other.

    Attributes:
        rows: The tasks' rows in the Gramian.
        leaves: The parameters, and the shape of a task's gradient of each.
        values: [len(rows), elements of all parameters].
    """

    rows: tuple[int, ...]
    leaves: Sequence[tuple[Tensor, torch.Size]]
    values: Tensor


class Layerwise(Engine):
    """Computes Gramians segment by segment.

    Several forwards (micro-batches, or one per task) are walked side by side, so that a segment's gradients are summed before
    their products are taken; their graphs are all kept. Among several ranks each segment's K gradients are summed while
    the next segment is gone through.

    Hooks that change gradients: those on parameters count. Where a forward sets hooks on activations, there is one segment,
    through which autograd goes with one task after the other, as for the rows. Ready losses, and what else was computed before
    the step, hide that there are hooks, which then may not run at all: use a closure that does it all, or the rows. There is
    one segment, too, where parts of the forward are checkpointed or offloaded and a function in Python lies between two things
    that one task's own part reads, or two layers that share a parameter.

    Args:
        ranks: The processes.
    """

    name: ClassVar[str] = "layerwise"
    adds: ClassVar[bool] = True

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._graphs: list[Graph] = []
        self._hooks = 0

    def begin(self) -> None:
        """Count the hooks that there are."""
        self._hooks = hooks_made()

    def read(self, forwards: Sequence[Mapping[int, Tensor]]) -> dict[int, int]:
        """Read the whole graphs.

        Raises:
            ValueError: If there are nested tensors.
        """
        self._graphs = [read_graph(losses) for losses in forwards]
        if any(is_nested(node) for graph in self._graphs for node in graph.order):
            raise ValueError(
                'gradients="layerwise" puts the gradients of all tasks next to each other, which nested tensors don\'t allow. '
                'Use gradients="parameters", or "auto".'
            )
        reached: dict[int, int] = {}
        for graph in self._graphs:
            for key, mask in graph.reached.items():
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
        walks = [Walk(piece, wanted.tasks) for piece in wanted.pieces]
        plans = self._plans(wanted)
        groups = self._groups(plans, wanted.shared)
        product = no_products(wanted)
        formed: Formed = {}
        sent: tuple[Tensor, Wait] | None = None
        failure: BaseException | None = None
        for number in range(max([len(groups), *map(len, plans)])):
            try:
                for walk, plan in zip(walks, plans, strict=True):
                    if number < len(plan):
                        advance(walk, plan[number], wanted, product, formed)
            except BaseException as error:
                if not self._ranks.owing:
                    raise
                # The other ranks wait for this one's part of every segment.
                failure, walks, plans = error, [], []
            leaves = groups[number] if number < len(groups) else []
            if self._ranks.size == 1:
                add_products(product, side_by_side({leaf: formed.pop(leaf) for leaf in leaves if leaf in formed}))
            elif leaves:
                with self._ranks.message():
                    self._receive(sent, product)
                    rows = _whole(leaves, formed, product)
                    sent = rows, self._ranks.start_sum(rows)
        self._receive(sent, product)
        product = self._ranks.sum_(product)
        if failure is not None:
            raise failure
        return product

    def _receive(self, sent: tuple[Tensor, Wait] | None, product: Tensor) -> None:
        """Wait for rows that are on their way; each rank adds the inner products of its part of the columns."""
        if sent is not None:
            rows, wait = sent
            wait()
            rank, size, width = self._ranks.rank, self._ranks.size, rows.shape[1]
            product += products(rows[:, width * rank // size : width * (rank + 1) // size])

    def _plans(self, wanted: Wanted) -> list[list[list[Run]]]:
        """The segments of each forward."""
        times = Counter(key for graph in self._graphs for key in graph.reached)
        # Sums over forwards and ranks are sums of gradients, which factors don't have.
        alone = {id(p): p for p in wanted.shared if times[id(p)] == 1 and self._ranks.size == 1 and not p.is_complex()}
        whole = hooks_made() != self._hooks
        plans = []
        for graph in self._graphs:
            direct = not whole and not any(map(hooked, graph.common))
            factors = find_factors(graph.common, graph.uses, alone, len(wanted.tasks)) if direct else {}
            plans.append(cut(graph, sizes(wanted, factors), factors, direct=direct, whole=whole))
        return plans

    def _groups(self, plans: Sequence[Sequence[Sequence[Run]]], shared: Sequence[Tensor]) -> list[list[Tensor]]:
        """The shared parameters whose gradients are complete after each segment, on all ranks."""
        last: dict[int, int] = {}
        for segments in plans:
            for number, segment in enumerate(segments, 1):
                for leaf in (leaf for run in segment for leaf in run.leaves):
                    last[id(leaf)] = max(number, last.get(id(leaf), 0))
        places = [last.get(id(parameter), 0) for parameter in shared]
        if self._ranks.size > 1 and shared:
            places = self._ranks.max_(torch.tensor(places, device=shared[0].device)).tolist()
        groups: list[list[Tensor]] = [[] for _ in range(max(places, default=0))]
        for parameter, place in zip(shared, places, strict=True):
            if place:
                groups[place - 1].append(parameter)
        return groups


def sizes(wanted: Wanted, factors: Mapping[Node, Factor]) -> dict[int, int]:
    """``id`` of a parameter whose gradients are formed -> its number of elements if it is shared, else 0."""
    left = {id(factor.leaf) for factor in factors.values()}
    found = {**dict.fromkeys(map(id, wanted.others), 0), **{id(p): p.numel() for p in wanted.shared}}
    return {key: size for key, size in found.items() if key not in left}


def no_products(wanted: Wanted) -> Tensor:
    """Zeros [K, K], to which inner products are added."""
    device = wanted.shared[0].device if wanted.shared else torch.device("cpu")
    return torch.zeros(len(wanted.tasks), len(wanted.tasks), dtype=wide_dtype(device), device=device)


def advance(
    walk: Walk, segment: Sequence[Run], wanted: Wanted, product: Tensor, formed: Formed
) -> list[tuple[Factor, Stack]]:
    """Go through one segment: add the products of factors, sum gradients of shared parameters, hand out those of the heads.

    Returns:
        The factors and their cotangents.
    """
    shared = set(map(id, wanted.shared))
    factored = []
    for place, stack in walk.through(segment):
        if isinstance(place, Factor):
            _add(product, stack.rows, place.products(stack.values))
            factored.append((place, stack))
        elif id(place) in shared:
            formed[place] = merge([formed[place], stack.wide]) if place in formed else stack.wide
        else:
            for row, gradient in zip(stack.rows, stack.parts, strict=True):
                wanted.take(wanted.tasks[row], place, gradient)
    return factored


def side_by_side(formed: Mapping[Tensor, Stack]) -> list[Flat]:
    """Gradients as matrices, those of small parameters in one."""
    groups: dict[object, list[tuple[Tensor, Stack]]] = {}
    for leaf, stack in formed.items():
        values = stack.values
        small = values[0].numel() < (SMALL if values.is_cpu else SMALL_ELSEWHERE)
        kind = (stack.rows, values.dtype, values.device) if small else id(leaf)
        groups.setdefault(kind, []).append((leaf, stack))
    found = []
    for group in groups.values():
        rows = group[0][1].rows
        parts = [stack.values.reshape(len(rows), -1) for _, stack in group]
        leaves = [(leaf, stack.values.shape[1:]) for leaf, stack in group]
        found.append(Flat(rows, leaves, torch.cat(parts, 1) if len(parts) > 1 else parts[0]))
    return found


def add_products(product: Tensor, flats: Iterable[Flat]) -> None:
    """Add the inner products of gradients."""
    for flat in flats:
        _add(product, flat.rows, products(flat.values))


def _whole(leaves: Sequence[Tensor], formed: Formed, product: Tensor) -> Tensor:
    """The gradients of some parameters next to each other, [K, elements], zeros where there are none."""
    parts = [real(leaf) for leaf in leaves]
    places = slices_of(parts)
    rows = torch.zeros(len(product), places[-1].stop, dtype=widest(parts), device=product.device)
    for leaf, place in zip(leaves, places, strict=True):
        if leaf in formed:
            stack = formed.pop(leaf)
            rows[list(stack.rows), place] = stack.values.reshape(len(stack.rows), -1).to(rows)
    return rows


def _add(product: Tensor, rows: Sequence[int], part: Tensor) -> None:
    """Add inner products of some rows."""
    if list(rows) == list(range(len(product))):
        product += part.to(product)
    else:
        index = torch.tensor(rows, device=product.device)
        product[index[:, None], index] += part.to(product)
