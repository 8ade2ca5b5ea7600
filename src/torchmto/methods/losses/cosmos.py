"""COSMOS: a weighted sum with a reward for the preferred direction."""

import torch
from torch import Tensor

from torchmto.methods import Domain, Indices, LossWeighting, Properties, hyper, register_method
from torchmto.methods.losses.inside import inside
from torchmto.methods.per_task import Shares, TaskFloats


@register_method("cosmos")
class COSMOS(LossWeighting):
    r"""A weighted sum minus a cosine, :math:`r^\top l - \lambda \frac{r^\top l}{\|r\| \|l\|}`.

    The cosine pulls the vector of losses towards the direction of the preference r. Only the objective: the paper also
    draws r anew for every batch and gives it to the model as an input. Scale: mean (r sums to 1 over the present
    tasks). Weights can be negative. Heads: times the task's weight.

    Args:
        preference: r, task -> positive weight or a sequence; scaled to sum 1 over the present tasks. None: all alike.
        penalty: The coefficient of the cosine. The paper's values go from 0.01 to 8 and depend on the data set.

    Source: Ruchte & Grabocka, Scalable Pareto Front Approximation for Deep Multi-Objective Learning, ICDM 2021, Eq. 5.

    Example:
        >>> import torch, torchmto
        >>> torchmto.make_method("cosmos").objective(torch.tensor([3.0, 3.0]))
        tensor(2.0000)
    """

    use = "One model for a chosen preference between tasks on a Pareto front."
    properties = Properties(homogeneity=None, identity=False, pareto=False)
    domain = Domain(
        "0",
        attained=True,
        corners="Where all losses are 0 the cosine isn't defined and doesn't count. Its part of the weights grows like 1 / ‖l‖ "
        "as all losses near 0.",
    )

    preference: Shares = hyper.given(None, Shares, TaskFloats | None)
    penalty: float = hyper.number(1.0, minimum=0, search=("log", 1e-2, 8.0))

    def objective(self, losses: Tensor, indices: Indices | None = None) -> Tensor:
        """The weighted sum minus the cosine."""
        r = self.preference.of(self.present(losses, indices)).to(losses)
        losses = inside(losses, losses >= 0)
        # The cosine of the losses over their largest one, whose squares stay in range.
        largest = losses.detach().amax()
        scaled = torch.where(largest == 0, 1.0, losses / torch.where(largest == 0, 1.0, largest))
        cosine: Tensor = (r * scaled).sum() / (torch.linalg.vector_norm(r) * torch.linalg.vector_norm(scaled))
        return (r * losses).sum() - self.penalty * cosine
