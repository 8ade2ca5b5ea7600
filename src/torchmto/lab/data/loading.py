"""Batches that depend on ``(seed, epoch, position)`` only, so that training resumes bit for bit mid-epoch."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:
    from torchmto.lab.data.base import Batch

_GOLDEN, _WORD = 0x9E3779B97F4A7C15, 2**64


def mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64, elementwise: a bijection that turns counters into random bits.

    Source: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
    """
    z = values.astype(np.uint64, copy=True)
    z ^= z >> np.uint64(30)
    z *= np.uint64(0xBF58476D1CE4E5B9)
    z ^= z >> np.uint64(27)
    z *= np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def sample_keys(seed: int, epoch: int, indices: Tensor) -> Tensor:
    """One random key per sample from ``(seed, epoch, index)``, whatever batch or process the sample is in.

    Args:
        seed: Any integer.
        epoch: Epoch number.
        indices: Sample numbers, int64 ``[B]``.

    Returns:
        int64 ``[B]``, to be given to `uniform`.

    Example:
        >>> bool((sample_keys(0, 1, torch.tensor([5, 7]))[1] == sample_keys(0, 1, torch.tensor([7]))).item())
        True
    """
    key = mix(np.array([seed % _WORD], dtype=np.uint64))
    key = mix(key + np.uint64(_GOLDEN * (epoch + 1) % _WORD))
    keys = mix(key + np.uint64(_GOLDEN) * (indices.numpy().astype(np.uint64) + np.uint64(1)))
    return torch.from_numpy(keys.view(np.int64))


def uniform(keys: Tensor, draw: int, low: float = 0.0, high: float = 1.0) -> Tensor:
    """The ``draw``-th random number of each sample, uniform in ``[low, high)``.

    Args:
        keys: int64 ``[B]`` from `sample_keys`.
        draw: Number of the draw; different draws are independent.
        low: Lower end.
        high: Upper end.

    Returns:
        float32 ``[B]``.
    """
    bits = mix(keys.numpy().view(np.uint64) + np.uint64(_GOLDEN * (draw + 1) % _WORD))
    unit = (bits >> np.uint64(40)).astype(np.float32) / np.float32(2**24)
    return torch.from_numpy(low + (high - low) * unit)


class BatchPlan:
    """Which samples make up which batch.

    A batch is the same samples whatever the number of processes: all ranks see the same permutation of an epoch,
    and each takes its piece of every batch. The pieces differ by one sample at most, the first ranks' are the larger
    ones; a last short batch may leave a rank without samples.

    Args:
        size: Number of samples.
        batch_size: Samples per batch, over all ranks.
        seed: Decides the permutations.
        shuffle: A new permutation every epoch; otherwise the stored order.
        drop_last: Leave out a last batch that isn't full.
        rank: This process' number.
        world_size: Number of processes.

    Example:
        >>> plan = BatchPlan(10, 4, seed=0, drop_last=False)
        >>> [len(plan.indices(epoch=0, position=p)) for p in range(len(plan))]
        [4, 4, 2]
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = True,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if size < 1:
            raise ValueError(f"Parameter `size` should be positive. Found `size = {size}`.")
        if batch_size < 1:
            raise ValueError(f"Parameter `batch_size` should be positive. Found `batch_size = {batch_size}`.")
        if not 0 <= rank < world_size:
            raise ValueError(f"Parameter `rank` should be in [0, {world_size}). Found `rank = {rank}`.")
        if drop_last and size < batch_size:
            raise ValueError(
                f"Parameter `batch_size` should be at most the {size} samples there are."
                f" Found `batch_size = {batch_size}`."
            )
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self.shuffle, self.drop_last = shuffle, drop_last
        self.rank, self.world_size = rank, world_size
        self._permutation: tuple[int, Tensor] | None = None

    def __len__(self) -> int:
        """Batches per epoch."""
        whole, rest = divmod(self.size, self.batch_size)
        return whole + int(rest > 0 and not self.drop_last)

    def order(self, epoch: int) -> Tensor:
        """The order of all samples in an epoch: int64 ``[size]``."""
        if not self.shuffle:
            return torch.arange(self.size)
        if self._permutation is None or self._permutation[0] != epoch:
            key = sample_keys(self.seed, epoch, torch.zeros(1, dtype=torch.int64))
            generator = torch.Generator().manual_seed(int(key.item()))
            self._permutation = epoch, torch.randperm(self.size, generator=generator)
        return self._permutation[1]

    def indices(self, epoch: int, position: int) -> Tensor:
        """This rank's samples of batch number ``position`` of an epoch: int64 ``[batch_size / world_size]`` or so."""
        if not 0 <= position < len(self):
            raise IndexError(f"Batch {position} of an epoch with {len(self)} batches.")
        start = position * self.batch_size
        return self.order(epoch)[start : start + self.batch_size].tensor_split(self.world_size)[self.rank]

    def keys(self, epoch: int, position: int) -> Tensor:
        """Random keys of the samples of a batch, for `uniform`."""
        return sample_keys(self.seed, epoch, self.indices(epoch, position))


class Loader:
    """Iterates over the batches of a plan from any position of any epoch.

    Threads, not processes, prepare batches ahead: tensors and image decoding release the interpreter lock,
    and nothing has to be copied between processes. Batches come in the plan's order whatever the number of
    threads.

    Args:
        fetch: ``(indices, keys) -> batch``; pure, since threads may call it out of order.
        plan: Which samples make up which batch.
        workers: Number of threads; 0 fetches in the calling thread.
    """

    def __init__(self, fetch: "Callable[[Tensor, Tensor], Batch]", plan: BatchPlan, *, workers: int = 0) -> None:
        if workers < 0:
            raise ValueError(f"Parameter `workers` should be non-negative. Found `workers = {workers}`.")
        self.fetch = fetch
        self.plan = plan
        self.workers = workers
        self.wait_seconds = 0.0
        """Time the consumer has waited for data since the loader was built."""

    def __len__(self) -> int:
        """Batches per epoch."""
        return len(self.plan)

    def batch(self, epoch: int, position: int) -> "Batch":
        """Batch number ``position`` of an epoch."""
        return self.fetch(self.plan.indices(epoch, position), self.plan.keys(epoch, position))

    def epoch(self, epoch: int, start: int = 0, stride: int = 1) -> "Iterator[Batch]":
        """Every ``stride``-th batch of an epoch from position ``start`` on."""
        positions = range(start, len(self), stride)
        ready = self._ahead(epoch, positions) if self.workers else self._one_by_one(epoch, positions)
        while True:
            began = time.perf_counter()
            batch = next(ready, None)
            self.wait_seconds += time.perf_counter() - began
            if batch is None:
                return
            yield batch

    def __iter__(self) -> "Iterator[Batch]":
        """The batches of epoch 0, for evaluation."""
        return self.epoch(0)

    def _one_by_one(self, epoch: int, positions: range) -> "Iterator[Batch]":
        for position in positions:
            yield self.batch(epoch, position)

    def _ahead(self, epoch: int, positions: range) -> "Iterator[Batch]":
        self.plan.order(epoch)  # so that the threads find the permutation made
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="torchmto-data")
        try:
            queue: deque[Future[Batch]] = deque()
            for position in positions:
                queue.append(pool.submit(self.batch, epoch, position))
                if len(queue) > self.workers:
                    yield queue.popleft().result()
            while queue:
                yield queue.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
