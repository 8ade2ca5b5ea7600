"""Reduction of small and large tensors across the ranks of a process group."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


class Ranks:
    """The processes that train together; without an initialised process group, this process alone.

    Args:
        group: The process group; None is the default group, if ``torch.distributed`` is initialised.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.active = dist.is_available() and dist.is_initialized()
        if group is not None and not self.active:
            raise ValueError("Parameter `process_group` was given, but torch.distributed isn't initialised.")
        self.group = group
        self.size = dist.get_world_size(group) if self.active else 1

    def sum_(self, tensor: Tensor) -> Tensor:
        """Replace ``tensor`` by its sum over the ranks."""
        if self.size > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.SUM, group=self.group)
        return tensor

    def max_(self, tensor: Tensor) -> Tensor:
        """Replace ``tensor`` by its elementwise maximum over the ranks."""
        if self.size > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.group)
        return tensor

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether ``flag`` is true on any rank."""
        if self.size == 1:
            return flag
        return bool(self.max_(torch.tensor(int(flag), dtype=torch.int32, device=device)).item())

    def equal(self, values: list[float] | None, device: torch.device) -> bool:
        """Whether all ranks hold the same list of numbers (of one length everywhere); None differs from everything."""
        if self.size == 1:
            return values is not None
        if self.any(values is None, device):
            return False
        own = torch.tensor(values, dtype=torch.float64, device=device)
        return bool((self.max_(torch.stack([own, -own])).sum(0) == 0).all())
