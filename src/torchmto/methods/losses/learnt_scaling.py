"""Loss weightings that learn one scale per task."""

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from torchmto.methods import Domain, LossWeighting, hyper, states
from torchmto.methods.losses.learnable import LearnableScales
from torchmto.step import Losses, StepContext


class LearntScaling(LossWeighting):
    """A sum of losses weighted by learnable scales, plus a penalty on the scales.

    The scales belong to the method: they have an Adam of their own, are updated after each step from the step's losses, and
    are saved in its state. An absent task's scale stays, and so does that of a task whose loss isn't positive: it has no
    optimum, and would move without bound.

    Args:
        lr: Adam's learning rate for the scales.
        initial: Initial value of every scale.
    """

    fixed = True
    recorded = {"scales": "scales.values"}
    domain = Domain(
        corners="A loss that isn't positive leaves its task's scale as it is: no scale would be the best one."
    )
    lr: float = hyper.number(0.025, above=0)
    initial: float = hyper.number(0.0)
    # One scale per task.
    scales: LearnableScales = states.made(lambda own, k: LearnableScales(k, lr=own.lr, initial=own.initial))

    def objective(self, losses: Tensor, indices: Sequence[int] | None = None) -> Tensor:
        """The weighted losses plus the scales' penalty."""
        chosen = self.present(losses, indices)
        return self.penalised(losses, self.scales.of(chosen).to(losses)).sum()

    def loss_weights(self, losses: Tensor, indices: Sequence[int] | None = None) -> Tensor:
        """The objective's gradient, written out."""
        chosen = self.present(losses, indices)
        return self.factors(self.scales.of(chosen).to(losses))

    def after_step(self, losses: Losses, context: StepContext) -> None:
        """One step of Adam on the scales, along the objective's derivative."""
        values = losses.values.to("cpu", torch.float64)
        positive = [value > 0 for value in values.tolist()]
        chosen = [index for index, good in zip(losses.indices, positive, strict=True) if good]
        if chosen:
            # Picking all of them by a list would take longer than the rest.
            values = values if len(chosen) == len(values) else values[positive]
            self.scales.step(self.slope(values, self.scales.of(chosen)), chosen)

    @abstractmethod
    def penalised(self, losses: Tensor, scales: Tensor) -> Tensor:
        """Each task's term of the objective, [k]."""

    @abstractmethod
    def factors(self, scales: Tensor) -> Tensor:
        """The derivative of each term by its loss, [k]."""

    @abstractmethod
    def slope(self, losses: Tensor, scales: Tensor) -> Tensor:
        """The derivative of each term by its scale, [k]."""
