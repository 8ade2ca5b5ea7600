"""What compiled regions hide of the roles of parameters, and what is known of it."""

import weakref
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from torchmto.gradients.reach import Sight
from torchmto.gradients.roles import Roles

Pairs = set[tuple[int, str]]
"""Tasks, and names of parameters that each may reach."""


class Regions:
    """The compiled regions of several outputs that there have been.

    One gives zeros for parameters that another output depends on, but none that has a gradient. Which these are, only
    a forward without compiling tells.

    Args:
        roles: What is known of who reaches what.

    Attributes:
        zeros: Where such a forward has told that what a region gives is zeros.
    """

    def __init__(self, roles: Roles) -> None:
        self.zeros: Pairs = set()
        self._roles = roles
        self._codes: weakref.WeakSet[type] = weakref.WeakSet()

    def __getstate__(self) -> dict[str, Any]:
        """Without what was compiled, which copies compile anew."""
        return {"zeros": self.zeros, "_roles": self._roles}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a copy."""
        self.__dict__.update(state)
        self._codes = weakref.WeakSet()

    def reached(self, tasks: Collection[int], name: str) -> bool:
        """Whether what a backward of ``tasks`` gives for a parameter is its gradient, and not such zeros."""
        known = not self._roles.tasks_of(name).isdisjoint(tasks)
        return known or not any((task, name) in self.zeros for task in tasks)

    def unclear(self, sights: Mapping[int, Sight], parameters: Mapping[str, Tensor], *, known: bool) -> Pairs:
        """Which tasks may reach which parameters without anything telling whether they do.

        What the roles tell of a parameter is all there is to know until there are regions: in a run that goes on here, or whose
        model was compiled only now. After that, what is compiled anew may depend on anything.

        Args:
            sights: Task -> what its loss's graph shows.
            parameters: The trained parameters by name.
            known: Whether roles are to be believed of the parameters that they know, whatever is compiled anew.
        """
        codes = set().union(*(sight.codes for sight in sights.values()))
        known = known or not self._codes
        if not codes.issubset(self._codes):
            self._codes.update(codes)
            self.forget()
        found: Pairs = set()
        for name, parameter in parameters.items():
            tasks = self._roles.tasks_of(name)
            hidden = {(i, name) for i, sight in sights.items() if id(parameter) in sight.hidden and i not in tasks}
            if tasks and known:
                self.zeros |= hidden
            else:
                found |= hidden - self.zeros
        return found

    def settle(self, pairs: Pairs) -> None:
        """After a forward without compiling: what the roles still don't tell are zeros."""
        self.zeros |= {(task, name) for task, name in pairs if task not in self._roles.tasks_of(name)}

    def forget(self) -> None:
        """Other parameters or other code: nothing is known to be zeros."""
        self.zeros = set()
