"""Whether losses, weights and gradients are finite, and what happens if not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

from torchmto.gradients import all_finite
from torchmto.gradients.ranks import local
from torchmto.step.losses import Losses, NonFiniteError
from torchmto.step.network import Heads, Network
from torchmto.step.reduction import Reduction


class SkippedError(Exception):
    """Raised inside a step to leave it out: under ``on_nonfinite="skip"``, or when the scaler found an overflow."""

    def __init__(self, reason: str, *, overflow: bool = False, absent: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.overflow = overflow
        self.absent = absent


class FiniteChecks:
    """Checks the numbers of one step before they change anything.

    Args:
        network: The model, whose gradients are dropped if a check fails; its scaler is told of overflows.
        tasks: The names of all tasks.
        on_nonfinite: "raise" or "skip".
        reduction: Knows the losses' weights, so that these can be told from gradients.

    Attributes:
        recorded: Task index -> the first loss of the step that passed.
        overflowed: Whether the scaler lowered its scale.
    """

    def __init__(self, network: Network, tasks: tuple[str, ...], on_nonfinite: str, reduction: Reduction) -> None:
        self.recorded: dict[int, float] = {}
        self.overflowed = False
        self._network = network
        self._tasks = tasks
        self._on_nonfinite = on_nonfinite
        self._reduction = reduction

    def losses(self, losses: Losses, values: Sequence[float]) -> None:
        """Check the losses, ``values`` as plain numbers, and record them."""
        for index, value in zip(losses.indices, values, strict=True):
            if value - value != 0:
                self.fail(f"The loss of task `{self._tasks[index]}` is {value}.")
        for index, value in zip(losses.indices, values, strict=True):
            self.recorded.setdefault(index, value)

    def task_gradients(self, losses: Losses, gramian: Tensor, heads: Heads) -> None:
        """Check the tasks' gradients, those of the shared parameters by the Gramian's diagonal."""
        for index, good in zip(losses.indices, gramian.diagonal().isfinite().tolist(), strict=True):
            if not good:
                self.fail_with_gradient(losses, f"The gradient of task `{self._tasks[index]}` isn't finite.")
        if not self._all_finite([gradient for _, held in heads.values() for gradient in held.values()]):
            self._overflow("The gradient of a head isn't finite.")

    def combined(self, losses: Losses) -> None:
        """Check what a method has made of finite gradients by arithmetic of its own, and what heads got by its weights."""
        if not self._all_finite([local(gradient) for gradient in self._network.gradients()]):
            self.fail_with_gradient(losses, "The combined gradient isn't finite.")

    def _all_finite(self, gradients: Sequence[Tensor]) -> bool:
        """Whether gradients are finite, on all ranks if they are sharded."""
        network = self._network
        if not network.sharded:
            return all_finite(gradients)
        worst = torch.tensor([float(not all(bool(g.isfinite().all()) for g in gradients))], device=network.device)
        return not network.ranks.max_(worst).item()

    def _weights(self, losses: Losses) -> None:
        """Tell weights that aren't finite from gradients: a method of logarithms has met a loss that isn't positive."""
        weights = self._reduction.weights
        if weights is not None and not bool(weights.isfinite().all()):
            values = zip(losses.indices, losses.raw.tolist(), strict=True)
            named = ", ".join(f"`{self._tasks[index]}` {value:g}" for index, value in values)
            self.fail(f"The method's loss weights aren't finite. The losses are {named}.")

    def fail(self, message: str) -> NoReturn:
        """Leave the step out, or raise."""
        self._network.zero_grad()
        if self._on_nonfinite == "skip":
            raise SkippedError(message)
        raise NonFiniteError(f"{message} Nothing was updated; pass `on_nonfinite='skip'` to leave such steps out.")

    def fail_with_gradient(self, losses: Losses, message: str) -> NoReturn:
        """The same for a gradient, unless the losses' weights are to blame."""
        self._weights(losses)
        self._overflow(message)

    def _overflow(self, message: str) -> NoReturn:
        """Leave the step out, or raise; a scaler sees an infinite gradient and lowers its scale by itself."""
        network, scaler = self._network, self._network.scaler
        if scaler is None:
            self.fail(message)
        network.zero_grad()
        parameter = network.parameters[0]
        parameter.grad = torch.full_like(parameter, float("inf"))
        scaler.unscale_(network.optimizer)
        scaler.step(network.optimizer)
        scaler.update()
        network.zero_grad()
        self.overflowed = True
        raise SkippedError(f"{message} The scaler lowered its scale.", overflow=True)
