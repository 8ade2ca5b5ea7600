"""Scale-invariant sum: the logarithms of the losses."""

from torch import Tensor

from torchmto.methods import Domain, Indices, LossWeighting, Properties, register_method
from torchmto.methods.losses.inside import safe_log


@register_method("si")
class ScaleInvariant(LossWeighting):
    r"""The sum of the losses' logarithms, :math:`\sum_i \log l_i`: every gradient is divided by its loss.

    Multiplying a loss by a constant changes nothing. Scale: sum. Heads: times the task's weight :math:`1 / l_i`, as the
    sum says. Losses must be positive. Where a loss tends to 0 its weight explodes, so on problems that a task solves
    perfectly it doesn't settle.

    In front of a method on gradients, ``MultiTask(..., method="mgda", weights="si")``, every gradient is that of the
    log-loss, :math:`g_i / l_i`: what released code calls the LOG\_ variant (LOG\_MGDA, LOG\_CAGrad, LOG\_IMTLG), without
    the eps of 1e-8 that some add. LOG\_MGDA also divides the sum of the weighted log-losses by :math:`\sum_i w_i / l_i`.
    A method that looks at the losses then sees 1 for each.

    Source: a baseline of Navon et al., Multi-Task Learning as a Bargaining Game, ICML 2022.

    Example:
        >>> import torch, torchmto
        >>> torchmto.make_method("si").loss_weights(torch.tensor([0.5, 4.0]))
        tensor([2.0000, 0.2500])
    """

    separable = True
    use = "Positive losses on different scales: scale-invariant and free."
    properties = Properties(homogeneity=0.0, identity=False, pareto=False)
    domain = Domain("0", corners="The weight of a loss near 0 grows like 1 / l.")

    def objective(self, losses: Tensor, indices: Indices | None = None) -> Tensor:
        """The sum of the logarithms."""
        return safe_log(losses).sum()
