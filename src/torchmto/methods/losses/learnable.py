"""Learnable numbers per task, with an optimizer of their own; loss weightings of one scale per task."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchmto.methods import Domain, Indices, LossWeighting, hyper, states
from torchmto.step import Losses, StepContext

BETAS = (0.9, 0.999)
EPS = 1e-8


class LearnableScales:
    """One learnable number per task, moved by Adam.

    They belong to the method and not to the model: the model's optimizer would apply its weight decay to them. Adam is
    written out for one reason: ``torch.optim.Adam`` moves the entries of a vector whose gradient is zero, while here the
    numbers, moments and step counts of absent tasks stay as they are. With all tasks present both agree. The numbers
    live on the CPU in float64; a step transfers K of them.

    Args:
        num_tasks: K.
        lr: Adam's learning rate; betas 0.9 and 0.999, eps 1e-8.
        initial: Initial value of all numbers.
        weight_decay: Times the number, added to its gradient.

    Example:
        >>> import torch
        >>> scales = LearnableScales(3, lr=0.1)
        >>> scales.step(torch.tensor([2.0, -5.0]), indices=(0, 2))
        >>> scales.values
        tensor([-0.1000,  0.0000,  0.1000], dtype=torch.float64)
    """

    def __init__(self, num_tasks: int, *, lr: float, initial: float = 0.0, weight_decay: float = 0.0) -> None:
        self.lr = lr
        self.weight_decay = weight_decay
        names = "values", "means", "squares", "steps"
        self._kept = {name: torch.zeros(num_tasks, dtype=torch.float64) for name in names}
        self.values = self._kept["values"].fill_(initial)

    def of(self, indices: Indices) -> Tensor:
        """The numbers of the tasks ``indices``, [k]."""
        return self.values[self._places(indices)].clone()

    def _places(self, indices: Indices) -> list[int] | slice:
        """An index for the tasks ``indices``; a slice, which is quicker, for all of them."""
        places = list(indices)
        return slice(None) if places == list(range(len(self.values))) else places

    def step(self, gradient: Tensor, indices: Indices) -> None:
        """One step of Adam for the tasks ``indices`` along ``gradient`` [k]."""
        # In NumPy, on the tensors' own memory: a few numbers are no work, and its calls are shorter than PyTorch's.
        where = self._places(indices)
        values, means, squares, steps = (tensor.numpy() for tensor in self._kept.values())
        own, count = values[where], steps[where] + 1
        slope = gradient.detach().to("cpu", torch.float64).numpy() + self.weight_decay * own
        mean, square = means[where], squares[where]
        mean = mean + (slope - mean) * (1 - BETAS[0])
        square = square + (slope * slope - square) * (1 - BETAS[1])
        size = np.sqrt(square / (1 - BETAS[1] ** count)) + EPS
        values[where] = own - self.lr * mean / (1 - BETAS[0] ** count) / size
        means[where], squares[where], steps[where] = mean, square, count

    def assign(self, values: Tensor, indices: Indices) -> None:
        """Set the numbers of the tasks ``indices``; the moments stay."""
        self.values[list(indices)] = values

    def state_dict(self) -> dict[str, Any]:
        """The numbers and Adam's state: the tensors themselves, as in an optimizer's, which whoever keeps them copies."""
        return {**self._kept}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a saved state.

        Raises:
            ValueError: If it has another number of tasks.
        """
        if len(state["values"]) != len(self.values):
            raise ValueError(
                f"The saved state has {len(state['values'])} scales, but there are {len(self.values)} tasks."
            )
        for name, tensor in self._kept.items():
            tensor.copy_(state[name])


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
    lr: float = hyper.number(0.025, above=0, search=("log", 1e-3, 1e-1))
    initial: float = hyper.number(0.0)
    # One scale per task.
    scales: LearnableScales = states.made(lambda own, k: LearnableScales(k, lr=own.lr, initial=own.initial))

    def objective(self, losses: Tensor, indices: Indices | None = None) -> Tensor:
        """The weighted losses plus the scales' penalty."""
        chosen = self.present(losses, indices)
        return self.penalised(losses, self.scales.of(chosen).to(losses)).sum()

    def loss_weights(self, losses: Tensor, indices: Indices | None = None) -> Tensor:
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
