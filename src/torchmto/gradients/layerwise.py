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
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from torchmto.gradients.engine import Engine, Take
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
        roots: Where the tasks' backwards start.
    """

    order: list[Node] = field(default_factory=list)
    reached: dict[int, tuple[Tensor, int]] = field(default_factory=dict)
    roots: list[Edge] = field(default_factory=list)


def _leaf(node: Node) -> Tensor | None:
    variable: Tensor | None = getattr(node, "variable", None)
    return variable


def read_graph(losses: Mapping[int, Tensor], stop: Collection[Node] = ()) -> Graph:
    """Walk the graph of ``losses``, task -> loss, from the last operation to the first, as far as the nodes ``stop``."""
    roots = [loss.grad_fn for loss in losses.values() if loss.grad_fn is not None]
    waiting: dict[Node, int] = dict.fromkeys(roots, 0)
    stack = list(waiting)
    while stack:
        node = stack.pop()
        for following, _ in () if node in stop else node.next_functions:
            if following is not None:
                if following not in waiting:
                    waiting[following] = 0
                    stack.append(following)
                waiting[following] += 1
    masks: dict[Node, int] = dict.fromkeys(waiting, 0)
    for task, loss in losses.items():
        if loss.grad_fn is not None:
            masks[loss.grad_fn] |= 1 << task
    graph = Graph(roots=[(loss.grad_fn, loss.output_nr) for loss in losses.values() if loss.grad_fn is not None])
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
        for following, _ in () if node in stop else node.next_functions:
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
    # A task with a forward of its own may start below the first segments.
    for root, number in graph.roots:
        boundary.setdefault(root, {})[number] = None
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


class Layerwise(Engine):
    """Computes Gramians segment by segment; keeps one scratch buffer between steps."""

    name = "layerwise"

    def __init__(self) -> None:
        self._scratch = torch.empty(0)
        self._graph = Graph()

    def begin(self) -> None:
        """Nothing: the graph tells all."""

    def read(self, losses: Mapping[int, Tensor]) -> dict[int, int]:
        """Read the whole graph."""
        self._graph = read_graph(losses)
        return {key: mask for key, (_, mask) in self._graph.reached.items()}

    def backward(self, losses: Sequence[Tensor], cotangents: Sequence[Tensor], shared: Sequence[Tensor]) -> None:
        """One whole backward."""
        self._graph = Graph()
        if shared:
            torch.autograd.backward(list(losses), list(cotangents), inputs=list(shared))

    def gramian(
        self,
        losses: Mapping[int, Tensor],
        seeds: Mapping[int, Tensor | None],
        *,
        shared: Sequence[Tensor],
        others: Sequence[Tensor],
        take: Take,
    ) -> Tensor:
        """J Jᵀ of the tasks' gradients on the shared parameters: exact."""
        kinds = {id(p): p for p in shared}
        sizes = {**dict.fromkeys(map(id, others), 0), **{key: p.numel() for key, p in kinds.items()}}
        segments = cut(self._graph, sizes)
        last = {id(leaf): number for number, segment in enumerate(segments) for leaf in segment.leaves}
        device = shared[0].device if shared else torch.device("cpu")
        wide = torch.float32 if device.type == "mps" else torch.float64
        product = torch.zeros(len(losses), len(losses), dtype=wide, device=device)
        cotangents: list[dict[Edge, Tensor]] = []
        for task, loss in losses.items():
            seed = seeds[task]
            assert loss.grad_fn is not None
            cotangents.append({(loss.grad_fn, loss.output_nr): torch.ones_like(loss) if seed is None else seed})
        # Parameters of several segments: their gradients are complete only in the last.
        tied: dict[int, Tensor] = {}
        for number, segment in enumerate(segments):
            own = [leaf for leaf in segment.leaves if id(leaf) in kinds]
            whole = [leaf for leaf in own if last[id(leaf)] == number and id(leaf) not in tied]
            rows = self._rows(len(losses), whole)
            views = [dict(zip(map(id, whole), views_of(row, whole), strict=True)) for row in rows]
            for leaf in own:
                if id(leaf) not in tied and last[id(leaf)] != number:
                    tied[id(leaf)] = _zeros(len(losses), leaf)
            stops = [node.register_prehook(_stop) for node in {node for node, _ in segment.below}]
            try:
                for row, task in enumerate(losses):
                    gradients, cotangents[row] = _through(cotangents[row], segment)
                    rest = _write(views[row], gradients)
                    del gradients
                    for leaf, gradient in rest:
                        if id(leaf) in tied:
                            tied[id(leaf)][row] += gradient
                        else:
                            take(task, leaf, gradient)
                    del rest
            finally:
                for stop in stops:
                    stop.remove()
            if whole:
                product += products(rows)
            for leaf in own:
                if id(leaf) in tied and last[id(leaf)] == number:
                    product += products(tied.pop(id(leaf)).view(len(losses), -1))
        return product

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


def _zeros(count: int, leaf: Tensor) -> Tensor:
    """Room for ``count`` gradients of one parameter."""
    kind = torch.promote_types(leaf.dtype, torch.float32)
    return torch.zeros(count, *leaf.shape, dtype=kind, device=leaf.device)


def _write(views: Mapping[int, Tensor], gradients: Sequence[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """Write a row: gradients of the parameters that have a view, zeros where there is none. Returns the other gradients."""
    written = {id(leaf): gradient for leaf, gradient in gradients if id(leaf) in views}
    if written:
        torch._foreach_copy_([views[key] for key in written], list(written.values()))
    if len(written) < len(views):
        torch._foreach_zero_([view for key, view in views.items() if key not in written])
    return [(leaf, gradient) for leaf, gradient in gradients if id(leaf) not in views]


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
    inputs: list[Any] = [*segment.leaves, *(GradientEdge(*edge) for edge in segment.below)]
    gradients = torch.autograd.grad(
        [GradientEdge(*edge) for edge, _ in above],
        inputs,
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
