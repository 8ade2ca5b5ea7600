"""Studies: what is done with a recipe."""

from collections.abc import Callable

from torchmto.lab.reproduce.findings import Findings
from torchmto.lab.reproduce.studies import (
    comparison,
    cost,
    groups,
    many_tasks,
    oracle,
    phases,
    priorities,
    theory,
)
from torchmto.lab.reproduce.studies.context import Context

__all__ = ["STUDIES", "Context"]

STUDIES: dict[str, Callable[[Context], Findings]] = {
    "comparison": comparison.run,
    "phases": phases.run,
    "oracle": oracle.run,
    "priorities": priorities.run,
    "groups": groups.run,
    "many_tasks": many_tasks.run,
    "cost": cost.run,
    "theory": theory.run,
}
"""What a recipe's ``study`` may be."""
