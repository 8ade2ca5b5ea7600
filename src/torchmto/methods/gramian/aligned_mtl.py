"""Aligned-MTL: gradients made orthogonal and equally long."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Unpack, cast

from torch import Tensor

from torchmto import solvers
from torchmto.checks import check_choice
from torchmto.methods.gramian.task_values import Preference, TaskFloats
from torchmto.methods.method import GramianWeighting, Properties, WeightingOptions
from torchmto.methods.registry import register


@register("aligned_mtl")
class AlignedMTL(GramianWeighting):
    r"""Independent component alignment: :math:`w = \sqrt{\lambda} V \Lambda^{-1/2} V^\top u`.

    The gradients are replaced by the nearest orthogonal set of one length, so that the system of gradients has
    condition number 1; V and :math:`\Lambda` are eigenvectors and eigenvalues of G over its numerical rank, u the
    preference.

    Scale: sum, as in LibMTL; TorchJD takes the mean (``scale="mean"``). Threshold of the rank: K times the machine
    precision, relative. Heads: their own task's gradient. Not random.

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
    properties = Properties(pareto=False)

    def __init__(
        self,
        *,
        scale_mode: str = "min",
        scale: str = "sum",
        preference: TaskFloats | None = None,
        **options: Unpack[WeightingOptions],
    ) -> None:
        super().__init__(**options)
        self.scale_mode = check_choice("scale_mode", scale_mode, ("min", "median", "rmse"))
        self.preference = Preference(preference, check_choice("scale", scale, ("sum", "mean")))

    def bind(self, tasks: tuple[str, ...]) -> None:
        """Match the preference with the tasks."""
        self.preference.bind(tasks)
        super().bind(tasks)

    def weights(self, gramian: Tensor, losses: Tensor | None = None, indices: Sequence[int] | None = None) -> Tensor:
        """The weights of the aligned sum, [k]; they can be negative."""
        mode = cast("Literal['min', 'median', 'rmse']", self.scale_mode)
        preference = self.preference.of(len(gramian), indices)
        return self.accept(solvers.aligned(self.as_array(gramian), scale=mode, preference=preference), gramian)
