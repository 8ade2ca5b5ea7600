"""Tchebycheff scalarisations: the largest weighted loss."""

from torch import Tensor

from torchmto.methods import Domain, Indices, LossWeighting, Properties, hyper, register_method
from torchmto.methods.losses.inside import inside
from torchmto.methods.per_task import PerTask, Shares, TaskFloats


@register_method("tchebycheff")
class Tchebycheff(LossWeighting):
    r"""The largest weighted loss, :math:`\max_i \lambda_i (l_i - z_i)`.

    Only the worst task has a gradient; tasks that tie share it evenly. For the smooth form see ``stch``. Scale: the
    weight of the worst task is its preference (which sum to 1 over the present tasks). Heads: times the task's weight,
    so the heads of all other tasks get a zero gradient.

    Args:
        preference: Task -> positive weight or a sequence; scaled to sum 1 over the present tasks. None: all alike.
        reference: The ideal point z, a lower bound of the losses: one number, or one per task (mapping or sequence).

    Source: Zhang & Li, MOEA/D: A Multiobjective Evolutionary Algorithm Based on Decomposition, IEEE TEVC 2007, Section
    II-B.

    Example:
        >>> import torch, torchmto
        >>> torchmto.make_method("tchebycheff").loss_weights(torch.tensor([1.0, 3.0]))
        tensor([0.0000, 0.5000])
    """

    use = "The worst weighted loss is all that counts."
    properties = Properties(pareto=False)
    domain = Domain("`reference`", attained=True)
    preference: Shares = hyper.given(None, Shares, TaskFloats | None)
    reference: PerTask = hyper.per_task(0.0)

    def lower_bounds(self, indices: Indices) -> Tensor:
        """Below the reference the distance falls as the loss rises: descent would climb."""
        return self.reference.of(indices)

    def _scaled(self, preference: Tensor) -> Tensor:
        return preference

    def objective(self, losses: Tensor, indices: Indices | None = None) -> Tensor:
        """The largest weighted distance to the reference."""
        chosen = self.present(losses, indices)
        scale = self._scaled(self.preference.of(chosen)).to(losses)
        gap = losses - self.reference.of(chosen).to(losses)
        return (scale * inside(gap, gap >= 0)).amax()


@register_method("mtchebycheff")
class ModifiedTchebycheff(Tchebycheff):
    r"""The largest loss divided by its preference, :math:`\max_i (l_i - z_i) / \lambda_i`.

    Minimal where the losses are in proportion to the preference, if the Pareto front has such a point, while the
    optimum of ``tchebycheff`` has them in inverse proportion. Scale: the weight of the worst task is the inverse of its
    preference (K if all are alike). Heads: only the worst task's gets a gradient.

    Args:
        preference: Task -> positive weight or a sequence; scaled to sum 1 over the present tasks. None: all alike.
        reference: The ideal point z, a lower bound of the losses: one number, or one per task (mapping or sequence).

    Source: Ma et al., On Tchebycheff Decomposition Approaches for Multiobjective Evolutionary Optimization, IEEE TEVC
    2018.

    Example:
        >>> import torch, torchmto
        >>> torchmto.make_method("mtchebycheff", preference=[0.2, 0.8]).objective(torch.tensor([1.0, 3.0]))
        tensor(5.)
    """

    use = "The worst task, relative to its preference, is all that counts."

    def _scaled(self, preference: Tensor) -> Tensor:
        return 1 / preference
