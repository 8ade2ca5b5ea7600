"""MoCo: weights on the simplex from gradients that are tracked over the steps."""

import torch
from torch import Tensor

from torchmto import solvers
from torchmto.gradients.rows import gramian
from torchmto.methods import Domain, GradientCombiner, Properties, hyper, register_method, states
from torchmto.methods.combine.columns import counted, fitted, remember_, spans, track_
from torchmto.step import TaskGradients


@register_method("moco")
class MoCo(GradientCombiner):
    r"""Stochastic multi-objective gradient with correction.

    Every task's gradient is tracked by :math:`y_i \leftarrow y_i - \beta_t (y_i - g_i)`, and weights move by
    :math:`\lambda \leftarrow \mathrm{softmax}(\lambda - \gamma_t (Y Y^\top + \rho I) \lambda)`; the update is
    :math:`\lambda^\top Y`. The rates decay as :math:`\beta_t = \beta / t^{\sigma_\beta}`, with t the steps in which
    the task was present (for :math:`\gamma` all steps); for a parameter that turns shared later, those since then.

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

    use = "Small batches: corrects the bias of stochastic weights by averaging gradients over time."
    recorded = {"weights": "shares"}
    properties = Properties(homogeneity=None, identity=False)
    domain = Domain(
        corners='With `normalize="loss"` non-negative losses only. A task whose gradient stays short takes weight from the '
        'others, and with `step="projection"` in the end all.'
    )
    beta: float = hyper.number(0.5, above=0, maximum=1, search=("linear", 0.1, 0.99))
    beta_sigma: float = hyper.number(0.5, minimum=0)
    gamma: float = hyper.number(0.1, minimum=0, search=("log", 1e-3, 1.0))
    gamma_sigma: float = hyper.number(0.5, minimum=0)
    rho: float = hyper.number(0.0, minimum=0)
    step_rule: str = hyper.called("step", hyper.choice("softmax", "projection"))
    normalize: str = hyper.choice("none", "loss")
    # Tracked gradients, weights and counts of steps, per task and shared parameter and in all.
    tracked: Tensor = states.rows()
    shares: Tensor = states.shares()
    times: Tensor = states.rows(torch.int64)
    num_steps: int = states.count()

    def __post_init__(self) -> None:
        """Gradients divided by a loss need its sign."""
        if self.normalize == "loss":
            self.domain = Domain("0", attained=True)

    @torch.no_grad()
    def combine(self, task_grads: TaskGradients) -> Tensor:
        """Track the gradients, move the weights, and combine, [P]."""
        matrix = task_grads.matrix
        self.ensure_setup(len(matrix))
        factors = self._factors(task_grads)
        present = list(task_grads.indices)
        self.tracked = fitted(self.tracked, self.num_tasks, matrix)
        self.num_steps += 1
        self.times = counted(self.times, present, task_grads.trained)
        for span, counts in spans(task_grads, self.times):
            rates = [self.beta / int(counts[task]) ** self.beta_sigma for task in present]
            shares_of_rows = [(1 - beta, beta * factor) for beta, factor in zip(rates, factors, strict=True)]
            track_(matrix[:, span], self.tracked[:, span], present, shares_of_rows)
        own = gramian(matrix)
        own.diagonal().add_(self.rho)
        shares = states.shares_of(self.shares, present)
        moved = shares - self.gamma / self.num_steps**self.gamma_sigma * (own @ shares)
        moved = (
            moved.softmax(0)
            if self.step_rule == "softmax"
            else torch.from_numpy(solvers.simplex_projection(moved.numpy()))
        )
        states.set_shares(self.shares, present, moved)
        self.head_weights = moved
        return torch.mv(matrix.T, moved.to(matrix))

    def remember(self, task_grads: TaskGradients) -> None:
        """Keep the tracked gradients."""
        remember_(self.tracked, task_grads, range(len(task_grads.indices)))

    def _factors(self, task_grads: TaskGradients) -> list[float]:
        """What each gradient is multiplied with before it is tracked."""
        if self.normalize == "none":
            return [1.0] * len(task_grads.matrix)
        norms = task_grads.gramian.diagonal().clamp_min(0).sqrt()
        losses = task_grads.losses.to(norms)
        self.check_losses(losses, task_grads.indices)
        return [loss / norm if norm > 0 else 0.0 for loss, norm in zip(losses.tolist(), norms.tolist(), strict=True)]
