"""The engine of ``gradients="auto"``: the rows, or what needs no rows, whichever a rule says is cheaper."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import Node

from torchmto.gradients.engine import Engine, Piece, Wanted, ratio
from torchmto.gradients.factors import TURNING, Factor, find_factors
from torchmto.gradients.finite import like
from torchmto.gradients.graph import Graph, cut, read_graph
from torchmto.gradients.layerwise import Flat, Formed, add_products, advance, no_products, side_by_side, sizes
from torchmto.gradients.reach import is_nested
from torchmto.gradients.stack import Stack
from torchmto.gradients.torch_private import (
    has_hooks,
    hooked,
    hooks_made,
    is_compiled,
    native,
    nodes_made,
    number_of,
    places,
)
from torchmto.gradients.walk import Walk

FEW = 2**14
"""Elements of all parameters up to which rows are always cheaper: what could be saved is less than reading the graph takes."""


class Costs(NamedTuple):
    """What the walk costs besides arithmetic, in multiplications: fits to measured times (docs/speed.md).

    Attributes:
        node: What it takes to read a node of the graph.
        call: What it takes to go through a node with all tasks in Python.
        task: What it takes to begin one task's backward, where nodes are called.
        formed: What it takes to launch one task's gradient of one parameter, its copy and its products: what the walk saves.
        launch: What it takes autograd to launch one node for one task: what a batched backward saves for all tasks but one.
        batch: What it takes to go through one task's own nodes before a batched backward.
        leaf: What a batched backward takes longer for one parameter's gradients, which are copied next to each other.
    """

    node: float
    call: float
    task: float
    formed: float
    launch: float
    batch: float
    leaf: float


CPU = Costs(node=5e5, call=2e6, task=4e6, formed=0, launch=0, batch=0, leaf=0)
"""Of a processor, which multiplies while the same thread could run Python: there is little to save by fewer, larger calls."""

GPU = Costs(node=5e8, call=1e10, task=0, formed=2e9, launch=1.5e9, batch=7e9, leaf=1e10)
"""Of everything else: it multiplies a thousand times as fast, so the number of launches decides up to large layers."""

LARGE = 2**20
"""Elements of a cotangent from which on an operation takes longer than its launch, which then costs nothing."""

LIVE = 3
"""How many cotangents as large as the largest there may be at a time."""


class Auto(Engine):
    """Decides at every step between the rows and a walk down the graph.

    What the walk keeps combines the gradients without another backward: gradients where they are small, cotangents of layers
    with few samples. On a GPU, where launching operations takes longer than most of them do, it may be one backward whose
    every operation takes the cotangents of all tasks.

    The decision depends on the graph, its shapes, K and the kind of device alone, never on timing: so a step that is
    repeated, in another process or after loading a state, is repeated to the bit. It compares, in multiplications, what the
    rows needn't do (reading the graph, calling its nodes from Python) with what gradients that aren't formed save
    (:attr:`~torchmto.gradients.factors.Factor.gain`), and what launches for all tasks at once do.

    Rows wherever else could cost memory or surprise: several forwards, independent batches, what was computed before the step
    (ready losses, or features that a closure only goes on from, which hide whether there are hooks on activations), hooks,
    checkpointing, offloading, compiled regions, and where K cotangents of the largest activation take more room than the rows
    that they save, or for one batched backward, than all rows.
    """

    name: ClassVar[str] = "mixed"
    optional: ClassVar[bool] = True

    def __init__(self) -> None:
        self._apart = False
        self.forget()

    def suits(self, sources: Sequence[Sequence[Any]], parameters: Sequence[Tensor]) -> bool:
        """One forward by one closure, with enough parameters, none of which has hooks."""
        if len(sources) > 1 or len(sources[0]) > 1 or isinstance(sources[0][0], Mapping):
            return False
        return sum(p.numel() for p in parameters) > FEW and not any(map(has_hooks, parameters))

    def begin(self) -> None:
        """Count the hooks and the nodes that there are."""
        self._hooks, self._nodes = hooks_made(), nodes_made()

    def read(self, forwards: Sequence[Mapping[int, Tensor]]) -> dict[int, int]:
        """Read the whole graph."""
        self.graph = read_graph(forwards[0])
        return self.graph.reached

    def forget(self) -> None:
        """Give up the graph and what was kept."""
        self.graph = Graph()
        self.factors: dict[Node, Factor] = {}
        self._cotangents: list[tuple[Factor, Stack]] = []
        self._flats: list[Flat] = []
        self._seeds: dict[int, Tensor | None] = {}
        self._batched = False

    def pays(self, shared: Sequence[Tensor], num_tasks: int) -> bool:
        """Whether a walk takes less time than the rows, and where it needs room finds it."""
        graph = self.graph
        if hooks_made() != self._hooks or not graph.reached or not shared:
            return False
        nodes = graph.common
        wanted = {id(parameter): parameter for parameter in shared}
        factors = find_factors(nodes, graph.uses, wanted, num_tasks)
        costs = CPU if shared[0].is_cpu else GPU
        read = costs.node * len(graph.order)
        # What each takes more than the rows.
        called = read + costs.call * len(nodes) + costs.task * num_tasks
        called -= sum(factor.gain + costs.formed * num_tasks for factor in factors.values())
        launched = sum(_width(node) < LARGE for node in nodes) if costs.launch else 0
        batched = read + costs.batch * num_tasks + costs.leaf * len(shared) - costs.launch * (num_tasks - 1) * launched
        if min(called, batched) >= 0:
            return False
        if any(number_of(node) < self._nodes for node in graph.order):
            return False
        if any(hooked(node) if native(node) else is_compiled(node) for node in nodes):
            return False
        if any(map(is_nested, graph.order)):
            return False
        if called < batched:
            passed = {node for factor in factors.values() for node in factor.between}
            room = _room(node for node in nodes if node not in passed) + sum(factor.size for factor in factors.values())
            if room <= sum(factor.leaf.numel() for factor in factors.values()):
                self.factors = factors
                return True
        if batched < 0 and all(native(node) or node in graph.leaves for node in nodes):
            parameters = _parameters(graph)
            room = _room(node for node in nodes if node not in parameters)
            self._batched = room <= sum(parameter.numel() for parameter in shared)
        return self._batched

    def gramian(self, wanted: Wanted) -> Tensor:
        """J Jᵀ of the tasks' gradients on the shared parameters: exact."""
        product, formed = no_products(wanted), Formed()
        walk = Walk(wanted.pieces[0], wanted.tasks, apart=self._apart)
        for segment in cut(self.graph, sizes(wanted, self.factors), self.factors, batched=self._batched):
            self._cotangents += advance(walk, segment, wanted, product, formed)
        self._apart = walk.apart
        self._flats = side_by_side(formed)
        add_products(product, self._flats)
        self._seeds, self.graph = dict(wanted.pieces[0].seeds), Graph()
        return product

    def backward(self, pieces: Sequence[Piece], shared: Sequence[Tensor]) -> int:
        """Weighted sums of what was kept, and products with them."""
        ratios = [ratio(weighted, self._seeds[task]) for task, weighted in pieces[0].seeds.items()]
        weights = torch.stack([one.to(ratios[0].device) for one in ratios]).tolist()  # waits for the device once
        chosen: dict[tuple[tuple[int, ...], torch.dtype, torch.device], Tensor] = {}

        def weighted(rows: tuple[int, ...], values: Tensor) -> Tensor:
            kind = rows, values.dtype, values.device
            if kind not in chosen:
                chosen[kind] = values.new_tensor([weights[row] for row in rows])
            total: Tensor = torch.tensordot(chosen[kind], values, 1)
            return total

        with torch.no_grad():
            for flat in self._flats:
                parts = torch.split(weighted(flat.rows, flat.values), [shape.numel() for _, shape in flat.leaves])
                for (leaf, shape), part in zip(flat.leaves, parts, strict=True):
                    leaf.grad = like(part.view(shape), leaf)
            for factor, stack in self._cotangents:
                factor.leaf.grad = like(factor.combined(weighted(stack.rows, stack.wide.values)), factor.leaf)
        self.forget()
        return 0


def _width(node: Node) -> int:
    """The elements of the largest of a node's cotangents."""
    return max((math.prod(place.shape) for place in places(node)), default=0)


def _room(nodes: Iterable[Node]) -> int:
    """What cotangents of one task are there at a time at most, in elements."""
    return LIVE * max(map(_width, nodes), default=0)


def _parameters(graph: Graph) -> set[Node]:
    """The leaves, and the nodes that do no more than transpose or convert one: their cotangents are its gradients."""
    found = set(graph.leaves)
    for node in reversed(graph.order):
        if node.name() in TURNING and all(other in found for other, _ in graph.edges[node]):
            found.add(node)
    return found
