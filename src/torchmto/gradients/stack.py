"""Cotangents of several tasks at one place of the graph."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torchmto.gradients.finite import real
from torchmto.gradients.rules import SMALL


class Stack:
    """One tensor for each of some tasks, next to each other or apart: changed into what is asked for, once.

    Args:
        rows: The tasks' rows in the Gramian, each once, in any order.
        content: [len(rows), *shape], or a list of tensors [*shape].
    """

    def __init__(self, rows: tuple[int, ...], content: Tensor | list[Tensor]) -> None:
        self.rows = rows
        self._content = content

    @property
    def better_apart(self) -> bool:
        """Whether the tensors are apart, and so large that they had better be left so."""
        return isinstance(self._content, list) and self._content[0].numel() > SMALL

    @property
    def values(self) -> Tensor:
        """[len(rows), *shape]."""
        if isinstance(self._content, list):
            parts = self._content
            self._content = parts[0].unsqueeze(0) if len(parts) == 1 else torch.stack(parts)
        return self._content

    @property
    def parts(self) -> Sequence[Tensor]:
        """One tensor [*shape] for each of the rows."""
        return self._content if isinstance(self._content, list) else self._content.unbind()

    def filled(self, rows: tuple[int, ...]) -> Tensor:
        """[len(rows), *shape], zeros for the rows that have no tensor here."""
        if rows == self.rows:
            return self.values
        parts = dict(zip(self.rows, self.parts, strict=True))
        missing = torch.zeros_like(self.parts[0])
        return torch.stack([parts.get(row, missing) for row in rows])

    @property
    def wide(self) -> "Stack":
        """In float32 at least."""
        values = self.values
        return Stack(self.rows, values.to(torch.promote_types(values.dtype, torch.float32)))

    @property
    def real(self) -> "Stack":
        """Complex numbers as pairs of reals."""
        return Stack(self.rows, [real(part) for part in self.parts]) if self._content[0].is_complex() else self

    def like(self, place: Any) -> "Stack":
        """In the shape, on the device and in the dtype of the tensor at ``place``, as autograd changes cotangents on their way.

        Args:
            place: A tensor, or what a node says about its input.
        """
        first = self._content[0]
        shape, device, dtype = tuple(place.shape), place.device, place.dtype
        if first.shape == shape and first.dtype == dtype and first.device == device:
            return self
        if first.shape != shape:
            broadcast = [1] * (first.dim() - len(shape))
            values = self.values.sum_to_size(len(self.rows), *broadcast, *shape).reshape(len(self.rows), *shape)
            return Stack(self.rows, values.to(device, dtype))
        if isinstance(self._content, list):
            return Stack(self.rows, [part.to(device, dtype) for part in self._content])
        return Stack(self.rows, self._content.to(device, dtype))


def merge(stacks: Sequence[Stack]) -> "Stack":
    """The sum of stacks at one place, whatever tasks they are of."""
    first = stacks[0]
    if len(stacks) == 1:
        return first
    if all(stack.rows == first.rows for stack in stacks):
        total = first.values
        for stack in stacks[1:]:
            total = total + stack.values
        return Stack(first.rows, total)
    by_row: dict[int, Tensor] = {}
    for stack in stacks:
        for row, part in zip(stack.rows, stack.parts, strict=True):
            by_row[row] = by_row[row] + part if row in by_row else part
    return Stack(tuple(by_row), list(by_row.values()))
