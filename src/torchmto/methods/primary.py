"""Methods in which one task leads: which one it is."""

from typing import Any

from torchmto.checks import check_integer, found, unknown_task
from torchmto.methods.per_task import ByTask


class Primary(ByTask):
    """The hyper-parameter ``primary``: the name of a task, or its number.

    Args:
        given: A name, or a number from 0.

    Raises:
        TypeError: If it is neither.
        ValueError: If it is a negative number.
    """

    def __init__(self, given: Any) -> None:
        self.given: str | int = given if isinstance(given, str) else check_integer("primary", given, minimum=0)
        self.index = 0 if isinstance(self.given, str) else self.given

    def bind(self, tasks: tuple[str, ...]) -> None:
        """Match it with the tasks.

        Raises:
            ValueError: If there is no such task.
        """
        if isinstance(self.given, str):
            if self.given not in tasks:
                raise ValueError(unknown_task(self.given, tasks, "in `primary`"))
            self.index = tasks.index(self.given)
        elif self.given >= len(tasks):
            raise ValueError(found("primary", f"the name or number of one of {len(tasks)} tasks", self.given))
