"""Nash-MTL: the update as a bargain between the tasks."""

from torch import Tensor

from torchmto import solvers
from torchmto.methods import Domain, GramianWeighting, Indices, Properties, hyper, register_method


@register_method("nash_mtl")
class NashMTL(GramianWeighting):
    r"""Nash bargaining: :math:`G \alpha = 1/\alpha`, :math:`\alpha > 0`; the update is :math:`\alpha^\top J`.

    Its direction doesn't depend on the lengths of the gradients, and its length is :math:`\sqrt{K}` whatever they are
    (less if some are zero); ``max_norm`` bounds it by 1, as the released code does by clipping. So the learning rate
    alone sets the step. Steps that reuse the weights are clipped by their own gradient.

    Solved exactly as a strictly convex problem, where the released code takes 20 steps of a sequence of convex
    programs from the last solution: a warm start isn't needed. Where a convex combination of the gradients vanishes
    there is no solution; 1e-6 is then added to every squared unit length (counted as a fallback; the released code
    keeps its last weights).

    Scale: see above. No eps. Heads: their own task's gradient. The released code clips the shared gradient alone and weights
    heads by the alpha from before that: ``heads="unclipped"``. With ``heads="weighted"`` the clipping shortens heads too. Not
    random.

    Args:
        max_norm: Largest norm of the update of the shared parameters; 0 for no bound.
        update_every: The paper's name for ``refresh_every``.
        **options: ``heads`` ("unit", "weighted" or "unclipped"), ``refresh_every``.

    Raises:
        ValueError: If ``update_every`` and ``refresh_every`` are both given and differ.

    Source: Navon et al., Multi-Task Learning as a Bargaining Game, ICML 2022, equation 3, claim 3.1.

    Example:
        >>> import torch, torchmto
        >>> torchmto.make_method("nash_mtl", max_norm=0.0).weights(torch.tensor([[1.0, 0.0], [0.0, 4.0]]))
        tensor([1.0000, 0.5000])
    """

    use = "Tasks on different scales that should bargain for a proportionally fair update."
    properties = Properties(homogeneity=0.0, identity=False, nonconflicting=True)
    domain = Domain(
        corners="A zero gradient takes no part; where a convex combination of the others vanishes a ridge is added, a "
        "fallback. The update doesn't shrink with the gradients: a constant learning rate doesn't settle."
    )
    max_norm: float = hyper.number(1.0, minimum=0, search=("log", 0.1, 10.0))
    update_every: int = hyper.integer(1, minimum=1)
    heads: str = hyper.choice("unit", "weighted", "unclipped")

    def __post_init__(self) -> None:
        """The paper's name for ``refresh_every``."""
        if self.update_every > 1 and self.refresh_every not in (1, self.update_every):
            raise ValueError(
                f"Parameters `update_every` and `refresh_every` mean the same. Found {self.update_every} and "
                f"{self.refresh_every}."
            )
        self.refresh_every = max(self.refresh_every, self.update_every)
        super().__post_init__()

    def weights(self, gramian: Tensor, losses: Tensor | None = None, indices: Indices | None = None) -> Tensor:
        """Positive weights (0 for a zero gradient), [k]."""
        weights = self.solved(solvers.nash, gramian)
        self.head_weights = weights if self.heads == "unclipped" else None
        return self.shortened(weights, gramian)
