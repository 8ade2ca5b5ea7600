"""PCD: close to the primary task's gradient, with a share of their own progress for all others."""

import torch
from torch import Tensor

from torchmto import solvers
from torchmto.methods import Domain, GramianWeighting, Indices, Properties, hyper, register_method, states
from torchmto.methods.per_task import PerTask, Primary


@register_method("pcd")
class PCD(GramianWeighting):
    r"""Priority-constrained descent.

    With :math:`\tilde g_i = g_i / \sqrt{\hat v_i + \epsilon}`, :math:`\hat v_i` the bias-corrected running mean of
    :math:`\|g_i\|^2`, and p the primary task: the direction :math:`\tilde d` nearest to :math:`\tilde g_p` with
    :math:`\tilde g_j \cdot \tilde d \ge \tau \|\tilde g_j\|^2` for all other tasks j, brought to the length of
    :math:`g_p`. Solved exactly; the released code tries all sets of constraints. Where they can't be satisfied together
    they are dropped for that step, as there (a fallback here).

    Scale: the length of the primary gradient. A primary gradient of zero stops all tasks, as in the released code, and a
    direction that vanishes is no update. Deviations: no eps by default (1e-8 in the paper); the paper moves all
    parameters, here the rule is for the shared ones; the running means count the steps in which a task was present; in a
    batch without the primary task the first of those present leads. Heads: their own task's gradient. Not random.

    Args:
        primary: The task that leads, by name or number; by default the first.
        tau: The share of the progress along its own normalised gradient that every other task gets, in [0, 1]: one number,
            or one per task (mapping or sequence; that of the primary task isn't used).
        beta: Share of the past in the running means, in [0, 1).
        eps: Added to them.
        **options: ``heads``, ``refresh_every``.

    Source: Varam & AlHajri, Not All Objectives Are Born Equal: Priority-Constrained Descent, TMLR 2026 (arXiv
    2606.29521), definitions 4.1 and 4.5, Algorithm 1, as in its released code.

    Example:
        >>> import torch, torchmto
        >>> torchmto.make_method("pcd", tau=0.5).weights(torch.tensor([[1.0, 0.0], [0.0, 4.0]]))
        tensor([0.8944, 0.2236])
    """

    use = "One task is the goal and the others are constraints: sparsity, robustness, auxiliary tasks."
    properties = Properties(equivariant=False, pareto=False)
    domain = Domain(
        corners="A primary gradient of zero stops the others. Constraints that no direction satisfies are dropped, a fallback."
    )
    primary: Primary = hyper.given(0, Primary, str | int)
    tau: PerTask = hyper.per_task(0.02, minimum=0, maximum=1, search=("log", 1e-3, 0.5))
    beta: float = hyper.number(0.999, minimum=0, below=1)
    eps: float = hyper.number(0.0, minimum=0)
    # Running means of the squared norms, and the number of steps in each.
    squares: Tensor = states.each(0.0)
    times: Tensor = states.each(0, torch.int64)

    def weights(self, gramian: Tensor, losses: Tensor | None = None, indices: Indices | None = None) -> Tensor:
        """The weights of the update, [k]. Moves the running means of the present tasks."""
        present = list(range(len(gramian)) if indices is None else indices)
        self.ensure_setup(max(present) + 1)
        self.times[present] += 1
        new = gramian.diagonal().clamp_min(0).to(self.squares)
        self.squares[present] += (1 - self.beta) * (new - self.squares[present])
        mean = self.squares[present] / (1 - self.beta ** self.times[present].to(self.squares)) + self.eps
        leader = present.index(self.primary.index) if self.primary.index in present else 0
        order = [leader, *(row for row in range(len(present)) if row != leader)]
        tau, scales = self.tau.of(present)[order[1:]], torch.where(mean > 0, mean.rsqrt(), 0.0)[order]
        ordered = self.solved(solvers.pcd, gramian[order][:, order], tau=tau.numpy(), scales=scales.numpy())
        weights = torch.empty_like(ordered)
        weights[order] = ordered
        return weights
