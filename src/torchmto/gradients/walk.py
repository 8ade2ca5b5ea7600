"""The K backwards through one forward's graph, side by side."""

import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from torchmto.gradients.backwards import ending_at
from torchmto.gradients.engine import Piece
from torchmto.gradients.factors import Factor
from torchmto.gradients.finite import dense
from torchmto.gradients.graph import Edge, Run
from torchmto.gradients.reach import leaf_of, root_of
from torchmto.gradients.rules import RULES
from torchmto.gradients.stack import Stack, merge
from torchmto.gradients.torch_private import has_hooks, places

Found = tuple[Tensor | Factor, Stack]
"""A parameter and gradients of tasks, to be added to others; or a factor and the cotangents of tasks."""


class Walk:
    """The tasks' backwards of one forward, and where they are.

    Args:
        piece: The losses and the tasks' cotangents.
        tasks: The tasks in the order of the Gramian's rows.
        apart: Whether batched runs are gone through task by task: from the first one on that can't be batched.
    """

    def __init__(self, piece: Piece, tasks: Sequence[int], *, apart: bool = False) -> None:
        self.apart = apart
        self._context = piece.context
        self._waiting: dict[Edge, list[Stack]] = {}
        for task, loss in piece.losses.items():
            seed = piece.seeds[task]
            root, number = root_of(loss)
            if root is not None:
                stack = Stack((tasks.index(task),), [torch.ones_like(loss) if seed is None else seed])
                self._wait((root, number), stack)

    def _wait(self, edge: Edge, stack: Stack) -> None:
        self._waiting.setdefault(edge, []).append(stack)

    def _arrived(self, node: Any) -> list[Stack | None]:
        """What has come to the inputs of a node."""
        edges = [(node, number) for number in range(len(places(node)))]
        return [merge(self._waiting.pop(edge)) if edge in self._waiting else None for edge in edges]

    def through(self, runs: Sequence[Run]) -> Iterator[Found]:
        """Go through runs with all tasks."""
        with torch.no_grad(), self._context():
            for run in runs:
                yield from self._called(run) if run.direct else self._backwards(run)

    def _called(self, run: Run) -> Iterator[Found]:
        """Call one node."""
        node: Any = run.nodes[0]
        arrived = self._arrived(node)
        given = [stack for stack in arrived if stack is not None]
        if not given:
            return
        if run.factor is not None:
            yield run.factor, given[0]
            if not any(run.needs):
                return
        results = self._by_rule(run, given[0]) if arrived[0] is not None and len(given) == 1 else None
        if results is None:
            call = node if run.asked is None else functools.partial(_called_by_autograd, node, run.asked)
            results = self._one_by_one(call, arrived)
        for (following, number), need, result in zip(run.edges, run.needs, results, strict=True):
            if not need or result is None:
                continue
            assert following is not None, "what needs a cotangent is there"
            leaf = leaf_of(following)
            if leaf is None:
                self._wait((following, number), result.like(places(following)[number]))
            else:
                yield leaf, _hooked(leaf, result.like(leaf)).real

    @staticmethod
    def _by_rule(run: Run, given: Stack) -> list[Stack | None] | None:
        """All tasks at once, where there is a formula for them."""
        rule = RULES.get(run.nodes[0].name())
        if rule is None or not given.parts[0].is_floating_point():
            return None
        if given.better_apart and run.factor is None:
            return None
        results = rule(run.nodes[0], given.values, run.needs)
        if results is None:
            return None
        return [None if value is None else Stack(given.rows, value) for value in results]

    @staticmethod
    def _one_by_one(call: Callable[..., Any], arrived: Sequence[Stack | None]) -> list[Stack | None]:
        """One call for each task."""
        rows = tuple(dict.fromkeys(row for stack in arrived if stack is not None for row in stack.rows))
        by_row = [{} if stack is None else dict(zip(stack.rows, stack.parts, strict=True)) for stack in arrived]
        calls = [call(*(parts.get(row) for parts in by_row)) for row in rows]
        calls = [result if isinstance(result, tuple) else (result,) for result in calls]
        return [_stack(rows, results) for results in zip(*calls, strict=True)]

    def _backwards(self, run: Run) -> Iterator[Found]:
        """One backward of autograd for each task, or one for all."""
        arrived = {
            (node, number): stack
            for node in run.nodes
            for number, stack in enumerate(self._arrived(node))
            if stack is not None
        }
        inputs: list[Any] = [*run.leaves, *(GradientEdge(*edge) for edge in run.below)]
        if not arrived or not inputs:
            return
        with torch.enable_grad(), ending_at(node for node, _ in run.below if run.stop):
            together = _together(arrived, inputs) if run.batched and not self.apart else None
            self.apart |= run.batched and together is None
            stacks = _one_after_the_other(arrived, inputs) if together is None else together
        for edge, stack in zip(run.below, stacks[len(run.leaves) :], strict=True):
            if stack is not None:
                self._wait(edge, stack)
        for leaf, stack in zip(run.leaves, stacks, strict=False):
            if stack is not None:
                yield leaf, stack.real


def _rows(stacks: Collection[Stack]) -> tuple[int, ...]:
    """The rows of all stacks, each once."""
    return tuple(dict.fromkeys(row for stack in stacks for row in stack.rows))


def _one_after_the_other(arrived: Mapping[Edge, Stack], inputs: Sequence[Any]) -> list[Stack | None]:
    """What comes to ``inputs`` in one backward for each task."""
    by_edge = {edge: dict(zip(stack.rows, stack.parts, strict=True)) for edge, stack in arrived.items()}
    rows = _rows(arrived.values())
    found = [
        torch.autograd.grad(
            [GradientEdge(*edge) for edge, parts in by_edge.items() if row in parts],
            inputs,
            grad_outputs=[parts[row] for parts in by_edge.values() if row in parts],
            retain_graph=True,
            allow_unused=True,
        )
        for row in rows
    ]
    return [_stack(rows, results) for results in zip(*found, strict=True)]


def _together(arrived: Mapping[Edge, Stack], inputs: Sequence[Any]) -> list[Stack | None] | None:
    """The same in one backward whose every operation takes the cotangents of all tasks; None where one can't."""
    rows = _rows(arrived.values())
    given = [stack.filled(rows) for stack in arrived.values()]
    try:
        found = torch.autograd.grad(
            [GradientEdge(*edge) for edge in arrived],
            inputs,
            grad_outputs=given,
            retain_graph=True,
            allow_unused=True,
            is_grads_batched=True,
        )
    except RuntimeError:
        # Sparse gradients, say, or no room. What is wrong with the graph itself shows again.
        return None
    return [None if values is None else Stack(rows, values) for values in found]


def _stack(rows: Sequence[int], results: Sequence[Tensor | None]) -> Stack | None:
    """The results of some tasks, as far as there are any."""
    kept = [(row, dense(result)) for row, result in zip(rows, results, strict=True) if result is not None]
    return Stack(tuple(row for row, _ in kept), [result for _, result in kept]) if kept else None


def _called_by_autograd(node: Node, asked: Edge, *cotangents: Tensor | None) -> Sequence[Tensor | None]:
    """What a node that can't be called otherwise makes of cotangents; nothing but it is run."""
    found: list[Sequence[Tensor | None]] = []
    arrived = [(GradientEdge(node, number), part) for number, part in enumerate(cotangents) if part is not None]
    edges, parts = zip(*arrived, strict=True)
    listening = node.register_hook(lambda results, _: found.append(results))
    try:
        with torch.enable_grad():
            torch.autograd.grad(edges, [GradientEdge(*asked)], parts, retain_graph=True, allow_unused=True)
    finally:
        listening.remove()
    return found[0]


def _hooked(leaf: Tensor, stack: Stack) -> Stack:
    """Gradients as the leaf's hooks change them."""
    if not has_hooks(leaf):
        return stack
    return Stack(stack.rows, [torch.autograd.grad(leaf, leaf, part)[0] for part in stack.parts])
