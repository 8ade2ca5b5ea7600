"""FAMO: fast adaptive multi-task optimisation."""

import torch
from torch import Tensor

from torchmto.methods import Cost, Domain, Indices, LossWeighting, Properties, hyper, register_method, states
from torchmto.methods.losses.inside import inside
from torchmto.methods.losses.learnable import LearnableScales
from torchmto.methods.per_task import PerTask
from torchmto.step import Losses, StepContext


@register_method("famo")
class FAMO(LossWeighting):
    r"""Lowers all losses at about the same relative rate, with one backward per step.

    With :math:`z = \mathrm{softmax}(\xi)` over the present tasks and :math:`D_i = l_i - b_i + \epsilon`, the objective
    is :math:`c \sum_i z_i \log D_i`, :math:`c = 1 / \sum_i (z_i / D_i)` constant, so the weights :math:`c z_i / D_i`
    sum to 1. After the optimizer step the losses of the same batch are computed again, and the logits :math:`\xi` take
    one step of Adam along :math:`(\mathrm{diag}(z) - z z^\top)(\log D^\mathrm{before} - \log D^\mathrm{after})`: a task
    that improved more than others loses weight. Logits of absent tasks stay.

    Scale: mean (weights sum to 1). Heads: times the task's weight. Cost: one more forward per step, without gradient,
    with the random state of the step's own forward and without moving norm buffers; so it needs a closure. Clipping: the
    released experiments clip the shared gradient to norm 1 before the backward, which does nothing; the released package
    clips after it, if it is given the shared parameters (here ``clip=``, over all parameters). The default decay is
    1e-5 in the former and 0.01 in the latter. Losses must be larger than ``min_losses + eps``: with a task at its bound
    all others would stand still. Not random.

    Args:
        lr: Adam's learning rate for the logits.
        gamma: Adam's weight decay for the logits, a pull to uniform weights.
        min_losses: The losses' lower bounds b: one number, or one per task (mapping or sequence).
        eps: Keeps the logarithm finite at the lower bound.

    Source: Liu et al., FAMO: Fast Adaptive Multitask Optimization, NeurIPS 2023, Algorithm 1.

    Example:
        >>> import torch, torchmto
        >>> torchmto.make_method("famo").loss_weights(torch.tensor([1.0, 3.0]))
        tensor([0.7500, 0.2500])
    """

    use = "Many tasks and one backward only: balances relative progress at the cost of one extra forward."
    recorded = {"logits": "logits.values"}
    properties = Properties(homogeneity=None, identity=False)
    domain = Domain(
        "`min_losses` + `eps`",
        corners="A loss close to its bound takes nearly all of the weight, as its gradient is the shortest, until the logits "
        "have made up for it.",
    )
    needs_losses_after = True
    lr: float = hyper.number(0.025, above=0, search=("log", 1e-3, 1e-1))
    gamma: float = hyper.number(1e-3, minimum=0, search=("log", 1e-5, 1e-1))
    min_losses: PerTask = hyper.per_task(0.0)
    eps: float = hyper.number(1e-8, minimum=0)
    # One logit per task.
    logits: LearnableScales = states.made(lambda own, k: LearnableScales(k, lr=own.lr, weight_decay=own.gamma))

    def lower_bounds(self, indices: Indices) -> Tensor:
        """Less than eps above its lower bound a task would take all the weight, and the others would stand still."""
        return self.min_losses.of(indices) + self.eps

    def cost(self, num_tasks: int) -> Cost:
        """Two forwards and one backward."""
        return Cost(2, 1, 1)

    def _log_distance(self, losses: Tensor, chosen: Indices) -> tuple[Tensor, Tensor]:
        distance = losses - self.min_losses.of(chosen).to(losses)
        distance = inside(distance, losses > self.lower_bounds(chosen).to(losses)) + self.eps
        return distance, distance.log()

    def objective(self, losses: Tensor, indices: Indices | None = None) -> Tensor:
        """The weighted sum of the logarithms, scaled so that the weights sum to 1."""
        chosen = self.present(losses, indices)
        z = self.logits.of(chosen).softmax(0).to(losses)
        distance, logarithm = self._log_distance(losses, chosen)
        return (z * logarithm).sum() / (z / distance.detach()).sum()

    @torch.no_grad()
    def after_step(self, losses: Losses, context: StepContext) -> None:
        """Measure the losses again and move the logits."""
        again = context.losses([context.tasks[i] for i in losses.indices])
        rows = {task: row for row, task in enumerate(losses.indices)}
        both = [task for task in again.indices if task in rows]
        before = losses.values[[rows[task] for task in both]].to("cpu", torch.float64)
        after = again.raw[[again.indices.index(task) for task in both]].to("cpu", torch.float64)
        if losses.factors is not None:
            # The factors of the step: a random weighting in front would draw new ones for the second forward.
            after = after * losses.factors[[rows[task] for task in both]].to(after)
        gain = self._log_distance(before, both)[1] - self._log_distance(after, both)[1]
        if not both or not bool(gain.isfinite().all()):
            return
        z = self.logits.of(both).softmax(0)
        self.logits.step(z * (gain - (z * gain).sum()), both)
