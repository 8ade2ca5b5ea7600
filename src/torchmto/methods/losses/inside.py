"""Functions of losses that tell where they have no value."""

import torch
from torch import Tensor


def inside(values: Tensor, good: Tensor) -> Tensor:
    """``values``; NaN, also in the derivative, where they aren't ``good``."""
    return values * torch.where(good, 1.0, torch.nan).to(values)


def safe_log(losses: Tensor) -> Tensor:
    """The logarithm; NaN, also in its derivative, where a loss isn't positive.

    The derivative of ``torch.log`` at a negative loss is a finite negative number, which would turn descent into
    ascent.
    """
    return inside(losses, losses > 0).log()
