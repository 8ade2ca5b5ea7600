"""One backward per task, on one process or many: gradients into the rows and the heads."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from torchmto.gradients import Rows, ShardedRows, plain, quiet
from torchmto.step.forwards import Forwards
from torchmto.step.info import Passes
from torchmto.step.losses import Chunk
from torchmto.step.network import Heads, Network
from torchmto.step.rank_sums import settle, sum_heads, take_shards
from torchmto.step.reduction import Reduction, Sums
from torchmto.step.task_gradients import hold


class Collector(ABC):
    """Runs the forwards of a batch and one backward per task. Gradients are sums over micro-batches and ranks.

    Args:
        network: The model.
        forwards: The step's forwards.
        reduction: Tells the ranks of losses and failures.
        passes: Where backwards are counted.
    """

    def __init__(self, network: Network, forwards: Forwards, reduction: Reduction, passes: Passes) -> None:
        self._network = network
        self._forwards = forwards
        self._reduction = reduction
        self._passes = passes

    @abstractmethod
    def collect(
        self, asked: tuple[str, ...], wanted: set[int], source: int, rows: Rows | ShardedRows, heads: Heads
    ) -> Sums:
        """Fill rows and heads.

        Args:
            asked: The tasks the closure is asked for.
            wanted: The tasks whose gradients are wanted.
            source: Which independent batch.
            rows: Gets the gradients of the shared parameters.
            heads: Gets the gradients of the others.

        Returns:
            The losses, summed over micro-batches and ranks.
        """

    def _backward(self, chunk: Chunk, index: int, factor: float, *, last: bool) -> tuple[Tensor | None, ...]:
        """One task's backward: ``factor`` times the gradients of all trained parameters."""
        loss = chunk.losses[index]
        with chunk.activated():
            gradients: tuple[Tensor | None, ...] = torch.autograd.grad(
                loss,
                self._network.parameters,
                grad_outputs=self._network.seed(loss, factor),
                retain_graph=not last,
                allow_unused=True,
            )
        self._passes.backward += 1
        if last:
            self._network.refuse_hidden()
        return gradients

    def _place(self, rows: Rows | ShardedRows, heads: Heads, task: int, gradients: Sequence[Tensor | None]) -> None:
        """Write one task's gradients: shared ones into its row, others to its head; follow parameters that turn shared."""
        network = self._network
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
        if grown and network.ranks.size == 1:
            network.lay_out(rows, heads)
            shared += [pair for pair in others if id(pair[0]) in rows.position]
            others = [pair for pair in others if id(pair[0]) not in rows.position]
        rows.add(task, shared)
        for parameter, gradient in others:
            hold(heads, task, parameter, gradient)


class OneProcess(Collector):
    """One process."""

    def collect(
        self, asked: tuple[str, ...], wanted: set[int], source: int, rows: Rows | ShardedRows, heads: Heads
    ) -> Sums:
        """Chunk by chunk, task by task."""
        network = self._network
        sums = Sums()
        averaged = len(self._forwards.sources[source]) > 1
        for chunk in self._forwards.run(asked, source, apart=wanted):
            network.lay_out(rows, heads)
            todo = [index for index in chunk.losses if index in wanted]
            counts = chunk.counts if averaged else dict.fromkeys(chunk.counts, 1.0)
            for index in todo:
                gradients = self._backward(chunk, index, counts[index], last=index == todo[-1])
                self._place(rows, heads, index, gradients)
                del gradients
            sums.add(Chunk(chunk.losses, counts))
        network.lay_out(rows, heads)
        rows.sort()
        return sums


class ManyProcesses(Collector):
    """Several processes with the same parameters.

    With one micro-batch a task's row is on its way while the next task's backward runs. Rows that are divided among the
    ranks travel after every micro-batch, others once, after the last.
    """

    def collect(
        self, asked: tuple[str, ...], wanted: set[int], source: int, rows: Rows | ShardedRows, heads: Heads
    ) -> Sums:
        """Chunk by chunk, task by task; ranks that lack a task add zeros."""
        network, reduction = self._network, self._reduction
        micro_batches = self._forwards.sources[source]
        streamed = len(micro_batches) == 1 or isinstance(rows, ShardedRows)
        # Where there is more than one exchange per list, all ranks need lists of one length.
        fixed = isinstance(rows, ShardedRows) or network.split
        number = f" by {len(micro_batches)} micro-batches" if fixed else ""
        reduction.doing = f"gradients {sorted(wanted)} of batch {source}{number}"
        sums = Sums()
        failure: Exception | None = None
        for position, chunk in enumerate(self._forwards.run(asked, source, apart=wanted)):
            todo = [index for index in chunk.losses if index in wanted]
            last = todo[-1] if todo else None
            own = Sums()
            own.add(chunk)
            if streamed:
                own, _ = reduction.tell(own)
                todo = [index for index in own.totals if index in wanted]
            if position == 0:
                network.lay_out(rows, heads)
            for index in todo:
                if failure is None and index in chunk.losses:
                    try:
                        gradients = self._backward(chunk, index, chunk.counts[index], last=index == last)
                        self._place(rows, heads, index, gradients)
                        del gradients
                    except Exception as error:  # noqa: BLE001 - raised on all ranks, once they have met again
                        failure = error
                if streamed:
                    rows.send(index)
            sums.merge(own)
        if not streamed:
            sums, _ = reduction.tell(sums, failure=failure)
            network.lay_out(rows, heads)
            for index in sums.totals:
                if index in wanted:
                    rows.send(index)
        rows.wait()
        rows.sort()
        sum_heads(network, rows, heads, tuple(index for index in sums.totals if index in wanted), failure)
        return sums


class Shards(Collector):
    """Several processes among which FSDP shards parameters: it averages gradients over them within each backward."""

    def collect(
        self, asked: tuple[str, ...], wanted: set[int], source: int, rows: Rows | ShardedRows, heads: Heads
    ) -> Sums:
        """Chunk by chunk, task by task, the same ones on all ranks."""
        network, reduction = self._network, self._reduction
        reduction.doing = f"gradients {sorted(wanted)} of batch {source}"
        sums = Sums()
        network.lay_out(rows, heads)
        for chunk in self._forwards.run(asked, source, apart=wanted):
            todo = [index for index in chunk.losses if index in wanted]
            for index in todo:
                loss = chunk.losses[index]
                network.zero_grad()
                with chunk.activated(), quiet(network.parameters):
                    torch.autograd.backward(
                        [loss],
                        [torch.ones_like(loss) * (chunk.counts[index] * network.ranks.size)],
                        retain_graph=index != todo[-1],
                    )
                self._passes.backward += 1
                self._place(rows, heads, index, take_shards(network))
            sums.add(chunk)
        sums, _ = reduction.tell(sums)
        rows.sort()
        settle(network, rows, heads)
        return sums
