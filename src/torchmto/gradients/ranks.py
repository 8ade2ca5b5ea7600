"""Collectives over the ranks of a process group, and how many bytes they send."""

import contextlib
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Wait = Callable[[], None]
"""Returns once the result of a collective that was started is there."""


class Ranks:
    """The processes that train together; without an initialised process group, this process alone.

    Args:
        group: The process group; None is the default group, if ``torch.distributed`` is initialised.

    Attributes:
        rank: This process' place in the group.
        size: How many processes there are, N.
        bytes_sent: What this process has sent: ``2 S (N-1)/N`` for the sum of S bytes, half of it to scatter a sum or to
            gather S bytes. That is the volume of the ring algorithm, the least possible.
        lost: Whether a message has failed: nobody knows which one the others wait for now.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.active = dist.is_available() and dist.is_initialized()
        if group is not None and not self.active:
            raise ValueError("Parameter `process_group` was given, but torch.distributed isn't initialised.")
        self.group = group
        self.rank = dist.get_rank(group) if self.active else 0
        self.size = dist.get_world_size(group) if self.active else 1
        if self.rank < 0:
            raise ValueError("Parameter `process_group` should be a group that this process belongs to.")
        self.bytes_sent = 0.0
        self.lost = False

    def check_alone(self) -> None:
        """Raise if there were no other processes when this was made, and now there are.

        Raises:
            ValueError: If so.
        """
        if not self.active and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            raise ValueError(
                "torch.distributed was initialised after MultiTask was built, so each of the "
                f"{dist.get_world_size()} processes would train by itself. Build MultiTask after `init_process_group`."
            )

    @property
    def owing(self) -> bool:
        """Whether others wait for this rank's next message, and it can be told which one that is."""
        return self.size > 1 and not self.lost

    @contextlib.contextmanager
    def message(self) -> Iterator[None]:
        """Inside something is sent. After an error no other message would fit what the others wait for."""
        try:
            yield
        except BaseException:
            self.lost = self.size > 1
            raise

    def _started(self, work: Any) -> Wait:
        def wait() -> None:
            with self.message():
                work.wait()

        return wait

    def _count(self, tensor: Tensor, passes: int) -> None:
        self.bytes_sent += passes * tensor.numel() * tensor.element_size() * (self.size - 1) / self.size

    def sum_(self, tensor: Tensor) -> Tensor:
        """Replace ``tensor`` by its sum over the ranks, which is the same on all of them bit for bit."""
        self.start_sum(tensor)()
        return tensor

    def start_sum(self, tensor: Tensor) -> Wait:
        """Begin :meth:`sum_` of a contiguous tensor, which mustn't be touched until it is done."""
        if self.size == 1 or tensor.numel() == 0:
            return lambda: None
        self._count(tensor, 2)
        with self.message():
            return self._started(dist.all_reduce(tensor, op=dist.ReduceOp.SUM, group=self.group, async_op=True))

    def max_(self, tensor: Tensor) -> Tensor:
        """Replace ``tensor`` by its elementwise maximum over the ranks."""
        if self.size > 1 and tensor.numel():
            self._count(tensor, 2)
            with self.message():
                dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.group)
        return tensor

    def start_scatter(self, piece: Tensor, whole: Tensor) -> Wait:
        """Begin to sum ``whole`` [N * n] over the ranks into ``piece`` [n], of which rank r gets the r-th part."""
        self._count(whole, 1)
        scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        with self.message():
            return self._started(scatter(piece, whole, group=self.group, async_op=True))

    def gather_(self, whole: Tensor, piece: Tensor) -> Tensor:
        """Fill ``whole`` [N * n] with the ranks' ``piece`` [n] in order."""
        self._count(whole, 1)
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        with self.message():
            gather(whole, piece, group=self.group)
        return whole

    def objects(self, value: object) -> list[Any]:
        """Every rank's ``value``: a small object; for messages and errors, not for every step."""
        values: list[Any] = [None] * self.size
        with self.message():
            dist.all_gather_object(values, value, group=self.group)
        return values

    def sum_all_(self, tensors: Sequence[Tensor]) -> None:
        """Sum tensors over the ranks in place, in one buffer for each type and device instead of one by one.

        All ranks bring tensors of the same sizes and types in the same order.
        """
        if self.size == 1:
            return
        # No memory for a buffer is a message that fails, too.
        with self.message():
            for kind in dict.fromkeys((tensor.dtype, tensor.device) for tensor in tensors):
                alike = [tensor for tensor in tensors if (tensor.dtype, tensor.device) == kind]
                flat = self.sum_(torch.cat([tensor.reshape(-1) for tensor in alike]))
                parts = torch.split(flat, [tensor.numel() for tensor in alike])
                torch._foreach_copy_(alike, [part.view_as(tensor) for part, tensor in zip(parts, alike, strict=True)])


def checksum(tensor: Tensor) -> int:
    """A number made from the bits of a tensor."""
    return zlib.crc32(
        tensor.detach().resolve_conj().resolve_neg().cpu().flatten().contiguous().view(torch.uint8).numpy().data
    )


def is_sharded(tensor: Tensor) -> bool:
    """Whether ``tensor`` is a DTensor: this rank holds a part of it."""
    # Where nobody has imported DTensor there is none, and importing it takes a second.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, without graph; the tensor itself if it isn't sharded."""
    if not is_sharded(tensor):
        return tensor
    part: Tensor = tensor.detach().to_local()  # type: ignore[attr-defined]
    return part


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, gathered by all ranks together if it is sharded."""
    if not is_sharded(tensor):
        return tensor
    gathered: Tensor = tensor.detach().full_tensor()  # type: ignore[attr-defined]
    return gathered


def sharded_like(part: Tensor, tensor: Tensor) -> Tensor:
    """This rank's ``part`` of a tensor that is sharded as ``tensor`` is."""
    from torch.distributed.tensor import DTensor  # noqa: PLC0415 - only where there are such tensors

    assert isinstance(tensor, DTensor)
    return DTensor.from_local(
        part.contiguous(),
        tensor.device_mesh,
        tensor.placements,
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )


def fingerprint(value: object) -> int:
    """A number below 2**20 made from ``repr(value)``; sums of its square over 4096 ranks are exact in float64."""
    return zlib.crc32(repr(value).encode()) & 0xFFFFF


def all_equal(total: float, squares: float, size: int) -> bool:
    """Whether ``size`` integers are equal, given their sum and the sum of their squares."""
    return size * squares == total * total
