r"""Least-squares tasks on shared and own parameters, where every answer is known.

:math:`L_k(s, h_k) = \tfrac12 \|A_k s + B_k h_k - c_k\|^2`, many problems at once: N problems, K tasks, m residuals, d shared
parameters, n own parameters per task; everything in float64.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torchmto import solvers

Partition = Sequence[Sequence[int]]


@dataclass(frozen=True)
class State:
    """Parameters.

    Attributes:
        shared: ``[N, d]``.
        heads: ``[N, K, n]``.
    """

    shared: Tensor
    heads: Tensor


@dataclass(frozen=True)
class Problems:
    """N problems of K tasks.

    Attributes:
        A: ``[N, K, m, d]``.
        B: ``[N, K, m, n]``.
        c: ``[N, K, m]``.
        absolute: Sum absolute residuals instead of half squares: losses without a Lipschitz gradient.
    """

    A: Tensor
    B: Tensor
    c: Tensor
    absolute: bool = False

    def residuals(self, state: State) -> Tensor:
        """``[N, K, m]``."""
        shared = torch.einsum("nkmd,nd->nkm", self.A, state.shared)
        return shared + torch.einsum("nkmh,nkh->nkm", self.B, state.heads) - self.c

    def losses(self, state: State) -> Tensor:
        """``[N, K]``."""
        residuals = self.residuals(state)
        return residuals.abs().sum(-1) if self.absolute else 0.5 * residuals.square().sum(-1)

    def gradients(self, state: State) -> tuple[Tensor, Tensor]:
        """Each task's (sub)gradient of the shared parameters ``[N, K, d]`` and of its own ``[N, K, n]``."""
        residuals = self.residuals(state)
        outer = residuals.sign() if self.absolute else residuals
        return torch.einsum("nkmd,nkm->nkd", self.A, outer), torch.einsum("nkmh,nkm->nkh", self.B, outer)

    def repeated(self, times: int) -> "Problems":
        """The same problems ``times`` over, to be trained with different learning rates at once."""
        parts = self.A.repeat(times, 1, 1, 1), self.B.repeat(times, 1, 1, 1), self.c.repeat(times, 1, 1)
        return Problems(*parts, self.absolute)

    @property
    def joint(self) -> tuple[Tensor, Tensor]:
        """All tasks' residuals as one least-squares problem: ``[N, K m, d + K n]`` and ``[N, K m]``."""
        number, tasks, rows, own = self.B.shape
        blocks = torch.zeros(number, tasks, rows, tasks, own, dtype=self.B.dtype)
        for task in range(tasks):
            blocks[:, task, :, task] = self.B[:, task]
        matrix = torch.cat([self.A, blocks.flatten(3)], dim=3)
        return matrix.flatten(1, 2), self.c.flatten(1)

    def minimizer(self) -> State:
        """Where the sum of the (squared) losses is least; one such point if there are several."""
        number, _, _, shared = self.A.shape
        matrix, target = self.joint
        solution = torch.linalg.lstsq(matrix, target.unsqueeze(-1), driver="gelsd").solution.squeeze(-1)
        return State(solution[:, :shared], solution[:, shared:].view(number, self.B.shape[1], -1))

    def optimum(self) -> Tensor:
        """The least total loss, ``[N]``."""
        return self.losses(self.minimizer()).sum(1)

    def smoothness(self) -> Tensor:
        """The Lipschitz constant of the summed loss's gradient, ``[N]``."""
        matrix, _ = self.joint
        norm: Tensor = torch.linalg.matrix_norm(matrix, ord=2)
        return norm.square()

    def start(self) -> State:
        """All parameters zero."""
        number, tasks, _, shared = self.A.shape
        zeros = torch.zeros(number, shared, dtype=self.A.dtype)
        return State(zeros, torch.zeros(number, tasks, self.B.shape[3], dtype=self.A.dtype))


def related_tasks(
    number: int,
    generator: torch.Generator,
    *,
    kinship: float = 0.8,
    groups: int = 2,
    members: int = 2,
    shared: int = 12,
    own: int = 2,
    residuals: int = 8,
    absolute: bool = False,
) -> Problems:
    """Random problems whose tasks come in families: members of a family have similar matrices and targets.

    Args:
        number: How many.
        generator: Where the numbers come from.
        kinship: Share of the variance that members of a family have in common, in [0, 1].
        groups: Families.
        members: Tasks per family; the first ``members`` tasks are the first family.
        shared: Shared parameters.
        own: Own parameters of each task.
        residuals: Residuals of each task.
        absolute: See `Problems`.
    """

    def draw(*shape: int) -> Tensor:
        common = torch.randn(number, groups, 1, *shape, generator=generator, dtype=torch.float64)
        alone = torch.randn(number, groups, members, *shape, generator=generator, dtype=torch.float64)
        drawn: Tensor = kinship**0.5 * common + (1 - kinship) ** 0.5 * alone
        return drawn.flatten(1, 2)

    return Problems(draw(residuals, shared), draw(residuals, own), draw(residuals), absolute)


def descend(problems: Problems, state: State, rate: Tensor, groups: Partition, *, shared: bool, heads: bool) -> State:
    """One batch: the groups' gradient steps one after the other.

    Args:
        problems: N problems.
        state: Before the batch.
        rate: Learning rate, ``[N]``.
        groups: A partition of the tasks, in the order of their steps.
        shared: Whether a group's gradient of the shared parameters is taken where the earlier groups' steps have led to;
            otherwise where the batch began, as in a joint step.
        heads: The same for the heads.

    Returns:
        The state after the batch. With neither it is that of one joint step, whatever the groups.
    """
    step = rate.view(-1, 1)
    first = now = problems.gradients(state)
    for number, group in enumerate(groups):
        chosen = list(group)
        if number and (shared or heads):
            now = problems.gradients(state)
        to_shared = (now if shared else first)[0][:, chosen].sum(1)
        new_heads = state.heads.clone()
        new_heads[:, chosen] -= step.unsqueeze(2) * (now if heads else first)[1][:, chosen]
        state = State(state.shared - step * to_shared, new_heads)
    return state


STRATEGIES: dict[str, tuple[bool, bool]] = {
    "joint": (False, False),
    "heads sequential": (False, True),
    "shared sequential": (True, False),
    "both sequential": (True, True),
}
"""Which gradients see the earlier groups' steps of the batch: (shared, heads)."""


def train(
    problems: Problems,
    rate: Tensor,
    groups: Partition,
    batches: int,
    *,
    strategy: str = "both sequential",
    schedule: Callable[[int], float] = lambda _: 1.0,
    marks: Sequence[int] = (),
    start: State | None = None,
) -> tuple[State, dict[int, Tensor]]:
    """Several batches from the start.

    Args:
        problems: N problems.
        rate: Learning rate at the start, ``[N]``.
        groups: A partition of the tasks.
        batches: How many.
        strategy: One of `STRATEGIES`.
        schedule: Factor of the learning rate at each batch.
        marks: Numbers of batches after which the total loss is noted.
        start: Where to begin, if not at zero.

    Returns:
        The state at the end, and the total losses ``[N]`` at the marks.
    """
    shared, heads = STRATEGIES[strategy]
    state = start or problems.start()
    noted: dict[int, Tensor] = {}
    for batch in range(batches):
        state = descend(problems, state, rate * schedule(batch), groups, shared=shared, heads=heads)
        if batch + 1 in marks:
            noted[batch + 1] = problems.losses(state).sum(1)
    return state, noted


def stationarity(problems: Problems, state: State) -> Tensor:
    """How far from Pareto stationary: 0 where no direction improves all tasks, to first order.

    The norm of the shortest convex combination of the tasks' whole gradients (a task's gradient of another's head is 0),
    relative to the mean norm of the tasks' gradients at the start, ``[N]``.
    """
    shared, own = problems.gradients(state)
    grams = shared @ shared.transpose(1, 2) + torch.diag_embed(own.square().sum(-1))
    at_start = problems.gradients(problems.start())
    scale: Tensor = torch.cat(at_start, dim=-1).norm(dim=-1).mean(1)
    shortest = []
    for gram in grams:
        weights = torch.from_numpy(solvers.min_norm(gram.numpy()).weights)
        shortest.append((weights @ gram @ weights).clamp_min(0).sqrt())
    length: Tensor = torch.stack(shortest)
    return length / scale
