"""One backward of the weighted sum of the losses."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torchmto.gradients.backwards import backward, quiet
from torchmto.step.forwards import forwards, groups
from torchmto.step.losses import Chunk, Losses, Proportions, Sums, Weigh, stack
from torchmto.step.messages import average_statistics, sum_gradients
from torchmto.step.parts import Parts, Request
from torchmto.step.reduction import average, over_ranks, tell


@dataclass
class _Weights:
    """What the losses of some tasks are multiplied with.

    Attributes:
        indices: The tasks, ascending.
        values: The method's weights, [k].
        factors: The user's weights, [k]; None for 1.
    """

    indices: tuple[int, ...]
    values: Tensor
    factors: Tensor | None

    def only(self, tasks: Collection[int]) -> "_Weights":
        """The weights of some tasks."""
        places = [place for place, index in enumerate(self.indices) if index in tasks]
        if len(places) == len(self.indices):
            return self
        factors = None if self.factors is None else self.factors[places]
        return _Weights(tuple(self.indices[place] for place in places), self.values[places], factors)


def weighted_backward(parts: Parts, request: Request, weigh: Weigh, *, fixed: bool, heads: str) -> Losses:
    """Forward and one backward of the weighted sum of the losses into ``.grad``.

    The weights need the losses of all micro-batches first. With one of them its graph is held meanwhile. With several, weights
    that are fixed (independent of the losses and of which tasks are present) allow one pass, in which every micro-batch is
    weighted by its count, if all bring the same tasks in the same proportions; what is left is a common factor. Otherwise the
    losses are read by a forward without gradient, and then every micro-batch is run again, with the same random state.

    Args:
        parts: The step's parts.
        request: Whose losses are summed, on which batch.
        weigh: (losses [k], indices) -> weights [k].
        fixed: Whether ``weigh`` gives the same weights whatever the losses and the present tasks.
        heads: "weighted" or "unit".

    Returns:
        The losses of all tasks the closure was asked for.
    """
    network = parts.network
    micro_batches = parts.sources[request.source]
    apart = heads == "unit"
    held = len(micro_batches) == 1 or all(isinstance(entry, Mapping) for entry in micro_batches)
    parts.doing = f"one gradient {sorted(request.wanted)} of batch {request.source}"
    losses: Losses | None = None
    if not held and fixed and parts.weigh_fixed:
        losses, done = _in_one_pass(parts, request, weigh, apart)
        if losses is not None and done:
            return losses
    chunks = list(forwards(parts, request, apart=apart)) if held else []
    if held:
        losses = over_ranks(parts, chunks)
    elif losses is None:
        with parts.noise.rehearsal():
            losses = over_ranks(parts, forwards(parts, request, grad=False))
    failure: BaseException | None = None
    try:
        weights = _weights(parts, weigh, losses.only(request.wanted))
        for chunk in chunks if held else forwards(parts, request, apart=apart):
            # A task that only the second pass brings has no weight.
            _backward(parts, chunk, weights, [chunk.counts[i] / losses.totals.get(i, 1) for i in chunk.losses], apart)
    except BaseException as error:
        if not network.ranks.owing or network.sharded:
            raise
        # The other ranks wait for this one's gradients.
        failure = error
    _settle(parts, failure)
    return losses


def _in_one_pass(parts: Parts, request: Request, weigh: Weigh, apart: bool) -> tuple[Losses | None, bool]:
    """One pass over micro-batches that bring the same tasks in the same proportions, on all ranks.

    Returns:
        The losses, as far as they are known, and whether the gradients are computed. If the micro-batches aren't like that
        nothing has happened; among several ranks, who exchange losses only once, the losses are known all the same.
    """
    network = parts.network
    micro_batches = parts.sources[request.source]
    nominal = len(micro_batches) * network.ranks.size
    weights = _known_weights(parts, request, weigh)
    sums = Sums()
    proportions, calls = Proportions(), len(groups(parts, micro_batches[0], request.asked))
    unit_size = 0.0
    with parts.noise.attempt() as undo:
        for position, chunk in enumerate(forwards(parts, request, apart=apart)):
            if position % calls == 0:
                proportions.begin()
            size = proportions.add(chunk.counts)
            # In one process equal sizes cancel before anything is rounded.
            unit_size = unit_size or (1.0 if parts.several else size)
            if not proportions.alike and not parts.several:
                break
            sums.add(chunk)
            if proportions.alike:
                _backward(parts, chunk, weights, [size / unit_size / nominal] * len(chunk.losses), apart)
        proportions.close()
        alike, first = proportions.alike, proportions.first
        if parts.several:
            sums, alike = tell(parts, sums, counts=[len(micro_batches), proportions.relative] if alike else None)
        losses = average(parts, sums) if alike or parts.several else None
        if losses is None or not alike:
            network.zero_grad()
            undo()
            return losses, False
    _settle(parts)
    left = nominal * unit_size / losses.totals[proportions.lead] if first else 1.0
    if left != 1:
        network.multiply(network.gradients(), left)
    return losses, True


def accumulate(parts: Parts, request: Request, weigh: Weigh, *, heads: str) -> None:
    """One more micro-batch of a batch that is accumulated over several calls, under fixed weights: its weighted gradient.

    It is kept beside ``.grad``.

    Raises:
        ValueError: If the micro-batch doesn't bring the same tasks in the same proportions as those before.
    """
    network, carried = parts.network, parts.left_by_earlier_calls(request.source)
    apart = heads == "unit"
    weights = _known_weights(parts, request, weigh)
    carried.proportions.begin()
    for chunk in forwards(parts, request, apart=apart):
        size = carried.proportions.add(chunk.counts)
        carried.sums.add(chunk)
        _backward(parts, chunk, weights, [size] * len(chunk.losses), apart)
    carried.proportions.close()
    if not carried.proportions.alike:
        raise ValueError(
            "With fixed weights every micro-batch of an accumulated batch should bring the same tasks, their counts in the "
            "same proportions: one backward serves all of its tasks, so their shares can't be told apart later. Pass the list "
            "of all micro-batches to one call; or, where a trainer makes the calls, take what keeps the tasks apart by K "
            'backwards: method `constant` with weights of 1 for gd, and `weights="uw"` besides for uw.'
        )
    for parameter in network.parameters:
        if parameter.grad is not None:
            gradient, parameter.grad = parameter.grad, None
            known = carried.gradients.get(id(parameter))
            carried.gradients[id(parameter)] = gradient if known is None else known + gradient


def finish(parts: Parts, request: Request) -> Losses:
    """The mean of what :func:`accumulate` has kept, into ``.grad``; returns the losses."""
    network, carried = parts.network, parts.left_by_earlier_calls(request.source)
    sums, proportions = carried.sums, carried.proportions
    if parts.several:
        parts.doing = f"one gradient {sorted(request.wanted)} of batch {request.source}, accumulated"
        sums, alike = tell(parts, sums, counts=proportions.relative)
        if not alike:
            raise ValueError("With fixed weights every rank should bring the same tasks in the same proportions.")
    for parameter in network.parameters:
        parameter.grad = carried.gradients.get(id(parameter))
    losses = average(parts, sums)
    _settle(parts)
    if proportions.first:
        network.multiply(network.gradients(), 1 / losses.totals[proportions.lead])
    return losses


def _known_weights(parts: Parts, request: Request, weigh: Weigh) -> _Weights:
    """Fixed weights don't depend on the losses: those of all tasks are known before the first forward."""
    indices = tuple(sorted(request.wanted))
    ones = torch.ones(len(indices), dtype=torch.float64, device=parts.network.device)
    factors = None if parts.weigh is None or not indices else parts.weigh(ones, indices)
    return _weights(parts, weigh, Losses(indices, ones, ones, {}, factors))


def _settle(parts: Parts, failure: BaseException | None = None) -> None:
    """After the last backward: what the ranks have in common."""
    if parts.several:
        parts.network.tidy_sparse()
        sum_gradients(parts.network, failure)
        average_statistics(parts.network)


def _weights(parts: Parts, weigh: Weigh, losses: Losses) -> _Weights:
    """The method's weight of every one of the losses, and the user's factors if there are any."""
    if not losses.indices:
        return _Weights((), losses.values, None)
    values = weigh(losses.values, losses.indices).detach().to(losses.values)
    factors = None if losses.factors is None else losses.factors.to(values)
    parts.weights = values if factors is None else values * factors
    return _Weights(losses.indices, values, factors)


def _backward(parts: Parts, chunk: Chunk, weights: _Weights, shares: Sequence[float], apart: bool) -> None:
    """Backward of the sum of weight times the user's factor times scale times share times loss, one share per loss.

    The weight is left out for the heads, if they get their gradients ``apart``, by a pass that goes no further than they are.
    """
    network = parts.network
    weights = weights.only(chunk.losses)
    if not weights.indices:
        return
    roots, factors = chunk.stacked, weights.factors
    if len(weights.indices) < len(chunk.losses):
        roots = stack([chunk.losses[index] for index in weights.indices])
        shares = [share for index, share in zip(chunk.losses, shares, strict=True) if index in weights.indices]
    if any(share != 1 for share in shares):
        shared_out = weights.values.new_tensor(shares)
        factors = shared_out if factors is None else factors * shared_out
    scale = network.scale(roots.device)
    if scale is not None:
        scale = scale.to(weights.values)
        factors = scale.expand(len(shares)) if factors is None else scale * factors
    inputs: list[Tensor] | None = network.parameters
    if network.sharded:
        # FSDP averages over the ranks what is to be summed.
        inputs, size = None, weights.values.new_full((len(shares),), network.ranks.size)
        factors = size if factors is None else factors * size
    elif network.regions.zeros:
        inputs = [p for p in network.parameters if network.regions.reached(weights.indices, network.name(p))]
    seeds = weights.values if factors is None else weights.values * factors
    before = network.without_gradient(weights.indices)
    with chunk.activated(), quiet(network.hooked()):
        if inputs is None:
            torch.autograd.backward(roots, seeds.to(roots))
        elif apart:
            own = torch.ones_like(seeds) if factors is None else factors
            shared, others = network.by_role(inputs)
            if others:
                backward(roots, own.to(roots), others, retain=bool(shared))
            if shared:
                backward(roots, seeds.to(roots), shared)
        else:
            backward(roots, seeds.to(roots), inputs)
    parts.num_backward += 1
    if before:
        network.explain(chunk, weights.indices, before)
