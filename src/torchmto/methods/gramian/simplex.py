"""Points of the simplex over all tasks, of which some are present."""

from collections.abc import Sequence

import torch
from torch import Tensor


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
