"""DualProj: the mean gradient made free of conflict."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

from torch import Tensor

from torchmto import solvers
from torchmto.checks import check_choice
from torchmto.methods.gramian.task_values import Preference, TaskFloats
from torchmto.methods.method import GramianWeighting, Properties, WeightingOptions
from torchmto.methods.registry import register


@register("dualproj")
class DualProj(GramianWeighting):
    r"""The mean gradient's projection on :math:`\{d : J d \ge 0\}`: the nearest direction without conflict.

    Solved exactly on unit gradients, without the regularisation of G that public codes add.

    Scale: mean. No eps. Heads: their own task's gradient. Not random.

    Args:
        scale: "mean" or "sum"; without effect if there is a preference.
        preference: The weights of the gradients before the projection: task -> non-negative float, or a sequence in
            the order of the tasks.
        **options: ``heads``, ``refresh_every``.

    Source: Lopez-Paz & Ranzato, Gradient Episodic Memory, NeurIPS 2017, equation 11; as an aggregator of tasks in
    Quinton & Rey, 2024 (arXiv 2406.16232).

    Example:
        >>> import torch, torchmto
        >>> torchmto.make_method("dualproj").weights(torch.tensor([[1.0, -1.0], [-1.0, 4.0]]))
        tensor([0.5000, 0.5000])
    """

    source = "Lopez-Paz & Ranzato, NeurIPS 2017, equation 11"
    use = "When no update may conflict with any task, at one projection per step."
    properties = Properties(nonconflicting=True)

    def __init__(
        self,
        *,
        scale: str = "mean",
        preference: TaskFloats | None = None,
        **options: Unpack[WeightingOptions],
    ) -> None:
        super().__init__(**options)
        self.preference = Preference(preference, check_choice("scale", scale, ("mean", "sum")))

    def bind(self, tasks: tuple[str, ...]) -> None:
        """Match the preference with the tasks."""
        self.preference.bind(tasks)
        super().bind(tasks)

    def weights(self, gramian: Tensor, losses: Tensor | None = None, indices: Sequence[int] | None = None) -> Tensor:
        """Weights of at least the preference, [k]."""
        preference = self.preference.of(len(gramian), indices)
        return self.accept(solvers.dual_cone(self.as_array(gramian), preference), gramian)
