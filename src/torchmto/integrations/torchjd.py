"""TorchJD: its aggregators as methods here, Gramian methods as aggregators there."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from torchmto import GradientCombiner, GramianWeighting, Method, make_method
from torchmto.checks import found
from torchmto.integrations import require
from torchmto.methods import hyper

require("torchjd", "torchjd")

from torchjd.aggregation import Aggregator, GramianWeightedAggregator, Weighting  # noqa: E402  its absence is said above


@contextmanager
def _drawing(generator: torch.Generator) -> Iterator[None]:
    """Let what draws from the global generator depend on the method's own: so it is saved, and equal on all ranks."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**62, (), generator=generator)))
        yield


class _Weights(GramianWeighting):
    """An aggregator that weights rows by their Gramian."""

    aggregator: Any = hyper.given(hyper.REQUIRED)

    def weights(self, gramian: Tensor, losses: Tensor | None = None, indices: Sequence[int] | None = None) -> Tensor:
        """The aggregator's weights, [k]."""
        with _drawing(self.generator):
            weights: Tensor = self.aggregator.gramian_weighting(gramian)
        return weights


class _Rows(GradientCombiner):
    """Any other aggregator, which is given the rows."""

    aggregator: Any = hyper.given(hyper.REQUIRED)

    @torch.no_grad()
    def combine(self, task_grads: Any) -> Tensor:
        """The aggregation of the rows, [P]."""
        with _drawing(self.generator):
            vector: Tensor = self.aggregator(task_grads.matrix)
        return vector


def from_torchjd(aggregator: Aggregator, **options: Any) -> Method:
    """One of TorchJD's aggregators as a method.

    It works wherever a method does: micro-batches, processes, scaler, ``mt.backward``. Where it is a function of the Gramian it
    gets that, in float64; its random choices come from the method's generator. What an aggregator itself remembers from step to
    step (``NashMTL``, ``GradVac``) isn't in the saved state.

    Args:
        aggregator: The aggregator. Heads get their own task's gradient.
        **options: ``heads``; of aggregators of the Gramian also ``refresh_every``.

    Raises:
        TypeError: If it isn't an aggregator.

    Example:
        >>> from torchjd.aggregation import MGDA
        >>> from torchmto.integrations.torchjd import from_torchjd
        >>> from_torchjd(MGDA()).name
        'torchjd.MGDA'
    """
    if not isinstance(aggregator, Aggregator):
        raise TypeError(found("aggregator", "an aggregator of torchjd.aggregation", aggregator))
    kind = _Weights if isinstance(aggregator, GramianWeightedAggregator) else _Rows
    named: type[Any] = type(kind.__name__, (kind,), {"name": f"torchjd.{type(aggregator).__name__}"})
    method: Method = named(aggregator=aggregator, **options)
    return method


class _Weighting(Weighting[Tensor]):
    """A Gramian method's weights."""

    def __init__(self, method: GramianWeighting) -> None:
        super().__init__()
        self.method = method

    def forward(self, gramian: Tensor, /) -> Tensor:
        return self.method.weights(gramian)


def to_torchjd(method: str | Method) -> Aggregator:
    """A Gramian method as one of TorchJD's aggregators.

    Args:
        method: The method, or its name; one whose weights are a function of the Gramian alone.

    Returns:
        An aggregator, with which ``gramian_weighting`` serves their engine of Gramians too.

    Raises:
        ValueError: If it isn't a Gramian method.

    Example:
        >>> import torch
        >>> from torchmto.integrations.torchjd import to_torchjd
        >>> to_torchjd("pcgrad")(torch.tensor([[1.0, 0.0], [-1.0, 1.0]]))
        tensor([0.5000, 1.5000])
    """
    method = make_method(method) if isinstance(method, str) else method
    if not isinstance(method, GramianWeighting):
        raise ValueError(found("method", "a Gramian method, whose weights are a function of J Jᵀ", method.name))
    return GramianWeightedAggregator(_Weighting(method))


__all__ = ["from_torchjd", "to_torchjd"]
