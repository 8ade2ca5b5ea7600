"""What every study is given."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torchmto.lab.reproduce.budget import Budget
from torchmto.lab.reproduce.recipe import Recipe

__all__ = ["Context"]


@dataclass(frozen=True)
class Context:
    """What every study is given.

    Attributes:
        recipe: What to run.
        folder: Where everything goes.
        data_root: What ``{data}`` in the recipe stands for.
        seeds: How many.
        budget: The time.
        jobs: Training runs at a time.
        executor: Where they run.
        say: Prints a line.
    """

    recipe: Recipe
    folder: Path
    data_root: Path
    seeds: int
    budget: Budget
    jobs: int
    say: Callable[[str], None]
    executor: str = "local"
