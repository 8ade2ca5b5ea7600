"""Random weights of the gradients."""

import torch
from torch import Tensor

from torchmto.methods import GramianWeighting, Indices, Properties, hyper, register_method


@register_method("random")
class Random(GramianWeighting):
    r"""Random gradient weighting: :math:`w = K \, \mathrm{softmax}(z)` with z standard normal, drawn anew every step.

    ``rlw`` is the same on the losses for one backward, with weighted heads.

    Scale: sum, the weights are 1 on average; ``scale="mean"`` leaves out the factor K. Heads: their own task's
    gradient. Random: K numbers per step from :attr:`generator`.

    Args:
        scale: "sum" or "mean".
        **options: ``heads``, ``refresh_every``.

    Source: Lin et al., Reasonable Effectiveness of Random Weighting, TMLR 2022.

    Example:
        >>> import torch, torchmto
        >>> torchmto.make_method("random").weights(torch.eye(3)).sum()
        tensor(3.)
    """

    use = "A control: what random gradient weights achieve."
    properties = Properties(equivariant=False, pareto=False)
    scale: str = hyper.choice("sum", "mean")

    def weights(self, gramian: Tensor, losses: Tensor | None = None, indices: Indices | None = None) -> Tensor:
        """Positive weights, [k]."""
        size = len(gramian)
        drawn = torch.randn(size, generator=self.generator, dtype=torch.float64).softmax(0).to(gramian)
        return drawn * size if self.scale == "sum" else drawn
