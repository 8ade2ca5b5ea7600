"""From the losses of single forwards to those of the step: averaged over micro-batches and ranks, and weighted."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from torchmto.step.losses import Chunk, Losses, Sums, stack
from torchmto.step.parts import Parts


def tell(
    parts: Parts, sums: Sums, *, counts: Sequence[object] | None = None, failure: BaseException | None = None
) -> tuple[Sums, bool]:
    """Sum losses over the ranks and agree on roles; also, whether all ranks have the same ``counts``."""
    network = parts.network
    told = parts.exchange(
        sums.totals,
        sums.weighted,
        doing=parts.doing,
        device=network.device,
        disagree=network.agreement.needed,
        counts=counts,
        failure=failure,
    )
    if told.disagree:
        network.agree()
    return Sums(told.totals, told.weighted), told.even


def agree(parts: Parts, weights: Tensor | None = None, *, failure: BaseException | None = None) -> Tensor | None:
    """Before what can't be undone: no rank has failed; and all go on with the first one's ``weights`` [k].

    So the ranks' processors may differ.
    """
    network = parts.network
    own = () if weights is None or network.ranks.rank else weights.unbind()
    parts.doing = "what was decided"
    told, _ = tell(parts, Sums(dict.fromkeys(range(len(own)), 1.0), dict(enumerate(own))), failure=failure)
    if weights is None:
        return None
    return torch.stack([told.weighted[place] for place in range(len(weights))]).to(weights)


def check_same(parts: Parts, chunk: Chunk, num_micro_batches: int) -> None:
    """With sharded parameters all ranks take part in every forward and backward."""
    _, same = tell(parts, Sums(), counts=[num_micro_batches, *sorted(chunk.losses)])
    if not same:
        raise ValueError(
            "With sharded parameters (FSDP) every rank takes part in every backward, so every rank should return losses "
            "for the same tasks in as many micro-batches. A task without labels on one rank can be returned as a zero "
            "loss with graph, with a small count: `(0 * output.sum(), 1e-6)`."
        )


def over_ranks(parts: Parts, chunks: Iterable[Chunk]) -> Losses:
    """The losses of this rank's forwards -> the losses of the step."""
    chunks = list(chunks)
    if len(chunks) == 1 and chunks[0].losses and not parts.several:
        (chunk,) = chunks
        if all(count == 1 for count in chunk.counts.values()):
            return _weighted(parts, tuple(chunk.losses), chunk.stacked.detach(), chunk.counts)
    return average(parts, summed(parts, chunks))


def summed(parts: Parts, chunks: Iterable[Chunk]) -> Sums:
    """The losses of this rank's forwards -> their sums, over all ranks."""
    sums = Sums()
    for chunk in chunks:
        sums.add(chunk)
    return tell(parts, sums)[0] if parts.several else sums


def average(parts: Parts, sums: Sums) -> Losses:
    """Sums over all micro-batches and ranks -> the losses of the step, with the user's loss weights."""
    totals = sums.totals
    indices = tuple(sorted(totals))
    values = [sums.weighted[i] / totals[i] if totals[i] != 1 else sums.weighted[i] for i in indices]
    raw = stack(values) if values else torch.zeros(0, device=parts.network.device)
    return _weighted(parts, indices, raw, totals)


def _weighted(parts: Parts, indices: tuple[int, ...], raw: Tensor, totals: dict[int, float]) -> Losses:
    losses = Losses(indices, raw, raw, totals)
    if parts.weigh is not None and indices:
        losses.factors = parts.weights = parts.weigh(raw, indices).detach().to(raw)
        losses.values = raw * losses.factors
    if parts.first is None or not parts.first.indices:
        parts.first = losses
    return losses
