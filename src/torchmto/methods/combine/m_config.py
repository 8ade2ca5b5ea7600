"""M-ConFIG: ConFIG on the tasks' momenta, of which only a few are renewed per step."""

from collections.abc import Iterator

import torch
from torch import Tensor

from torchmto import solvers
from torchmto.gradients.rows import gramian
from torchmto.methods import Cost, Domain, Properties, hyper, register_method, states
from torchmto.methods.combine.adam_rule import AdamRule
from torchmto.methods.combine.columns import averaged, counted, fitted, spans
from torchmto.step import StepContext, TaskGradients
from torchmto.step.finite import SkippedError
from torchmto.step.losses import empty_batch

EPS = 1e-8
"""Added to the root of the second moment, as in the paper."""


@register_method("m_config")
class MConFIG(AdamRule):
    r"""Conflict-free inverse gradients of momenta: about the cost of one task per step.

    Every task has a first momentum :math:`m_i \leftarrow \beta_1 m_i + (1 - \beta_1) g_i`, renewed only when it is the task's
    turn. The direction is that of ``config`` for all bias-corrected momenta, :math:`\hat d = \mathcal G(\hat m_1, \dots, \hat
    m_K)`. The second moment is that of the gradient whose momentum it would be: with :math:`m = (1 - \beta_1^t) \hat d`,
    :math:`\tilde g = (m - \beta_1 m_{t-1}) / (1 - \beta_1)`, :math:`v \leftarrow \beta_2 v + (1 - \beta_2) \tilde g^2`. The
    update is :math:`\hat d / (\sqrt{\hat v} + 10^{-8})`.

    The optimizer: this method is one, so the optimizer given to ``MultiTask`` should be ``torch.optim.SGD`` without momentum,
    as in the released code; its learning rate is Adam's. Any other is warned of.

    Scale: Adam's, entries of about 1. Order: tasks take turns in their given order, so that another order gives another
    training unless all have their turn in every step. Of the tasks whose turn it is in a step those that the batch hasn't are
    passed over until their next turn; where it has none of them the next ones have theirs, by a further call of the closure.
    Heads: their own task's gradient, in the task's turn (the released multi-task code gives all heads theirs in every step,
    by one more backward). Deviation: the first step takes all tasks, so
    that every momentum has begun; the released code doesn't move before every task has had a turn. A task that hasn't been
    seen yet takes no part. Where a parameter turns shared later its momenta begin then, and are corrected for that. Memory:
    K + 2 more vectors of the shared parameters' size. Not random. Linearly dependent momenta: the least-squares direction, a
    fallback.

    Args:
        num_updates: How many tasks have their turn in a step; None: all that are present.
        betas: Decays of the momenta and of the second moment, in [0, 1).
        **options: ``heads``.

    Source: Liu et al., ConFIG, ICLR 2025, Algorithm 1 (M-ConFIG), as in its released code.
    """

    use = "ConFIG where K backwards per step are too many: one task's backward per step, on momenta of all."
    domain = Domain(corners="Momenta that are linearly dependent: the least-squares direction, a fallback.")
    properties = Properties(homogeneity=None, equivariant=False, identity=False, pareto=False)
    num_updates: int | None = hyper.integer(1, minimum=1, none=True)
    # The momenta, the second moment, the direction's last momentum, counts (per task and parameter; per parameter), whose turn.
    momenta: Tensor = states.rows()
    moment: Tensor = states.made(lambda *_: torch.zeros(1, 0))
    last: Tensor = states.made(lambda *_: torch.zeros(1, 0))
    times: Tensor = states.rows(torch.int64)
    num_steps: Tensor = states.made(lambda *_: torch.zeros(1, 0, dtype=torch.int64))
    turn: int = states.count()
    _direction: Tensor | None = None

    @property
    def one_by_one(self) -> bool:
        """Where not all tasks' gradients are renewed in a step."""
        return self.num_updates is not None

    def cost(self, num_tasks: int) -> Cost:
        """One forward, and a backward for each task whose turn it is (of all tasks in the first step)."""
        return Cost(1, num_tasks if self.num_updates is None else min(self.num_updates, num_tasks), 1)

    def _gradients(self, context: StepContext) -> TaskGradients:
        """Those of the next tasks that the batch has."""
        asked = [context.tasks.index(name) for name in context.asked]
        number = self.num_updates
        if number is None or number >= len(asked) or not bool(self.times.any()):
            return context.gradients()
        queue = sorted(asked, key=lambda task: (task - self.turn) % self.num_tasks)
        for start in range(0, len(queue), number):
            chosen = queue[start : start + number]
            self.turn = (chosen[-1] + 1) % self.num_tasks
            try:
                return context.gradients([context.tasks[task] for task in chosen])
            except SkippedError as skipped:
                if not skipped.absent:
                    raise
        raise empty_batch(context.asked)

    @torch.no_grad()
    def combine(self, task_grads: TaskGradients) -> Tensor:
        """Renew the momenta of the tasks at hand, and combine those of all, [P]."""
        matrix = task_grads.matrix
        self.ensure_setup(len(matrix))
        self.momenta = fitted(self.momenta, self.num_tasks, matrix)
        self.moment, self.last = fitted(self.moment, 1, matrix), fitted(self.last, 1, matrix)
        self.times = counted(self.times, task_grads.indices, task_grads.trained)
        self.num_steps = counted(self.num_steps, [0], task_grads.trained)
        begun = self.times.any(1)
        begun[list(task_grads.indices)] = True
        seen = torch.nonzero(begun).flatten()
        own = torch.zeros(len(seen), len(seen), dtype=torch.float64)
        for span, counts in self._spans(task_grads):
            corrections = self._corrections(counts[seen])
            own += gramian(self._momenta(task_grads, span))[seen][:, seen] * torch.outer(corrections, corrections)
        solution = solvers.config(own.numpy(), precision=task_grads.precision)
        self.num_fallbacks += not solution.converged
        direction = torch.zeros_like(matrix[0])
        update = torch.zeros_like(direction)
        finite = torch.ones((), dtype=torch.bool, device=matrix.device)
        for span, counts in self._spans(task_grads):
            weights = torch.zeros(self.num_tasks, dtype=torch.float64)
            weights[seen] = torch.from_numpy(solution.weights) * self._corrections(counts[seen])
            torch.mv(self._momenta(task_grads, span).T, weights.to(matrix), out=direction[span])
            second = self._moments(direction, span, counts)[1] / (1 - self.betas[1] ** int(counts[-1]))
            finite &= second.isfinite().all()
            torch.div(direction[span], second.sqrt_().add_(EPS), out=update[span])
        self._direction = direction
        if self._network is not None:
            # The momenta of tasks whose turn it isn't move what they reach, too.
            roles, moving = self._network.roles, set(seen.tolist())
            layout = enumerate(zip(roles.layout, task_grads.trained, strict=False))
            task_grads.rows.fill(i for i, (name, trained) in layout if trained and moving & roles.tasks_of(name))
        # A square that overflows would stay in the second moment, and its entry never move again.
        return update if bool(finite) else torch.full_like(update, torch.inf)

    @torch.no_grad()
    def remember(self, task_grads: TaskGradients) -> None:
        """Keep the momenta and moments."""
        direction, self._direction = self._direction, None
        assert direction is not None, "combine comes first"
        for span, counts in self._spans(task_grads):
            self.momenta[:, span] = self._momenta(task_grads, span)
            self.last[0, span], self.moment[0, span] = self._moments(direction, span, counts)

    def _spans(self, task_grads: TaskGradients) -> Iterator[tuple[slice, Tensor]]:
        """Pieces of columns whose counts, [K + 1] with that of all steps, are the same."""
        return spans(task_grads, torch.cat([self.times, self.num_steps]))

    def _corrections(self, counts: Tensor) -> Tensor:
        """What momenta are multiplied with for their start at 0, by their counts; those that haven't begun are 0."""
        return torch.where(counts > 0, 1 / (1 - self.betas[0] ** counts.clamp_min(1).double()), 0.0)

    def _momenta(self, task_grads: TaskGradients, piece: slice) -> Tensor:
        """Some columns of the momenta after this step."""
        return averaged(self.momenta, task_grads.matrix, task_grads.indices, self.betas[0], piece)

    def _moments(self, direction: Tensor, piece: slice, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Some columns of the direction's momentum and of the second moment after this step."""
        first, second = self.betas
        momentum = direction[piece] * (1 - first ** int(counts[-1]))
        implied = (momentum - first * self.last[0, piece]) / (1 - first)
        return momentum, self.moment[0, piece] * second + (1 - second) * implied.square()
