"""DB-MTL: gradients of the log-losses, tracked and made equally long."""

import torch
from torch import Tensor

from torchmto.gradients.rows import gramian
from torchmto.methods import Domain, GradientCombiner, Properties, hyper, register_method, states
from torchmto.methods.combine.columns import fitted, remember_, spans, track_
from torchmto.step import TaskGradients


@register_method("db_mtl")
class DBMTL(GradientCombiner):
    r"""Dual-balancing multi-task learning.

    Loss balancing: the gradients are those of :math:`\log l_i`, that is :math:`g_i / l_i`. Gradient balancing: they
    are tracked by :math:`\hat g_i \leftarrow \beta_t \hat g_i + (1 - \beta_t) g_i / l_i` with :math:`\beta_t = \beta
    / t^\sigma`, t the steps in which the task was present, and rescaled to the longest: the update is :math:`\sum_i
    (\max_j \|\hat g_j\| / \|\hat g_i\|) \hat g_i`.

    No promise about the Pareto set: the update doesn't shrink with the losses, and grows where one nears 0.

    Scale: sum of vectors as long as the longest; multiplying all losses by one number changes nothing. The tracked
    gradients start at 0, as in the released code, so with ``sigma=0`` the first updates are short by 1 - beta. No eps
    (1e-8 in the logarithm and the norms there). A task whose loss or gradient is 0 takes no part in a step, as if it
    were absent: what is tracked of it would be brought to full length too. :math:`g_i / l_i` that overflows makes the
    step non-finite. Memory: one more K x P matrix; absent tasks keep their rows. Heads: as in the
    paper, the gradient of their log-loss ("weighted": times :math:`1 / l_i`, the default here); "unit": their task's
    plain gradient. Not random.

    Args:
        beta: Share of the past in the tracked gradients, in [0, 1).
        sigma: Its decay over the steps.
        heads: "weighted" or "unit".

    Source: Lin et al., Dual-Balancing for Multi-Task Learning, 2023 (arXiv 2308.12029), Algorithm 1; defaults of its
    code.
    """

    use = "Losses and gradients on very different scales; puts all tasks at the largest gradient's norm."
    properties = Properties(homogeneity=0.0, identity=False, pareto=False, uses_losses=True)
    domain = Domain(
        "0",
        attained=True,
        corners="A task whose loss or gradient is 0 takes no part in the step, as if it were absent.",
    )
    beta: float = hyper.number(0.9, minimum=0, below=1, search=("linear", 0.1, 0.99))
    sigma: float = hyper.number(0.0, minimum=0)
    heads: str = hyper.choice("weighted", "unit")
    # Tracked gradients and counts of steps.
    tracked: Tensor = states.rows()
    times: Tensor = states.each(0, torch.int64)

    @torch.no_grad()
    def combine(self, task_grads: TaskGradients) -> Tensor:
        """Track the gradients of the log-losses and sum them at equal length, [P]."""
        self.ensure_setup(len(task_grads.matrix))
        losses = task_grads.losses.to(device="cpu", dtype=torch.float64)
        self.check_losses(losses, task_grads.indices)
        inverse = torch.where(losses > 0, 1 / losses, 0.0)
        self.head_weights = inverse
        largest = torch.finfo(task_grads.matrix.dtype).max
        lengths = task_grads.gramian.diagonal().clamp_min(0).sqrt()
        if bool((lengths.clamp_min(1) * inverse >= largest).any()):
            # A length that overflows would make all weights 0.
            return torch.full_like(task_grads.matrix[0], torch.inf)
        # What is tracked of a task without a gradient would be brought to full length all the same, however old it is.
        moving = ((lengths > 0) & (inverse > 0)).tolist()
        self._moving = [place for place, moves in enumerate(moving) if moves]
        present = [task_grads.indices[place] for place in self._moving]
        self.tracked = fitted(self.tracked, self.num_tasks, task_grads.matrix)
        if not present:
            return torch.zeros_like(task_grads.matrix[0])
        self.times[present] += 1
        matrix = task_grads.matrix
        pasts = [self.beta / int(self.times[task]) ** self.sigma for task in present]
        shares = [(beta, (1 - beta) * factor) for beta, factor in zip(pasts, inverse[moving].tolist(), strict=True)]
        for span, _ in spans(task_grads):
            track_([matrix[place, span] for place in self._moving], self.tracked[:, span], present, shares)
        norms = gramian(matrix).diagonal()[self._moving].clamp_min(0).sqrt()
        ratios = norms.max() / norms
        weights = matrix.new_zeros(len(matrix))
        weights[self._moving] = torch.where(ratios <= largest, ratios, 0.0).to(weights)
        return torch.mv(matrix.T, weights)

    def remember(self, task_grads: TaskGradients) -> None:
        """Keep the tracked gradients."""
        remember_(self.tracked, task_grads, self._moving)
