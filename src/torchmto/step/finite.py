"""Whether losses, weights and gradients are finite, and what happens if not."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NoReturn

import torch
from torch import Tensor

from torchmto.gradients.ranks import local
from torchmto.step.losses import Losses, NonFiniteError
from torchmto.step.network import Network
from torchmto.step.plan import Plan
from torchmto.step.reduction import Reduction


class SkippedError(Exception):
    """Raised inside a step to leave it out: under ``on_nonfinite="skip"``, or when the scaler found an overflow."""

    def __init__(self, reason: str, *, overflow: bool = False, absent: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.overflow = overflow
        self.absent = absent


def in_one_transfer(losses: Tensor, weights: Tensor | None, mark: Tensor) -> Iterator[list[float]]:
    """Losses [k], their weights (none for None) and a scalar as lists of plain numbers, with one wait for the device."""
    tensors = [losses, losses[:0] if weights is None else weights, mark.reshape(1)]
    if not losses.is_cpu:
        flat = torch.cat([tensor.to(losses) for tensor in tensors]).cpu()
        tensors = list(torch.split(flat, [len(tensor) for tensor in tensors]))
    return (tensor.tolist() for tensor in tensors)


@dataclass
class FiniteChecks:
    """Checks the numbers of one step before they change anything.

    Attributes:
        network: The model, whose gradients are dropped if a check fails; its scaler is told of overflows.
        plan: What all steps have in common.
        reduction: Knows the losses' weights, so that these can be told from gradients.
        stepping: Whether this step updates the scaler; else a trainer does.
        recorded: Task index -> the first loss of the step that passed.
        overflowed: Whether the scaler lowered its scale.
    """

    network: Network
    plan: Plan
    reduction: Reduction
    stepping: bool
    recorded: dict[int, float] = field(default_factory=dict)
    overflowed: bool = False

    def losses(self, losses: Losses, values: Sequence[float]) -> None:
        """Check the losses, ``values`` as plain numbers, and record them."""
        for index, value in zip(losses.indices, values, strict=True):
            if value - value != 0:
                self.fail(f"The loss of task `{self.plan.tasks[index]}` is {value}.")
        if self.plan.outside:
            self._domains(losses, values)
        for index, value in zip(losses.indices, values, strict=True):
            self.recorded.setdefault(index, value)

    def _domains(self, losses: Losses, values: Sequence[float]) -> None:
        """Check that the methods can take the losses: a loss weighting in front the raw ones, the method weighted ones."""
        raw = torch.tensor(values, dtype=losses.raw.dtype)
        method, *weighting = self.plan.outside
        reason = weighting[0](raw, losses.indices) if weighting else ""
        if not reason:
            seen = raw if losses.factors is None else losses.values.cpu()
            reason = method(seen, losses.indices)
            reason += (
                " (This is its loss times the weight that `weights=` gives it.)" if reason and seen is not raw else ""
            )
        if reason:
            self.fail(reason)

    def task_gradients(self, losses: Losses, gramian: Tensor) -> None:
        """Check the tasks' gradients on the shared parameters, by the Gramian's diagonal."""
        for index, square in zip(losses.indices, gramian.diagonal().tolist(), strict=True):
            if square - square != 0:
                self.fail_with_gradient(losses, f"The gradient of task `{self.plan.tasks[index]}` isn't finite.")

    def applied(self, gradients: Sequence[Tensor], mark: float) -> bool:
        """Whether what the optimizer will see is finite, on all ranks if it is sharded.

        Args:
            gradients: All of it.
            mark: A number that is finite only if all of it is, the same on all ranks.
        """
        if mark - mark == 0:
            return True
        # A sum or norm of finite numbers may overflow.
        network = self.network
        bad = not all(bool(local(gradient).isfinite().all()) for gradient in gradients)
        if network.sharded:
            bad = bool(network.ranks.max_(torch.tensor([float(bad)], device=network.device)).item())
        return not bad

    def weights(self, losses: Losses, values: Sequence[float]) -> None:
        """Check the losses' weights, ``values`` as plain numbers: times a gradient of zero they may leave no trace."""
        if any(value - value != 0 for value in values):
            raw = zip(losses.indices, losses.raw.tolist(), strict=True)
            named = ", ".join(f"`{self.plan.tasks[index]}` {value:g}" for index, value in raw)
            self.fail(f"The method's loss weights aren't finite. The losses are {named}.")

    def fail(self, message: str) -> NoReturn:
        """Leave the step out, or raise."""
        self.network.zero_grad()
        if self.plan.on_nonfinite == "skip":
            raise SkippedError(message)
        raise NonFiniteError(f"{message} Nothing was updated; pass `on_nonfinite='skip'` to leave such steps out.")

    def fail_with_gradient(self, losses: Losses | None, message: str) -> NoReturn:
        """The same for a gradient, unless the weights of its losses are to blame."""
        weights = self.reduction.weights
        if losses is not None and weights is not None:
            self.weights(losses, weights.tolist())
        self._overflow(message)

    def _overflow(self, message: str) -> NoReturn:
        """Leave the step out, or raise; a scaler sees an infinite gradient and lowers its scale by itself."""
        if self.network.scaler is None:
            self.fail(message)
        if not self.stepping:
            raise SkippedError(f"{message} It is left to the scaler.", overflow=True)
        self.network.show_overflow()
        self.overflowed = True
        raise SkippedError(f"{message} The scaler lowered its scale.", overflow=True)
