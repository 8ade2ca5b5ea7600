"""DualProj: the mean gradient made free of conflict."""

from torch import Tensor

from torchmto import solvers
from torchmto.methods import Properties, register_method
from torchmto.methods.gramian.preference import PreferenceWeighting


@register_method("dualproj")
class DualProj(PreferenceWeighting):
    r"""The mean gradient's projection on :math:`\{d : J d \ge 0\}`: the nearest direction without conflict.

    Solved exactly on unit gradients, without the regularisation of G that public codes add.
    Only where a positive combination of the gradients vanishes up to the rounding errors of their type, so that these would
    decide on the weights, a ridge of their size is added.

    Scale: mean. No eps. Heads: their own task's gradient. Not random.

    Args:
        scale: "mean" or "sum"; without effect if there is a preference.
        preference: The weights of the gradients before the projection: task -> non-negative float, or a sequence in
            the order of the tasks. Those of absent tasks are shared out among the present ones, in proportion.
        **options: ``heads``, ``refresh_every``.

    Source: Lopez-Paz & Ranzato, Gradient Episodic Memory, NeurIPS 2017, equation 11; as an aggregator of tasks in
    Quinton & Rey, 2024 (arXiv 2406.16232).

    Example:
        >>> import torch, torchmto
        >>> torchmto.make_method("dualproj").weights(torch.tensor([[1.0, -1.0], [-1.0, 4.0]]))
        tensor([0.5000, 0.5000])
    """

    use = "When no update may conflict with any task, at one projection per step."
    properties = Properties(nonconflicting=True)

    def solve(self, gramian: Tensor, preference: list[float]) -> Tensor:
        """Weights of at least the preference, [k]."""
        return self.solved(solvers.dual_cone, gramian, preference=preference)
