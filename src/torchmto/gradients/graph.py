"""The backward graph of losses: its nodes in order, and how it is gone through."""

import functools
import heapq
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor
from torch.autograd.graph import Node

from torchmto.gradients.factors import Factor
from torchmto.gradients.reach import Edges, can_be_called, edges_of, in_python, leaf_of, root_of
from torchmto.gradients.torch_private import native, number_of

Edge = tuple[Node, int]
"""A node of the backward graph and which of its inputs: the gradient of one output of a forward operation."""

SEGMENTS = 16
"""A segment is closed once it has this fraction of what all segments hold."""


@dataclass
class Graph:
    """The backward graph of several losses.

    Attributes:
        order: Its nodes, every node after all nodes whose results it takes; leaves are left out, unless they are losses.
        masks: The tasks whose losses reach each of these nodes, as a bit mask.
        leaves: The nodes of the leaves, and the leaves.
        reached: ``id`` of a leaf -> the tasks whose losses reach it, as a bit mask.
        uses: How many edges and losses lead to each node, leaves included.
        edges: Where each node's results go, leaves included; nowhere from where the walk was to stop.
    """

    order: list[Node] = field(default_factory=list)
    masks: dict[Node, int] = field(default_factory=dict)
    leaves: dict[Node, Tensor] = field(default_factory=dict)
    reached: dict[int, int] = field(default_factory=dict)
    uses: dict[Node, int] = field(default_factory=dict)
    edges: dict[Node, Edges] = field(default_factory=dict)

    @functools.cached_property
    def common(self) -> list[Node]:
        """The nodes that more than one task reaches, in order."""
        return [node for node in self.order if self.masks[node].bit_count() > 1]


def read_graph(losses: Mapping[int, Tensor], stop: Collection[Node] = ()) -> Graph:
    """Walk the graph of ``losses``, task -> loss, from the last operation to the first, as far as the nodes ``stop``."""
    masks: dict[Node, int] = {}
    begun: Counter[Node] = Counter()
    for task, loss in losses.items():
        root, _ = root_of(loss)
        if root is not None:
            masks[root] = masks.get(root, 0) | 1 << task
            begun[root] += 1
    waiting: dict[Node, int] = dict.fromkeys(masks, 0)
    edges: dict[Node, Edges] = {}
    following: dict[Node, list[Node]] = {}
    stack = list(waiting)
    while stack:
        node = stack.pop()
        edges[node] = () if node in stop else edges_of(node)
        followers = following[node] = [other for other, _ in edges[node] if other is not None]
        for other in followers:
            if other not in waiting:
                waiting[other] = 0
                stack.append(other)
            waiting[other] += 1
    graph = Graph(masks=masks, uses={node: count + begun[node] for node, count in waiting.items()}, edges=edges)
    # Of the operations whose gradient is complete the one that ran last comes first, as in the autograd engine itself.
    ready = [(-number_of(node), place, node) for place, node in enumerate(waiting) if waiting[node] == 0]
    heapq.heapify(ready)
    place = len(waiting)
    while ready:
        node = heapq.heappop(ready)[2]
        mask = masks[node]
        leaf = None if following[node] else leaf_of(node)
        if leaf is not None:
            graph.leaves[node] = leaf
            graph.reached[id(leaf)] = mask
            if node not in begun:
                continue
        graph.order.append(node)
        for other in following[node]:
            masks[other] = masks.get(other, 0) | mask
            waiting[other] -= 1
            if waiting[other] == 0:
                place += 1
                heapq.heappush(ready, (-number_of(other), place, other))
    return graph


@dataclass
class Run:
    """Consecutive nodes of a graph: one that is called with all tasks' cotangents, or some that autograd goes through.

    Attributes:
        nodes: The nodes.
        direct: Whether the node is called.
        asked: Of a called node that isn't PyTorch's own, which autograd has to call: the edge that it is asked for. None of
            the node's other edges leads there, so nothing else is run.
        edges: Of a called node: where its results go.
        needs: Of a called node: which of its inputs need cotangents.
        factor: Of a called node: the parameter that it multiplies, if that one's gradients aren't formed.
        leaves: Parameters that the nodes use, each once, and whose gradients are wanted.
        below: Inputs of later nodes that the nodes give gradients to.
        stop: Whether a backward has to be stopped there: it doesn't stop by itself where what it is asked for can be reached
            from there as well. PyTorch's own nodes then do nothing, and there are no others.
        batched: Whether one backward takes the cotangents of all tasks.
    """

    nodes: list[Node]
    direct: bool = False
    asked: Edge | None = None
    edges: Edges = ()
    needs: tuple[bool, ...] = ()
    factor: Factor | None = None
    leaves: list[Tensor] = field(default_factory=list)
    below: list[Edge] = field(default_factory=list)
    stop: bool = False
    batched: bool = False


def cut(
    graph: Graph,
    sizes: Mapping[int, int],
    factors: Mapping[Node, Factor],
    *,
    direct: bool = True,
    whole: bool = False,
    batched: bool = False,
) -> list[list[Run]]:
    """Cut a graph into runs, and these into segments: consecutive runs, whose parameters' gradients are reduced together.

    Args:
        graph: The graph.
        sizes: ``id`` of a wanted parameter -> what it counts: its number of elements if it is shared, else 0.
        factors: The nodes whose parameters' gradients aren't formed; these parameters have no size.
        direct: Whether nodes may be called outside of a backward. If not, and a run's backwards would run functions in Python
            that lie below it once more, nothing is cut.
        whole: Don't cut: one run has everything.
        batched: One run for each task's own nodes, and one batched run for all the others.

    Raises:
        RuntimeError: If a factor's node isn't called, so that its parameter would be left out.
    """
    parts = _Cut(graph, sizes, factors, direct=direct, batched=batched)
    segments = [parts.whole()] if whole else parts.segments()
    placed = sum(run.factor is not None for segment in segments for run in segment)
    if placed != len(factors):
        raise RuntimeError(f"{len(factors) - placed} factors of the Gramian weren't placed: an error of torchmto.")
    return segments


class _Cut:
    """A graph that is being cut."""

    def __init__(
        self, graph: Graph, sizes: Mapping[int, int], factors: Mapping[Node, Factor], *, direct: bool, batched: bool
    ) -> None:
        self._graph = graph
        self._factors = factors
        self._direct = direct and not batched
        self._batched = batched
        self._sizes = {node: sizes[id(leaf)] for node, leaf in graph.leaves.items() if id(leaf) in sizes}
        # What lies between a factor's node and its parameter is gone through by nobody.
        self._passed = {node for factor in factors.values() for node in factor.between}
        total = sum(self._sizes.values()) + sum(factor.size for factor in factors.values())
        self._enough = max(1, total if batched else total // SEGMENTS)
        self._needed: set[Node] = set(self._sizes)
        for node in reversed(graph.order):
            if node not in self._passed and (node in factors or any(self._needs(node))):
                self._needed.add(node)

    def _needs(self, node: Node) -> tuple[bool, ...]:
        return tuple(other in self._needed for other, _ in self._graph.edges[node])

    @functools.cached_property
    def _in_python(self) -> set[Node]:
        return set(filter(in_python, self._graph.order))

    @functools.cached_property
    def _places(self) -> dict[Node, int]:
        """The place of every node in the graph's order; leaves come last, since they lead nowhere."""
        return {node: place for place, node in enumerate([*self._graph.order, *self._graph.leaves])}

    def whole(self) -> list[Run]:
        """All that is needed as one run."""
        return [self._run([node for node in self._graph.order if node in self._needed])]

    def segments(self) -> list[list[Run]]:
        """The segments: those nodes first that one task alone reaches, task by task."""
        graph = self._graph
        runs = list(self._heads())
        done = {node for run in runs for node in run.nodes}
        rest = [node for node in graph.order if node in self._needed and node not in done]
        runs += self._trunk(rest)
        if not self._direct and any(map(self._disturbs, runs)):
            return [self.whole()]
        segments: list[list[Run]] = [[]]
        size = 0
        for run in runs:
            if size >= self._enough:
                segments.append([])
                size = 0
            segments[-1].append(run)
            size += self._size(run)
        return segments

    def _size(self, run: Run) -> int:
        leaves = {other for node in run.nodes for other, _ in self._graph.edges[node] if other in self._sizes}
        return sum(self._sizes[leaf] for leaf in leaves) + (0 if run.factor is None else run.factor.size)

    def _heads(self) -> list[Run]:
        """One run for each task's own nodes, unless they use many shared parameters: then a task has its own forward."""
        own: dict[int, list[Node]] = {}
        for node in self._graph.order:
            mask = self._graph.masks[node]
            if node in self._needed and mask.bit_count() == 1:
                own.setdefault(mask, []).append(node)
        runs: list[Run] = []
        for nodes in own.values():
            shared = {
                other
                for node in nodes
                for other, _ in self._graph.edges[node]
                if other in self._sizes and self._graph.masks[other].bit_count() > 1
            }
            if sum(self._sizes[leaf] for leaf in shared) <= self._enough:
                runs += self._by_autograd(nodes)
        return runs

    def _trunk(self, nodes: Sequence[Node]) -> list[Run]:
        """Nodes that are called, one by one; what lies between, in runs of about the same number of parameters."""
        if self._batched:
            run = self._run(list(nodes))
            run.batched = True
            return [run]
        runs: list[Run] = []
        waiting: list[Node] = []
        boundary: set[Node] = set()
        size = 0

        def close() -> None:
            nonlocal size
            if waiting:
                runs.extend(self._by_autograd(list(waiting)))
            waiting.clear()
            size = 0

        for node in nodes:
            following = [other for other, _ in self._graph.edges[node] if other in self._needed]
            if self._direct and can_be_called(node):
                close()
                runs.append(self._called(node))
                continue
            boundary.discard(node)
            # A boundary of one tensor is best; but a run with twice enough parameters is closed anyhow.
            if size >= 2 * self._enough or (size >= self._enough and not boundary):
                close()
            waiting.append(node)
            boundary.update(other for other in following if other not in self._sizes)
            size += self._size(Run([node]))
        close()
        return runs

    def _called(self, node: Node) -> Run:
        run = self._run([node])
        run.direct, run.needs, run.factor = True, self._needs(node), self._factors.get(node)
        run.edges = self._graph.edges[node]
        if not native(node):
            wanted = [(other, number) for other, number in run.edges if other is not None and other in self._needed]
            run.asked = min(wanted, key=lambda edge: self._places[edge[0]])
        return run

    def _by_autograd(self, nodes: list[Node]) -> list[Run]:
        """One run, unless its backwards would disturb functions below it: then each node is called by itself."""
        run = self._run(nodes)
        if not self._direct or not self._disturbs(run):
            return [run]
        return [self._called(node) if self._graph.edges[node] else self._run([node]) for node in nodes]

    def _disturbs(self, run: Run) -> bool:
        """Whether a function in Python lies between the run and something else that its backwards are asked for."""
        if not run.stop or not self._in_python:
            return False
        edges = self._graph.edges
        asked = self._asked(run.nodes)
        stack = [node for node, _ in run.below]
        under = set(stack)
        while stack:
            following = {other for other, _ in edges[stack.pop()] if other is not None} - under
            under |= following
            stack += following
        leading: set[Node] = set()
        for node in sorted(under, key=self._places.__getitem__, reverse=True):
            if any(other in asked or other in leading for other, _ in edges[node]):
                leading.add(node)
        return not leading.isdisjoint(self._in_python)

    def _asked(self, nodes: Sequence[Node]) -> dict[Node, int]:
        """What a backward through nodes is asked for: leaves and nodes below, and how often the nodes lead there."""
        inside = set(nodes)
        found: Counter[Node] = Counter(node for node in nodes if node in self._sizes)  # losses that are parameters
        for node in nodes:
            found.update(
                other
                for other, _ in self._graph.edges[node]
                if other in self._sizes or (other in self._needed and other not in inside)
            )
        return found

    def _run(self, nodes: list[Node]) -> Run:
        asked = self._asked(nodes)
        leaves = [leaf for leaf in asked if leaf in self._sizes]
        edges = (edge for node in nodes for edge in self._graph.edges[node])
        below = list(dict.fromkeys((other, n) for other, n in edges if other in asked and other not in self._sizes))
        # One thing alone doesn't lead to itself, nor does anything below lead to a leaf that nothing else uses.
        once = all(asked[leaf] == self._graph.uses[leaf] for leaf in leaves)
        stop = bool(below) and not (once and len(asked) - len(leaves) == 1)
        return Run(nodes, leaves=[self._graph.leaves[leaf] for leaf in leaves], below=below, stop=stop)
