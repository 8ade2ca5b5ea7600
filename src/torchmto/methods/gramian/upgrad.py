"""UPGrad: every gradient made free of conflict by itself, then averaged."""

from torch import Tensor

from torchmto import solvers
from torchmto.methods import Properties, register_method
from torchmto.methods.gramian.preference import PreferenceWeighting


@register_method("upgrad")
class UPGrad(PreferenceWeighting):
    r"""Unconflicting projection of gradients: the mean of the gradients' projections on :math:`\{d : J d \ge 0\}`.

    Solved exactly on unit gradients, without the regularisation of G that public codes add (which lets the update
    conflict with tasks of small gradients), and at any scale (below a norm of 1e-2 or so they return the mean).
    Only where a positive combination of the gradients vanishes up to the rounding errors of their type, so that these
    would decide on the weights, a ridge of their size is added.

    Scale: mean, as in the paper. No eps. Heads: their own task's gradient. Not random.

    Args:
        scale: "mean" or "sum"; without effect if there is a preference.
        preference: How much each projection counts: task -> non-negative float, or a sequence in the order of the
            tasks. That of absent tasks is shared out among the present ones, in proportion.
        **options: ``heads``, ``refresh_every``.

    Source: Quinton & Rey, Jacobian Descent for Multi-Objective Optimization, 2024 (arXiv 2406.16232), section 3.

    Example:
        >>> import torch, torchmto
        >>> torchmto.make_method("upgrad").weights(torch.tensor([[1.0, -1.0], [-1.0, 4.0]]))
        tensor([1.0000, 0.6250])
    """

    use = "When no update may conflict with any task and small-norm tasks must not be drowned."
    properties = Properties(nonconflicting=True)

    def solve(self, gramian: Tensor, preference: list[float]) -> Tensor:
        """Weights of at least the preference, [k]."""
        return self.solved(solvers.upgrad, gramian, preference=preference)
