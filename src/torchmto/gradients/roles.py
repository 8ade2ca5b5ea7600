"""The roles of parameters: shared by several tasks, or the head of one."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from torchmto.gradients.ranks import Ranks


class Roles:
    """Which tasks have reached which parameter.

    A parameter is *shared* once a second task has reached it and never goes back; before, it belongs to the one task
    that reached it (a head). With a single task every parameter it reaches counts as shared: there is nothing to
    separate. If the shared parameters are given, they alone are shared.

    Args:
        num_tasks: K.
        shared: The names of the shared parameters, or None to find them.

    Attributes:
        declared: The names that were given, None if none were.
        given: Whether the shared parameters are given, here or where a loaded state comes from.
        layout: Names of the shared parameters, in the order of their columns in the gradient matrix. Columns are only
            ever appended.
        seen: The tasks that have reached a parameter, since others are trained.
        walked: The tasks whose graph has been walked for what they reach.
        looked: The names of the parameters that were trained in these walks.
        changes: How often something was learnt or forgotten.
    """

    def __init__(self, num_tasks: int, shared: Iterable[str] | None = None) -> None:
        self.num_tasks = num_tasks
        self.declared = None if shared is None else tuple(shared)
        self.given = shared is not None
        self.layout: list[str] = list(self.declared or ())
        self._shared = set(self.layout)
        self._reached: dict[str, set[int]] = {}
        self.seen: frozenset[int] = frozenset()
        self.walked: frozenset[int] = frozenset()
        self.looked: frozenset[str] = frozenset()
        self.changes = 0
        self.mark()

    def mark(self) -> None:
        """Remember the present state for :meth:`undo`."""
        self._journal: list[tuple[str, int]] = []
        self._mark = (len(self.layout), self.seen, self.walked, self.looked)

    def undo(self) -> bool:
        """Forget what was learnt since :meth:`mark`; return whether shared parameters were taken back."""
        self.changes += 1
        for name, task in self._journal:
            tasks = self._reached.get(name, set())
            tasks.discard(task)
            if not tasks:
                self._reached.pop(name, None)
        size, self.seen, self.walked, self.looked = self._mark
        shrunk = len(self.layout) > size
        self._shared.difference_update(self.layout[size:])
        del self.layout[size:]
        self._journal = []
        return shrunk

    def look(self, names: Iterable[str]) -> None:
        """Tell which parameters are trained now: if there are others than before, every task counts as unseen again."""
        if not self.looked.issuperset(names := list(names)):
            self.changes += 1
            self.looked = self.looked.union(names)
            self.seen = self.walked = frozenset()

    def rename(self, old: str, new: str) -> bool:
        """A parameter has the name ``new`` now; return whether nothing is called ``old`` any more.

        Something still is where both are shared: columns never go away.
        """
        self.changes += 1
        gone = not {old, new} <= self._shared
        if gone and old in self._shared:
            self.layout[self.layout.index(old)] = new
            self._shared ^= {old, new}
            self.declared = self.declared and tuple(new if name == old else name for name in self.declared)
        for task in sorted(self.tasks_of(old)):
            self.observe(task, [new])
        if gone:
            self._reached.pop(old, None)
        return gone

    def is_shared(self, name: str) -> bool:
        """Whether parameter ``name`` is shared."""
        return name in self._shared

    def tasks_of(self, name: str) -> frozenset[int]:
        """The tasks that have reached parameter ``name`` so far."""
        return frozenset(self._reached.get(name, ()))

    def observe(self, task: int, names: Iterable[str]) -> bool:
        """Record that ``task`` has reached the parameters ``names``; return whether a parameter became shared.

        A loss that reaches none may be a placeholder: its task counts as unseen.
        """
        names = list(names)
        if names and task not in self.seen:
            self.changes += 1
            self.seen |= {task}
        needed = 1 if self.num_tasks == 1 else 2
        grown = False
        for name in names:
            if task in self._reached.get(name, ()):
                continue
            # What can be undone is noted before it is done: an interrupt may come in between.
            self._journal.append((name, task))
            tasks = self._reached.setdefault(name, set())
            tasks.add(task)
            self.changes += 1
            if not self.given and len(tasks) >= needed and name not in self._shared:
                self.layout.append(name)
                self._shared.add(name)
                grown = True
        return grown

    @property
    def unshared(self) -> bool:
        """Whether all tasks have been seen and share no parameter."""
        return not self.layout and len(self.seen) == self.num_tasks

    def sort(self, start: int, names: Sequence[str]) -> None:
        """Bring the columns from number ``start`` on, which nothing was written to yet, into the order of ``names``."""
        order = {name: i for i, name in enumerate(names)}
        self.layout[start:] = sorted(self.layout[start:], key=lambda name: order.get(name, len(order)))

    def matrix(self, names: Iterable[str]) -> Tensor:
        """What has been reached as a uint8 tensor [len(names) + 1, K]; the last row says which tasks were seen."""
        rows = [[int(task in self._reached.get(name, ())) for task in range(self.num_tasks)] for name in names]
        rows.append([int(task in self.seen) for task in range(self.num_tasks)])
        return torch.tensor(rows, dtype=torch.uint8)

    def merge(self, names: list[str], matrix: Tensor) -> bool:
        """Take over what other ranks have reached (:meth:`matrix`); return whether a parameter became shared."""
        grown = False
        for task in range(self.num_tasks):
            if matrix[-1, task]:
                reached = matrix[:-1, task].nonzero().flatten().tolist()
                grown = self.observe(task, [names[i] for i in reached]) or grown
        return grown

    def state_dict(self) -> dict[str, Any]:
        """Everything known, as plain lists and names."""
        return {
            "given": self.given,
            "layout": list(self.layout),
            "reached": {name: sorted(tasks) for name, tasks in self._reached.items()},
            "seen": sorted(self.seen),
            "walked": sorted(self.walked),
            "looked": sorted(self.looked),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a saved state, whose columns come first.

        Raises:
            ValueError: If other parameters are shared there than were given here.
        """
        layout, given = list(state["layout"]), bool(state["given"])
        if self.declared is not None:
            new = [name for name in self.declared if name not in layout]
            other = [name for name in layout if name not in self.declared] or (new if given else [])
            if other:
                raise ValueError(
                    f"The saved state's shared parameters aren't those of `shared`: `{other[0]}` is in one of them only "
                    f"({len(other)} such in all). Build the MultiTask without `shared` to go on with the saved ones."
                )
            layout, given = layout + new, True
        self.given = given
        self.layout = layout
        self._shared = set(self.layout)
        self._reached = {name: set(tasks) for name, tasks in state["reached"].items()}
        self.seen = frozenset(state["seen"])
        self.walked = frozenset(state.get("walked", ()))
        self.looked = frozenset(state.get("looked", ()))
        self.changes += 1
        self.mark()


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
