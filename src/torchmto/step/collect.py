"""One backward per task, on one process or many: gradients into the rows and the heads."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torchmto.gradients import Rows, ShardedRows, plain, quiet
from torchmto.step.forwards import forwards
from torchmto.step.losses import Chunk
from torchmto.step.messages import settle, sum_heads, take_shards
from torchmto.step.network import Heads
from torchmto.step.parts import Parts, Request
from torchmto.step.reduction import Sums


def collect(parts: Parts, request: Request, rows: Rows | ShardedRows, heads: Heads) -> Sums:
    """Run the forwards of a batch and one backward per task. Gradients are sums over micro-batches and ranks.

    Among several processes, with one micro-batch, a task's row is on its way while the next task's backward runs. Rows that are
    divided among the ranks travel after every micro-batch, others once, after the last. FSDP averages gradients within each
    backward.

    Args:
        parts: The step's parts.
        request: Whose gradients on which batch.
        rows: Gets the gradients of the shared parameters.
        heads: Gets the gradients of the others.

    Returns:
        The losses, summed over micro-batches and ranks.
    """
    network, reduction, several = parts.network, parts.reduction, parts.several
    number = len(parts.sources[request.source])
    divided = isinstance(rows, ShardedRows)
    streamed = several and not network.sharded and (number == 1 or divided) and parts.carried is None
    reduction.doing = f"gradients {sorted(request.wanted)} of batch {request.source}"
    if divided or network.split:
        # There is more than one exchange per list, so all ranks need lists of one length.
        reduction.doing += f" by {number} micro-batches"
    sums, failure = gather(parts, request, rows, heads, streamed=streamed)
    if several and not streamed:
        sums, _ = reduction.tell(sums)
    present = tuple(index for index in sums.totals if index in request.wanted)
    if network.sharded:
        rows.sort()
        settle(network, rows, heads)
        return sums
    if not streamed:
        network.lay_out(rows, heads)
    if several and not streamed:
        for index in present:
            rows.send(index)
    rows.wait()
    rows.sort()
    if several:
        sum_heads(network, rows, heads, present, failure)
    return sums


def gather(
    parts: Parts, request: Request, rows: Rows | ShardedRows, heads: Heads, *, streamed: bool
) -> tuple[Sums, BaseException | None]:
    """This rank's forwards and backwards; rows that are ``streamed`` are sent on the way.

    Returns:
        The losses, with those of earlier calls, and what failed where the other ranks wait for rows all the same.
    """
    network, several = parts.network, parts.several
    sums = parts.left_by_earlier_calls(request.source).sums
    failure: BaseException | None = None
    for position, chunk in enumerate(forwards(parts, request, apart=True)):
        own = Sums()
        own.add(chunk)
        if streamed:
            own, _ = parts.reduction.tell(own)
        if position == 0 or not several:
            network.lay_out(rows, heads)
        turn = [index for index in own.totals if index in request.wanted]
        failure = _backwards(parts, chunk, turn, rows, heads, streamed=streamed, failure=failure)
        sums.merge(own)
    return sums, failure


def _backwards(
    parts: Parts,
    chunk: Chunk,
    turn: Sequence[int],
    rows: Rows | ShardedRows,
    heads: Heads,
    *,
    streamed: bool,
    failure: BaseException | None,
) -> BaseException | None:
    """One backward for each task in ``turn`` that this rank has.

    Returns:
        What failed, here or before, where the other ranks wait for rows all the same.
    """
    own = [index for index in turn if index in chunk.losses]
    for index in turn:
        if index in own and failure is None:
            try:
                gradients = _backward(parts, chunk, index, last=index == own[-1])
                _place(parts, rows, heads, index, gradients)
                del gradients
            except BaseException as error:
                if not streamed:
                    raise
                failure = error
        if streamed:
            rows.send(index)
    return failure


def _backward(parts: Parts, chunk: Chunk, index: int, *, last: bool) -> Sequence[Tensor | None]:
    """One task's backward: the gradients of all trained parameters, times the loss's count."""
    network, loss, factor = parts.network, chunk.losses[index], chunk.counts[index]
    with chunk.activated():
        if network.sharded:
            # Its backwards leave gradients in `.grad`, averaged over the ranks.
            network.zero_grad()
            with quiet(network.parameters):
                torch.autograd.backward(
                    [loss], [torch.ones_like(loss) * (factor * network.ranks.size)], retain_graph=not last
                )
            gradients: Sequence[Tensor | None] = take_shards(network)
        else:
            gradients = torch.autograd.grad(
                loss,
                network.parameters,
                grad_outputs=network.seed(loss, factor),
                retain_graph=not last,
                allow_unused=True,
            )
    parts.num_backward += 1
    if last:
        network.refuse_hidden()
    return gradients


def _place(parts: Parts, rows: Rows | ShardedRows, heads: Heads, task: int, gradients: Sequence[Tensor | None]) -> None:
    """Write one task's gradients: shared ones into its row, others to its head; follow parameters that turn shared."""
    network = parts.network
    shared: list[tuple[Tensor, Tensor]] = []
    others: list[tuple[Tensor, Tensor]] = []
    for parameter, gradient in zip(network.parameters, gradients, strict=True):
        if gradient is None or not network.reaches(task, parameter):
            continue
        if id(parameter) in rows.position:
            shared.append((parameter, plain(gradient)))
        else:
            others.append((parameter, plain(gradient)))
    found = others if task in network.roles.seen else shared + others
    grown = not network.compiled and network.roles.observe(task, [network.name(p) for p, _ in found])
    if grown and not parts.several:
        network.lay_out(rows, heads)
        shared += [pair for pair in others if id(pair[0]) in rows.position]
        others = [pair for pair in others if id(pair[0]) not in rows.position]
    rows.add(task, shared)
    for parameter, gradient in others:
        hold(heads, task, parameter, gradient)


def hold(heads: Heads, task: int, parameter: Tensor, gradient: Tensor) -> None:
    """Add one task's gradient of a parameter outside the shared ones."""
    _, held = heads.setdefault(id(parameter), (parameter, {}))
    # A copy, because autograd may hand out one tensor for two parameters, or an expanded one.
    held[task] = held[task] + gradient if task in held else gradient.clone()
