"""SON-GOKU: conflicting tasks take turns, in groups from a colouring of the conflict graph."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from torchmto.gradients.rows import gramian
from torchmto.methods import Cost, Procedure, Properties, hyper, register_method, states
from torchmto.methods.combine.columns import averaged, fitted, spans
from torchmto.solvers.unit import rounding_error
from torchmto.step import StepContext, StepInfo, TaskGradients


def colour_conflicts(gramian: Tensor, threshold: float = 0.0, *, precision: float | None = None) -> list[list[int]]:
    """Groups without conflict by greedy colouring (Welsh-Powell) of the conflict graph.

    Two tasks conflict if the cosine of their gradients is below minus the threshold by more than its rounding error.
    Tasks are coloured in the order of falling number of conflicts, ties by index, each with the first colour that no
    conflicting task has.

    Args:
        gramian: Inner products of the tasks' gradients, [K, K].
        threshold: In [0, 1].
        precision: The gradients' machine precision; default that of the Gramian's type.

    Returns:
        Groups of task indices, ascending in each group, one group per colour.

    Example:
        >>> colour_conflicts(torch.tensor([[1.0, -0.5, 0.2], [-0.5, 1.0, 0.3], [0.2, 0.3, 1.0]]))
        [[0, 2], [1]]
    """
    norms = gramian.diagonal().clamp_min(0).sqrt()
    rounding = rounding_error(torch.finfo(gramian.dtype).eps if precision is None else precision)
    conflicts = gramian < -(threshold + rounding) * torch.outer(norms, norms)
    conflicts.fill_diagonal_(fill_value=False)
    table = conflicts.tolist()
    order = sorted(range(len(table)), key=lambda task: -sum(table[task]))
    groups: list[list[int]] = []
    for task in order:
        free = next((group for group in groups if not any(table[task][other] for other in group)), None)
        if free is None:
            groups.append([task])
        else:
            free.append(task)
    return [sorted(group) for group in groups]


@register_method("son_goku")
class SonGoku(Procedure):
    r"""Graph colouring of tasks: only one group of tasks that don't conflict is trained per step.

    The tasks' gradients are tracked by :math:`\tilde g_i \leftarrow \beta \tilde g_i + (1 - \beta) g_i`. Every
    ``refresh_every`` steps (and in the first) a graph is drawn with an edge where :math:`-\cos(\tilde g_i, \tilde
    g_j) > \tau`, and coloured greedily. The groups of one colour take turns, one per step, beginning with that of the task
    that has waited longest: so none waits for more than K steps, however often the groups change. The update is the plain
    sum of the group's gradients; parameters that the group doesn't reach, or where its gradient is zero, have
    ``.grad = None`` and don't move. Tasks that aren't in the batch wait on.

    Read from the paper's abstract and summaries: interference, tracking, periodic greedy colouring and one group per
    step are the paper's; the defaults, the order of the turns and no warm-up are our choices. All K gradients are
    computed in every step, to track them. Scale: sum over the group. Memory: one more K x P matrix. Heads: their own
    task's gradient. Not random.

    Args:
        beta: Share of the past in the tracked gradients, in [0, 1).
        tau: The threshold :math:`\tau`, in [0, 1].
        refresh_every: Steps between colourings.

    Source: Patapati & Srinivasan, Graph Coloring for Multi-Task Learning, 2025 (arXiv 2509.16959).
    """

    use = "Many tasks of which only some conflict: trains compatible sets in turn."
    properties = Properties(equivariant=False, pareto=False)
    whole_rows = "tracks the rows in its state"
    needs_closure = False
    beta: float = hyper.number(0.9, minimum=0, below=1, search=("linear", 0.5, 0.99))
    tau: float = hyper.number(0.0, minimum=0, maximum=1, search=("linear", 0.0, 0.5))
    refresh_every: int = hyper.integer(50, minimum=1)
    # Tracked gradients, the groups, and the step in which each task has had its last turn.
    tracked: Tensor = states.rows()
    groups: list[list[int]] = states.made(lambda *_: [])
    turns: Tensor = states.each(0, torch.int64)
    num_steps: int = states.count()

    def cost(self, num_tasks: int) -> Cost:
        """K backwards: the gradients of the waiting tasks are tracked as well."""
        return Cost(1, num_tasks, 1)

    def no_backward(self, num_sources: int) -> str:
        """One step from one forward."""
        return ""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a saved state; older ones only say which group is next, and all tasks begin anew."""
        known = {name: value for name, value in state.items() if name != "turn"}
        super().load_state_dict({"turns": torch.zeros(self.num_tasks, dtype=torch.int64), **known})

    def step(self, context: StepContext) -> StepInfo:
        """Track all gradients; update by those of one group."""
        gradients = context.gradients()
        present = gradients.indices
        with torch.no_grad():
            self.tracked = fitted(self.tracked, self.num_tasks, gradients.matrix)
        if self.num_steps % self.refresh_every == 0:
            moved = (self._moved(gradients, span) for span, _ in spans(gradients))
            start = torch.zeros(self.num_tasks, self.num_tasks, dtype=torch.float64)
            self.groups = colour_conflicts(sum(map(gramian, moved), start), self.tau, precision=gradients.precision)
        self.num_steps += 1
        # By groups, as those that have waited alike go in their order.
        waiting = [task for group in self.groups for task in group if task in present]
        longest = min(waiting, key=lambda task: int(self.turns[task]))
        active = next([task for task in present if task in group] for group in self.groups if longest in group)
        self.turns[active] = self.num_steps
        weights = torch.tensor([float(task in active) for task in present], dtype=torch.float64)
        for key, (parameter, held) in list(gradients.heads.items()):
            gradients.heads[key] = (parameter, {task: g for task, g in held.items() if task in active})
        # Beside the rows, which are needed once more.
        vector = torch.mv(gradients.matrix.T, weights.to(gradients.matrix))
        context.combine(gradients, weights, vector=vector)
        # What only waiting tasks reach has zeros now, and optimizers with moments would move it.
        for parameter in gradients.parameters:
            if parameter.grad is not None and not bool(parameter.grad.any()):
                parameter.grad = None
        context.apply()
        for span, _ in spans(gradients):
            self.tracked[:, span] = self._moved(gradients, span)
        names = context.tasks
        return context.info(
            weights=weights,
            indices=present,
            gradients=gradients,
            records={
                "groups": [[names[task] for task in entry] for entry in self.groups],
                "active": [names[task] for task in active],
            },
        )

    def _moved(self, gradients: TaskGradients, piece: slice) -> Tensor:
        """Some columns of the tracked gradients after this step."""
        return averaged(self.tracked, gradients.matrix, gradients.indices, self.beta, piece)
