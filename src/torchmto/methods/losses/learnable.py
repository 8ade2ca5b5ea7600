"""Learnable numbers per task, with an optimizer of their own."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

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

    def of(self, indices: Sequence[int]) -> Tensor:
        """The numbers of the tasks ``indices``, [k]."""
        return self.values[self._places(indices)].clone()

    def _places(self, indices: Sequence[int]) -> list[int] | slice:
        """An index for the tasks ``indices``; a slice, which is quicker, for all of them."""
        places = list(indices)
        return slice(None) if places == list(range(len(self.values))) else places

    def step(self, gradient: Tensor, indices: Sequence[int]) -> None:
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

    def assign(self, values: Tensor, indices: Sequence[int]) -> None:
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
