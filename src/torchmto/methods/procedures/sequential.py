"""Plain one-task-at-a-time updates."""

import torch

from torchmto.methods import Cost, Procedure, Properties, hyper, register_method
from torchmto.step import StepContext, StepInfo


@register_method("sequential")
class Sequential(Procedure):
    """One optimizer step per task and batch: forward of the task, backward, step; then the next task.

    Parameters a sub-step doesn't reach keep ``.grad = None``, so an optimizer with moments leaves them alone. K forwards, K
    backwards and K optimizer steps per batch: compare methods by the cost counters of ``StepInfo``.

    Scale: each task's own gradient. Heads: their own task's gradient, once per batch. Random: the order, if shuffled.

    Args:
        shuffle: Draw a new order of the tasks for every batch; else the order in which they were given.

    Source: phase 1 of Jeong & Yoon, CVPR 2024, without its task-specific norms.
    """

    use = "The strongest simple baseline of the papers' ablations; K optimizer steps per batch, so compare by cost."
    properties = Properties(homogeneity=None, equivariant=False, pareto=False)
    shuffle: bool = hyper.flag(False)

    @property
    def one_by_one(self) -> bool:
        """Always."""
        return True

    def cost(self, num_tasks: int) -> Cost:
        """K of everything."""
        return Cost(num_tasks, num_tasks, num_tasks)

    def step(self, context: StepContext) -> StepInfo:
        """Update task after task."""
        one_task_at_a_time(context, self.generator if self.shuffle else None)
        return context.info()


def one_task_at_a_time(context: StepContext, generator: torch.Generator | None = None) -> None:
    """One plain sub-step per task of ``context``, in the given order, or shuffled if there is a generator."""
    order = list(context.asked)
    if generator is not None:
        order = [order[i] for i in torch.randperm(len(order), generator=generator).tolist()]
    for task in order:
        context.descend((task,))
