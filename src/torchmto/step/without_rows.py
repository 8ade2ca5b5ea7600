"""Task gradients whose rows aren't kept: an engine computes their Gramian, and one more backward combines them."""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from torchmto.gradients import Rows, all_finite
from torchmto.gradients.engine import Piece
from torchmto.step.losses import Chunk
from torchmto.step.network import Heads
from torchmto.step.rank_sums import sum_gradients, sum_heads
from torchmto.step.reduction import Sums
from torchmto.step.task_gradients import Computation, TaskGradients, factors_of, hold, rescale_heads
from torchmto.step.with_rows import WithRows


class WithoutRows(Computation):
    """The Gramian and the heads' gradients by the network's engine; the graphs stay for the combination."""

    @functools.cached_property
    def _rows(self) -> WithRows:
        """For steps in which rows are cheaper."""
        return WithRows(self._network, self._forwards, self._reduction, self._finite, self._passes)

    def gradients(self, asked: tuple[str, ...], wanted: set[int], source: int) -> TaskGradients:
        """The Gramian and the heads' gradients."""
        network, engine, reduction = self._network, self._network.engine, self._reduction
        assert engine is not None
        several = network.ranks.size > 1
        number = len(self._forwards.sources[source])
        if number > 1 and not engine.adds:
            raise ValueError(
                f'gradients="{engine.name}" works on one micro-batch: the Gramian of a sum of gradients needs the sums, which '
                'it doesn\'t keep. Use gradients="parameters" or "layerwise".'
            )
        reduction.doing = f"gradients {sorted(wanted)} of batch {source}"
        engine.begin()
        chunks, sums = self._run(asked, wanted, source, averaged=several or number > 1)
        forwards = [{i: loss for i, loss in chunk.losses.items() if i in wanted} for chunk in chunks]
        self._observe(engine.read(forwards), {index for losses in forwards for index in losses})
        if not engine.pays(self._shared(), sum(map(len, forwards))):
            engine.forget()
            self._forwards.held = chunks
            return self._rows.gradients(asked, wanted, source)
        self._passes.engine = engine.name
        if several:
            sums, _ = reduction.tell(sums)
        everything = reduction.average(sums)
        losses = self._present(everything, wanted)
        heads: Heads = {}

        def take(task: int, parameter: Tensor, gradient: Tensor) -> None:
            if network.reaches(task, parameter):
                hold(heads, task, parameter, gradient)

        # Telling the ranks has told this one which parameters others share.
        shared = self._shared()
        known = set(map(id, shared))
        others = [p for p in network.parameters if id(p) not in known]
        pieces = [
            Piece(own, {i: network.seed(loss, chunk.counts[i]) for i, loss in own.items()}, chunk.activated)
            for own, chunk in zip(forwards, chunks, strict=True)
        ]
        failure: Exception | None = None
        product = torch.zeros(0)
        try:
            product = engine.gramian(pieces, losses.indices, shared=shared, others=others, take=take)
        except Exception as error:
            if not several:
                raise
            failure = error
        self._passes.backward += sum(len(own) for own in forwards)
        rows = Rows(0, network.ranks)
        if several:
            network.lay_out(rows, heads)
            sum_heads(network, rows, heads, losses.indices, failure)
        product = product.to(device="cpu", dtype=torch.float64)
        factors = factors_of(network, losses)
        if factors is not None:
            product = product * torch.outer(factors, factors)
            rescale_heads(heads, losses, factors)
        self._finite.losses(everything, everything.raw.tolist())
        self._finite.task_gradients(losses, product, heads)
        kept = [Chunk(own, chunk.counts, chunk.active) for own, chunk in zip(forwards, chunks, strict=True)]
        return TaskGradients(rows, losses, product, heads, everything, graph=kept)

    def _run(
        self, asked: tuple[str, ...], wanted: set[int], source: int, *, averaged: bool
    ) -> tuple[list[Chunk], Sums]:
        """All forwards of a batch, and the sums of their losses."""
        chunks = list(self._forwards.run(asked, source, apart=wanted))
        sums = Sums()
        for position, chunk in enumerate(chunks):
            counts = chunk.counts if averaged else dict.fromkeys(chunk.counts, 1.0)
            chunks[position] = Chunk(chunk.losses, counts, chunk.active)
            sums.add(chunks[position])
        return chunks, sums

    def _shared(self) -> list[Tensor]:
        """The shared parameters, in the same order on all ranks."""
        network = self._network
        return [p for p in network.parameters if network.roles.is_shared(network.name(p))]

    def _observe(self, reached: Mapping[int, int], tasks: Collection[int]) -> None:
        """Learn from the graph which task reaches which parameter."""
        network = self._network
        if network.compiled:
            return
        for task in tasks:
            names = [network.name(p) for p in network.parameters if reached.get(id(p), 0) >> task & 1]
            network.roles.observe(task, names)

    def combine(self, gradients: TaskGradients, weights: Tensor | None, vector: Tensor | None) -> None:
        """``weights @ J`` by one more backward through the graphs of the task gradients."""
        network, losses = self._network, gradients.reduced
        if gradients.graph is None:
            self._rows.combine(gradients, weights, vector)
            return
        assert weights is not None, "only Gramian methods do without rows"
        assert network.engine is not None
        chunks, gradients.graph = gradients.graph, None
        if losses.factors is not None:
            weights = weights * losses.factors.to(weights)
        scale = network.scale(network.device)
        if scale is not None:
            weights = weights.to(scale) * scale
        by_task = dict(zip(losses.indices, weights.unbind(), strict=True))
        pieces = [
            Piece(
                chunk.losses,
                {i: (by_task[i] * (chunk.counts[i] / losses.totals[i])).to(loss) for i, loss in chunk.losses.items()},
                chunk.activated,
            )
            for chunk in chunks
        ]
        shared = self._shared()
        failure: Exception | None = None
        try:
            self._passes.backward += network.engine.backward(pieces, shared)
        except Exception as error:
            if network.ranks.size == 1:
                raise
            failure = error
        network.tidy_sparse()
        sum_gradients(network, failure)
        # Products of factors are taken in float32: a gradient formed in half precision may overflow here for the first time.
        if not all_finite([p.grad for p in shared if p.grad is not None]):
            self._finite.fail_with_gradient(losses, "The combined gradient isn't finite.")
        if scale is not None:
            torch._foreach_div_([p.grad for p in shared if p.grad is not None], scale)
