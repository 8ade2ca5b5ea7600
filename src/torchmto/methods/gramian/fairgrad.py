"""FairGrad: alpha-fair shares of the update."""

from torch import Tensor

from torchmto import solvers
from torchmto.methods import Domain, GramianWeighting, Indices, Properties, hyper, register_method

RELEASED_NORM = 1.0
"""Largest norm of the released code's update of the shared parameters."""


@register_method("fairgrad")
class FairGrad(GramianWeighting):
    r"""Weights with :math:`G w = w^{-1/\alpha}`, w > 0: the update that is alpha-fair to the tasks' decreases.

    alpha = 1 is Nash-MTL without its clipping; a large alpha favours the task that gains least. The update scales
    with the gradients to the power :math:`(1 - \alpha)/(1 + \alpha)`. Solved by Newton steps, where need
    be in stages from alpha = 1 on (the released supervised code runs a non-linear least-squares solver). Tested for alpha
    from 0.5 to 100 with norms that span four orders of magnitude; beyond that it can stop on the way, and the solution for the
    alpha reached is taken, which conflicts with no task either. Where a convex combination of the gradients vanishes
    there is no solution, and 1e-6 is added to every squared unit length. Both are counted as fallbacks.

    With alpha > 1 the update grows as the gradients shrink or cancel, so near the Pareto set it only settles if the
    learning rate falls.

    Scale: see above. No eps. Heads: their own task's gradient, as in the released code for supervised learning. That
    code also multiplies the update of the shared parameters by K and clips it, not the heads' gradients, to norm 1:
    ``scale="released"``; the one for reinforcement learning does neither. Not random.

    Args:
        alpha: Positive. 2 in the paper's experiments; 1 is the class default of the released code.
        scale: "paper", or "released": times the number of present tasks, then at most 1 long. Steps that reuse the weights
            are clipped by their own gradient.
        **options: ``heads``, ``refresh_every``.

    Source: Ban & Ji, Fair Resource Allocation in Multi-Task Learning, ICML 2024, equation 8.

    Example:
        >>> import torch, torchmto
        >>> torchmto.make_method("fairgrad").weights(torch.tensor([[8.0]]))
        tensor([0.2500])
    """

    use = "When a chosen notion of fairness between the tasks' progress is wanted (alpha)."
    properties = Properties(homogeneity=-1 / 3, identity=False, pareto=False, nonconflicting=True)
    domain = Domain(
        corners="With alpha > 1 the update has no bound as gradients shrink or cancel. A zero gradient takes no part; where a "
        "convex combination of the others vanishes a ridge is added, a fallback."
    )
    alpha: float = hyper.number(2.0, above=0, search=("choice", 1.0, 2.0, 5.0, 10.0))
    scale: str = hyper.choice("paper", "released")

    def __post_init__(self) -> None:
        """The released code bounds its update."""
        super().__post_init__()
        self.max_norm = RELEASED_NORM if self.scale == "released" else 0.0

    def weights(self, gramian: Tensor, losses: Tensor | None = None, indices: Indices | None = None) -> Tensor:
        """Positive weights (0 for a zero gradient), [k]."""
        return self.scaled(self.shares(gramian), gramian)

    def shares(self, gramian: Tensor) -> Tensor:
        """The solution of the equation, [k]."""
        return self.solved(solvers.fair, gramian, alpha=self.alpha)

    def scaled(self, weights: Tensor, gramian: Tensor) -> Tensor:
        """The weights at the scale that was asked for."""
        return weights if self.scale == "paper" else self.shortened(len(weights) * weights, gramian)
