"""A logarithm of losses that tells when there is none."""

from __future__ import annotations

import torch
from torch import Tensor


def safe_log(losses: Tensor) -> Tensor:
    """The logarithm; NaN, also in its derivative, where a loss isn't positive.

    The derivative of ``torch.log`` at a negative loss is a finite negative number, which would turn descent into
    ascent.
    """
    return (losses + torch.where(losses > 0, 0.0, torch.nan).to(losses)).log()
