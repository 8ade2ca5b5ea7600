"""MetaBalance: auxiliary gradients brought towards the length of the primary task's, parameter by parameter."""

from collections.abc import Sequence

import torch
from torch import Tensor

from torchmto.methods import Domain, GradientCombiner, Properties, hyper, register_method, states
from torchmto.methods.combine.columns import counted
from torchmto.methods.per_task import Primary
from torchmto.step import TaskGradients


@register_method("metabalance")
class MetaBalance(GradientCombiner):
    r"""Adapts the gradient magnitudes of auxiliary tasks to that of a primary task.

    For every shared parameter tensor by itself, with running means :math:`m_i \leftarrow \beta m_i + (1 - \beta)
    \|g_i\|` and p the primary task: the update is :math:`g_p + \sum_{j \ne p} \left(r \, m_p / m_j + 1 - r\right) g_j`. So
    strong auxiliary gradients are shortened and weak ones lengthened, each time a share r of the way; it is the paper's
    strategy that does both, and the one that is released.

    Scale: sum. No eps. Deviations: the means are corrected for the number of steps a task was present in, which cancels
    where all always are; a gradient of zero stays zero (NaN in the released code), and where the primary task has had no
    gradient yet the others stay as they are (the released code stops there). Heads: their own task's gradient. Not
    random. A primary task that is absent still sets the length, by its mean.

    Args:
        primary: The task that the others are to help, by name or number; by default the first.
        relax: The share r, in [0, 1]: 0 is the plain sum, 1 equal lengths. 0.7 as released; the paper tunes it.
        beta: Share of the past in the running means, in [0, 1).
        **options: ``heads``.

    Source: He et al., MetaBalance: Improving Multi-Task Recommendations via Adapting Gradient Magnitudes of Auxiliary
    Tasks, WWW 2022 (arXiv 2203.06801), as in its released code.
    """

    use = "Auxiliary tasks that only serve one target task, and drown it or are too weak to help."
    properties = Properties(equivariant=False, pareto=False)
    domain = Domain(corners="Where the primary task has had no gradient the others stay as they are.")
    primary: Primary = hyper.given(0, Primary, str | int)
    relax: float = hyper.number(0.7, minimum=0, maximum=1, search=("linear", 0.0, 1.0))
    beta: float = hyper.number(0.9, minimum=0, below=1)
    # Running means of the gradients' lengths, one per task and shared parameter, and their numbers of steps.
    lengths: Tensor = states.rows(torch.float64)
    times: Tensor = states.rows(torch.int64)

    @torch.no_grad()
    def combine(self, task_grads: TaskGradients) -> Tensor:
        """The sum of the balanced gradients, [P]."""
        matrix, present = task_grads.matrix, list(task_grads.indices)
        parts = [task_grads.columns(parameter) for parameter in task_grads.parameters]
        lengths = [matrix[:, part].norm(dim=1, keepdim=True) for part in parts]
        factors = self._factors(torch.cat([matrix[:, :0], *lengths], dim=1), present, task_grads.trained)
        combined = torch.empty_like(matrix[0])
        for part, weights in zip(parts, factors.to(matrix).unbind(1), strict=True):
            torch.mv(matrix[:, part].T, weights, out=combined[part])
        return combined

    def _factors(self, lengths: Tensor, present: list[int], trained: Sequence[bool]) -> Tensor:
        """What each task's gradient [k, n] of every parameter is multiplied with. Moves the running means."""
        self.ensure_setup(max(present) + 1)
        new = lengths.shape[1] - self.lengths.shape[1]
        self.lengths = torch.nn.functional.pad(self.lengths, (0, new))
        self.times = counted(self.times, present, trained)
        rates = (1 - self.beta) * torch.tensor(trained, dtype=self.lengths.dtype)
        self.lengths[present] += rates * (lengths.to(self.lengths) - self.lengths[present])
        means = self.lengths / (1 - self.beta ** self.times.clamp_min(1).to(self.lengths))
        leader = means[self.primary.index]
        ratios = torch.where(means > 0, leader / means, 0.0)[present]
        factors = torch.where(leader > 0, self.relax * ratios + (1 - self.relax), 1.0)
        factors[[task == self.primary.index for task in present]] = 1.0
        return factors
