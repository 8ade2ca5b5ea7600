"""How heads can make the tasks' gradients agree: second derivatives, through what the heads read."""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from torchmto.checks import warn
from torchmto.gradients.backwards import ending_at
from torchmto.gradients.finite import plain
from torchmto.gradients.reach import read_by
from torchmto.step.forwards import forwards
from torchmto.step.losses import Chunk
from torchmto.step.messages import sum_heads
from torchmto.step.network import Heads, Network
from torchmto.step.parts import Parts, Request
from torchmto.step.task_gradients import TaskGradients, factors_of, hold, rescale_heads


def agreement(parts: Parts, request: Request, gradients: TaskGradients, weights: Tensor) -> Heads:
    """The derivatives by the heads; see :meth:`torchmto.step.StepContext.agreement`."""
    network, losses = parts.network, gradients.reduced
    factors = factors_of(network, losses)
    weights = weights.double() if factors is None else weights.double() * factors
    found: Heads = {}
    failure: BaseException | None = None
    parts.doing = "agreement"
    try:
        with parts.noise.extra():
            for chunk in forwards(parts, request):
                with chunk.activated():
                    _add(parts, chunk, gradients, dict(zip(losses.indices, weights.tolist(), strict=True)), found)
    except BaseException as error:
        if not network.ranks.owing:
            raise
        failure = error
    if parts.several:
        sum_heads(network, gradients.rows, found, losses.indices, failure)
    if factors is not None:
        rescale_heads(found, losses, factors)
    return found


def _add(parts: Parts, chunk: Chunk, gradients: TaskGradients, weights: dict[int, float], found: Heads) -> None:
    """Add what one forward brings."""
    losses = {task: loss for task, loss in chunk.losses.items() if task in weights}
    _check(parts.network, unlike=len(losses) < len(weights))
    alike: dict[frozenset[GradientEdge], tuple[list[GradientEdge], list[int]]] = {}
    for task, read in zip(losses, read_by(losses.values()), strict=True):
        if read:
            alike.setdefault(frozenset(read), (read, []))[1].append(task)
    for read, tasks in alike.values():
        with ending_at(edge.node for edge in read):
            pulls = _pulls(parts, chunk, losses, read, tasks)
        common: dict[int, Tensor] = {}
        for task, pull in pulls.items():
            for place, part in enumerate(pull):
                if part is not None:
                    own = weights[task] * part.detach().to(torch.promote_types(part.dtype, torch.float32))
                    common[place] = common[place] + own if place in common else own
        for task in tasks:
            heads = [parameter for parameter, held in gradients.heads.values() if task in held]
            products = [(part.conj() * common[i]).real.sum() for i, part in enumerate(pulls[task]) if part is not None]
            product = sum(products[1:], products[0]) if products else torch.zeros(())
            if not heads or not product.requires_grad:
                continue
            parts.num_backward += 1
            derivatives = torch.autograd.grad(product, heads, retain_graph=True, allow_unused=True)
            for parameter, derivative in zip(heads, derivatives, strict=True):
                if derivative is not None:
                    hold(found, task, parameter, plain(derivative))


def _check(network: Network, *, unlike: bool) -> None:
    """Raise if the model is compiled; say once that micro-batches are ``unlike`` in their tasks.

    With split norms each has one task alone, which a method knows before.
    """
    if network.compiled:
        raise ValueError("The model is compiled, and PyTorch has no second derivatives of compiled models.")
    if unlike and not network.split and "unlike" not in network.warned:
        network.warned.add("unlike")
        warn(
            "A micro-batch, or a rank's batch, lacks tasks that others of this step have. Which results tasks share is found "
            "in each by itself, so what heads learn to agree with isn't what it is in one batch. This warning isn't repeated."
        )


def _pulls(
    parts: Parts, chunk: Chunk, losses: dict[int, Tensor], read: Sequence[GradientEdge], tasks: Collection[int]
) -> dict[int, tuple[Tensor | None, ...]]:
    """Every task's gradients by the results that some ``tasks`` read; those of these tasks with graph."""
    parts.num_backward += len(losses)
    return {
        task: torch.autograd.grad(
            loss,
            read,
            parts.network.seed(loss, chunk.counts[task]),
            retain_graph=True,
            create_graph=task in tasks,
            allow_unused=True,
        )
        for task, loss in losses.items()
    }
