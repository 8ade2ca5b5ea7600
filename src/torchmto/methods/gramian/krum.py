"""Krum: the gradients that lie closest to the others."""

from torch import Tensor

from torchmto import solvers
from torchmto.methods import Domain, GramianWeighting, Indices, Properties, hyper, register_method


@register_method("krum")
class Krum(GramianWeighting):
    r"""(Multi-)Krum: the mean of the m gradients whose nearest K - f - 2 others are closest.

    Made for distributed learning with faulty workers; as a multi-task method it ignores outlying tasks.

    Scale: mean of the selected gradients. With fewer than f + 3 tasks one neighbour counts, where the paper's
    guarantee doesn't hold. Ties, up to rounding errors, go to the first task: with fewer than f + 3 tasks the two nearest
    always tie, and the order of the tasks decides between them. Heads: their own task's gradient. Not random.

    Args:
        num_outliers: The number f of gradients not to be trusted.
        num_selected: The number m of gradients to average; at most all.
        **options: ``heads``, ``refresh_every``.

    Source: Blanchard et al., Machine Learning with Adversaries, NeurIPS 2017, sections 4 and 5.

    Example:
        >>> import torch, torchmto
        >>> J = torch.tensor([[1.0, 0.0], [1.1, 0.0], [0.9, 0.1], [-50.0, 9.0]])
        >>> torchmto.make_method("krum", num_selected=2).weights(J @ J.T)
        tensor([0.5000, 0.5000, 0.0000, 0.0000])
    """

    use = "Gradients of some tasks or batches may be outliers."
    properties = Properties(equivariant=False, pareto=False)
    domain = Domain(
        corners="Fewer than `num_outliers` + 3 tasks: one neighbour counts, and nothing is guaranteed. A zero gradient may be "
        "the one that is selected."
    )
    num_outliers: int = hyper.integer(1, minimum=0)
    num_selected: int = hyper.integer(1, minimum=1)

    def weights(self, gramian: Tensor, losses: Tensor | None = None, indices: Indices | None = None) -> Tensor:
        """1/m for the selected tasks, 0 for the others, [k]."""
        return self.solved(solvers.krum, gramian, num_outliers=self.num_outliers, num_selected=self.num_selected)
