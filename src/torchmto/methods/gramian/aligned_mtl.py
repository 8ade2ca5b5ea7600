"""Aligned-MTL: gradients made orthogonal and equally long."""

from typing import Literal, Unpack, cast

from torchmto import solvers
from torchmto.checks import check_choice
from torchmto.methods.gramian.preference import PreferenceWeighting
from torchmto.methods.method import Domain, Properties, WeightingOptions
from torchmto.methods.per_task import TaskFloats
from torchmto.methods.registry import register_method
from torchmto.solvers.solution import Array, Solution


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
        preference: The weights u: task -> non-negative float, or a sequence in the order of the tasks.
        **options: ``heads``, ``refresh_every``.

    Source: Senushkin et al., Independent Component Alignment for Multi-Task Learning, CVPR 2023, Algorithm 1.

    Example:
        >>> import torch, torchmto
        >>> torchmto.make_method("aligned_mtl").weights(torch.tensor([[1.0, 0.0], [0.0, 4.0]]))
        tensor([1.0000, 0.5000])
    """

    source = "Senushkin et al., CVPR 2023, Algorithm 1"
    use = "Gradients of very different size that should be orthogonalised without favouring any."
    tuning_space = {"scale_mode": ("choice", "min", "median", "rmse")}
    properties = Properties(pareto=False)
    domain = Domain(corners="Zero gradients take no part; what dependent ones span is aligned over its own rank.")

    def __init__(
        self,
        *,
        scale_mode: str = "min",
        scale: str = "sum",
        preference: TaskFloats | None = None,
        **options: Unpack[WeightingOptions],
    ) -> None:
        super().__init__(scale=scale, preference=preference, **options)
        self.scale_mode = check_choice("scale_mode", scale_mode, ("min", "median", "rmse"))

    def solve(self, gramian: Array, preference: list[float], precision: float) -> Solution:
        """The weights of the aligned sum, [k]; they can be negative."""
        mode = cast("Literal['min', 'median', 'rmse']", self.scale_mode)
        return solvers.aligned(gramian, scale=mode, preference=preference, precision=precision)
