"""Whether losses, weights and gradients are finite, and what happens if not."""

from collections.abc import Iterator, Sequence
from typing import NoReturn

import torch
from torch import Tensor

from torchmto.gradients.ranks import local
from torchmto.step.losses import Losses, NonFiniteError
from torchmto.step.parts import Parts


class SkippedError(Exception):
    """Raised inside a step to leave it out: under ``on_nonfinite="skip"``, or when the scaler found an overflow."""

    def __init__(self, reason: str, *, overflow: bool = False, absent: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.overflow = overflow
        self.absent = absent


def in_one_transfer(losses: Tensor, weights: Tensor | None, mark: Tensor) -> Iterator[list[float]]:
    """Losses [k], their weights (none for None) and a scalar as lists of plain numbers, with one wait for the device."""
    if losses.is_cpu:
        return iter((losses.tolist(), [] if weights is None else weights.tolist(), [mark.item()]))
    tensors = [losses, losses[:0] if weights is None else weights, mark.reshape(1)]
    flat = torch.cat([tensor.to(losses) for tensor in tensors]).cpu()
    return (tensor.tolist() for tensor in torch.split(flat, [len(tensor) for tensor in tensors]))


def check_losses(parts: Parts, losses: Losses, values: Sequence[float], *, source: int = 0) -> None:
    """Check the losses of an independent batch, ``values`` as plain numbers; record those of the step's own."""
    for index, value in zip(losses.indices, values, strict=True):
        if value - value != 0:
            fail(parts, f"The loss of task `{parts.tasks[index]}` is {value}.")
    if parts.outside:
        _domains(parts, losses, values)
    if source == 0:
        for index, value in zip(losses.indices, values, strict=True):
            parts.recorded.setdefault(index, value)


def _domains(parts: Parts, losses: Losses, values: Sequence[float]) -> None:
    """Check that the methods can take the losses: a loss weighting in front the raw ones, the method weighted ones."""
    raw = torch.tensor(values, dtype=losses.raw.dtype)
    method, *weighting = parts.outside
    reason = weighting[0](raw, losses.indices) if weighting else ""
    if not reason:
        seen = raw if losses.factors is None else losses.values.cpu()
        reason = method(seen, losses.indices)
        reason += " (This is its loss times the weight that `weights=` gives it.)" if reason and seen is not raw else ""
    if reason:
        fail(parts, reason)


def check_task_gradients(parts: Parts, losses: Losses, gramian: Tensor) -> None:
    """Check the tasks' gradients on the shared parameters, by the Gramian's diagonal."""
    for index, square in zip(losses.indices, gramian.diagonal().tolist(), strict=True):
        if square - square != 0:
            fail_with_gradient(parts, losses, f"The gradient of task `{parts.tasks[index]}` isn't finite.")


def is_finite(parts: Parts, gradients: Sequence[Tensor], mark: float) -> bool:
    """Whether what the optimizer will see is finite, on all ranks if it is sharded.

    Args:
        parts: The step's parts.
        gradients: All of it.
        mark: A number that is finite only if all of it is, the same on all ranks.
    """
    if mark - mark == 0:
        return True
    # A sum or norm of finite numbers may overflow.
    network = parts.network
    bad = not all(bool(local(gradient).isfinite().all()) for gradient in gradients)
    if network.sharded:
        bad = bool(network.ranks.max_(torch.tensor([float(bad)], device=network.device)).item())
    return not bad


def check_weights(parts: Parts, losses: Losses, values: Sequence[float]) -> None:
    """Check the losses' weights, ``values`` as plain numbers: times a gradient of zero they may leave no trace."""
    if any(value - value != 0 for value in values):
        raw = zip(losses.indices, losses.raw.tolist(), strict=True)
        named = ", ".join(f"`{parts.tasks[index]}` {value:g}" for index, value in raw)
        fail(parts, f"The method's loss weights aren't finite. The losses are {named}.")


def fail(parts: Parts, message: str) -> NoReturn:
    """Leave the step out, or raise."""
    parts.network.zero_grad()
    if parts.on_nonfinite == "skip":
        raise SkippedError(message)
    raise NonFiniteError(f"{message} Nothing was updated; pass `on_nonfinite='skip'` to leave such steps out.")


def fail_with_gradient(parts: Parts, losses: Losses | None, message: str) -> NoReturn:
    """The same for a gradient, unless the weights of its losses are to blame."""
    weights = parts.weights
    if losses is not None and weights is not None:
        check_weights(parts, losses, weights.tolist())
    _overflow(parts, message)


def _overflow(parts: Parts, message: str) -> NoReturn:
    """Leave the step out, or raise; a scaler sees an infinite gradient and lowers its scale by itself."""
    if parts.network.scaler is None:
        fail(parts, message)
    if not parts.stepping:
        raise SkippedError(f"{message} It is left to the scaler.", overflow=True)
    parts.network.show_overflow()
    parts.overflowed = True
    raise SkippedError(f"{message} The scaler lowered its scale.", overflow=True)
