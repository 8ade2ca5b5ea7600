"""What all steps of a training have in common."""

from collections.abc import Sequence
from dataclasses import dataclass

from torchmto.step.losses import Outside, Weigh


@dataclass
class Plan:
    """What all steps of a training have in common.

    Attributes:
        tasks: The names of all tasks.
        on_nonfinite: "raise" or "skip".
        weigh: The user's loss weights: a callable from losses and indices to factors [k]; None for 1.
        weigh_fixed: Whether these factors depend neither on the losses nor on which tasks are present.
        outside: Why a method can't take the losses that it sees: the step's method, then the loss weighting before it. Empty
            if they take any.
        repeats: Whether a step may run the model more than once, so that random states are kept.
        same_noise: Whether all forwards of a batch get the same random state.
    """

    tasks: tuple[str, ...]
    on_nonfinite: str = "raise"
    weigh: Weigh | None = None
    weigh_fixed: bool = True
    outside: Sequence[Outside] = ()
    repeats: bool = False
    same_noise: bool = False
