"""Task gradients whose rows are kept: the default."""

from __future__ import annotations

import torch
from torch import Tensor

from torchmto.gradients import Rows, ShardedRows, gramian
from torchmto.step.collect import Collector, ManyProcesses, OneProcess, Shards
from torchmto.step.finite import FiniteChecks
from torchmto.step.forwards import Forwards
from torchmto.step.info import Passes
from torchmto.step.network import Heads, Network
from torchmto.step.rank_sums import own_columns
from torchmto.step.reduction import Reduction
from torchmto.step.task_gradients import Computation, TaskGradients, factors_of, rescale_heads


class WithRows(Computation):
    """K backwards into the K x P matrix, its Gramian, and combinations of its rows."""

    def __init__(
        self, network: Network, forwards: Forwards, reduction: Reduction, finite: FiniteChecks, passes: Passes
    ) -> None:
        super().__init__(network, forwards, reduction, finite, passes)
        kind = Shards if network.sharded else OneProcess if network.ranks.size == 1 else ManyProcesses
        self._collector: Collector = kind(network, forwards, reduction, passes)

    def gradients(self, asked: tuple[str, ...], wanted: set[int], source: int) -> TaskGradients:
        """Rows, heads and Gramian; sums turn into means, unscaled and weighted, by one factor per task."""
        network = self._network
        self._passes.engine = "parameters"
        rows = network.rows_of(source)
        rows.begin()
        heads: Heads = {}
        everything = self._reduction.average(self._collector.collect(asked, wanted, source, rows, heads))
        losses = self._present(everything, wanted)
        factors = factors_of(network, losses)
        if factors is not None:
            rows.matrix.mul_(factors.to(rows.matrix).unsqueeze(1))
            rescale_heads(heads, losses, factors)
        product = self._gramian(rows)
        self._finite.losses(everything, everything.raw.tolist())
        self._finite.task_gradients(losses, product, heads)
        return TaskGradients(rows, losses, product, heads, everything)

    def _gramian(self, rows: Rows | ShardedRows) -> Tensor:
        """The Gramian of the rows; every rank computes that of its part of the columns, and they are summed."""
        matrix, ranks = rows.matrix, self._network.ranks
        if ranks.size == 1:
            return gramian(matrix)
        total = torch.zeros(len(matrix), len(matrix), dtype=torch.float64)
        for columns in own_columns(self._network, rows):
            total += gramian(matrix[:, columns])
        return ranks.sum_(total.to(self._network.device)).cpu()

    def combine(self, gradients: TaskGradients, weights: Tensor | None, vector: Tensor | None) -> None:
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
        self._network.set_gradients(
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
