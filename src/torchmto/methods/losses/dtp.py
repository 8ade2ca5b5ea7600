"""Dynamic task prioritization."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from torchmto.checks import found, unknown_task
from torchmto.methods import Domain, Indices, LossWeighting, Properties, hyper, register_method, states
from torchmto.methods.per_task import PerTask, named

LEAST = 1e-6
"""Smallest performance: its weight would be infinite at 0."""


@register_method("dtp")
class DTP(LossWeighting):
    r"""Harder tasks weigh more: :math:`w_i = -(1 - \kappa_i)^{\gamma_i} \log \kappa_i`, a focal loss of performance.

    :math:`\kappa_i \in [0, 1]` is a moving average of the task's performance (accuracy, mIoU, ...; higher is better),
    told by ``mt.report({task: value})`` after each validation: :math:`\kappa \leftarrow \alpha\,\mathrm{value} + (1 -
    \alpha)\,\kappa`, starting with the first value. A task weighs 1 before its first report, and 0 at performance 1.
    Values below 1e-6 count as 1e-6. Scale: sum. Heads: times the task's weight. Only the weights of tasks: the paper's
    weights of single samples (a focal loss inside a task) belong to the user's loss.

    Args:
        gamma: The focusing exponent: one for all tasks, or one per task (mapping or sequence).
        alpha: Share of a new report in the moving average. The paper doesn't give one; 1 would be the last report
            alone.

    Raises:
        ValueError: From ``mt.report``, if a performance is outside [0, 1].

    Source: Guo et al., Dynamic Task Prioritization for Multitask Learning, ECCV 2018, Section 3.

    Example:
        >>> import torch, torchmto
        >>> method = torchmto.make_method("dtp")
        >>> method.bind(("easy", "hard"))
        >>> method.report({"easy": 0.9, "hard": 0.5})
        >>> method.loss_weights(torch.tensor([1.0, 1.0]))
        tensor([0.0105, 0.3466])
    """

    use = "Tasks with a validation score in (0, 1), where hard tasks should come first."
    takes_shares = True
    properties = Properties(identity=False)
    domain = Domain(corners="Once every task is at performance 1, nothing moves.")
    fixed = True
    gamma: PerTask = hyper.per_task(1.0, minimum=0, search=("linear", 0.0, 2.0))
    alpha: float = hyper.number(0.5, above=0, maximum=1, search=("linear", 0.1, 1.0))
    # The averaged performances; NaN: not reported yet.
    performance: Tensor = states.each(torch.nan)

    def _weights(self, chosen: Indices) -> Tensor:
        kappa = self.performance[list(chosen)]
        focal = -((1 - kappa) ** self.gamma.of(chosen)) * kappa.clamp_min(LEAST).log()
        return torch.where(kappa.isnan(), 1.0, focal)

    def objective(self, losses: Tensor, indices: Indices | None = None) -> Tensor:
        """The weighted sum of the losses."""
        return (self._weights(self.present(losses, indices)).to(losses) * losses).sum()

    def report(self, performance: Mapping[str, float]) -> None:
        """Average in validation results."""
        for name, value in performance.items():
            if name not in self.tasks:
                raise ValueError(unknown_task(name, self.tasks, "in the report"))
            if not 0 <= value <= 1:
                raise ValueError(found(f"performance[{name!r}]", "in [0, 1]: method `dtp` needs shares", value))
        for name, value in performance.items():
            i = self.tasks.index(name)
            old = self.performance[i]
            self.performance[i] = value if old.isnan() else self.alpha * value + (1 - self.alpha) * old

    def records(self) -> Mapping[str, Any]:
        """The averaged performances that have been reported."""
        if not self.num_tasks:
            return {}
        averages = named(self.tasks, self.performance)
        return {"performance": {name: value for name, value in averages.items() if not math.isnan(value)}}
