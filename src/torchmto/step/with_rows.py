"""Task gradients whose rows are kept: one backward per task, on one process or many, into the rows and the heads."""

from collections.abc import Sequence

import torch
from torch import Tensor

from torchmto.gradients import Rows, ShardedRows, gradients_of, gramian, plain, quiet
from torchmto.step.forwards import forwards
from torchmto.step.losses import Chunk, Losses
from torchmto.step.messages import own_columns, settle, sum_heads, take_shards
from torchmto.step.network import Heads, Network
from torchmto.step.parts import Parts, Request
from torchmto.step.reduction import Sums
from torchmto.step.task_gradients import TaskGradients, factors_of, hold, present, rescale_heads


def gradients_with_rows(parts: Parts, request: Request) -> TaskGradients:
    """K backwards into the K x P matrix, and its Gramian.

    Sums over micro-batches and ranks turn into means, unscaled and weighted, by one factor per task.
    """
    network = parts.network
    parts.engine = "parameters"
    rows, heads = _begun(parts, request.source)
    everything = _collect(parts, request, rows, heads)
    losses = present(parts, everything, request)
    factors = factors_of(network, losses)
    if factors is not None:
        rows.matrix.mul_(factors.to(rows.matrix).unsqueeze(1))
        rescale_heads(heads, losses, factors)
    product = gramian(rows.matrix) if not parts.several else _summed_gramian(network, rows)
    parts.finite.losses(everything, everything.raw.tolist())
    parts.finite.task_gradients(losses, product)
    return TaskGradients(rows, losses, product, heads, everything, precision=network.precision(rows.parameters))


def keep_rows(parts: Parts, request: Request) -> None:
    """One more micro-batch of a batch that is accumulated over several calls: its rows are added to those of earlier ones."""
    rows, heads = _begun(parts, request.source)
    _gather(parts, request, rows, heads, streamed=False)


def _begun(parts: Parts, source: int) -> tuple[Rows | ShardedRows, Heads]:
    """The rows and heads of a batch, empty unless earlier calls have left some."""
    rows = parts.network.rows_of(source)
    if parts.carried is None or source not in parts.carried:
        rows.begin()
    return rows, {} if parts.carried is None else parts.left_by_earlier_calls(source).heads


def _collect(parts: Parts, request: Request, rows: Rows | ShardedRows, heads: Heads) -> Losses:
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
        The losses, averaged over micro-batches and ranks.
    """
    network, reduction = parts.network, parts.reduction
    number = len(parts.sources[request.source])
    if not parts.several and number == 1 and parts.carried is None and not network.split:
        (chunk,) = forwards(parts, request, apart=True)
        network.lay_out(rows, heads)
        _backwards(parts, chunk, [index for index in chunk.losses if index in request.wanted], rows, heads)
        return reduction.over_ranks([chunk])
    if not parts.several:
        sums, _ = _gather(parts, request, rows, heads, streamed=False)
        rows.sort()
        return reduction.average(sums)
    divided = isinstance(rows, ShardedRows)
    streamed = not network.sharded and (number == 1 or divided) and parts.carried is None
    reduction.doing = f"gradients {sorted(request.wanted)} of batch {request.source}"
    if divided or network.split:
        # There is more than one exchange per list, so all ranks need lists of one length.
        reduction.doing += f" by {number} micro-batches"
    sums, failure = _gather(parts, request, rows, heads, streamed=streamed)
    if not streamed:
        sums, _ = reduction.tell(sums)
    present = tuple(index for index in sums.totals if index in request.wanted)
    if network.sharded:
        rows.sort()
        settle(network, rows, heads)
        return reduction.average(sums)
    if not streamed:
        network.lay_out(rows, heads)
        for index in present:
            rows.send(index)
    rows.wait()
    rows.sort()
    sum_heads(network, rows, heads, present, failure)
    return reduction.average(sums)


def _gather(
    parts: Parts, request: Request, rows: Rows | ShardedRows, heads: Heads, *, streamed: bool
) -> tuple[Sums, BaseException | None]:
    """This rank's forwards and backwards; rows that are ``streamed`` are sent on the way.

    Returns:
        The losses, with those of earlier calls, and what failed where the other ranks wait for rows all the same.
    """
    network = parts.network
    sums = parts.left_by_earlier_calls(request.source).sums
    failure: BaseException | None = None
    for position, chunk in enumerate(forwards(parts, request, apart=True)):
        own = sums if not streamed else Sums()
        own.add(chunk)
        if streamed:
            own, _ = parts.reduction.tell(own)
            sums.merge(own)
        if position == 0 or not parts.several:
            network.lay_out(rows, heads)
        turn = [index for index in (own.totals if streamed else chunk.losses) if index in request.wanted]
        failure = _backwards(parts, chunk, turn, rows, heads, streamed=streamed, failure=failure)
    return sums, failure


def _backwards(
    parts: Parts,
    chunk: Chunk,
    turn: Sequence[int],
    rows: Rows | ShardedRows,
    heads: Heads,
    *,
    streamed: bool = False,
    failure: BaseException | None = None,
) -> BaseException | None:
    """One backward for each task in ``turn`` that this rank has.

    Returns:
        What failed, here or before, where the other ranks wait for rows all the same.
    """
    own = [index for index in turn if index in chunk.losses]
    with chunk.activated():
        for index in turn:
            if index in own and failure is None:
                try:
                    gradients = _backward(parts, chunk, index, last=index == own[-1])
                    _place(parts, rows, heads, index, gradients)
                    del gradients
                except BaseException as error:
                    if not streamed or parts.network.ranks.lost:
                        raise
                    failure = error
            if streamed:
                rows.send(index)
    return failure


def _backward(parts: Parts, chunk: Chunk, index: int, *, last: bool) -> Sequence[Tensor | None]:
    """One task's backward: the gradients of all trained parameters, times the loss's count."""
    network, loss, factor = parts.network, chunk.losses[index], chunk.counts[index]
    if network.sharded:
        # Its backwards leave gradients in `.grad`, averaged over the ranks.
        network.zero_grad()
        seed = torch.ones_like(loss) * (factor * network.ranks.size)
        with quiet(network.parameters):
            torch.autograd.backward([loss], [seed], retain_graph=not last)
        gradients: Sequence[Tensor | None] = take_shards(network)
    else:
        gradients = gradients_of(loss, network.seed(loss, factor), network.parameters, retain=not last)
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
        if gradient is None or (network.compiled and not network.reaches(task, parameter)):
            continue
        own = plain(gradient) if gradient.is_sparse or gradient.is_complex() else gradient
        (shared if id(parameter) in rows.position else others).append((parameter, own))
    new = others if task in network.roles.seen else shared + others
    grown = not network.compiled and network.roles.observe(task, [network.name(p) for p, _ in new])
    if grown and not parts.several:
        network.lay_out(rows, heads)
        shared += [pair for pair in others if id(pair[0]) in rows.position]
        others = [pair for pair in others if id(pair[0]) not in rows.position]
    rows.add(task, shared)
    for parameter, gradient in others:
        hold(heads, task, parameter, gradient)


def _summed_gramian(network: Network, rows: Rows | ShardedRows) -> Tensor:
    """The Gramian of the rows; every rank computes that of its part of the columns, and they are summed."""
    matrix = rows.matrix
    total = torch.full((len(matrix), len(matrix)), torch.nan, dtype=torch.float64)
    try:
        total = sum((gramian(matrix[:, columns]) for columns in own_columns(network, rows)), torch.zeros_like(total))
    finally:
        # After an error, too: the other ranks wait for it.
        total = network.ranks.sum_(total.to(network.device)).cpu()
    return total


def combine_rows(parts: Parts, gradients: TaskGradients, weights: Tensor | None, vector: Tensor | None) -> None:
    """One matrix-vector product over the rows, in place where they are whole."""
    rows = gradients.rows
    if vector is None and isinstance(rows, Rows):
        assert weights is not None, "either weights or a vector"
        views = rows.weighted_sum_(weights)
    else:
        flat, views = rows.combined()
        if vector is None:
            assert weights is not None, "either weights or a vector"
            torch.mv(rows.matrix.T, weights.to(flat), out=flat)
        elif vector is not flat:
            flat.copy_(vector)
    if isinstance(rows, ShardedRows):
        rows.gather()
    parts.network.set_gradients(
        [(rows.parameters[i], views[i]) for i in rows.reached() if rows.parameters[i].requires_grad]
    )


def inner_products(network: Network, first: TaskGradients, second: TaskGradients) -> Tensor:
    """Inner products between the rows of two batches, [k1, k2]; see :meth:`torchmto.step.StepContext.inner_products`."""
    if network.shard_gradients and len(first.parameters) != len(second.parameters):
        raise ValueError(
            "A parameter became shared between two independent batches, which divides the columns differently. With "
            "shard_gradients=True give the shared parameters as `shared=`."
        )
    narrow = min(first.rows, second.rows, key=lambda rows: rows.matrix.shape[1])
    total = torch.zeros(len(first.indices), len(second.indices), dtype=torch.float64)
    for columns in own_columns(network, narrow):
        total += (first.matrix[:, columns] @ second.matrix[:, columns].T).to(total)
    return network.ranks.sum_(total.to(network.device)).cpu()
