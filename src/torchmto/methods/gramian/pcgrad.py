"""PCGrad: gradients projected off those they conflict with."""

import numpy as np
import torch
from torch import Tensor

from torchmto import solvers
from torchmto.methods import GramianWeighting, Indices, Properties, hyper, register_method
from torchmto.solvers.projection import Order


def random_orders(num_tasks: int, generator: torch.Generator) -> Order:
    """For every task the others in a random order, [K, K - 1]."""
    # In NumPy, whose calls are shorter: a few numbers are no work. Of one type, whatever PyTorch makes by default.
    drawn = torch.rand(num_tasks, num_tasks, generator=generator, dtype=torch.float32)
    order = drawn.numpy().argsort(axis=1, kind="stable")
    others: Order = order[order != np.arange(num_tasks)[:, None]]
    return others.reshape(num_tasks, num_tasks - 1)


@register_method("pcgrad")
class PCGrad(GramianWeighting):
    r"""Projecting conflicting gradients.

    For every task i, the other tasks j in a random order of i's own: if :math:`\langle g_i', g_j \rangle < 0`, then
    :math:`g_i' \leftarrow g_i' - \langle g_i', g_j \rangle / \|g_j\|^2 \, g_j`, with the *original* :math:`g_j`. The update
    is :math:`\sum_i g_i'`. Computed on K x K coefficients.

    Scale: sum. No eps, no self-projection (LibMTL has both). Heads: their own task's gradient. Random: one order per task
    and step, from :attr:`generator`.

    Args:
        shuffle: Draw the orders at random, as in the paper; else go through the tasks in their given order.
        **options: ``heads``, ``refresh_every``.

    Source: Yu et al., Gradient Surgery for Multi-Task Learning, NeurIPS 2020, Algorithm 1.

    Example:
        >>> import torch, torchmto
        >>> torchmto.make_method("pcgrad").weights(torch.tensor([[1.0, -1.0], [-1.0, 4.0]]))
        tensor([2.0000, 1.2500])
    """

    use = "The standard gradient surgery; a baseline whenever gradients conflict."
    properties = Properties(equivariant=False)
    shuffle: bool = hyper.flag(True)

    def weights(self, gramian: Tensor, losses: Tensor | None = None, indices: Indices | None = None) -> Tensor:
        """Column sums of the projected gradients' coefficients, [k]."""
        orders = random_orders(len(gramian), self.generator) if self.shuffle else None
        return self.accept(solvers.pcgrad(self.as_array(gramian), orders), gramian)
