"""GradVac: gradients turned towards each other until they are as similar as they usually are."""

import torch
from torch import Tensor

from torchmto import solvers
from torchmto.checks import found
from torchmto.gradients.rows import gramian as gramian_of_rows
from torchmto.methods import GramianWeighting, Indices, Properties, hyper, register_method
from torchmto.methods.gramian.pcgrad import random_orders
from torchmto.solvers.projection import Order
from torchmto.step import Network, StepContext, TaskGradients


@register_method("gradvac")
class GradVac(GramianWeighting):
    r"""Gradient vaccine: PCGrad towards a running mean of the cosines instead of towards 0.

    For every task i, the other tasks j in a random order of i's own, with c the cosine of :math:`g_i'` and the
    *original* :math:`g_j`: if :math:`c < \hat\rho_{ij}`, then :math:`g_i' \leftarrow g_i' + g_j \|g_i'\| (\hat\rho
    \sqrt{1 - c^2} - c \sqrt{1 - \hat\rho^2}) / (\|g_j\| \sqrt{1 - \hat\rho^2})`; in any case :math:`\hat\rho_{ij}
    \leftarrow (1 - \beta) \hat\rho_{ij} + \beta c`. The targets start at 0 and are state. The update is :math:`\sum_i
    g_i'`.

    Scale: sum. No eps. Heads: their own task's gradient. Random: one order per task and step, from :attr:`generator`.
    LibMTL updates a target only if it was missed, and both public codes have ``beta=0.5``.

    Args:
        beta: Share of a new cosine in its target.
        shuffle: Draw the orders at random, as in the paper; else go through the tasks in their given order.
        groups: The parameters that cosines are taken over, each group with targets of its own: "whole" (all shared
            parameters), "layer" (those of one module) or "matrix" (every parameter tensor by itself), as the paper tries.
            The last two need the rows, heads="unit" and refresh_every=1.
        **options: ``heads``, ``refresh_every``.

    Source: Wang et al., Gradient Vaccine, ICLR 2021, equations 2 and 3, Algorithm 1.

    Example:
        >>> import torch, torchmto
        >>> method = torchmto.make_method("gradvac", beta=0.5)
        >>> method.weights(torch.tensor([[1.0, -1.0], [-1.0, 4.0]])), method.targets[0, 1]
        (tensor([2.0000, 1.2500]), tensor(-0.2500, dtype=torch.float64))
    """

    use = "Related tasks whose gradients should stay as aligned as they usually are."
    properties = Properties(equivariant=False)
    beta: float = hyper.number(0.01, minimum=0, maximum=1, search=("log", 1e-3, 0.5))
    shuffle: bool = hyper.flag(True)
    groups: str = hyper.choice("whole", "layer", "matrix")
    targets: Tensor
    group_targets: dict[str, Tensor]

    def __post_init__(self) -> None:
        """With several groups there is no weight to multiply heads with, or to use again."""
        super().__post_init__()
        if self.groups != "whole" and (self.heads != "unit" or self.refresh_every > 1):
            needed = "'whole' with heads='weighted' or refresh_every > 1, as a task has a weight per group"
            raise ValueError(found("groups", needed, self.groups))

    @property
    def only_weighs(self) -> bool:
        """With several groups no task has a single weight."""
        return self.groups == "whole"

    def setup(self, num_tasks: int) -> None:
        """Cosine targets [K, K], 0 at first; per group where there are several."""
        if self.groups == "whole":
            self.add_state("targets", torch.zeros(num_tasks, num_tasks, dtype=torch.float64))
        else:
            self.add_state("group_targets", {})

    def refusal(self, network: Network) -> str:
        """A group's columns may lie on several ranks, or not be kept."""
        if (network.divided or network.engine is not None) and self.groups != "whole":
            return "takes cosines over the columns of each group"
        return super().refusal(network)

    def weights(self, gramian: Tensor, losses: Tensor | None = None, indices: Indices | None = None) -> Tensor:
        """Column sums of the turned gradients' coefficients, [k]. Moves the targets of the present tasks.

        Raises:
            ValueError: If there are several groups: one Gramian says nothing about them.
        """
        if self.groups != "whole":
            raise ValueError(found("groups", "'whole' where the rows aren't known", self.groups))
        self.ensure_setup(len(gramian))
        weights, self.targets = self._turned(gramian, self.targets, self._orders(len(gramian)), indices)
        return weights

    def _orders(self, size: int) -> Order | None:
        return random_orders(size, self.generator) if self.shuffle else None

    def _turned(
        self, gramian: Tensor, targets: Tensor, orders: Order | None, indices: Indices | None
    ) -> tuple[Tensor, Tensor]:
        """The weights [k] for one Gramian, and its targets [K, K] after this step."""
        present = torch.arange(len(gramian)) if indices is None else torch.tensor(list(indices))
        where = (present.unsqueeze(1), present)
        projection, moved = solvers.gradvac(
            self.as_array(gramian),
            targets[where].numpy(),
            orders,
            beta=self.beta,
            precision=self.precision_of(gramian),
        )
        targets = targets.clone()
        targets[where] = torch.from_numpy(moved)
        return self.accept(projection, gramian), targets

    def _combine(self, context: StepContext, gradients: TaskGradients) -> Tensor | None:
        """Returns the weights, None with several groups: there a task has no single one."""
        if self.groups == "whole":
            return super()._combine(context, gradients)
        self._precision = gradients.precision
        matrix, indices = gradients.matrix, gradients.indices
        orders = self._orders(len(matrix))
        vector, targets = torch.zeros_like(matrix[0]), dict(self.group_targets)
        for group, parts in self._columns(context.network, gradients).items():
            gramian = sum((gramian_of_rows(matrix[:, part]) for part in parts), torch.zeros_like(gradients.gramian))
            before = targets.get(group, gramian.new_zeros(self.num_tasks, self.num_tasks))
            weights, targets[group] = self._turned(gramian, before, orders, indices)
            for part in parts:
                torch.mv(matrix[:, part].T, weights.to(matrix), out=vector[part])
        self.group_targets = targets
        self._precision = None
        context.combine(gradients, vector=vector)
        return None

    def _columns(self, network: Network, gradients: TaskGradients) -> dict[str, list[slice]]:
        """The columns of every group, by its name."""
        groups: dict[str, list[slice]] = {}
        for parameter in gradients.parameters:
            name = network.name(parameter)
            key = name.rpartition(".")[0] if self.groups == "layer" else name
            groups.setdefault(key, []).append(gradients.columns(parameter))
        return groups
