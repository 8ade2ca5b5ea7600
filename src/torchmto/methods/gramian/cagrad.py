"""CAGrad: near the mean gradient, the direction that serves the worst-off task best."""

import torch
from torch import Tensor

from torchmto import solvers
from torchmto.methods import GramianWeighting, Indices, hyper, register_method


@register_method("cagrad")
class CAGrad(GramianWeighting):
    r"""Conflict-averse gradient descent.

    With the mean gradient :math:`g_0`: :math:`\max_d \min_i g_i \cdot d` over :math:`\|d - g_0\| \le c \|g_0\|`, that
    is :math:`d = g_0 + c \|g_0\| g_w / \|g_w\|` where w minimises :math:`w^\top G \mathbb{1}/K + c \|g_0\|
    \sqrt{w^\top G w}` over the simplex and :math:`g_w = w^\top J`. Solved exactly; where :math:`g_w = 0`, which the
    formula leaves open, d is the direction of the ball nearest to :math:`g_0` that conflicts with no task. Zero means: up to
    the rounding errors of the gradients' type.

    Scale: that of the mean gradient, as in the paper. Three public codes multiply by K (``scale="sum"``); the
    released one also divides by :math:`1 + c^2` (``rescale=True``; dividing by 1 + c is left to the learning rate).
    No eps. With one task there is nothing to be averse to: its gradient is used as it is, where the formula would
    lengthen it by 1 + c. Heads: their own task's gradient. Not random. The update conflicts with no task if c >= 1.

    Args:
        c: Radius of the ball relative to the mean gradient; 0 is the mean gradient, the paper takes c < 1 (0.4 and
            0.5).
        rescale: Divide by :math:`1 + c^2`.
        scale: "mean" or "sum" (times the number of present tasks).
        **options: ``heads``, ``refresh_every``.

    Source: Liu et al., Conflict-Averse Gradient Descent, NeurIPS 2021, equation 4, Algorithm 1.

    Example:
        >>> import torch, torchmto
        >>> J = torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
        >>> torchmto.make_method("cagrad", c=0.5).weights(J @ J.T) @ J
        tensor([0.1835, 1.2041, 1.2041])
    """

    use = "When the worst-off task matters but the average should still fall; the step stays near the mean gradient."
    c: float = hyper.number(0.5, minimum=0, search=("linear", 0.1, 0.9))
    rescale: bool = hyper.flag(False)
    scale: str = hyper.choice("mean", "sum")

    def weights(self, gramian: Tensor, losses: Tensor | None = None, indices: Indices | None = None) -> Tensor:
        """The weights of d, [k]."""
        if len(gramian) == 1:
            return torch.ones_like(gramian[0])
        weights = self.solved(solvers.cagrad, gramian, c=self.c, rescale=self.rescale)
        return weights * len(gramian) if self.scale == "sum" else weights
