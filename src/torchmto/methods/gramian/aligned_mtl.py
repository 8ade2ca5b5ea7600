"""Aligned-MTL: gradients made orthogonal and equally long."""

from torch import Tensor

from torchmto import solvers
from torchmto.methods import Domain, Properties, hyper, register_method
from torchmto.methods.gramian.preference import PreferenceWeighting


@register_method("aligned_mtl")
class AlignedMTL(PreferenceWeighting):
    r"""Independent component alignment: :math:`w = \sqrt{\lambda} V \Lambda^{-1/2} V^\top u`.

    The gradients are replaced by the nearest orthogonal set of one length, so that the system of gradients has
    condition number 1; V and :math:`\Lambda` are eigenvectors and eigenvalues of G over its numerical rank, u the
    preference.

    Scale: sum, as in LibMTL; TorchJD takes the mean (``scale="mean"``). Threshold of the rank: a unit gradient
    whose squared distance from what the others span is below K times 1e-6, the rounding error of single precision with
    some room, counts as dependent on them. Heads: their own task's gradient. Not random.

    Args:
        scale_mode: The common squared length: the smallest eigenvalue ("min", paper), the "median" one, or the mean
            one ("rmse").
        scale: "sum" or "mean"; without effect if there is a preference.
        preference: The weights u: task -> non-negative float, or a sequence in the order of the tasks. Those of absent tasks
            are shared out among the present ones, in proportion.
        **options: ``heads``, ``refresh_every``.

    Source: Senushkin et al., Independent Component Alignment for Multi-Task Learning, CVPR 2023, Algorithm 1.

    Example:
        >>> import torch, torchmto
        >>> torchmto.make_method("aligned_mtl").weights(torch.tensor([[1.0, 0.0], [0.0, 4.0]]))
        tensor([1.0000, 0.5000])
    """

    use = "Gradients of very different size that should be orthogonalised without favouring any."
    properties = Properties(pareto=False)
    domain = Domain(corners="Zero gradients take no part; what dependent ones span is aligned over its own rank.")
    scale_mode: str = hyper.choice("min", "median", "rmse", search=("choice", "min", "median", "rmse"))
    scale: str = hyper.choice("sum", "mean")

    def solve(self, gramian: Tensor, preference: list[float]) -> Tensor:
        """The weights of the aligned sum, [k]; they can be negative."""
        return self.solved(solvers.aligned, gramian, scale=self.scale_mode, preference=preference)
