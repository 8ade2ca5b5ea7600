"""Task gradients whose rows are kept."""

from __future__ import annotations

import torch
from torch import Tensor

from torchmto.gradients import Rows, ShardedRows, gramian
from torchmto.step.collect import collect, gather
from torchmto.step.messages import own_columns
from torchmto.step.network import Heads, Network
from torchmto.step.parts import Parts, Request
from torchmto.step.task_gradients import TaskGradients, factors_of, present, rescale_heads


def gradients_with_rows(parts: Parts, request: Request) -> TaskGradients:
    """K backwards into the K x P matrix, and its Gramian.

    Sums over micro-batches and ranks turn into means, unscaled and weighted, by one factor per task.
    """
    network = parts.network
    parts.engine = "parameters"
    rows, heads = _begun(parts, request.source)
    everything = parts.reduction.average(collect(parts, request, rows, heads))
    losses = present(parts, everything, request)
    factors = factors_of(network, losses)
    if factors is not None:
        rows.matrix.mul_(factors.to(rows.matrix).unsqueeze(1))
        rescale_heads(heads, losses, factors)
    product = _gramian(network, rows)
    parts.finite.losses(everything, everything.raw.tolist())
    parts.finite.task_gradients(losses, product)
    return TaskGradients(rows, losses, product, heads, everything, precision=network.precision(rows.parameters))


def keep_rows(parts: Parts, request: Request) -> None:
    """One more micro-batch of a batch that is accumulated over several calls: its rows are added to those of earlier ones."""
    rows, heads = _begun(parts, request.source)
    gather(parts, request, rows, heads, streamed=False)


def _begun(parts: Parts, source: int) -> tuple[Rows | ShardedRows, Heads]:
    """The rows and heads of a batch, empty unless earlier calls have left some."""
    rows = parts.network.rows_of(source)
    if parts.carried is None or source not in parts.carried:
        rows.begin()
    return rows, parts.left_by_earlier_calls(source).heads


def _gramian(network: Network, rows: Rows | ShardedRows) -> Tensor:
    """The Gramian of the rows; every rank computes that of its part of the columns, and they are summed."""
    matrix, ranks = rows.matrix, network.ranks
    if ranks.size == 1:
        return gramian(matrix)
    total = torch.full((len(matrix), len(matrix)), torch.nan, dtype=torch.float64)
    try:
        total = sum((gramian(matrix[:, columns]) for columns in own_columns(network, rows)), torch.zeros_like(total))
    finally:
        # After an error, too: the other ranks wait for it.
        total = ranks.sum_(total.to(network.device)).cpu()
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
