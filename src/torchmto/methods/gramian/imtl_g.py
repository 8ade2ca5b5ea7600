"""IMTL-G: an update with equal projections on all gradients."""

from torch import Tensor

from torchmto import solvers
from torchmto.methods import Domain, GramianWeighting, Indices, Properties, register_method


@register_method("imtl_g")
class IMTLG(GramianWeighting):
    r"""Impartial multi-task learning, gradient part: the update projects equally on all unit gradients.

    The weights have sum 1. They can be negative, and where gradients of very different length conflict even the
    common projection can be. Where linearly dependent gradients allow no equal projections, the weights are the
    least-squares ones, or 1/K if these are 0; both are counted as fallbacks. Gradients are dependent where an eigenvalue
    of their cosines is below K times 1e-6 of the largest one, the rounding error of single precision with some room. Zero
    gradients take no part and have weight 0.

    Scale: the weights sum to 1. No eps. Heads: their own task's gradient. Not random. The loss part is the loss
    weighting ``imtl_l``; the paper's full method is ``MultiTask(..., method="imtl_g", weights="imtl_l")``.

    Args:
        **options: ``heads``, ``refresh_every``.

    Source: Liu et al., Towards Impartial Multi-Task Learning, ICLR 2021, equation 5.

    Example:
        >>> import torch, torchmto
        >>> torchmto.make_method("imtl_g").weights(torch.tensor([[1.0, 0.0], [0.0, 4.0]]))
        tensor([0.6667, 0.3333])
    """

    use = "When the update should make equal progress along every unit gradient."
    properties = Properties(pareto=False)
    domain = Domain(
        corners="Linearly dependent gradients: the least-squares weights, or 1/K, a fallback. Zero gradients take no part. "
        "Where gradients of very different length conflict the update can conflict with all of them."
    )

    def weights(self, gramian: Tensor, losses: Tensor | None = None, indices: Indices | None = None) -> Tensor:
        """Weights with sum 1, [k]."""
        return self.solved(solvers.imtl_g, gramian)
