"""How long an experiment may take."""

import time
from collections.abc import Callable, Sequence
from typing import Any

from torchmto.lab.grid.experiment import run_label
from torchmto.lab.grid.runner import StoppedError, Watcher
from torchmto.lab.run.config import RunConfig


class Budget:
    """A deadline that is looked at between units of work.

    Args:
        minutes: From now; None for no limit.
    """

    def __init__(self, minutes: float | None) -> None:
        self.began = time.monotonic()
        self.minutes = minutes

    @property
    def used(self) -> float:
        """Minutes since the beginning."""
        return (time.monotonic() - self.began) / 60

    @property
    def spent(self) -> bool:
        """Whether the time is up."""
        return self.minutes is not None and self.used >= self.minutes


class BudgetWatcher(Watcher):
    """Prints a line per run and stops the grid after a run when the time is up.

    Args:
        budget: The time.
        say: Prints a line.
    """

    def __init__(self, budget: Budget, say: Callable[[str], None]) -> None:
        self._budget = budget
        self._say = say
        self._left = 0

    def plan(self, runs: Sequence[RunConfig], finished: Sequence[RunConfig]) -> None:
        """Say what is left."""
        self._left = len(runs) - len(finished)
        self._say(f"  {len(finished)} of {len(runs)} runs are finished.")
        self._check()

    def finish(self, config: RunConfig, result: dict[str, Any]) -> None:
        """Say so, and look at the clock."""
        self._left -= 1
        self._say(f"  {run_label(config)}: {result['seconds']:.1f} s, {self._left} left")
        self._check()

    def _check(self) -> None:
        if self._left and self._budget.spent:
            raise StoppedError
