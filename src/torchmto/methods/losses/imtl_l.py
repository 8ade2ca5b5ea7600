"""IMTL-L: impartial scaling of the losses."""

from torch import Tensor

from torchmto.methods import Properties, register_method
from torchmto.methods.losses.learnable import LearntScaling


@register_method("imtl_l")
class IMTLL(LearntScaling):
    r"""Learnt scales that make all scaled losses alike, :math:`\sum_i e^{s_i} l_i - s_i` with learnable :math:`s_i`.

    At the optimum :math:`e^{s_i} l_i = 1`. The scales belong to the method: they have an Adam of their own, are updated
    after each step from the step's losses, and are saved in its state. An absent task's scale stays, and so does
    that of a loss that isn't positive. Scale: sum, with weights :math:`e^{s_i}` that start at 1. Heads: times the task's
    weight.

    Args:
        lr: Adam's learning rate for the scales. The paper learns them with the model's optimizer; 0.025 is ours.
        initial: Initial value of every scale.

    Source: Liu et al., Towards Impartial Multi-Task Learning, ICLR 2021, Eq. 6 with a = e, b = 1.

    Example:
        >>> import torch, torchmto
        >>> torchmto.make_method("imtl_l").objective(torch.tensor([1.0, 4.0]))
        tensor(5.)
    """

    use = "Losses on different scales, with learnable scales and one backward."
    properties = Properties(homogeneity=None, identity=False, pareto=False)

    def penalised(self, losses: Tensor, scales: Tensor) -> Tensor:
        """The scaled loss minus the scale."""
        return losses * scales.exp() - scales

    def factors(self, scales: Tensor) -> Tensor:
        """The derivative by the loss, exp(s)."""
        return scales.exp()

    def slope(self, losses: Tensor, scales: Tensor) -> Tensor:
        """The derivative, l exp(s) - 1."""
        return losses * scales.exp() - 1
