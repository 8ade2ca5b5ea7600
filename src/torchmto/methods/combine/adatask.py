"""AdaTask: Adam with moments of its own for every task."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from torchmto.gradients.rows import views_of
from torchmto.methods import hyper, register_method, states
from torchmto.methods.combine.adam_rule import AdamRule
from torchmto.methods.combine.columns import counted, fitted, spans
from torchmto.step import Network, TaskGradients


@register_method("adatask")
class AdaTask(AdamRule):
    r"""Task-wise adaptive learning rates: the shared parameters move by the sum of the tasks' own Adam steps.

    With moments :math:`m_i, v_i` of every task's gradient, bias-corrected by the steps in which the task was present (of a
    parameter that turns shared later, since then; the task that it was a head of keeps its moments):
    :math:`\sum_i \hat m_i / (\sqrt{\hat v_i} + \epsilon)`, so a task with large gradients doesn't set the learning
    rate of the others.

    The optimizer: this method is one, so the optimizer given to ``MultiTask`` should be ``torch.optim.SGD`` without
    momentum. Its learning rate is Adam's, its weight decay AdamW's; schedulers and parameter groups work as usual.
    Any other is warned of, as it would adapt a second time. Heads then need Adam too: with ``adam_heads`` their
    gradients become their Adam direction in the same way, so the whole is Adam with separate moments for the shared
    parameters, as in the paper.

    Scale: sum of K directions with entries of about 1, whatever the losses' scale: not homogeneous because of eps.
    Memory: two more K x P matrices; absent tasks keep their moments. ``clip`` bounds the Adam direction, not the
    gradient. Heads: their own task's gradient. Not random. The paper's AdaGrad and RMSProp variants aren't offered.

    Args:
        betas: Decays of the two moments, in [0, 1).
        eps: Added to the root of the second moment.
        adam_heads: Take Adam's direction for the heads as well.
        **options: ``heads``.

    Source: Yang et al., AdaTask, AAAI 2023, Algorithm 1 (Adam).
    """

    use = "Adam-trained models in which one task's gradients dominate the shared moments."
    eps: float = hyper.number(1e-8, minimum=0)
    adam_heads: bool = hyper.flag(True)
    # Moments of every task's gradient, and counts of steps per shared parameter.
    first: Tensor = states.rows()
    second: Tensor = states.rows()
    times: Tensor = states.rows(torch.int64)
    # The same of heads, by their parameters' names; and whose they are.
    head_moments: dict[str, list[Tensor]] = states.made(lambda *_: {})
    head_times: dict[str, int] = states.made(lambda *_: {})
    head_tasks: dict[str, int] = states.made(lambda *_: {})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a saved state; older ones don't say whose the heads are, which the next step tells."""
        super().load_state_dict({"head_tasks": {}, **state})

    @torch.no_grad()
    def combine(self, task_grads: TaskGradients) -> Tensor:
        """The sum of the tasks' Adam directions, [P]."""
        matrix = task_grads.matrix
        if bool((task_grads.gramian.diagonal() > torch.finfo(matrix.dtype).max).any()):
            # A square that overflows would stay in the second moment, and its entry never move again.
            return torch.full_like(matrix[0], torch.inf)
        self.ensure_setup(len(matrix))
        self.first = fitted(self.first, self.num_tasks, matrix)
        self.second = fitted(self.second, self.num_tasks, matrix)
        times = counted(self.times, [], task_grads.trained)
        if self._network is not None:
            self._take_over_heads(task_grads, self._network, times)
        self.times = counted(times, task_grads.indices, task_grads.trained)
        combined = torch.zeros_like(matrix[0])
        for span, counts in spans(task_grads, self.times):
            for row, task in zip(matrix, task_grads.indices, strict=True):
                moments = self.first[task, span].clone(), self.second[task, span].clone()
                combined[span] += self._direction(*moments, row[span], int(counts[task]))
        if self.adam_heads and self._network is not None:
            self._turn_heads(task_grads, self._network)
        return combined

    @torch.no_grad()
    def remember(self, task_grads: TaskGradients) -> None:
        """Update the moments."""
        for span, _ in spans(task_grads):
            for row, task in zip(task_grads.matrix, task_grads.indices, strict=True):
                self._move(self.first[task, span], self.second[task, span], row[span])

    def _move(self, first: Tensor, second: Tensor, gradient: Tensor) -> None:
        """Update two moments in place."""
        decay, decay_second = self.betas
        first.mul_(decay).add_(gradient, alpha=1 - decay)
        second.mul_(decay_second).addcmul_(gradient, gradient, value=1 - decay_second)

    def _direction(self, first: Tensor, second: Tensor, gradient: Tensor, times: int) -> Tensor:
        """Update two moments in place; Adam's direction after that."""
        decay, decay_second = self.betas
        self._move(first, second, gradient)
        root = (second / (1 - decay_second**times)).sqrt_().add_(self.eps)
        direction = first / (1 - decay**times)
        # 0/0 of an entry that never had a gradient, with eps = 0.
        return direction.div_(root).nan_to_num_(nan=0.0) if self.eps == 0 else direction.div_(root)

    def _take_over_heads(self, task_grads: TaskGradients, network: Network, times: Tensor) -> None:
        """What was the head of one task, and is shared now, has moments of that task; they and their ``times`` go on."""
        for name in [name for name in self.head_tasks if network.roles.is_shared(name)]:
            place = network.roles.layout.index(name)
            if place >= len(task_grads.parameters):
                # The ranks don't all know of it yet.
                continue
            parameter, task = task_grads.parameters[place], self.head_tasks.pop(name)
            columns = task_grads.columns(parameter)
            for memory, moment in zip((self.first, self.second), self.head_moments.pop(name), strict=True):
                views_of(memory[task, columns], [parameter])[0].copy_(moment)
            times[task, place] = self.head_times.pop(name)

    def _turn_heads(self, task_grads: TaskGradients, network: Network) -> None:
        """Replace the heads' gradients by their Adam directions."""
        for key, (parameter, held) in list(task_grads.heads.items()):
            if not held:
                continue
            name = network.name(parameter)
            tasks = list(held)
            gradient = held[tasks[0]] if len(held) == 1 else torch.stack(list(held.values())).sum(0)
            # Copies, so that a step that fails later can go back to the old ones.
            before = self.head_moments.get(name, [torch.zeros_like(gradient)] * 2)
            moments = self.head_moments[name] = [moment.to(gradient, copy=True) for moment in before]
            self.head_times[name] = self.head_times.get(name, 0) + 1
            self.head_tasks[name] = tasks[0]
            direction = self._direction(moments[0], moments[1], gradient, self.head_times[name])
            if not bool(moments[1].isfinite().all()):
                # As for the rows: not even with eps = 0 a direction.
                direction = torch.full_like(gradient, torch.inf)
            task_grads.heads[key] = (parameter, {tasks[0]: direction})
