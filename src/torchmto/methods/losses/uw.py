"""Uncertainty weighting."""

from torch import Tensor

from torchmto.methods import Properties, register_method
from torchmto.methods.losses.learnable import LearntScaling


@register_method("uw")
class UW(LearntScaling):
    r"""Weights by learnt task uncertainty, :math:`\sum_i \frac{l_i}{2 e^{s_i}} + \frac{s_i}{2}`, :math:`s_i` learnable.

    :math:`s_i` is the logarithm of the task's observation variance; at its optimum :math:`e^{s_i} = l_i`. The scales
    belong to the method: they have an Adam of their own, are updated after each step from the step's losses, and are
    saved in its state. An absent task's scale stays, and so does that of a loss that isn't
    positive. Scale: sum, but the weights :math:`e^{-s_i} / 2` start at 1/2.
    Heads: times the task's weight. The released code of Nash-MTL has this form; some codes use :math:`e^{-s} l + s` for
    some tasks.

    Args:
        lr: Adam's learning rate for the scales. The paper doesn't state one; 0.025 as in the released code of Nash-MTL.
        initial: Initial value of every scale.

    Source: Kendall et al., Multi-Task Learning Using Uncertainty to Weigh Losses, CVPR 2018, Eq. 7.

    Example:
        >>> import torch, torchmto
        >>> torchmto.make_method("uw").loss_weights(torch.tensor([1.0, 4.0]))
        tensor([0.5000, 0.5000])
    """

    use = "Losses on different scales; the most used learnable weighting."
    properties = Properties(homogeneity=None, identity=False, pareto=False)

    def penalised(self, losses: Tensor, scales: Tensor) -> Tensor:
        """The halved loss over the variance, plus half its logarithm."""
        return losses * (-scales).exp() / 2 + scales / 2

    def factors(self, scales: Tensor) -> Tensor:
        """The derivative by the loss, exp(-s) / 2."""
        return (-scales).exp() / 2

    def slope(self, losses: Tensor, scales: Tensor) -> Tensor:
        """The derivative, (1 - l exp(-s)) / 2."""
        return (1 - losses * (-scales).exp()) / 2
