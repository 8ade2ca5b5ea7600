"""What the autograd graph of losses reaches, and what functions with a backward of their own hide from it.

A reentrant checkpoint runs its forward without graph, and its part of the backward as a backward of its own, which adds to
``.grad`` of the parameters inside by itself. The graph outside doesn't know of them: a backward that is asked for chosen
parameters leaves them out without a word. Any ``torch.autograd.Function`` may do the same.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from torchmto.gradients.finite import plain
from torchmto.gradients.torch_private import (
    compiled_code,
    converting,
    gives_up,
    has_hooks,
    hooked,
    is_compiled,
    is_opaque,
    is_sink,
    is_users,
    native,
    places,
    reentrant,
)


@dataclass
class Reach:
    """What a walk has met.

    Attributes:
        leaves: The ``id`` of every leaf that the graph reaches -> the machine precision of its gradient. Under autocast it is
            read through a copy of lower precision, whose gradient it gets.
        regions: The nodes of compiled regions. One of several outputs hides which of them depends on which parameter, so the
            leaves are then only an upper bound (:func:`sight_of`).
        reentrant: Whether there is a reentrant checkpoint.
        functions: The nodes of functions written in Python outside PyTorch.
    """

    leaves: dict[int, float] = field(default_factory=dict)
    regions: list[Node] = field(default_factory=list)
    reentrant: bool = False
    functions: list[Node] = field(default_factory=list)

    @property
    def compiled(self) -> bool:
        """Whether there is a compiled region."""
        return bool(self.regions)

    @property
    def opaque(self) -> list[Node]:
        """Those compiled regions that hide what their outputs depend on."""
        return [node for node in self.regions if is_opaque(node)]

    def note(self, leaf: Tensor | None, dtype: torch.dtype | None = None) -> None:
        """Note a leaf, read in its own ``dtype`` or in another."""
        if leaf is not None:
            precision = torch.finfo(dtype or leaf.dtype).eps
            self.leaves[id(leaf)] = max(precision, self.leaves.get(id(leaf), 0.0))


Edges = Sequence[tuple[Node | None, int]]
"""Nodes of the backward graph, each with the number of its output."""


def beyond(node: Node | None, output: int) -> tuple[Node | None, int]:
    """Where an edge leads past a node that ``DistributedDataParallel`` passes all outputs of a model through as they are."""
    while node is not None and is_sink(node) and output < len(node.next_functions):
        node, output = node.next_functions[output]
    return node, output


def root_of(loss: Tensor) -> tuple[Node | None, int]:
    """Where the backward of a loss begins: of one that is a parameter itself, at that leaf's node."""
    edge = get_gradient_edge(loss)
    return beyond(edge.node, edge.output_nr)


def leaf_of(node: Node | None) -> Tensor | None:
    """The leaf that a node adds gradients to; None for other nodes. A user's function may keep anything as ``ctx.variable``."""
    leaf: Tensor | None = getattr(node, "variable", None)
    return None if leaf is None or node is None or node.next_functions else leaf


def edges_of(node: Node) -> list[tuple[Node | None, int]]:
    """Where a node's results go."""
    # Nearly all nodes are PyTorch's own, and this is asked of every one of them in every step of some engines.
    return [beyond(*edge) if isinstance(edge[0], BackwardCFunction) else edge for edge in node.next_functions]


def _walk(roots: Edges, stop: Collection[Node] = ()) -> Iterator[tuple[Node, Edges]]:
    """Every node that ``roots`` lead to, once, and where it leads; nowhere from the nodes ``stop``."""
    visited: set[Node] = set()
    stack = [beyond(*root) for root in roots]
    while stack:
        node, _ = stack.pop()
        if node is None or node in visited:
            continue
        visited.add(node)
        following = [] if node in stop else edges_of(node)
        yield node, following
        stack += following


def reach(roots: Edges) -> Reach:
    """Walk the autograd graph from nodes, each with the number of its output, down to its leaves."""
    found = Reach()
    for node, following in _walk(roots):
        found.note(leaf_of(node))
        name = node.name()
        if is_compiled(node):
            found.regions.append(node)
        elif name == reentrant():
            found.reentrant = True
        elif name == converting():
            for below, _ in following:
                found.note(leaf_of(below), places(node)[0].dtype)
        elif is_users(node):
            found.functions.append(node)
    return found


def is_nested(node: Node) -> bool:
    """Whether a node takes the gradient of a nested tensor: these can't be stacked, and jagged ones have no certain size."""
    return any(place.is_nested_tensor for place in places(node))


def in_python(node: Node) -> bool:
    """Whether a node is written in Python: where nothing arrives it may make something of it, or fail, unlike PyTorch's own."""
    return isinstance(node, BackwardCFunction)


def can_be_called(node: Node) -> bool:
    """Whether a node may be called outside of a backward: it is PyTorch's own, and no leaf that it leads to has hooks."""
    leaves = (leaf_of(other) for other, _ in node.next_functions)
    return native(node) and not any(leaf is not None and has_hooks(leaf) for leaf in leaves)


def is_recomputed(losses: Iterable[Tensor]) -> bool:
    """Whether something else than a tensor is saved: backwards may run parts of the forward again. To be asked before any."""
    return any(hooked(node) for node, _ in _walk([(loss.grad_fn, loss.output_nr) for loss in losses]))


def read_by(losses: Iterable[Tensor]) -> list[list[GradientEdge]]:
    """For every loss the results that its own part reads and other losses share; leaves are left out."""
    walks = [dict(_walk([(loss.grad_fn, loss.output_nr)])) for loss in losses]
    uses = Counter(node for walk in walks for node in walk)
    every = []
    for walk in walks:
        read = dict.fromkeys(edge for node, following in walk.items() if uses[node] == 1 for edge in following)
        shared = [(node, output) for node, output in read if node is not None and uses[node] > 1]
        every.append([GradientEdge(node, output) for node, output in shared if leaf_of(node) is None])
    return every


def reach_of(losses: Iterable[Tensor]) -> Reach:
    """Walk the autograd graph of losses that require a gradient, down to its leaves."""
    losses = list(losses)
    found = reach([(loss.grad_fn, loss.output_nr) for loss in losses])
    for loss in losses:
        found.note(loss if loss.grad_fn is None else None)
    return found


@dataclass
class Sight:
    """What a graph in which there may be compiled regions shows of the leaves that a loss depends on.

    Attributes:
        clear: The ``id`` of those leaves that it depends on, as the graph without regions that hide it shows.
        hidden: Of those that only such regions lead to: it may depend on them or not.
        codes: What these regions run.
    """

    clear: set[int]
    hidden: set[int]
    codes: set[type]


def sight_of(loss: Tensor) -> Sight:
    """What a loss's graph shows of the leaves that the loss depends on."""
    found = reach_of([loss])
    opaque = found.opaque
    every = set(found.leaves)
    if not opaque:
        return Sight(every, set(), set())
    walk = _walk([(loss.grad_fn, loss.output_nr)], set(opaque))
    clear = {id(leaf) for node, _ in walk if (leaf := leaf_of(node)) is not None}
    return Sight(clear, every - clear, set(map(compiled_code, opaque)))


def check_keeps(losses: Iterable[Tensor]) -> None:
    """Raise if a compiled region in the graph of ``losses`` gives up in its first backward what the forward has saved.

    Raises:
        ValueError: If there is one.
    """
    if any(map(gives_up, reach_of(losses).regions)):
        raise ValueError(
            "The model was compiled outside mt.step, for one backward only: that backward writes over what the next "
            "task's needs. Call `torch.compiler.reset()` and pass a closure, so that the model is compiled within mt.step."
        )


def refuse_reentrant(found: Reach) -> None:
    """Raise if a walk has met a reentrant checkpoint.

    Raises:
        ValueError: If it has.
    """
    if found.reentrant:
        raise ValueError(
            "The model runs a part of its forward under a reentrant checkpoint, which hides the parameters inside from the "
            "autograd graph: they would stay untrained, also if `shared=` named them. Use "
            "`torch.utils.checkpoint.checkpoint(..., use_reentrant=False)`; in transformers "
            '`gradient_checkpointing_enable({"use_reentrant": False})`.'
        )


def refuse_hidden(names: Sequence[str]) -> None:
    """Raise if ``.grad`` of the parameters called ``names`` has appeared by itself.

    Raises:
        ValueError: If there are any.
    """
    if names:
        raise ValueError(
            f"The gradient of parameter `{names[0]}` ({len(names)} such in all) has appeared by itself: a backward inside "
            "mt.step's backward has set it, so the autograd graph hides the parameter, also if `shared=` named it. That may be "
            "a reentrant checkpoint (use one with use_reentrant=False), or a torch.autograd.Function or a hook that calls "
            "`backward()`: give the parameters to the function as inputs, and return the gradients that "
            "`torch.autograd.grad` gives for them."
        )


def gradients_below(node: Node) -> list[Tensor]:
    """What a node makes of cotangents of ones, in copies; nothing if it can't be run by itself. Its graph is kept."""
    outputs = [(n, place) for n, place in enumerate(places(node)) if place.dtype.is_floating_point]
    below = [GradientEdge(after, number) for after, number in node.next_functions if after is not None]
    try:
        found = torch.autograd.grad(
            [GradientEdge(node, number) for number, _ in outputs],
            below,
            [torch.ones(tuple(place.shape), dtype=place.dtype, device=place.device) for _, place in outputs],
            retain_graph=True,
            allow_unused=True,
        )
    except Exception:  # noqa: BLE001 - a user's; in the step it will show, if it does there
        return []
    return [plain(gradient).clone() for gradient in found if gradient is not None]


def run_unreached(found: Reach, losses: Iterable[Tensor], parameters: Sequence[Tensor]) -> list[Tensor]:
    """Run those functions below which no parameter is trained, which a backward for the parameters would never run.

    Args:
        found: What a walk from the losses has met.
        losses: The losses. Their graphs are kept.
        parameters: The trained parameters; their ``.grad`` is left as it is.

    Returns:
        The parameters whose ``.grad`` that has set: hidden ones.
    """
    trained = set(map(id, parameters))
    apart = [node for node in found.functions if not reach(node.next_functions).leaves.keys() & trained]
    edges = [
        GradientEdge(below, number) for node in apart for below, number in node.next_functions if below is not None
    ]
    if not edges:
        return []
    before = [parameter.grad for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.grad = None
        torch.autograd.grad(list(losses), edges, retain_graph=True, allow_unused=True)
        return [parameter for parameter in parameters if parameter.grad is not None]
    finally:
        for parameter, gradient in zip(parameters, before, strict=True):
            parameter.grad = gradient
