"""The engine of ``gradients="auto"``: the rows, or what needs no rows, whichever a rule says is cheaper."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import Node

from torchmto.gradients.engine import Engine, Piece, Wanted, ratio
from torchmto.gradients.factors import Factor, find_factors
from torchmto.gradients.finite import like
from torchmto.gradients.graph import Graph, cut, read_graph
from torchmto.gradients.layerwise import Formed, add_products, advance, no_products, sizes
from torchmto.gradients.stack import Stack
from torchmto.gradients.torch_private import has_hooks, hooked, hooks_made, is_compiled, native, places
from torchmto.gradients.walk import Walk

FEW = 2**14
"""Elements of all parameters up to which rows are always cheaper: what could be saved is less than reading the graph takes."""


class Costs(NamedTuple):
    """What the walk costs besides arithmetic, in multiplications: fits to measured times (docs/speed.md).

    Attributes:
        node: What it takes to read a node of the graph.
        call: What it takes to go through a node with all tasks in Python.
        task: What it takes to begin one task's backward.
        formed: What it takes to launch one task's gradient of one parameter, its copy and its products: what the walk saves.
    """

    node: float
    call: float
    task: float
    formed: float


CPU = Costs(node=500_000, call=2_000_000, task=4_000_000, formed=0)
"""Of a processor, which multiplies while the same thread could run Python."""

GPU = Costs(node=5e8, call=1e10, task=0, formed=2e9)
"""Of everything else: it multiplies a thousand times as fast, so the number of launches decides up to large layers."""

LIVE = 3
"""How many cotangents as large as the largest there may be at a time."""


class Auto(Engine):
    """Decides at every step between the rows and a walk down the graph.

    What the walk keeps combines the gradients without another backward: gradients where they are small, cotangents of layers
    with few samples.

    The decision depends on the graph, its shapes, K and the kind of device alone, never on timing: so a step that is
    repeated, in another process or after loading a state, is repeated to the bit. It compares, in multiplications, what the
    rows needn't do (reading the graph, calling its nodes from Python) with what gradients that aren't formed save
    (:attr:`~torchmto.gradients.factors.Factor.gain`).

    Rows wherever else could cost memory or surprise: several forwards, independent batches, ready losses (which hide whether
    there are hooks on activations), hooks, checkpointing, offloading, compiled regions, and where K cotangents of the
    largest activation take more room than the rows that they save.
    """

    name: ClassVar[str] = "mixed"
    optional: ClassVar[bool] = True

    def __init__(self) -> None:
        self.forget()

    def suits(self, sources: Sequence[Sequence[Any]], parameters: Sequence[Tensor]) -> bool:
        """One forward by one closure, with enough parameters, none of which has hooks."""
        if len(sources) > 1 or len(sources[0]) > 1 or isinstance(sources[0][0], Mapping):
            return False
        return sum(p.numel() for p in parameters) > FEW and not any(map(has_hooks, parameters))

    def begin(self) -> None:
        """Count the hooks that there are."""
        self._hooks = hooks_made()

    def read(self, forwards: Sequence[Mapping[int, Tensor]]) -> dict[int, int]:
        """Read the whole graph."""
        self.graph = read_graph(forwards[0])
        return self.graph.reached

    def forget(self) -> None:
        """Give up the graph and what was kept."""
        self.graph = Graph()
        self.factors: dict[Node, Factor] = {}
        self._cotangents: list[tuple[Factor, Stack]] = []
        self._formed: Formed = {}
        self._seeds: dict[int, Tensor | None] = {}

    def pays(self, shared: Sequence[Tensor], num_tasks: int) -> bool:
        """Whether gradients that needn't be formed save more time than the walk takes in Python, and room besides."""
        graph = self.graph
        if hooks_made() != self._hooks or not graph.reached:
            return False
        nodes = graph.common
        wanted = {id(parameter): parameter for parameter in shared}
        factors = find_factors(nodes, graph.uses, wanted, num_tasks)
        costs = CPU if shared[0].device.type == "cpu" else GPU
        walk = costs.node * len(graph.order) + costs.call * len(nodes) + costs.task * num_tasks
        if sum(factor.gain + costs.formed * num_tasks for factor in factors.values()) <= walk:
            return False
        if any(hooked(node) if native(node) else is_compiled(node) for node in nodes):
            return False
        passed = {node for factor in factors.values() for node in factor.between}
        largest = max(math.prod(place.shape) for node in nodes if node not in passed for place in places(node))
        room = LIVE * largest + sum(factor.size for factor in factors.values())
        if room > sum(factor.leaf.numel() for factor in factors.values()):
            return False
        self.factors = factors
        return True

    def gramian(self, wanted: Wanted) -> Tensor:
        """J Jᵀ of the tasks' gradients on the shared parameters: exact."""
        product = no_products(wanted)
        walk = Walk(wanted.pieces[0], wanted.tasks)
        for segment in cut(self.graph, sizes(wanted, self.factors), self.factors):
            self._cotangents += advance(walk, segment, wanted, product, self._formed)
        add_products(product, self._formed.values())
        self._seeds, self.graph = dict(wanted.pieces[0].seeds), Graph()
        return product

    def backward(self, pieces: Sequence[Piece], shared: Sequence[Tensor]) -> int:
        """Weighted sums of what was kept, and products with them."""
        ratios = [ratio(weighted, self._seeds[task]) for task, weighted in pieces[0].seeds.items()]
        weights = torch.stack([one.to(ratios[0].device) for one in ratios]).tolist()  # waits for the device once
        with torch.no_grad():
            for leaf, stack in self._formed.items():
                leaf.grad = like(_weighted(stack, weights), leaf)
            for factor, stack in self._cotangents:
                factor.leaf.grad = factor.combined(_weighted(stack.wide, weights))
        self.forget()
        return 0


def _weighted(stack: Stack, weights: Sequence[float]) -> Tensor:
    """The weighted sum of a stack."""
    values = stack.values
    total: Tensor = torch.tensordot(values.new_tensor([weights[row] for row in stack.rows]), values, 1)
    return total
