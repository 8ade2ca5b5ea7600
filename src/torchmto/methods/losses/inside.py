"""Functions of losses that tell where they have no value, or no more of one than rounding errors."""

import torch
from torch import Tensor

ROUNDING = 8 * torch.finfo(torch.float32).eps
"""How far the difference of two losses may be off relative to the larger one: few operations lead to each, in float32 as a
rule, whatever the type that sums over ranks come in."""


def inside(values: Tensor, good: Tensor) -> Tensor:
    """``values``; NaN, also in the derivative, where they aren't ``good``."""
    return values * torch.where(good, 1.0, torch.nan).to(values)


def safe_log(losses: Tensor) -> Tensor:
    """The logarithm; NaN, also in its derivative, where a loss isn't positive.

    The derivative of ``torch.log`` at a negative loss is a finite negative number, which would turn descent into
    ascent.
    """
    return inside(losses, losses > 0).log()


def beyond_rounding(differences: Tensor, sizes: Tensor) -> Tensor:
    """Differences of numbers of these sizes; 0, also in the derivative, where they may be nothing but rounding errors.

    Args:
        differences: What has a kink at 0, on whose side the sign of a rounding error would decide.
        sizes: Of each of them how large the numbers are that it is the difference of.
    """
    return torch.where(differences.abs() <= ROUNDING * sizes, 0.0, differences)
