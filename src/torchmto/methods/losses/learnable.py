"""Learnable numbers per task, with an optimizer of their own."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


class LearnableScales:
    """One learnable number per task, moved by an Adam of its own.

    They belong to the method and not to the model: the model's optimizer would apply its weight decay to them. Every
    number is a parameter by itself, because Adam moves the entries of a vector whose gradient is zero: so the numbers
    and moments of absent tasks stay as they are. They live on the CPU in float64; a step transfers K numbers.

    Args:
        num_tasks: K.
        lr: Adam's learning rate.
        initial: Initial value of all numbers.
        weight_decay: Adam's weight decay (added to the gradient).
    """

    def __init__(self, num_tasks: int, *, lr: float, initial: float = 0.0, weight_decay: float = 0.0) -> None:
        self._scales = [torch.full((), initial, dtype=torch.float64, requires_grad=True) for _ in range(num_tasks)]
        self._adam = torch.optim.Adam(self._scales, lr=lr, weight_decay=weight_decay)

    @property
    def values(self) -> Tensor:
        """The numbers of all tasks, [K]."""
        return torch.stack(self._scales).detach()

    def of(self, indices: Sequence[int]) -> Tensor:
        """The numbers of the tasks ``indices``, [k]."""
        return torch.stack([self._scales[i] for i in indices]).detach()

    def step(self, gradient: Tensor, indices: Sequence[int]) -> None:
        """One step of Adam for the tasks ``indices`` along ``gradient`` [k]."""
        for i, entry in zip(indices, gradient.detach().to("cpu", torch.float64), strict=True):
            self._scales[i].grad = entry
        self._adam.step()
        self._adam.zero_grad(set_to_none=True)

    @torch.no_grad()
    def assign(self, values: Tensor, indices: Sequence[int]) -> None:
        """Set the numbers of the tasks ``indices``; the moments stay."""
        for i, value in zip(indices, values, strict=True):
            self._scales[i].copy_(value)

    def state_dict(self) -> dict[str, Any]:
        """A copy of the numbers and of Adam's state."""
        return {"values": self.values, "optimizer": copy.deepcopy(self._adam.state_dict())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a saved state.

        Raises:
            ValueError: If it has another number of tasks.
        """
        if len(state["values"]) != len(self._scales):
            raise ValueError(
                f"The saved state has {len(state['values'])} scales, but there are {len(self._scales)} tasks."
            )
        self._adam.load_state_dict(copy.deepcopy(state["optimizer"]))
        self.assign(state["values"], range(len(self._scales)))
