"""Fixed weights given by the user."""

from torch import Tensor

from torchmto.methods import Indices, LossWeighting, Properties, hyper, register_method
from torchmto.methods.per_task import PerTask, TaskFloats


@register_method("static")
class Static(LossWeighting):
    r"""The weighted sum :math:`\sum_i w_i l_i` with constant weights.

    Scale: sum, the weights are used as they are given. Heads: times the task's weight, as the sum says.

    Args:
        weights: Task -> non-negative weight, or a sequence in the order of the tasks.

    Raises:
        ValueError: If a weight is negative or not finite, or (when the tasks are known) a task has none.

    Source: constant weights, tuned by hand or by search.

    Example:
        >>> import torch, torchmto
        >>> torchmto.make_method("static", weights=[1.0, 10.0]).objective(torch.tensor([2.0, 3.0]))
        tensor(32.)
    """

    use = "Weights known from a paper or a search."
    properties = Properties(equivariant=False, identity=False)
    fixed = True
    weights: PerTask = hyper.per_task(hyper.REQUIRED, TaskFloats, minimum=0, common=False)

    def objective(self, losses: Tensor, indices: Indices | None = None) -> Tensor:
        """The weighted sum of the losses."""
        return (losses * self.weights.of(range(len(losses)) if indices is None else indices).to(losses)).sum()
