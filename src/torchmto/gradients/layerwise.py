"""The Gramian of the tasks' gradients without the K x P matrix: the graph is walked down in segments.

The backward graph of all losses is cut into segments of about a sixteenth of the shared parameters each. Segment by segment
from the top, one backward per task goes through the segment alone: it starts from what that task's backward has left at the
segment's upper boundary, and ends at its lower boundary. So at any time there are the K tasks' gradients of one segment's
parameters, which are reduced to their K x K products at once, and their K cotangents at one boundary; every segment is gone
through once per task, as in K whole backwards.
"""

from __future__ import annotations

import functools
import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from torchmto.gradients.rows import products, views_of

SEGMENTS = 16
"""A segment is closed once it has this fraction of the shared parameters."""

Edge = tuple[Node, int]
"""A node of the backward graph and which of its inputs: the gradient of one output of a forward operation."""


@dataclass
class Graph:
    """The backward graph of several losses.

    Attributes:
        order: Its nodes, every node after all nodes whose results it takes; leaves are left out.
        reached: ``id`` of a leaf -> the leaf and the tasks whose losses reach it, as a bit mask.
    """

    order: list[Node] = field(default_factory=list)
    reached: dict[int, tuple[Tensor, int]] = field(default_factory=dict)


def _leaf(node: Node) -> Tensor | None:
    variable: Tensor | None = getattr(node, "variable", None)
    return variable


def read_graph(losses: Mapping[int, Tensor]) -> Graph:
    """Walk the graph of ``losses``, task -> loss, none of which is a leaf, from the last operation to the first."""
    roots = [loss.grad_fn for loss in losses.values() if loss.grad_fn is not None]
    waiting: dict[Node, int] = dict.fromkeys(roots, 0)
    stack = list(waiting)
    while stack:
        for following, _ in stack.pop().next_functions:
            if following is not None:
                if following not in waiting:
                    waiting[following] = 0
                    stack.append(following)
                waiting[following] += 1
    masks: dict[Node, int] = dict.fromkeys(waiting, 0)
    for task, loss in losses.items():
        if loss.grad_fn is not None:
            masks[loss.grad_fn] |= 1 << task
    graph = Graph()
    # Of the operations whose gradient is complete the one that ran last comes first, as in the autograd engine itself.
    ready = [(-_number(node), place, node) for place, node in enumerate(waiting) if waiting[node] == 0]
    heapq.heapify(ready)
    place = len(waiting)
    while ready:
        node = heapq.heappop(ready)[2]
        leaf = _leaf(node)
        if leaf is not None:
            graph.reached[id(leaf)] = (leaf, masks[node])
            continue
        graph.order.append(node)
        for following, _ in node.next_functions:
            if following is not None:
                masks[following] |= masks[node]
                waiting[following] -= 1
                if waiting[following] == 0:
                    place += 1
                    heapq.heappush(ready, (-_number(following), place, following))
    return graph


def _number(node: Node) -> int:
    # Private, but for 2.1 and later the only way to the order in which operations ran; only the sizes of boundaries depend
    # on it. Leaves have the largest number.
    return int(node._sequence_nr())  # noqa: SLF001


@dataclass
class Segment:
    """Consecutive nodes of a graph.

    Attributes:
        leaves: Parameters that its nodes use, each once.
        below: Inputs of later nodes that its nodes, or those of segments above, give gradients to: its lower boundary.
    """

    leaves: list[Tensor] = field(default_factory=list)
    below: list[Edge] = field(default_factory=list)


def cut(graph: Graph, sizes: Mapping[int, int]) -> list[Segment]:
    """Cut a graph into segments.

    Args:
        graph: The graph.
        sizes: ``id`` of a wanted parameter -> what it counts: its number of elements if it is shared, else 0.
    """
    enough = max(1, sum(sizes[key] for key in graph.reached if key in sizes) // SEGMENTS)
    segments: list[Segment] = []
    current, known, size = Segment(), set[int](), 0
    # Inputs of nodes that aren't in a segment yet, with their nodes: dict for the order.
    boundary: dict[Node, dict[int, None]] = {}
    for node in graph.order:
        boundary.setdefault(node, {})
        # A boundary of one tensor is best; but a segment with twice enough parameters is closed anyhow.
        if size >= 2 * enough or (size >= enough and len(boundary) == 1):
            current.below = [(other, number) for other, numbers in boundary.items() for number in numbers]
            segments.append(current)
            current, known, size = Segment(), set(), 0
        del boundary[node]
        for following, number in node.next_functions:
            if following is None:
                continue
            leaf = _leaf(following)
            if leaf is None:
                boundary.setdefault(following, {})[number] = None
            elif id(leaf) in sizes and id(leaf) not in known:
                known.add(id(leaf))
                current.leaves.append(leaf)
                size += sizes[id(leaf)]
    return [*segments, current]


def _stop(gradients: tuple[Tensor | None, ...]) -> Any:
    """A hook before a node of the lower boundary: nothing goes further down in this segment's backward."""
    return (None,) * len(gradients)


class Layerwise:
    """Computes Gramians segment by segment; keeps one scratch buffer between steps."""

    def __init__(self) -> None:
        self._scratch = torch.empty(0)

    def gramian(
        self,
        graph: Graph,
        losses: Mapping[int, Tensor],
        seeds: Mapping[int, Tensor | None],
        shared: Sequence[Tensor],
        others: Sequence[Tensor],
        take: Callable[[int, Tensor, Tensor], None],
    ) -> Tensor:
        """The Gramian of the losses' gradients with respect to the shared parameters. The graph is kept.

        Args:
            graph: :func:`read_graph` of the losses.
            losses: Task -> loss with graph, k of them.
            seeds: Task -> cotangent of its loss, None for 1.
            shared: The shared parameters.
            others: Parameters whose gradients are wanted one by one: the heads.
            take: Called with a task, one of ``others`` and its gradient.

        Returns:
            [k, k] in the order of ``losses``, float64 where the device has it.
        """
        kinds = {id(p): p for p in shared}
        sizes = {**dict.fromkeys(map(id, others), 0), **{key: p.numel() for key, p in kinds.items()}}
        segments = cut(graph, sizes)
        last = {id(leaf): number for number, segment in enumerate(segments) for leaf in segment.leaves}
        device = shared[0].device if shared else torch.device("cpu")
        wide = torch.float32 if device.type == "mps" else torch.float64
        product = torch.zeros(len(losses), len(losses), dtype=wide, device=device)
        cotangents: list[dict[Edge, Tensor]] = []
        for task, loss in losses.items():
            seed = seeds[task]
            assert loss.grad_fn is not None
            cotangents.append({(loss.grad_fn, loss.output_nr): torch.ones_like(loss) if seed is None else seed})
        tied: dict[int, Tensor] = {}
        for number, segment in enumerate(segments):
            own = [leaf for leaf in segment.leaves if id(leaf) in kinds]
            whole = [leaf for leaf in own if last[id(leaf)] == number and id(leaf) not in tied]
            rows = self._rows(len(losses), whole)
            views = [views_of(row, whole) for row in rows]
            place = {id(leaf): i for i, leaf in enumerate(whole)}
            stops = [node.register_prehook(_stop) for node in {node for node, _ in segment.below}]
            try:
                for row, task in enumerate(losses):
                    gradients, cotangents[row] = _through(cotangents[row], segment)
                    filled = self._sort(task, row, len(losses), gradients, tied, place, views[row], take, kinds)
                    missing = [view for i, view in enumerate(views[row]) if i not in filled]
                    if missing:
                        torch._foreach_zero_(missing)
                    del gradients
            finally:
                for stop in stops:
                    stop.remove()
            if whole:
                product += products(rows)
            for key in [id(leaf) for leaf in own if last[id(leaf)] == number and id(leaf) in tied]:
                product += products(tied.pop(key).flatten(1))
        return product

    @staticmethod
    def _sort(
        task: int,
        row: int,
        count: int,
        gradients: list[tuple[Tensor, Tensor]],
        tied: dict[int, Tensor],
        place: Mapping[int, int],
        views: list[Tensor],
        take: Callable[[int, Tensor, Tensor], None],
        shared: Mapping[int, Tensor],
    ) -> set[int]:
        """Put one task's gradients of a segment where they belong; return which of the views were written."""
        targets, values, filled = [], [], set[int]()
        for leaf, gradient in gradients:
            key = id(leaf)
            if key in place:
                filled.add(place[key])
                targets.append(views[place[key]])
                values.append(gradient)
            elif key in shared:
                # Used in several segments: its gradient is complete only in the last of them.
                if key not in tied:
                    wide = torch.promote_types(leaf.dtype, torch.float32)
                    tied[key] = torch.zeros(count, *leaf.shape, dtype=wide, device=leaf.device)
                tied[key][row] += gradient
            else:
                take(task, leaf, gradient)
        if targets:
            torch._foreach_copy_(targets, values)
        return filled

    def _rows(self, count: int, leaves: Sequence[Tensor]) -> Tensor:
        """A part of the scratch buffer as rows of all ``leaves``' elements."""
        if not leaves:
            return self._scratch.new_empty(count, 0)
        dtype = functools.reduce(torch.promote_types, (leaf.dtype for leaf in leaves), torch.float32)
        width = sum(leaf.numel() for leaf in leaves)
        fits = self._scratch.dtype == dtype and self._scratch.device == leaves[0].device
        if not fits or self._scratch.numel() < count * width:
            self._scratch = torch.empty(0)
            self._scratch = torch.empty(count * width, dtype=dtype, device=leaves[0].device)
        return self._scratch[: count * width].view(count, width)


def _through(
    cotangents: dict[Edge, Tensor], segment: Segment
) -> tuple[list[tuple[Tensor, Tensor]], dict[Edge, Tensor]]:
    """One task's backward through one segment: the gradients of its parameters, and the cotangents at its lower boundary."""
    below = set(segment.below)
    kept = {edge: value for edge, value in cotangents.items() if edge in below}
    above = [(edge, value) for edge, value in cotangents.items() if edge not in below]
    cotangents.clear()
    if not above:
        return [], kept
    gradients = torch.autograd.grad(
        [GradientEdge(*edge) for edge, _ in above],
        [*segment.leaves, *(GradientEdge(*edge) for edge in segment.below)],
        grad_outputs=[value for _, value in above],
        retain_graph=True,
        allow_unused=True,
    )
    count = len(segment.leaves)
    for edge, gradient in zip(segment.below, gradients[count:], strict=True):
        if gradient is not None:
            kept[edge] = kept[edge] + gradient if edge in kept else gradient
    own = zip(segment.leaves, gradients[:count], strict=True)
    return [(leaf, gradient) for leaf, gradient in own if gradient is not None], kept
