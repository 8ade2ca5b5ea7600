"""Room for the K gradients of a few parameters at a time, and their inner products."""

from collections.abc import Sequence

import torch
from torch import Tensor

from torchmto.gradients.finite import real
from torchmto.gradients.ranks import Pending, Ranks
from torchmto.gradients.rows import products, views_of, widest


class Bucket:
    """The tasks' gradients of some parameters as rows, being filled.

    Args:
        memory: Room for the rows, whatever it holds.
        num_tasks: K.
        leaves: The parameters.

    Attributes:
        memory: The same.
        rows: [K, elements of all parameters], a part of it.
    """

    def __init__(self, memory: Tensor, num_tasks: int, leaves: Sequence[Tensor]) -> None:
        width = sum(real(leaf).numel() for leaf in leaves)
        self.memory = memory
        self.rows = memory[: num_tasks * width].view(num_tasks, width)
        self._views = [dict(zip(map(id, leaves), views_of(row, leaves), strict=True)) for row in self.rows]
        self._written: list[set[int]] = [set() for _ in range(num_tasks)]

    def add(self, row: int, gradients: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Add gradients of some parameters to one row."""
        views, written = self._views[row], self._written[row]
        new = [(views[id(leaf)], gradient) for leaf, gradient in gradients if id(leaf) not in written]
        more = [(views[id(leaf)], gradient) for leaf, gradient in gradients if id(leaf) in written]
        if new:
            torch._foreach_copy_([view for view, _ in new], [gradient for _, gradient in new])
        if more:
            torch._foreach_add_([view for view, _ in more], [gradient for _, gradient in more])
        written.update(id(leaf) for leaf, _ in gradients)

    def complete(self) -> None:
        """Zeros where there was no gradient."""
        for views, written in zip(self._views, self._written, strict=True):
            if len(written) < len(views):
                torch._foreach_zero_([view for key, view in views.items() if key not in written])


class Buckets:
    """Buckets that are closed one after the other, each once its gradients are complete, and reduced to K x K products.

    Among several ranks a bucket's sum travels while the gradients of the next are computed; all ranks close the same
    buckets.

    Args:
        groups: The parameters of each bucket.
        num_tasks: K.
        ranks: The processes.
        spare: Memory of earlier buckets; a list that lives longer than this object.
        device: Where the product is.

    Attributes:
        product: The inner products of the closed buckets, [K, K]; of this rank's part of the columns.
    """

    def __init__(
        self,
        groups: Sequence[Sequence[Tensor]],
        num_tasks: int,
        *,
        ranks: Ranks,
        spare: list[Tensor],
        device: torch.device,
    ) -> None:
        self._groups = groups
        self._num_tasks = num_tasks
        self._ranks = ranks
        self._spare = spare
        self._number = {id(leaf): number for number, group in enumerate(groups) for leaf in group}
        self._open: dict[int, Bucket] = {}
        self._sent: tuple[Bucket, Pending] | None = None
        leaves = [leaf for group in groups for leaf in group]
        self._device = device
        self._dtype = widest(map(real, leaves))
        self._largest = num_tasks * max((sum(real(leaf).numel() for leaf in group) for group in groups), default=0)
        wide = torch.float32 if device.type == "mps" else torch.float64
        self.product = torch.zeros(num_tasks, num_tasks, dtype=wide, device=device)

    def __contains__(self, leaf: Tensor) -> bool:
        return id(leaf) in self._number

    def add(self, row: int, gradients: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Add one task's gradients, each to its parameter's bucket."""
        by_bucket: dict[int, list[tuple[Tensor, Tensor]]] = {}
        for leaf, gradient in gradients:
            by_bucket.setdefault(self._number[id(leaf)], []).append((leaf, gradient))
        for number, own in by_bucket.items():
            self._bucket(number).add(row, own)

    def _bucket(self, number: int) -> Bucket:
        if number not in self._open:
            self._open[number] = Bucket(self._memory(), self._num_tasks, self._groups[number])
        return self._open[number]

    def _memory(self) -> Tensor:
        while self._spare:
            memory = self._spare.pop()
            if (memory.dtype, memory.device, len(memory)) == (self._dtype, self._device, self._largest):
                return memory
            del memory
        return torch.empty(self._largest, dtype=self._dtype, device=self._device)

    def close(self, number: int) -> None:
        """Sum a bucket over the ranks and add its inner products to the product: now, or once the next is closed."""
        if number >= len(self._groups) or not self._groups[number]:
            return
        bucket = self._bucket(number)
        del self._open[number]
        bucket.complete()
        if self._ranks.size == 1:
            self._reduce(bucket)
            return
        self.finish()
        self._sent = bucket, self._ranks.start_sum(bucket.rows)

    def finish(self) -> None:
        """Wait for the bucket that is on its way."""
        if self._sent is not None:
            bucket, work = self._sent
            self._sent = None
            work.wait()
            self._reduce(bucket)

    def _reduce(self, bucket: Bucket) -> None:
        """Add inner products; each rank adds those of its part of the columns."""
        rank, size, width = self._ranks.rank, self._ranks.size, bucket.rows.shape[1]
        self.product += products(bucket.rows[:, width * rank // size : width * (rank + 1) // size])
        self._spare.append(bucket.memory)
