"""Task gradients whose rows aren't kept: an engine computes their Gramian, and one more backward combines them."""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from torchmto.gradients import Rows
from torchmto.gradients.engine import Piece, Wanted
from torchmto.step.forwards import forwards
from torchmto.step.losses import Chunk
from torchmto.step.messages import sum_gradients, sum_heads
from torchmto.step.network import Heads, Network
from torchmto.step.parts import Parts, Request
from torchmto.step.task_gradients import TaskGradients, factors_of, hold, present, rescale_heads
from torchmto.step.with_rows import gradients_with_rows


def gradients_without_rows(parts: Parts, request: Request) -> TaskGradients:
    """The Gramian and the heads' gradients by the network's engine; the graphs stay for the combination."""
    network, engine, reduction = parts.network, parts.network.engine, parts.reduction
    assert engine is not None
    several = parts.several
    number = len(parts.sources[request.source])
    if number > 1 and not engine.adds:
        raise ValueError(
            f'gradients="{engine.name}" works on one micro-batch: the Gramian of a sum of gradients needs the sums, which '
            'it doesn\'t keep. Use gradients="parameters" or "layerwise".'
        )
    reduction.doing = f"gradients {sorted(request.wanted)} of batch {request.source}"
    engine.begin()
    chunks = list(forwards(parts, request, apart=True))
    own_losses = [{i: loss for i, loss in chunk.losses.items() if i in request.wanted} for chunk in chunks]
    _observe(network, engine.read(own_losses), {index for losses in own_losses for index in losses})
    if not engine.pays(_shared(network), sum(map(len, own_losses))):
        engine.forget()
        parts.held = chunks
        return gradients_with_rows(parts, request)
    parts.engine = engine.name
    everything = reduction.over_ranks(chunks)
    losses = present(parts, everything, request)
    heads: Heads = {}

    def take(task: int, parameter: Tensor, gradient: Tensor) -> None:
        if network.reaches(task, parameter):
            hold(heads, task, parameter, gradient)

    # Telling the ranks has told this one which parameters others share.
    shared = _shared(network)
    known = set(map(id, shared))
    others = [p for p in network.parameters if id(p) not in known]
    pieces = [
        Piece(own, {i: network.seed(loss, chunk.counts[i]) for i, loss in own.items()}, chunk.activated)
        for own, chunk in zip(own_losses, chunks, strict=True)
    ]
    failure: BaseException | None = None
    product = torch.zeros(0)
    try:
        product = engine.gramian(Wanted(pieces, losses.indices, shared, others, take))
        network.refuse_hidden()
    except BaseException as error:
        if not network.ranks.owing:
            raise
        failure = error
    parts.num_backward += sum(len(own) for own in own_losses)
    rows = Rows(0, network.ranks)
    if several:
        network.lay_out(rows, heads)
        sum_heads(network, rows, heads, losses.indices, failure)
    product = product.to(device="cpu", dtype=torch.float64)
    factors = factors_of(network, losses)
    if factors is not None:
        product = product * torch.outer(factors, factors)
        rescale_heads(heads, losses, factors)
    parts.finite.losses(everything, everything.raw.tolist())
    parts.finite.task_gradients(losses, product)
    kept = [Chunk(own, chunk.counts, chunk.active) for own, chunk in zip(own_losses, chunks, strict=True)]
    return TaskGradients(rows, losses, product, heads, everything, precision=network.precision(shared), graph=kept)


def _shared(network: Network) -> list[Tensor]:
    """The shared parameters, in the same order on all ranks."""
    return [p for p in network.parameters if network.roles.is_shared(network.name(p))]


def _observe(network: Network, reached: Mapping[int, int], tasks: Collection[int]) -> None:
    """Learn from the graph which task reaches which parameter."""
    if network.compiled:
        return
    for task in tasks:
        names = [network.name(p) for p in network.parameters if reached.get(id(p), 0) >> task & 1]
        network.roles.observe(task, names)


def combine_graphs(parts: Parts, gradients: TaskGradients, weights: Tensor | None) -> None:
    """``weights @ J`` by one more backward through the graphs of the task gradients."""
    network, losses = parts.network, gradients.reduced
    assert weights is not None, "only Gramian methods do without rows"
    assert gradients.graph is not None
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
            {
                i: (by_task[i] * (chunk.counts[i] / losses.totals[i])).to(loss.device)
                for i, loss in chunk.losses.items()
            },
            chunk.activated,
        )
        for chunk in chunks
    ]
    shared = _shared(network)
    failure: BaseException | None = None
    try:
        parts.num_backward += network.engine.backward(pieces, shared)
        network.refuse_hidden(shared, [loss for chunk in chunks for loss in chunk.losses.values()])
    except BaseException as error:
        if not network.ranks.owing:
            raise
        failure = error
    network.tidy_sparse()
    sum_gradients(network, failure)
    reached = network.gradients(shared)
    if scale is not None and reached:
        torch._foreach_div_(reached, scale)
