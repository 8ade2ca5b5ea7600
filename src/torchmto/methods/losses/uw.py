"""Uncertainty weighting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from torchmto.checks import check_number
from torchmto.methods.losses.learnable import LearnableScales
from torchmto.methods.losses.per_task import by_task
from torchmto.methods.method import LossWeighting, Properties
from torchmto.methods.registry import register
from torchmto.problem import Losses, Problem


@register("uw")
class UW(LossWeighting):
    r"""Weights by learnt task uncertainty, :math:`\sum_i \frac{l_i}{2 e^{s_i}} + \frac{s_i}{2}`, :math:`s_i` learnable.

    :math:`s_i` is the logarithm of the task's observation variance; at its optimum :math:`e^{s_i} = l_i`. The scales
    belong to the method: they have an Adam of their own, are updated after each step from the step's losses, and are
    saved in its state. An absent task's scale stays. Scale: sum, but the weights :math:`e^{-s_i} / 2` start at 1/2.
    Heads: times the task's weight.

    Args:
        lr: Adam's learning rate for the scales. The paper doesn't state one; 0.025 as in the released code of Nash-MTL.
        initial: Initial value of every scale.

    Source: Kendall et al., Multi-Task Learning Using Uncertainty to Weigh Losses, CVPR 2018, Eq. 7. The released code
    of Nash-MTL has this form; some codes use :math:`e^{-s} l + s` for some tasks.

    Example:
        >>> import torch, torchmto
        >>> torchmto.make_method("uw").loss_weights(torch.tensor([1.0, 4.0]))
        tensor([0.5000, 0.5000])
    """

    source = "Kendall et al., CVPR 2018, Eq. 7"
    use = "Losses on different scales; the most used learnable weighting."
    properties = Properties(homogeneity=None, identity=False, pareto=False)
    fixed = True
    scales: LearnableScales

    def __init__(self, *, lr: float = 0.025, initial: float = 0.0) -> None:
        super().__init__()
        self.lr = check_number("lr", lr, above=0)
        self.initial = check_number("initial", initial)

    def setup(self, num_tasks: int) -> None:
        """One scale per task."""
        self.add_state("scales", LearnableScales(num_tasks, lr=self.lr, initial=self.initial))

    def objective(self, losses: Tensor, indices: Sequence[int] | None = None) -> Tensor:
        """The weighted losses plus the scales' penalty."""
        chosen = self.present(losses, indices)
        scales = self.scales.of(chosen).to(losses)
        return (losses * (-scales).exp() / 2 + scales / 2).sum()

    @torch.no_grad()
    def after_step(self, losses: Losses, problem: Problem) -> None:
        """One step of Adam on the scales, along the objective's derivative (1 - l exp(-s)) / 2."""
        values = losses.values.to("cpu", torch.float64)
        self.scales.step((1 - values * (-self.scales.of(losses.indices)).exp()) / 2, losses.indices)

    def records(self) -> Mapping[str, Any]:
        """The scales after the step."""
        return {"scales": by_task(self, self.scales.values)}
