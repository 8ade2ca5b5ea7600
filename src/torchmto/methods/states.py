"""States, declared in the body of a method's class: what they are before the first step, for so many tasks."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

_T = TypeVar("_T")


class State:
    """One state of a class, which :meth:`Method.setup <torchmto.Method.setup>` makes an attribute of.

    Args:
        first: The method and the number of tasks -> its first value.
    """

    def __init__(self, first: Callable[[Any, int], Any]) -> None:
        self.first = first


def declared(cls: type, kind: type[_T]) -> dict[str, _T]:
    """The attributes of one kind in the bodies of a class and its bases, its own first; another of that name hides one."""
    names = dict.fromkeys(name for base in cls.__mro__ for name in vars(base))
    values = {name: getattr(cls, name, None) for name in names}
    return {name: value for name, value in values.items() if isinstance(value, kind)}


def made(first: Callable[[Any, int], Any]) -> Any:
    """A state of any kind; see :class:`State`."""
    return State(first)


def each(value: float, dtype: torch.dtype = torch.float64) -> Any:
    """One number per task, [K]; NaN for what isn't known yet."""
    return made(lambda _, num_tasks: torch.full((num_tasks,), value, dtype=dtype))


def shares() -> Any:
    """A point of the simplex, [K]: at first its centre."""
    return made(lambda _, num_tasks: torch.full((num_tasks,), 1 / num_tasks, dtype=torch.float64))


def rows(dtype: torch.dtype | None = None) -> Any:
    """A memory of a row per task, [K, 0], which gets its columns in the first step."""
    return made(lambda _, num_tasks: torch.zeros(num_tasks, 0, dtype=dtype))


def count() -> Any:
    """How often something has happened, or whose turn it is: 0."""
    return made(lambda *_: 0)


def shares_of(state: Tensor, indices: Sequence[int]) -> Tensor:
    """The present tasks' entries of a point of the simplex [K], rescaled to sum 1: a point of the smaller simplex [k].

    Where absent tasks have everything, the present ones' shares are equal: each such step starts there, as what absent tasks
    have is theirs until they are present again.

    Example:
        >>> shares_of(torch.tensor([0.25, 0.25, 0.5]), [0, 1])
        tensor([0.5000, 0.5000])
    """
    if len(indices) == len(state):
        return state.clone()
    part = state[list(indices)]
    total = part.sum()
    return part / total if bool(total > 0) else torch.full_like(part, 1 / len(part))


@torch.no_grad()
def set_shares(state: Tensor, indices: Sequence[int], shares: Tensor) -> None:
    """Put new shares of the present tasks back; absent tasks keep theirs, and the whole still sums to 1."""
    where = list(indices)
    if len(where) == len(state):
        state.copy_(shares)
    else:
        state[where] = shares.to(state) * state[where].sum()
