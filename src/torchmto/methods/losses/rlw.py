"""Random loss weighting."""

import torch
from torch import Tensor

from torchmto.methods import Indices, LossWeighting, Properties, register_method


@register_method("rlw")
class RLW(LossWeighting):
    r"""Random weights in every step: :math:`\sum_i w_i l_i` with :math:`w = K\,\mathrm{softmax}(z)`, z standard normal.

    K is the number of present tasks. Scale: sum (in the paper and its code they sum to 1). Heads: times the
    task's weight. Random: one draw per step from :attr:`generator`.

    Source: Lin et al., Reasonable Effectiveness of Random Weighting, TMLR 2022.

    Example:
        >>> import torch, torchmto
        >>> weights = torchmto.make_method("rlw").loss_weights(torch.tensor([1.0, 2.0, 3.0]))
        >>> round(weights.sum().item(), 4)
        3.0
    """

    use = "A control: what random loss weights achieve, at one backward."
    properties = Properties(equivariant=False, pareto=False)

    def objective(self, losses: Tensor, indices: Indices | None = None) -> Tensor:
        """The sum of the losses times freshly drawn weights."""
        draw = torch.randn(len(losses), generator=self.generator, dtype=torch.float64)
        return (len(losses) * draw.softmax(0).to(losses) * losses).sum()
