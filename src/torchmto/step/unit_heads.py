"""Heads' own gradients out of one weighted backward."""

from collections.abc import Mapping

import torch
from torch import Tensor

from torchmto.gradients import dense
from torchmto.step.network import Network


class UnitHeads:
    """Takes the tasks' weights out of the heads' gradients after a weighted backward.

    The weighted sum multiplies a head's gradient by its task's weight; dividing by it gives the task's own gradient back.
    Where that would lose precision (a weight a thousand times smaller than the largest, or zero) or where a parameter
    outside the shared ones belongs to several tasks, its gradient comes from a backward of its own, which only runs
    through the head.
    """

    def __init__(self, network: Network) -> None:
        self._network = network
        self._own: dict[int, tuple[Tensor, Tensor]] = {}

    def _owners(self) -> list[tuple[Tensor, frozenset[int]]]:
        """The parameters outside the shared ones, with the tasks that reach them."""
        roles, name = self._network.roles, self._network.name
        return [(p, roles.tasks_of(name(p))) for p in self._network.parameters if not roles.is_shared(name(p))]

    @staticmethod
    def _divisible(weights: Mapping[int, Tensor]) -> dict[int, float]:
        values = {task: float(weight) for task, weight in weights.items()}
        least = 1e-3 * max(abs(value) for value in values.values())
        return {task: value for task, value in values.items() if abs(value) > least}

    def before(self, losses: Mapping[int, Tensor], weights: Mapping[int, Tensor], seeds: Mapping[int, Tensor]) -> None:
        """Compute, before the weighted backward, the gradients that can't be had by division."""
        divisible = self._divisible(weights)
        apart: dict[int, list[Tensor]] = {}
        for parameter, owners in self._owners():
            for task in owners:
                if len(owners) > 1 or task not in divisible:
                    apart.setdefault(task, []).append(parameter)
        for task, seed in seeds.items():
            wanted = apart.get(task)
            if wanted is None:
                continue
            gradients = torch.autograd.grad(
                losses[task], wanted, torch.ones_like(losses[task]) * seed, retain_graph=True, allow_unused=True
            )
            for parameter, gradient in zip(wanted, gradients, strict=True):
                if gradient is not None:
                    _, before = self._own.get(id(parameter), (parameter, None))
                    own = dense(gradient)
                    self._own[id(parameter)] = parameter, own.clone() if before is None else before + own

    @torch.no_grad()
    def finish(self, weights: Mapping[int, Tensor]) -> None:
        """Replace or divide the heads' gradients."""
        divisible = self._divisible(weights) if weights else {}
        gradients: list[Tensor] = []
        values: list[float] = []
        for parameter, owners in self._owners():
            value = divisible.get(next(iter(owners))) if len(owners) == 1 else None
            if value is not None and parameter.grad is not None and id(parameter) not in self._own:
                gradients.append(parameter.grad)
                values.append(value)
        if gradients:
            torch._foreach_div_(gradients, values)
        for parameter, gradient in self._own.values():
            parameter.grad = gradient
