"""The backward graph of losses: its nodes in order, and its segments."""

from __future__ import annotations

import heapq
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from torch import Tensor
from torch.autograd.graph import Node

from torchmto.gradients.factors import Factor

Edge = tuple[Node, int]
"""A node of the backward graph and which of its inputs: the gradient of one output of a forward operation."""

SEGMENTS = 16
"""A segment is closed once it has this fraction of what all segments hold."""


@dataclass
class Graph:
    """The backward graph of several losses.

    Attributes:
        order: Its nodes, every node after all nodes whose results it takes; leaves are left out.
        reached: ``id`` of a leaf -> the leaf and the tasks whose losses reach it, as a bit mask.
        roots: Where the tasks' backwards start.
        uses: How many edges lead to each node, leaves included.
    """

    order: list[Node] = field(default_factory=list)
    reached: dict[int, tuple[Tensor, int]] = field(default_factory=dict)
    roots: list[Edge] = field(default_factory=list)
    uses: dict[Node, int] = field(default_factory=dict)


def leaf_of(node: Node) -> Tensor | None:
    """The leaf whose gradient ``node`` accumulates; None for nodes of operations."""
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
    graph = Graph(
        roots=[(loss.grad_fn, loss.output_nr) for loss in losses.values() if loss.grad_fn is not None],
        uses=dict(waiting),
    )
    # Of the operations whose gradient is complete the one that ran last comes first, as in the autograd engine itself.
    ready = [(-_number(node), place, node) for place, node in enumerate(waiting) if waiting[node] == 0]
    heapq.heapify(ready)
    place = len(waiting)
    while ready:
        node = heapq.heappop(ready)[2]
        leaf = leaf_of(node)
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
        leaves: Parameters that its nodes use, each once, and whose gradients are wanted.
        factors: Parameters of its nodes whose gradients needn't be formed.
        below: Inputs of later nodes that its nodes, or those of segments above, give gradients to: its lower boundary.
    """

    leaves: list[Tensor] = field(default_factory=list)
    factors: list[Factor] = field(default_factory=list)
    below: list[Edge] = field(default_factory=list)


def cut(graph: Graph, sizes: Mapping[int, int], factors: Mapping[Node, Factor]) -> list[Segment]:
    """Cut a graph into segments.

    Args:
        graph: The graph.
        sizes: ``id`` of a wanted parameter -> what it counts: its number of elements if it is shared, else 0.
        factors: The nodes whose parameters' gradients aren't formed; these parameters have no size.
    """
    # What lies between a factor's node and its parameter is gone through by no backward.
    passed = {node for factor in factors.values() for node in factor.between}
    total = sum(sizes[key] for key in graph.reached if key in sizes) + sum(f.size for f in factors.values())
    enough = max(1, total // SEGMENTS)
    segments: list[Segment] = []
    current, known, size = Segment(), set[int](), 0
    # Inputs of nodes that aren't in a segment yet, with their nodes: dict for the order.
    boundary: dict[Node, dict[int, None]] = {}
    # A task with a forward of its own may start below the first segments.
    for root, number in graph.roots:
        boundary.setdefault(root, {})[number] = None
    for node in graph.order:
        if node in passed:
            continue
        boundary.setdefault(node, {})
        # A boundary of one tensor is best; but a segment with twice enough parameters is closed anyhow.
        if size >= 2 * enough or (size >= enough and len(boundary) == 1):
            current.below = [(other, number) for other, numbers in boundary.items() for number in numbers]
            segments.append(current)
            current, known, size = Segment(), set(), 0
        del boundary[node]
        if node in factors:
            current.factors.append(factors[node])
            size += factors[node].size
        for following, number in node.next_functions:
            if following is None or following in passed:
                continue
            leaf = leaf_of(following)
            if leaf is None:
                boundary.setdefault(following, {})[number] = None
            elif id(leaf) in sizes and id(leaf) not in known:
                known.add(id(leaf))
                current.leaves.append(leaf)
                size += sizes[id(leaf)]
    return [*segments, current]
