"""GradVac: gradients turned towards each other until they are as similar as they usually are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

import torch
from torch import Tensor

from torchmto import solvers
from torchmto.checks import check_flag, check_number
from torchmto.methods.gramian.pcgrad import random_orders
from torchmto.methods.method import GramianWeighting, Properties, WeightingOptions
from torchmto.methods.registry import register_method


@register_method("gradvac")
class GradVac(GramianWeighting):
    r"""Gradient vaccine: PCGrad towards a running mean of the cosines instead of towards 0.

    For every task i, the other tasks j in a random order of i's own, with c the cosine of :math:`g_i'` and the
    *original* :math:`g_j`: if :math:`c < \hat\rho_{ij}`, then :math:`g_i' \leftarrow g_i' + g_j \|g_i'\| (\hat\rho
    \sqrt{1 - c^2} - c \sqrt{1 - \hat\rho^2}) / (\|g_j\| \sqrt{1 - \hat\rho^2})`; in any case :math:`\hat\rho_{ij}
    \leftarrow (1 - \beta) \hat\rho_{ij} + \beta c`. The targets start at 0 and are state. The update is :math:`\sum_i
    g_i'`.

    Scale: sum. One group, the whole of the shared parameters (the paper also tries a group per layer or matrix). No
    eps. Heads: their own task's gradient. Random: one order per task and step, from :attr:`generator`. LibMTL updates
    a target only if it was missed, and both public codes have ``beta=0.5``.

    Args:
        beta: Share of a new cosine in its target.
        shuffle: Draw the orders at random, as in the paper; else go through the tasks in their given order.
        **options: ``heads``, ``refresh_every``.

    Source: Wang et al., Gradient Vaccine, ICLR 2021, equations 2 and 3, Algorithm 1.

    Example:
        >>> import torch, torchmto
        >>> method = torchmto.make_method("gradvac", beta=0.5)
        >>> method.weights(torch.tensor([[1.0, -1.0], [-1.0, 4.0]])), method.targets[0, 1]
        (tensor([2.0000, 1.2500]), tensor(-0.2500, dtype=torch.float64))
    """

    source = "Wang et al., ICLR 2021, equations 2 and 3, Algorithm 1"
    use = "Related tasks whose gradients should stay as aligned as they usually are."
    properties = Properties(equivariant=False)
    targets: Tensor

    def __init__(self, *, beta: float = 0.01, shuffle: bool = True, **options: Unpack[WeightingOptions]) -> None:
        super().__init__(**options)
        self.beta = check_number("beta", beta, minimum=0, maximum=1)
        self.shuffle = check_flag("shuffle", shuffle)

    def setup(self, num_tasks: int) -> None:
        """Cosine targets [K, K], 0 at first."""
        self.add_state("targets", torch.zeros(num_tasks, num_tasks, dtype=torch.float64))

    def weights(self, gramian: Tensor, losses: Tensor | None = None, indices: Sequence[int] | None = None) -> Tensor:
        """Column sums of the turned gradients' coefficients, [k]. Moves the targets of the present tasks."""
        size = len(gramian)
        self.ensure_setup(size)
        present = torch.arange(size) if indices is None else torch.tensor(list(indices))
        where = (present.unsqueeze(1), present)
        orders = random_orders(size, self.generator) if self.shuffle else None
        projection, targets = solvers.gradvac(
            self.as_array(gramian),
            self.targets[where].numpy(),
            orders,
            beta=self.beta,
            precision=self.precision_of(gramian),
        )
        self.targets[where] = torch.from_numpy(targets)
        return self.accept(projection, gramian)
