"""The gradients of the tasks of one batch, as methods see them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from torchmto.gradients import Rows, ShardedRows
from torchmto.step.finite import SkippedError
from torchmto.step.losses import Chunk, Losses, empty_batch
from torchmto.step.network import Heads, Network
from torchmto.step.parts import Parts, Request


class TaskGradients:
    """The present tasks' gradients: rows on the shared parameters, and each head's own.

    Attributes:
        indices: The present tasks, ascending; row i of everything below belongs to task ``indices[i]``.
        losses: Their losses, [k].
        gramian: G = J Jᵀ, float64 on the CPU, [k, k].
        heads: Parameters outside the shared ones -> the gradient of each task that reached them.
        reduced: The losses of the rows' tasks, with counts.
        all_losses: The losses of all tasks of the forward, more where more were asked for.
        precision: The machine precision of the rows, the coarsest of their parameters'.
        graph: Where the rows aren't kept: the losses with graph, of this rank.
    """

    def __init__(
        self,
        rows: Rows | ShardedRows,
        losses: Losses,
        gramian: Tensor,
        heads: Heads,
        everything: Losses,
        *,
        precision: float,
        graph: Sequence[Chunk] | None = None,
    ) -> None:
        self.rows = rows
        self.indices = losses.indices
        self.losses = losses.values
        self.reduced = losses
        self.all_losses = everything
        self.gramian = gramian
        self.heads = heads
        self.precision = precision
        self.graph = graph

    @property
    def matrix(self) -> Tensor:
        """J, the gradients of the present tasks on the shared parameters as rows, [k, P]. The live buffer, no copy."""
        return self.rows.matrix

    @property
    def parameters(self) -> list[Tensor]:
        """The shared parameters, in the order of their columns."""
        return self.rows.parameters

    def has(self, parameter: Tensor) -> bool:
        """Whether ``parameter`` is one of the shared parameters."""
        return id(parameter) in self.rows.position

    def columns(self, parameter: Tensor) -> slice:
        """The columns of one shared parameter."""
        return self.rows.slices[self.rows.position[id(parameter)]]

    def view(self, parameter: Tensor) -> Tensor:
        """The gradients of one shared parameter, a view [k, *parameter.shape] of the matrix."""
        assert isinstance(self.rows, Rows), "methods that need whole rows are refused where rows are divided"
        return self.rows.view(parameter)


def present(parts: Parts, everything: Losses, request: Request) -> Losses:
    """The losses of the tasks whose gradients are wanted; there has to be one, and a parameter that tasks share."""
    losses = everything.only(request.wanted)
    if not everything.indices:
        raise empty_batch(parts.asked)
    if not losses.indices:
        raise SkippedError("None of the tasks of this sub-step is present.", absent=True)
    if parts.network.roles.unshared and request.combined:
        raise ValueError(
            f"{parts.network.unshared()} A method that combines the gradients of tasks needs shared parameters; loss "
            "weightings, as `gd`, do without."
        )
    return losses


def factors_of(network: Network, losses: Losses) -> Tensor | None:
    """What turns every present task's summed gradient into its mean, float64 [k]; None for 1.

    It also undoes the scaler's scale and applies the user's loss weights.
    """
    if losses.factors is None and network.scaler is None and all(total == 1 for total in losses.totals.values()):
        return None
    factors = torch.tensor([1.0 / losses.totals[i] for i in losses.indices], dtype=torch.float64)
    scale = network.scale(network.device)
    if scale is not None:
        factors = factors / scale.to(factors)
    if losses.factors is not None:
        factors = factors * losses.factors.to(factors)
    return None if bool((factors == 1).all()) else factors


def hold(heads: Heads, task: int, parameter: Tensor, gradient: Tensor) -> None:
    """Add one task's gradient of a parameter outside the shared ones."""
    _, held = heads.setdefault(id(parameter), (parameter, {}))
    # A copy, because autograd may hand out one tensor for two parameters, or an expanded one.
    held[task] = held[task] + gradient if task in held else gradient.clone()


def rescale_heads(heads: Heads, losses: Losses, factors: Tensor) -> None:
    """Multiply every task's gradients of heads by its factor."""
    by_task = dict(zip(losses.indices, factors.tolist(), strict=True))
    for parameter, held in heads.values():
        heads[id(parameter)] = (parameter, {task: g * by_task[task] for task, g in held.items() if task in by_task})


def set_heads(network: Network, gradients: TaskGradients, weights: Tensor | None) -> None:
    """Set ``.grad`` of the heads: the sum of their tasks' gradients, times the tasks' weights [k] if there are any."""
    by_task = dict.fromkeys(gradients.indices, 1.0)
    if weights is not None:
        by_task = dict(zip(gradients.indices, weights.tolist(), strict=True))
    totals: list[tuple[Tensor, Tensor]] = []
    for parameter, held in gradients.heads.values():
        total: Tensor | None = None
        for task, gradient in held.items():
            part = gradient if by_task[task] == 1 else gradient * by_task[task]
            total = part if total is None else total + part
        if total is not None and parameter.requires_grad:
            totals.append((parameter, total))
    network.set_gradients(totals)
