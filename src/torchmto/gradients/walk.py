"""K backwards through one forward's graph, all of them segment by segment."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from torchmto.gradients.engine import Piece
from torchmto.gradients.factors import Factor
from torchmto.gradients.finite import plain
from torchmto.gradients.graph import Edge, Segment


@dataclass
class Found:
    """What one task's backward through one segment has found.

    Attributes:
        task: The task.
        gradients: Parameters and their gradients.
        cotangents: The cotangents of the segment's factors, None for zero.
    """

    task: int
    gradients: list[tuple[Tensor, Tensor]]
    cotangents: Sequence[Tensor | None]


class Walk:
    """The tasks' backwards of one forward, and where they are.

    Args:
        piece: The losses and the tasks' cotangents.
        segments: The segments of their graph, from the top.
    """

    def __init__(self, piece: Piece, segments: list[Segment]) -> None:
        self.segments = segments
        self._piece = piece
        self._cotangents: dict[int, dict[Edge, Tensor]] = {}
        for task, loss in piece.losses.items():
            seed = piece.seeds[task]
            assert loss.grad_fn is not None
            self._cotangents[task] = {(loss.grad_fn, loss.output_nr): torch.ones_like(loss) if seed is None else seed}

    def factors(self, number: int) -> Sequence[Factor]:
        """The factors of segment ``number``; none below the last."""
        return self.segments[number].factors if number < len(self.segments) else ()

    def through(self, number: int) -> Iterator[Found]:
        """Go through segment ``number`` with one task after the other; nothing below the last segment."""
        if number >= len(self.segments):
            return
        segment = self.segments[number]
        stops = [node.register_prehook(_stop) for node in {node for node, _ in segment.below}]
        try:
            with self._piece.context():
                for task in self._piece.losses:
                    yield self._backward(task, segment)
        finally:
            for stop in stops:
                stop.remove()

    def _backward(self, task: int, segment: Segment) -> Found:
        """One task's backward through one segment."""
        below = set(segment.below)
        cotangents = self._cotangents[task]
        kept = {edge: value for edge, value in cotangents.items() if edge in below}
        above = [(edge, value) for edge, value in cotangents.items() if edge not in below]
        self._cotangents[task] = kept
        del cotangents
        if not above:
            return Found(task, [], [None] * len(segment.factors))
        inputs: list[Any] = [
            *segment.leaves,
            *(GradientEdge(factor.node, 0) for factor in segment.factors),
            *(GradientEdge(*edge) for edge in segment.below),
        ]
        if not inputs:
            return Found(task, [], [])
        gradients = list(
            torch.autograd.grad(
                [GradientEdge(*edge) for edge, _ in above],
                inputs,
                grad_outputs=[value for _, value in above],
                retain_graph=True,
                allow_unused=True,
            )
        )
        num_leaves, num_factors = len(segment.leaves), len(segment.factors)
        for edge, gradient in zip(segment.below, gradients[num_leaves + num_factors :], strict=True):
            if gradient is not None:
                kept[edge] = kept[edge] + gradient if edge in kept else gradient
        own = zip(segment.leaves, gradients[:num_leaves], strict=True)
        return Found(
            task,
            [(leaf, plain(gradient)) for leaf, gradient in own if gradient is not None],
            gradients[num_leaves : num_leaves + num_factors],
        )


def _stop(gradients: tuple[Tensor | None, ...]) -> Any:
    """A hook before a node of the lower boundary: nothing goes further down in this segment's backward."""
    return (None,) * len(gradients)
