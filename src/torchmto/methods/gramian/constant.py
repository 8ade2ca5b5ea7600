"""Fixed weights of the gradients."""

from torch import Tensor

from torchmto.methods import GramianWeighting, Indices, Properties, hyper, register_method
from torchmto.methods.per_task import PerTask, TaskFloats


@register_method("constant")
class Constant(GramianWeighting):
    r"""The update :math:`\sum_i w_i g_i` with fixed weights.

    Costs K backwards, so that conflicts are reported and the heads can do without the weights; ``static`` gives the
    same update of the shared parameters for one backward, with weighted heads.

    Scale: the weights are used as they are given. Heads: their own task's gradient. Not random.

    Args:
        weights: Task -> non-negative weight, or a sequence in the order of the tasks.
        **options: ``heads``, ``refresh_every``.

    Raises:
        ValueError: If a weight is negative or not finite, or (when the tasks are known) a task has none.

    Source: constant weights.

    Example:
        >>> import torch, torchmto
        >>> torchmto.make_method("constant", weights=[1.0, 10.0]).weights(torch.eye(2))
        tensor([ 1., 10.])
    """

    use = "Known trade-offs; a control for methods that adapt."
    properties = Properties(equivariant=False, identity=False)
    given: PerTask = hyper.called("weights", hyper.per_task(hyper.REQUIRED, TaskFloats, minimum=0, common=False))

    def weights(self, gramian: Tensor, losses: Tensor | None = None, indices: Indices | None = None) -> Tensor:
        """The present tasks' weights, [k]."""
        return self.given.of(range(len(gramian)) if indices is None else indices).to(gramian)
