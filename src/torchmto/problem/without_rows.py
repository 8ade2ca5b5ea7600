"""Task gradients whose rows aren't kept: an engine computes their Gramian, and one more backward combines them."""

from __future__ import annotations

import torch
from torch import Tensor

from torchmto.gradients import Rows
from torchmto.problem.losses import Chunk
from torchmto.problem.network import Heads
from torchmto.problem.reduction import Sums
from torchmto.problem.task_gradients import Computation, TaskGradients, factors_of, hold, rescale_heads


class WithoutRows(Computation):
    """The Gramian and the heads' gradients by the network's engine; the graph stays for the combination."""

    def gradients(self, asked: tuple[str, ...], wanted: set[int], source: int) -> TaskGradients:
        """The Gramian and the heads' gradients."""
        network, engine = self._network, self._network.engine
        assert engine is not None
        if len(self._forwards.sources[source]) > 1:
            raise ValueError(
                f'gradients="{engine.name}" works on one micro-batch: the Gramian of a sum of gradients needs the sums, which '
                'it doesn\'t keep. Use gradients="parameters".'
            )
        engine.begin()
        (chunk,) = self._forwards.run(asked, source)
        sums = Sums()
        sums.add(Chunk(chunk.losses, dict.fromkeys(chunk.counts, 1.0)))
        everything = self._reduction.average(sums)
        losses = self._present(everything, wanted)
        present = {index: chunk.losses[index] for index in losses.indices}
        reached = engine.read(present)
        roles = network.roles
        if not network.compiled:
            for index in present:
                names = [network.name(p) for p in network.parameters if reached.get(id(p), 0) >> index & 1]
                roles.observe(index, names)
        heads: Heads = {}

        def take(task: int, parameter: Tensor, gradient: Tensor) -> None:
            if network.reaches(task, parameter):
                hold(heads, task, parameter, gradient)

        shared = [p for p in network.parameters if roles.is_shared(network.name(p))]
        others = [p for p in network.parameters if not roles.is_shared(network.name(p))]
        seeds = {index: network.seed(loss, 1.0) for index, loss in present.items()}
        product = engine.gramian(present, seeds, shared=shared, others=others, take=take)
        self._passes.backward += len(present)
        product = product.to(device="cpu", dtype=torch.float64)
        factors = factors_of(network, losses)
        if factors is not None:
            product = product * torch.outer(factors, factors)
            rescale_heads(heads, losses, factors)
        self._finite.losses(everything, everything.raw.tolist())
        self._finite.task_gradients(losses, product, heads)
        return TaskGradients(
            Rows(0, network.ranks), losses, product, heads, everything, graph=(list(present.values()), shared)
        )

    def combine(self, gradients: TaskGradients, weights: Tensor | None, vector: Tensor | None) -> None:
        """``weights @ J`` by one more backward through the graph of the task gradients."""
        network = self._network
        assert weights is not None, "only Gramian methods do without rows"
        assert gradients.graph is not None
        assert network.engine is not None
        losses, shared = gradients.graph
        gradients.graph = None
        factors = gradients.reduced.factors
        if factors is not None:
            weights = weights * factors.to(weights)
        scale = network.scale(network.device)
        if scale is not None:
            weights = weights.to(scale) * scale
        cotangents = [weight.to(loss) for weight, loss in zip(weights.unbind(), losses, strict=True)]
        network.engine.backward(losses, cotangents, shared)
        self._passes.backward += bool(shared)
        if scale is not None:
            torch._foreach_div_([p.grad for p in shared if p.grad is not None], scale)
