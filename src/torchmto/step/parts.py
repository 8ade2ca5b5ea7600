"""What one step works with."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from torchmto.step.losses import Chunk, Losses, Outside, Proportions, Source, Sums, Weigh
from torchmto.step.messages import Exchange
from torchmto.step.network import Heads, Network
from torchmto.step.surroundings import Noise, Surroundings


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
        tasks: The names of all tasks.
        on_nonfinite: "raise" or "skip".
        weigh: The user's loss weights, until they have been told of the step: a callable from losses and indices to factors
            [k]; None for 1.
        weigh_fixed: Whether these factors depend neither on the losses nor on which tasks are present.
        weigh_apart: Whether no task's factor depends on another task's loss or presence.
        outside: Why a method can't take the losses that it sees: the step's method, then the loss weighting before it. Empty
            if they take any.
        repeats: Whether a step may run the model more than once, so that random states are kept.
        same_noise: Whether all forwards of a batch get the same random state.
        network: The model, its optimizer and everything that lives longer than a step.
        sources: For every independent batch the list of its micro-batches, each a closure or ready losses.
        asked: The tasks this step is about.
        about: What must be the same on all ranks, besides the tasks.
        stepping: Whether the optimizer takes its step; else the gradient is left in ``.grad``, times a scaler's scale.
        carried: Where a batch is accumulated over several calls: what earlier ones have left, by independent batch.
        summed: Then: whether weighted sums are kept, and not rows.
        several: Whether several processes train together.
        surroundings: The caller's modes, for closures.
        doing: What the next exchange is for; the same on all ranks.
        first: The first losses of the step that aren't empty; the first ones at all until there are any.
        weights: The weights that losses were given last, [k], to explain gradients that aren't finite.
        recorded: Task index -> the first loss of the step that passed its check.
        overflowed: Whether the scaler lowered its scale.
        num_forward: Calls of closures so far.
        num_backward: Backward passes so far.
        engine: What has computed gradients of tasks: see :class:`~torchmto.StepInfo`.
        consumed: The ``id`` of ready losses whose graph was asked for.
        held: Forwards that have been run already, for what comes next: to see which tasks there are, or by an engine that has
            left their gradients to the rows.
    """

    tasks: tuple[str, ...]
    on_nonfinite: str
    weigh: Weigh | None
    weigh_fixed: bool
    weigh_apart: bool
    outside: Sequence[Outside]
    repeats: bool
    same_noise: bool
    network: Network
    sources: Sequence[Sequence[Source]]
    asked: tuple[str, ...]
    about: str
    stepping: bool
    carried: dict[int, Carried] | None
    summed: bool
    several: bool
    surroundings: Surroundings = field(default_factory=Surroundings)
    doing: str = ""
    first: Losses | None = None
    weights: Tensor | None = None
    recorded: dict[int, float] = field(default_factory=dict)
    overflowed: bool = False
    num_forward: int = 0
    num_backward: int = 0
    engine: str | None = None
    consumed: set[int] = field(default_factory=set)
    held: list[Chunk] = field(default_factory=list)

    @functools.cached_property
    def noise(self) -> Noise:
        """Random states of the forwards, for those that are repeated."""
        return Noise(self.network.room, same=self.same_noise, keep=self.repeats)

    @functools.cached_property
    def exchange(self) -> Exchange:
        """What the ranks tell each other."""
        return Exchange(self.network.ranks, len(self.tasks), self.about)

    def left_by_earlier_calls(self, source: int) -> Carried:
        """What earlier calls have left for an accumulated batch."""
        return Carried() if self.carried is None else self.carried.setdefault(source, Carried())
