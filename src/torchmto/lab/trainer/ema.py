"""A moving average of the weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn


class MovingAverage:
    """An exponential moving average of a model's parameters; buffers are the model's own.

    The decay rises as (1 + n) / (10 + n) to its final value over the first updates, so that the average doesn't remember
    the initial weights.

    Args:
        model: The model that is trained.
        decay: Share of the average that an update keeps.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.num_updates = 0
        self._names = [name for name, _ in model.named_parameters()]
        self._parameters: list[Tensor] = list(model.parameters())
        self.average = [parameter.detach().clone() for parameter in self._parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the current weights."""
        self.num_updates += 1
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        torch._foreach_lerp_(self.average, [parameter.detach() for parameter in self._parameters], 1 - decay)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """The model has the averaged weights inside the block."""
        with torch.no_grad():
            trained = [parameter.detach().clone() for parameter in self._parameters]
            torch._foreach_copy_(self._parameters, self.average)
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(self._parameters, trained)

    def state_dict(self) -> dict[str, Any]:
        """The average, and how often it was updated."""
        return {"num_updates": self.num_updates, "average": dict(zip(self._names, self.average, strict=True))}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved average."""
        self.num_updates = state["num_updates"]
        with torch.no_grad():
            torch._foreach_copy_(self.average, [state["average"][name] for name in self._names])


__all__ = ["MovingAverage"]
