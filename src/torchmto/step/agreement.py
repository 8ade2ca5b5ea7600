"""What all ranks know together about the roles of parameters."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from torchmto.gradients import Ranks, Roles


class Agreement:
    """Brings the roles that single ranks have found out to all of them.

    Args:
        ranks: The processes.
        roles: This rank's roles.

    Attributes:
        columns: How many shared parameters all ranks know of: their number of columns in the gradient matrix.
    """

    def __init__(self, ranks: Ranks, roles: Roles) -> None:
        self.columns = len(roles.layout)
        self._ranks = ranks
        self._roles = roles
        self._changes = 0
        self._reached: dict[str, frozenset[int]] = {}

    @property
    def needed(self) -> bool:
        """Whether this rank knows of roles that the ranks haven't agreed on."""
        return self._roles.changes != self._changes

    def tasks_of(self, name: str) -> frozenset[int]:
        """The tasks that reach parameter ``name``, as far as all ranks know."""
        return self._reached.get(name, frozenset())

    def reach(self, names: Sequence[str], device: torch.device) -> None:
        """Share with all ranks which task reaches which of the parameters ``names``. Called by all ranks together."""
        roles = self._roles
        matrix = self._ranks.max_(roles.matrix(names).to(device))
        roles.merge(list(names), matrix.cpu())
        # Ranks may have found shared parameters in different orders.
        roles.sort(self.columns, names)
        self._reached = {name: roles.tasks_of(name) for name in names}
        self._changes = roles.changes
        self.columns = len(roles.layout)

    def shrink(self) -> None:
        """Parameters may have ceased to be shared: an error has undone what a step had found out."""
        self.columns = min(self.columns, len(self._roles.layout))
