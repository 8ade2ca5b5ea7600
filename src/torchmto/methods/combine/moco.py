"""MoCo: weights on the simplex from gradients that are tracked over the steps."""

from typing import Unpack

import torch
from torch import Tensor

from torchmto import solvers
from torchmto.checks import check_choice, check_number
from torchmto.gradients.rows import gramian
from torchmto.methods.combine.columns import fitted, remember_, track_
from torchmto.methods.gramian.simplex import set_shares, shares_of
from torchmto.methods.method import Domain, GradientCombiner, GradientOptions, Properties
from torchmto.methods.registry import register_method
from torchmto.step import TaskGradients


@register_method("moco")
class MoCo(GradientCombiner):
    r"""Stochastic multi-objective gradient with correction.

    Every task's gradient is tracked by :math:`y_i \leftarrow y_i - \beta_t (y_i - g_i)`, and weights move by
    :math:`\lambda \leftarrow \mathrm{softmax}(\lambda - \gamma_t (Y Y^\top + \rho I) \lambda)`; the update is
    :math:`\lambda^\top Y`. The rates decay as :math:`\beta_t = \beta / t^{\sigma_\beta}`, with t the steps in which
    the task was present (for :math:`\gamma` all steps).

    Scale: the weights sum to 1; y starts at 0, so the first updates are short. As the softmax of weights on the
    simplex isn't far from uniform, so are the weights; the paper's algorithm has the projection on the simplex
    instead (``step="projection"``), its code the softmax. Its code also replaces :math:`g_i` by :math:`l_i g_i /
    \|g_i\|` (``normalize="loss"``, without its eps of 1e-8). Not homogeneous: gamma is meant for gradients as they
    are. Memory: one more K x P matrix. Tasks that are absent keep their y and their weight. Heads: their own task's
    gradient; "weighted": times lambda. Not random.

    Args:
        beta: First rate of the tracking, in (0, 1].
        beta_sigma: Its decay.
        gamma: First rate of the weights.
        gamma_sigma: Its decay.
        rho: Pull towards equal weights.
        step: "softmax" or "projection".
        normalize: "none" or "loss".
        **options: ``heads``.

    Source: Fernando et al., Mitigating Gradient Bias in Multi-objective Learning, ICLR 2023, Algorithm 1.
    """

    source = "Fernando et al., ICLR 2023, Algorithm 1"
    use = "Small batches: corrects the bias of stochastic weights by averaging gradients over time."
    tuning_space = {"beta": ("linear", 0.1, 0.99), "gamma": ("log", 1e-3, 1.0)}
    recorded = {"weights": "shares"}
    properties = Properties(homogeneity=None, identity=False)
    domain = Domain(
        corners='With `normalize="loss"` non-negative losses only. A task whose gradient stays short takes weight from the '
        'others, and with `step="projection"` in the end all.'
    )
    tracked: Tensor
    shares: Tensor
    times: Tensor
    num_steps: int

    def __init__(
        self,
        *,
        beta: float = 0.5,
        beta_sigma: float = 0.5,
        gamma: float = 0.1,
        gamma_sigma: float = 0.5,
        rho: float = 0.0,
        step: str = "softmax",
        normalize: str = "none",
        **options: Unpack[GradientOptions],
    ) -> None:
        super().__init__(**options)
        self.beta = check_number("beta", beta, above=0, maximum=1)
        self.beta_sigma = check_number("beta_sigma", beta_sigma, minimum=0)
        self.gamma = check_number("gamma", gamma, minimum=0)
        self.gamma_sigma = check_number("gamma_sigma", gamma_sigma, minimum=0)
        self.rho = check_number("rho", rho, minimum=0)
        self.step_rule = check_choice("step", step, ("softmax", "projection"))
        self.normalize = check_choice("normalize", normalize, ("none", "loss"))
        if normalize == "loss":
            self.domain = Domain("0", attained=True)

    def setup(self, num_tasks: int) -> None:
        """Tracked gradients, weights and counts of steps."""
        self.add_state("tracked", torch.zeros(num_tasks, 0))
        self.add_state("shares", torch.full((num_tasks,), 1 / num_tasks, dtype=torch.float64))
        self.add_state("times", torch.zeros(num_tasks, dtype=torch.int64))
        self.add_state("num_steps", 0)

    @torch.no_grad()
    def combine(self, task_grads: TaskGradients) -> Tensor:
        """Track the gradients, move the weights, and combine, [P]."""
        self.ensure_setup(len(task_grads.matrix))
        factors = self._factors(task_grads)
        present = list(task_grads.indices)
        self.tracked = fitted(self.tracked, self.num_tasks, task_grads.matrix)
        self.num_steps += 1
        self.times[present] += 1
        rates = [self.beta / int(self.times[task]) ** self.beta_sigma for task in present]
        shares_of_rows = [(1 - beta, beta * factor) for beta, factor in zip(rates, factors, strict=True)]
        track_(task_grads.matrix, self.tracked, present, shares_of_rows)
        own = gramian(task_grads.matrix)
        own.diagonal().add_(self.rho)
        shares = shares_of(self.shares, present)
        moved = shares - self.gamma / self.num_steps**self.gamma_sigma * (own @ shares)
        moved = (
            moved.softmax(0)
            if self.step_rule == "softmax"
            else torch.from_numpy(solvers.simplex_projection(moved.numpy()))
        )
        set_shares(self.shares, present, moved)
        self.head_weights = moved
        return torch.mv(task_grads.matrix.T, moved.to(task_grads.matrix))

    def remember(self, task_grads: TaskGradients) -> None:
        """Keep the tracked gradients."""
        remember_(self.tracked, task_grads.matrix, task_grads.indices)

    def _factors(self, task_grads: TaskGradients) -> list[float]:
        """What each gradient is multiplied with before it is tracked."""
        if self.normalize == "none":
            return [1.0] * len(task_grads.matrix)
        norms = task_grads.gramian.diagonal().clamp_min(0).sqrt()
        losses = task_grads.losses.to(norms)
        self.check_losses(losses, task_grads.indices)
        return [loss / norm if norm > 0 else 0.0 for loss, norm in zip(losses.tolist(), norms.tolist(), strict=True)]
