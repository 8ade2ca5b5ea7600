"""IMTL-L: impartial scaling of the losses."""

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


@register("imtl_l")
class IMTLL(LossWeighting):
    r"""Learnt scales that make all scaled losses alike, :math:`\sum_i e^{s_i} l_i - s_i` with learnable :math:`s_i`.

    At the optimum :math:`e^{s_i} l_i = 1`. The scales belong to the method: they have an Adam of their own, are updated
    after each step from the step's losses, and are saved in its state. An absent task's scale stays. Scale: sum, with
    weights :math:`e^{s_i}` that start at 1. Heads: times the task's weight.

    Args:
        lr: Adam's learning rate for the scales. The paper learns them with the model's optimizer; 0.025 is ours.
        initial: Initial value of every scale.

    Source: Liu et al., Towards Impartial Multi-Task Learning, ICLR 2021, Eq. 6 with a = e, b = 1.

    Example:
        >>> import torch, torchmto
        >>> torchmto.make_method("imtl_l").objective(torch.tensor([1.0, 4.0]))
        tensor(5.)
    """

    source = "Liu et al., ICLR 2021, Eq. 6"
    use = "Losses on different scales, with learnable scales and one backward."
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
        """The scaled losses minus the scales."""
        chosen = self.present(losses, indices)
        scales = self.scales.of(chosen).to(losses)
        return (losses * scales.exp() - scales).sum()

    @torch.no_grad()
    def after_step(self, losses: Losses, problem: Problem) -> None:
        """One step of Adam on the scales, along the objective's derivative l exp(s) - 1."""
        values = losses.values.to("cpu", torch.float64)
        self.scales.step(values * self.scales.of(losses.indices).exp() - 1, losses.indices)

    def records(self) -> Mapping[str, Any]:
        """The scales after the step."""
        return {"scales": by_task(self, self.scales.values)}
