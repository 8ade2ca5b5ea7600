"""What one step works with."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from torchmto.step.finite import FiniteChecks
from torchmto.step.losses import Chunk, Source
from torchmto.step.network import Heads, Network
from torchmto.step.noise import Noise
from torchmto.step.plan import Plan
from torchmto.step.reduction import Proportions, Reduction, Sums
from torchmto.step.surroundings import Surroundings


@dataclass
class Request:
    """What a method wants of one batch.

    Attributes:
        asked: The tasks the closure is asked for.
        wanted: The numbers of the tasks whose gradients are wanted.
        source: Which independent batch.
        combined: Whether the gradients are to be combined, so that the tasks have to share parameters.
    """

    asked: tuple[str, ...]
    wanted: frozenset[int]
    source: int = 0
    combined: bool = True


@dataclass
class Carried:
    """What earlier micro-batches of an accumulated batch have left, for one independent batch. Rows stay with the network.

    Attributes:
        sums: Their losses.
        heads: Where rows are kept: the heads' gradients.
        gradients: Where a weighted sum is kept instead: the ``id`` of a parameter -> its gradient.
        proportions: Then: whether all bring the same tasks in the same proportions.
    """

    sums: Sums = field(default_factory=Sums)
    heads: Heads = field(default_factory=dict)
    gradients: dict[int, Tensor] = field(default_factory=dict)
    proportions: Proportions = field(default_factory=Proportions)


@dataclass
class Parts:
    """The parts of one step, which its functions hand on.

    Attributes:
        plan: What all steps have in common.
        network: The model, its optimizer and everything that lives longer than a step.
        asked: The tasks this step is about.
        sources: For every independent batch the list of its micro-batches, each a closure or ready losses.
        reduction: Averages losses over micro-batches and ranks.
        finite: Checks losses and gradients.
        surroundings: The caller's modes, for closures.
        several: Whether several processes train together.
        carried: Where a batch is accumulated over several calls: what earlier ones have left, by independent batch.
        summed: Then: whether weighted sums are kept, and not rows.
        num_forward: Calls of closures so far.
        num_backward: Backward passes so far.
        engine: What has computed gradients of tasks: see :class:`~torchmto.StepInfo`.
        consumed: The ``id`` of ready losses that were used.
        held: Forwards that have been run already: an engine has left their gradients to the rows.
    """

    plan: Plan
    network: Network
    asked: tuple[str, ...]
    sources: Sequence[Sequence[Source]]
    reduction: Reduction
    finite: FiniteChecks
    surroundings: Surroundings
    several: bool
    carried: dict[int, Carried] | None = None
    summed: bool = False
    num_forward: int = 0
    num_backward: int = 0
    engine: str | None = None
    consumed: set[int] = field(default_factory=set)
    held: list[Chunk] = field(default_factory=list)

    @functools.cached_property
    def noise(self) -> Noise:
        """Random states of the forwards, for those that are repeated."""
        return Noise(self.network.room, same=self.plan.same_noise, keep=self.plan.repeats)

    def request(self, tasks: Sequence[str] | None, forward: Sequence[str] | None, source: int) -> Request:
        """Gradients of those of ``tasks`` (default all) that this step is about, from a forward of ``forward`` (the same)."""
        asked = names = self.asked
        if tasks is not None:
            names = tuple(name for name in tasks if name in asked)
        called = names if forward is None else tuple(name for name in forward if name in asked)
        return Request(called, frozenset(map(self.plan.tasks.index, names)), source)

    def left_by_earlier_calls(self, source: int) -> Carried:
        """What earlier calls have left for an accumulated batch."""
        return Carried() if self.carried is None else self.carried.setdefault(source, Carried())
