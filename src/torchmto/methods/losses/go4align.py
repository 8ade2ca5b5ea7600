"""GO4Align: group optimisation for multi-task alignment."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchmto.methods import Domain, Indices, LossWeighting, Properties, hyper, register_method, states
from torchmto.step import Losses, StepContext

LEAST = 1e-6
"""Smallest share: from 0 no factor brings it back."""


def group_means(values: Tensor, num_groups: int) -> Tensor:
    """Split numbers into groups of least squared deviation (k-means, exact in one dimension); each one's group mean.

    Args:
        values: Numbers, [K].
        num_groups: How many groups; with fewer numbers than groups each is its own.

    Returns:
        The mean of every number's group, float64 [K].

    Example:
        >>> import torch
        >>> group_means(torch.tensor([1.0, 8.0, 2.0, 10.0]), 2).tolist()
        [1.5, 9.0, 1.5, 9.0]
    """
    order = values.argsort(stable=True)
    x = values[order].to("cpu", torch.float64).numpy()
    size = len(x)
    if size <= num_groups:
        return values.to("cpu", torch.float64)
    sums = np.concatenate([[0.0], np.cumsum(x - x.mean())])
    squares = np.concatenate([[0.0], np.cumsum((x - x.mean()) ** 2)])
    # best[e]: least cost of the first e numbers in the groups so far; the last group starts at starts[-1][e].
    best = np.where(np.arange(size + 1) == 0, 0.0, np.inf)
    starts: list[np.ndarray[Any, np.dtype[np.intp]]] = []
    for _ in range(num_groups):
        start, end = np.arange(size + 1)[:, None], np.arange(size + 1)[None, :]
        length = np.maximum(end - start, 1)
        cost = squares[end] - squares[start] - (sums[end] - sums[start]) ** 2 / length
        total = np.where(end > start, best[:, None] + cost, np.inf)
        starts.append(total.argmin(axis=0))
        best = total.min(axis=0)
    means = torch.empty(size, dtype=torch.float64)
    end_of_group = size
    for column in reversed(starts):
        begin = int(column[end_of_group])
        means[order[begin:end_of_group].cpu()] = float(x[begin:end_of_group].mean())
        end_of_group = begin
    return means


@register_method("go4align")
class GO4Align(LossWeighting):
    r"""Tasks at a similar stage share a weight, which aligns their progress: :math:`\sum_i w_i l_i`.

    A task's indicator is :math:`\nu_i = q_i \sum_j l_j / l_i`, where the first factor remembers past risks, :math:`q_i
    \leftarrow q_i e^{-\eta l_i}`, normalised to sum 1. The indicators are clustered by k-means into groups, and a
    task's weight is the mean indicator of its group. The weights are constants in the derivative. The share of present
    tasks in q is renormalised; absent tasks keep theirs. Scale: equal losses have weight 1. Heads: times the task's
    weight. Deviation: one-dimensional k-means is solved exactly, so the groups don't depend on a random start, and
    no share of the present tasks falls below 1e-6. Losses must be positive. Not random.

    Args:
        num_groups: Number of groups; 1 gives all tasks the mean indicator. The paper tunes it per data set.
        step_size: :math:`\eta`.

    Source: Shen et al., GO4Align: Group Optimization for Multi-Task Alignment, NeurIPS 2024, as in its released code.

    Example:
        >>> import torch, torchmto
        >>> torchmto.make_method("go4align").loss_weights(torch.tensor([1.0, 1.0, 4.0]))
        tensor([2.0002, 2.0002, 0.4999])
    """

    use = "Tasks that learn in step with each other and should share a weight."
    recorded = {"shares": "shares"}
    properties = Properties(homogeneity=None, pareto=False)
    domain = Domain("0", corners="No share falls below 1e-6, from where a task can come back.")
    num_groups: int = hyper.integer(2, minimum=1)
    step_size: float = hyper.number(1e-4, minimum=0, search=("log", 1e-3, 1.0))
    # The shares q.
    shares: Tensor = states.shares()

    def _updated(self, losses: Tensor, chosen: Indices) -> Tensor:
        """The shares of the present tasks after these losses, summing to 1."""
        logarithm = self.shares[list(chosen)].log() - self.step_size * losses.detach().to("cpu", torch.float64)
        shares = logarithm.softmax(0).clamp_min(LEAST)
        return shares / shares.sum()

    def objective(self, losses: Tensor, indices: Indices | None = None) -> Tensor:
        """The sum of the losses times their groups' weights."""
        chosen = self.present(losses, indices)
        values = losses.detach().to("cpu", torch.float64)
        indicators = self._updated(losses, chosen) * (values.sum() / values)
        indicators = torch.where(values > 0, indicators, torch.nan)
        if bool(indicators.isfinite().all()):
            indicators = group_means(indicators, self.num_groups)
        return (indicators.to(losses) * losses).sum()

    def after_step(self, losses: Losses, context: StepContext) -> None:
        """Keep the shares."""
        chosen = list(losses.indices)
        self.shares[chosen] = self._updated(losses.values, chosen) * self.shares[chosen].sum()
