"""ExcessMTL: weights by estimated excess risks."""

import torch
from torch import Tensor

from torchmto.methods import Domain, Indices, Method, hyper, register_method, states
from torchmto.methods.combine.columns import fitted
from torchmto.step import StepContext, StepInfo, TaskGradients

LEAST = 1e-6
"""Smallest share of a weight in their sum: from 0 no factor brings it back."""


@register_method("excess_mtl")
class ExcessMTL(Method):
    r"""Tasks far from their optimum weigh more; label noise, which no training removes, doesn't count.

    The distance of a task to its optimum (its excess risk) is estimated as :math:`e_i = g_i^\top
    \mathrm{diag}(\sum_{steps} g_i^2)^{-1/2} g_i`, relative to its first positive value. In every step after that one its
    weight is multiplied by :math:`\exp(\eta\, e_i / e_i(0))`, and the weights are rescaled to sum K; then the step uses
    them. Entries of absent tasks stay, and the present tasks' weights keep their sum.

    A loss weighting, but it needs the K gradients: K backwards per step, and a K x P state with the sums of squared
    gradients on the shared parameters. Scale: sum; the update's weights sum to the number of present tasks. Heads:
    times the task's weight by default. Deviation: no epsilon in the denominator; entries whose gradient has always been
    zero count as zero; a weight's share of the sum doesn't fall below
    1e-6. A gradient whose squares overflow makes the step non-finite.

    Args:
        step_size: :math:`\eta`.
        heads: "weighted": heads get their gradient times the task's weight; "unit": without it.

    Source: He et al., Robust Multi-Task Learning with Excess Risks, ICML 2024, Algorithm 1.
    """

    family = "combiner"
    use = "Noisy labels in some tasks, which loss-based weightings would over-weight."
    whole_rows = "sums the squares of the rows in its state"
    domain = Domain(corners="No weight falls below 1e-6 of the sum, from where a task can come back.")
    step_size: float = hyper.number(1e-2, minimum=0, search=("log", 1e-3, 1e-1))
    heads: str = hyper.choice("weighted", "unit")
    # Weights, first positive excess risks (NaN: none yet), and sums of squared gradients (sized in the first step).
    weights: Tensor = states.each(1.0)
    first: Tensor = states.each(torch.nan)
    squares: Tensor = states.rows()

    @torch.no_grad()
    def _excess(self, gradients: TaskGradients) -> Tensor:
        """The estimated excess risks of the present tasks, float64 [k]."""
        matrix = gradients.matrix
        self.squares = squares = fitted(self.squares, self.num_tasks, matrix)
        excess = []
        for row, task in zip(matrix, gradients.indices, strict=True):
            square = row.square()
            # In this order nothing overflows that the gradient's square doesn't.
            excess.append(torch.where(square > 0, square * (squares[task] + square).rsqrt(), 0.0).sum())
        return torch.stack(excess).to("cpu", torch.float64)

    def _update(self, chosen: Indices, excess: Tensor) -> Tensor:
        """Multiply the weights; the present tasks' weights in the update, [k], summing to k."""
        where = list(chosen)
        relative = excess / self.first[where]
        # A task's first step with a gradient only sets its scale; to one next to nothing there is no ratio.
        relative = torch.where(relative.isfinite(), relative, 0.0)
        self.first[where] = torch.where(self.first[where].isnan() & (excess > 0), excess, self.first[where])
        before = self.weights[where]
        moved = (before.log() + self.step_size * relative).softmax(0).clamp_min(LEAST)
        moved = moved / moved.sum()
        if bool((relative != 0).any()):
            self.weights[where] = moved * before.sum()
        weights = self.weights[where]
        return weights * (len(where) / weights.sum())

    def _check(self, context: StepContext, gradients: TaskGradients) -> None:
        """Leave out gradients whose squares overflow, before they are added: an infinite sum would stay for good."""
        largest = torch.finfo(gradients.matrix.dtype).max
        sums = self.squares.sum(1).tolist()
        for task, square in zip(gradients.indices, gradients.gramian.diagonal().tolist(), strict=True):
            # The norm's square is at least that of every entry, and so is its sum over the steps.
            if sums[task] + square > largest:
                context.fail(gradients, f"The squares of the gradient of task `{context.tasks[task]}` overflow.")

    def step(self, context: StepContext) -> StepInfo:
        """Per-task gradients, new weights, one combined step."""
        gradients = context.gradients()
        self._check(context, gradients)
        weights = self._update(gradients.indices, self._excess(gradients))
        # Beside the rows, which are needed once more.
        vector = torch.mv(gradients.matrix.T, weights.to(gradients.matrix))
        context.combine(gradients, weights, vector=vector, heads=self.heads)
        context.apply()
        for row, task in zip(gradients.matrix, gradients.indices, strict=True):
            self.squares[task].addcmul_(row, row)
        return context.info(weights=weights, indices=gradients.indices, gradients=gradients)
