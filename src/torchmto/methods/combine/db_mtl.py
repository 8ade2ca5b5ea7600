"""DB-MTL: gradients of the log-losses, tracked and made equally long."""

from __future__ import annotations

import torch
from torch import Tensor

from torchmto.checks import check_number
from torchmto.gradients import gramian
from torchmto.methods.combine.columns import fitted
from torchmto.methods.method import GradientCombiner, Properties
from torchmto.methods.registry import register
from torchmto.step import TaskGradients


@register("db_mtl")
class DBMTL(GradientCombiner):
    r"""Dual-balancing multi-task learning.

    Loss balancing: the gradients are those of :math:`\log l_i`, that is :math:`g_i / l_i`. Gradient balancing: they
    are tracked by :math:`\hat g_i \leftarrow \beta_t \hat g_i + (1 - \beta_t) g_i / l_i` with :math:`\beta_t = \beta
    / t^\sigma`, t the steps in which the task was present, and rescaled to the longest: the update is :math:`\sum_i
    (\max_j \|\hat g_j\| / \|\hat g_i\|) \hat g_i`.

    No promise about the Pareto set: the update doesn't shrink with the losses, and grows where one nears 0.

    Scale: sum of vectors as long as the longest; multiplying all losses by one number changes nothing. The tracked
    gradients start at 0, as in the released code, so with ``sigma=0`` the first updates are short by 1 - beta. No eps
    (1e-8 in the logarithm and the norms there). A loss of 0 or a gradient of 0 contributes 0; :math:`g_i / l_i` that
    overflows makes the step non-finite. Memory: one more K x P matrix; absent tasks keep their rows. Heads: as in the
    paper, the gradient of their log-loss ("weighted": times :math:`1 / l_i`, the default here); "unit": their task's
    plain gradient. Not random.

    Args:
        beta: Share of the past in the tracked gradients, in [0, 1).
        sigma: Its decay over the steps.
        heads: "weighted" or "unit".

    Raises:
        ValueError: If a loss is negative (in the step).

    Source: Lin et al., Dual-Balancing for Multi-Task Learning, 2023 (arXiv 2308.12029), Algorithm 1; defaults of its
    code.
    """

    source = "Lin et al., 2023, arXiv 2308.12029, Algorithm 1"
    use = "Losses and gradients on very different scales; puts all tasks at the largest gradient's norm."
    properties = Properties(homogeneity=0.0, identity=False, pareto=False, uses_losses=True)
    tracked: Tensor
    times: Tensor

    def __init__(self, *, beta: float = 0.9, sigma: float = 0.0, heads: str = "weighted") -> None:
        super().__init__(heads=heads)
        self.beta = check_number("beta", beta, minimum=0, below=1)
        self.sigma = check_number("sigma", sigma, minimum=0)

    def setup(self, num_tasks: int) -> None:
        """Tracked gradients and counts of steps."""
        self.add_state("tracked", torch.zeros(num_tasks, 0))
        self.add_state("times", torch.zeros(num_tasks, dtype=torch.int64))

    @torch.no_grad()
    def combine(self, task_grads: TaskGradients) -> Tensor:
        """Track the gradients of the log-losses and sum them at equal length, [P]."""
        self.ensure_setup(len(task_grads.matrix))
        losses = task_grads.losses.to(device="cpu", dtype=torch.float64)
        if bool((losses < 0).any()):
            raise ValueError(
                "Method `db_mtl` takes the logarithm of the losses, so they should be positive. "
                f"Found {losses.tolist()}."
            )
        inverse = torch.where(losses > 0, 1 / losses, 0.0)
        self.head_weights = inverse
        largest = torch.finfo(task_grads.matrix.dtype).max
        lengths = task_grads.gramian.diagonal().clamp_min(0).sqrt()
        if bool((lengths.clamp_min(1) * inverse >= largest).any()):
            # Tracked, a gradient (or its factor) that overflows would stay for good.
            return torch.full_like(task_grads.matrix[0], torch.inf)
        present = list(task_grads.indices)
        self.tracked = fitted(self.tracked, self.num_tasks, task_grads.matrix)
        self.times[present] += 1
        for row, task, factor in zip(task_grads.matrix, present, inverse.tolist(), strict=True):
            beta = self.beta / int(self.times[task]) ** self.sigma
            self.tracked[task].mul_(beta).add_(row, alpha=(1 - beta) * factor)
        norms = gramian(self.tracked).diagonal()[present].clamp_min(0).sqrt()
        ratios = norms.max() / norms
        weights = self.tracked.new_zeros(self.num_tasks)
        weights[present] = torch.where(ratios <= largest, ratios, 0.0).to(weights)
        return torch.mv(self.tracked.T, weights)
