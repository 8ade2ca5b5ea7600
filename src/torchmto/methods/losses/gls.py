"""Geometric loss strategy."""

from torch import Tensor

from torchmto.methods import Domain, Indices, LossWeighting, Properties, register_method
from torchmto.methods.losses.inside import safe_log


@register_method("gls")
class GLS(LossWeighting):
    r"""The geometric mean of the losses, :math:`(\prod_i l_i)^{1/K} = \exp(\frac1K \sum_i \log l_i)`.

    Over the present tasks; computed from logarithms, so that products of many losses don't under- or overflow. The
    weights are :math:`L / (K l_i)` with the geometric mean L: invariant to a common scale of the losses. Scale: mean.
    Heads: times the task's weight. Losses must be positive. Where a loss tends
    to 0, the mean has a kink and a constant learning rate doesn't settle.

    Source: Chennupati et al., MultiNet++, CVPR Workshops 2019.

    Example:
        >>> import torch, torchmto
        >>> torchmto.make_method("gls").objective(torch.tensor([1.0, 4.0]))
        tensor(2.)
    """

    use = "Positive losses on different scales, without any hyper-parameter."
    properties = Properties(identity=False, pareto=False)
    domain = Domain("0", corners="As one loss nears 0 so do the weights of all others.")

    def objective(self, losses: Tensor, indices: Indices | None = None) -> Tensor:
        """The geometric mean."""
        return safe_log(losses).mean().exp()
