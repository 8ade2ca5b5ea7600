"""Equal weights: the plain sum of the losses."""

import torch
from torch import Tensor

from torchmto.methods import Indices, LossWeighting, register_method


@register_method("gd")
class GD(LossWeighting):
    r"""Gradient descent on the plain sum of the losses, :math:`\sum_i l_i`.

    Scale: sum. Heads: their own task's gradient. The baseline of every comparison.

    Source: equal weighting, as old as multi-task learning (Caruana, Multitask Learning, 1997).

    Example:
        >>> import torch, torchmto
        >>> torchmto.make_method("gd").objective(torch.tensor([1.0, 2.0]))
        tensor(3.)
    """

    use = "Always, first: the baseline to beat, and often enough the answer."
    fixed = True

    def objective(self, losses: Tensor, indices: Indices | None = None) -> Tensor:
        """The sum of the losses."""
        return losses.sum()

    def loss_weights(self, losses: Tensor, indices: Indices | None = None) -> Tensor:
        """Ones, as the objective's gradient is."""
        return torch.ones_like(losses)
