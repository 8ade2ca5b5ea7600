"""Gradients at perturbed parameters, one task at a time, and what combines them."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from torchmto.checks import found
from torchmto.gradients.finite import real
from torchmto.gradients.rows import gramian
from torchmto.methods import GramianWeighting, Procedure, hyper
from torchmto.methods.registry import weighing_method
from torchmto.step import Losses, StepContext, TaskGradients

Pairs = list[tuple[Tensor, Tensor]]
"""Parameters, each with a tensor of its shape (pairs of reals for a complex one)."""


def inner_method(default: str) -> Any:
    """A hyper-parameter: what combines the gradients."""

    def check(name: str, given: Any) -> GramianWeighting:
        made = weighing_method(name, given)
        if made.refresh_every > 1 or made.heads != "unit":
            raise ValueError(found(name, "a Gramian method with refresh_every=1 and heads='unit'", given))
        return made

    return hyper.given(default, check, str | GramianWeighting)


class SharpnessAware(Procedure):
    """Base of the methods that take every task's gradient at parameters perturbed for that task.

    The shared parameters and the task's head are moved by ``rho`` each, along gradients or what stands for them; after the
    task's backward they are put back. The tasks' shared gradients are combined by another method's weights.

    Args:
        rho: Length of the perturbation.
        adaptive: Lengths relative to the parameters' own sizes (ASAM).
        inner: A Gramian method, by name or as an object.
    """

    whole_rows = "moves parameters along whole rows"
    rho: float
    adaptive: bool = hyper.flag(False)
    inner: GramianWeighting

    def __post_init__(self) -> None:
        """The inner method is a state."""
        self.add_state("inner", self.inner)

    def records(self) -> Mapping[str, Any]:
        """What the inner method records."""
        return self.inner.records()

    @torch.no_grad()
    def shifts(self, directions: Pairs) -> Pairs:
        """A step of length ``rho`` along the directions taken together; none where they vanish or aren't finite."""
        if self.adaptive:
            directions = [(p, real(p.detach()).abs() * d) for p, d in directions]
        norm = torch.nn.utils.get_total_norm([d for _, d in directions])
        if not bool(norm > 0) or not bool(norm.isfinite()):
            return []
        scaled = [(p, d * (self.rho / norm).to(d)) for p, d in directions]
        return [(p, real(p.detach()).abs() * d) for p, d in scaled] if self.adaptive else scaled

    def perturbed(
        self, context: StepContext, losses: Losses, shifts_of: Callable[[int], Pairs]
    ) -> tuple[TaskGradients, Tensor]:
        """One forward and backward of every present task, each at its own place.

        Args:
            context: The step.
            losses: Those of the forward before, of the present tasks.
            shifts_of: Task -> how its parameters are moved.

        Returns:
            The gradients, and their rows [k, P]: those that the former would show are the last task's.
        """
        rows: list[tuple[Tensor, list[int]]] = []
        heads: dict[int, tuple[Tensor, dict[int, Tensor]]] = {}
        for task in losses.indices:
            with context.moved(shifts_of(task)):
                one = context.gradients([context.tasks[task]])
            # The memory of the rows is the next task's.
            rows.append((one.matrix[0].clone(), one.rows.reached()))
            for key, (parameter, held) in one.heads.items():
                heads.setdefault(key, (parameter, {}))[1].update(held)
        width = len(rows[-1][0])
        matrix = torch.stack([torch.nn.functional.pad(row, (0, width - len(row))) for row, _ in rows])
        one.rows.fill({position for _, reached in rows for position in reached})
        return TaskGradients(one.rows, losses, gramian(matrix), heads, losses, precision=one.precision), matrix
