"""ConFIG: the direction on which all gradients project equally, as long as they agree."""

from torch import Tensor

from torchmto import solvers
from torchmto.methods import Domain, GramianWeighting, Indices, Properties, register_method


@register_method("config")
class ConFIG(GramianWeighting):
    r"""Conflict-free inverse gradients.

    The direction is that of :math:`U^{+} \mathbb{1} = U^\top (U U^\top)^{+} \mathbb{1}` for unit gradients U, on
    which all projections are equal; the length is :math:`\sum_i g_i \cdot \hat d`. Where linearly dependent gradients
    allow no equal projections, the direction is the least-squares one (counted as a fallback), which can conflict with
    some of them. Gradients are dependent where an eigenvalue of their cosines is below K times 1e-6 of the largest one,
    the rounding error of single precision with some room. Zero gradients take no part.

    With three tasks or more it can stop short of the Pareto set: where some combination of the unit gradients whose
    weights sum to 1 vanishes, even with negative weights, no direction projects equally on all.

    Scale: that of the sum. No eps. Heads: their own task's gradient. Not random. Without the paper's momentum
    variant.

    Args:
        **options: ``heads``, ``refresh_every``.

    Source: Liu et al., ConFIG, ICLR 2025, equations 2-4.

    Example:
        >>> import torch, torchmto
        >>> torchmto.make_method("config").weights(torch.tensor([[1.0, 0.0], [0.0, 4.0]]))
        tensor([1.5000, 0.7500])
    """

    use = "When every update has to help every task at an equal rate."
    properties = Properties(pareto=False)
    domain = Domain(
        corners="Linearly dependent gradients: the least-squares direction, a fallback. Zero gradients take no part."
    )

    def weights(self, gramian: Tensor, losses: Tensor | None = None, indices: Indices | None = None) -> Tensor:
        """The weights of the update, [k]; they can be negative."""
        return self.solved(solvers.config, gramian)
