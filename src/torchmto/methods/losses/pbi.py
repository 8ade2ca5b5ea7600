"""Penalty-based boundary intersection."""

import torch
from torch import Tensor

from torchmto.methods import Domain, Indices, LossWeighting, Properties, hyper, register_method
from torchmto.methods.losses.inside import beyond_rounding, inside
from torchmto.methods.per_task import PerTask, Shares, TaskFloats


@register_method("pbi")
class PBI(LossWeighting):
    r"""The distance along a preferred direction plus a penalty on the distance to it, :math:`d_1 + \theta d_2`.

    :math:`d_1 = (l - z)^\top \hat w` and :math:`d_2 = \|(l - z) - d_1 \hat w\|` with the unit vector :math:`\hat w`
    along the preference. Scale: unit norm (without penalty and preference the weights are :math:`1 / \sqrt K`). Weights
    can be negative. Heads: times the task's weight.

    Args:
        preference: The direction, task -> positive weight or a sequence. None: the diagonal.
        theta: The penalty; the paper uses 5.
        reference: The ideal point z, below the losses: one number, or one per task (mapping or sequence).

    Source: Zhang & Li, MOEA/D: A Multiobjective Evolutionary Algorithm Based on Decomposition, IEEE TEVC 2007, Section
    II-C.

    Example:
        >>> import torch, torchmto
        >>> torchmto.make_method("pbi", theta=2.0, preference=[1.0, 1e-30]).objective(torch.tensor([3.0, 4.0]))
        tensor(11.)
    """

    use = "A chosen preference direction in loss space."
    properties = Properties(pareto=False)
    domain = Domain(
        "`reference`",
        attained=True,
        corners="The penalty can give a loss below its share a negative weight: it may rise. A distance to the direction that "
        "may be nothing but the losses' rounding errors is 0.",
    )
    preference: Shares = hyper.given(None, Shares, TaskFloats | None)
    theta: float = hyper.number(5.0, minimum=0, search=("log", 0.1, 10.0))
    reference: PerTask = hyper.per_task(0.0)

    def lower_bounds(self, indices: Indices) -> Tensor:
        """Distances to a point that isn't below the losses mean nothing."""
        return self.reference.of(indices)

    def objective(self, losses: Tensor, indices: Indices | None = None) -> Tensor:
        """The two distances."""
        chosen = self.present(losses, indices)
        direction = self.preference.of(chosen)
        direction = (direction / torch.linalg.vector_norm(direction)).to(losses)
        reference = self.reference.of(chosen).to(losses)
        gap = inside(losses - reference, losses >= reference)
        along = (gap * direction).sum()
        sizes = torch.maximum(losses.detach().abs(), reference.abs())
        sizes = sizes + (sizes * direction).sum() * direction
        across = beyond_rounding(gap - along * direction, sizes)
        # Divided by its largest entry, whose square stays in range.
        largest = across.detach().abs().amax()
        largest = torch.where(largest > 0, largest, 1.0)
        value: Tensor = along + self.theta * largest * torch.linalg.vector_norm(across / largest)
        return value
