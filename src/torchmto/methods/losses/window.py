"""Mean losses over windows of steps."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from torchmto.methods import LossWeighting, Method, hyper, states
from torchmto.step import Losses, StepContext


class LossWindow:
    """The mean loss of every task over the steps since the last window ended.

    Args:
        num_tasks: K.
        length: Steps after which a window is full; None: windows end when told.
    """

    def __init__(self, num_tasks: int, length: int | None) -> None:
        self.length = length
        self._total = torch.zeros(num_tasks, dtype=torch.float64)
        self._count = torch.zeros(num_tasks, dtype=torch.float64)
        self._steps = 0

    def add(self, losses: Losses) -> bool:
        """Add a step's losses; return whether the window is full."""
        present = list(losses.indices)
        self._total[present] += losses.values.to("cpu", torch.float64)
        self._count[present] += 1
        self._steps += 1
        return self.length is not None and self._steps >= self.length

    def close(self) -> Tensor:
        """End the window: the mean losses, [K], NaN for tasks that weren't present."""
        means = self._total / self._count
        self._total.zero_()
        self._count.zero_()
        self._steps = 0
        return means

    def state_dict(self) -> dict[str, Any]:
        """A copy of the sums."""
        return {"total": self._total.clone(), "count": self._count.clone(), "steps": self._steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a saved state."""
        self._total.copy_(state["total"])
        self._count.copy_(state["count"])
        self._steps = int(state["steps"])


class Windowed(Method):
    """What looks at mean losses over windows. A subclass implements ``close``.

    Args:
        window: Steps per window; None: windows end at ``mt.end_window()``.
    """

    window: int | None = hyper.integer(None, minimum=1)
    # The window's sums.
    means: LossWindow = states.made(lambda own, num_tasks: LossWindow(num_tasks, own.window))

    def after_step(self, losses: Losses, context: StepContext) -> None:
        """Add the step's losses to the window."""
        if self.means.add(losses):
            self.close(self.means.close())

    def end_window(self) -> None:
        """Close the window, unless windows are counted in steps."""
        if self.window is None and self.num_tasks:
            self.close(self.means.close())

    @abstractmethod
    def close(self, means: Tensor) -> None:
        """Take over a window's mean losses, [K], NaN for tasks that weren't present."""


class WindowedWeighting(Windowed, LossWeighting):
    """Base of the loss weightings that look at mean losses over windows."""
