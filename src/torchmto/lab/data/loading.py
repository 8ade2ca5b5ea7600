"""Batches that depend on ``(seed, epoch, position)`` only, so that training resumes bit for bit mid-epoch."""

import contextlib
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from itertools import count, islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from torchmto.checks import check_integer, warn

PATIENCE = 20.0
"""Seconds after which one is told what takes so long about an iterable."""
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


def batch_key(keys: Tensor) -> int:
    """The random key of a batch as a whole, which is none of its samples'; ``keys`` are theirs, int64 ``[B]``."""
    first = keys[:1].numpy().view(np.uint64)  # no two batches of an epoch begin with the same sample
    return int(mix(first + np.uint64(_GOLDEN)).view(np.int64).sum())


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


@dataclass(eq=False)
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
        drop_last: Leave out a last batch that isn't full, unless it is the only one.
        rank: This process' number.
        world_size: Number of processes.

    Example:
        >>> plan = BatchPlan(10, 4, seed=0, drop_last=False)
        >>> [len(plan.indices(epoch=0, position=p)) for p in range(len(plan))]
        [4, 4, 2]
    """

    size: int
    batch_size: int
    _: KW_ONLY
    seed: int = 0
    shuffle: bool = True
    drop_last: bool = True
    rank: int = 0
    world_size: int = 1
    _permutation: tuple[int, Tensor] | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("size", "batch_size"):
            check_integer(name, getattr(self, name), minimum=1)

    def __len__(self) -> int:
        """Batches per epoch."""
        whole, rest = divmod(self.size, self.batch_size)
        return whole + int(rest > 0 and (not self.drop_last or not whole))

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
    """Batches of a plan from any position of any epoch, through torch's ``DataLoader``.

    Args:
        fetch: ``(indices, keys) -> batch``, which depends on its arguments only, since other processes may call it.
        plan: Which samples make up which batch.
        workers: Processes that prepare batches ahead; 0 prepares each when it is asked for. Never changes a batch.
    """

    def __init__(self, fetch: Callable[[Tensor, Tensor], Any], plan: BatchPlan, *, workers: int = 0) -> None:
        check_integer("workers", workers, minimum=0)
        self.fetch = fetch
        self.plan = plan
        self.wait_seconds = 0.0
        """Time the consumer has waited for data since the loader was built."""
        self._asked: list[tuple[int, int]] = []
        self._loader: DataLoader[Any] = DataLoader(
            _Batches(fetch, plan),
            sampler=self._asked,
            batch_size=None,
            num_workers=workers,
            collate_fn=same,
            # Its own, as a new iterator draws a number, which may not come from the generator that dropout draws from.
            generator=torch.Generator().manual_seed(0),
            persistent_workers=workers > 0,
        )

    def __len__(self) -> int:
        """Batches per epoch."""
        return len(self.plan)

    def epoch(self, epoch: int, start: int = 0, stride: int = 1) -> Iterator[Any]:
        """Every ``stride``-th batch of an epoch from position ``start`` on."""
        self._asked[:] = [(epoch, position) for position in range(start, len(self), stride)]
        ready = iter(self._loader)
        for _ in range(len(self._asked)):
            began = time.perf_counter()
            try:
                batch = next(ready)
            except ValueError as error:
                told = str(error).rstrip()
                if "DataLoader worker process" not in told:
                    raise
                raise ValueError(told.rpartition("ValueError: ")[2]) from error  # what the other process said
            self.wait_seconds += time.perf_counter() - began
            yield batch

    def __iter__(self) -> Iterator[Any]:
        """The batches of epoch 0, for evaluation."""
        return self.epoch(0)


class _Batches(Dataset[Any]):
    """A plan's batches by epoch and position."""

    def __init__(self, fetch: Callable[[Tensor, Tensor], Any], plan: BatchPlan) -> None:
        self.fetch, self.plan = fetch, plan

    def __getitem__(self, place: tuple[int, int]) -> Any:
        return self.fetch(self.plan.indices(*place), self.plan.keys(*place))


def same(batch: Any) -> Any:
    """The batch: what collates batches that come ready-made."""
    return batch


@dataclass(eq=False)
class StreamLoader:
    """Batches of an iterable, which is gone through anew every epoch, and up to the place where a run goes on.

    Args:
        stream: Gives samples, or batches where ``batch_size`` is None. Each comes with a random state seeded from seed,
            epoch and place.
        batch_size: Samples per batch; None where each element is a batch.
        collate: ``(samples, keys) -> batch``, with a random key per sample as `sample_keys` gives them, or what to make of a
            list of the one element that is a batch.
        seed: Decides the random states.
        drop_last: Leave out a last batch that isn't full.
        rank: This process' number.
        world_size: Number of processes; each takes its piece of every batch.
    """

    stream: Iterable[Any]
    batch_size: int | None
    collate: Callable[[list[Any], Tensor], Any]
    _: KW_ONLY
    seed: int = 0
    drop_last: bool = True
    rank: int = 0
    world_size: int = 1
    wait_seconds: float = field(default=0.0, init=False)
    _length: int | None = field(default=None, init=False, repr=False)

    def __len__(self) -> int:
        """Batches per epoch; counted by going through the stream once where it doesn't say."""
        if self._length is None:
            try:
                size = len(self.stream)  # type: ignore[arg-type]
            except TypeError:
                with own_random_state(self._key(0, -1)):  # counting disturbs nothing
                    size = self._counted()
            whole, rest = divmod(size, self.batch_size or 1)
            self._length = whole + int(rest > 0 and (not self.drop_last or not whole))
        return self._length

    def _counted(self) -> int:
        size, patience = 0, time.monotonic() + PATIENCE
        for size, _ in enumerate(self.stream, 1):
            if time.monotonic() > patience:
                warn(
                    f"An iterable data set is counted first: it has to end, or to have `__len__`. {size} elements so far."
                )
                patience = float("inf")
        return size

    def _key(self, epoch: int, place: int) -> int:
        """What the random state is seeded from at a place; -1 is where an epoch begins."""
        return int(sample_keys(self.seed, epoch, torch.tensor([place])))

    def _drawn(self, epoch: int) -> Iterator[Any]:
        """The stream's elements, each drawn with a random state of its own."""
        with own_random_state(self._key(epoch, -1)):
            source = iter(self.stream)
        for place in count():
            with own_random_state(self._key(epoch, place)):
                try:
                    item = next(source)
                except StopIteration:
                    return
            yield item

    def epoch(self, epoch: int, start: int = 0, stride: int = 1) -> Iterator[Any]:
        """Every ``stride``-th batch of an epoch from position ``start`` on.

        Raises:
            ValueError: If the stream gives fewer samples than when it was counted.
        """
        source = self._drawn(epoch)
        for position in range(len(self)):
            began = time.perf_counter()
            items = list(islice(source, self.batch_size or 1))
            first = position * (self.batch_size or 1)
            keys = sample_keys(self.seed, epoch, torch.arange(first, first + len(items)))
            wanted = position >= start and (position - start) % stride == 0
            if not items:
                raise ValueError(
                    f"An iterable data set should give as many samples every time it is gone through. Found {len(self)} "
                    f"batches when it was counted, and {position} in epoch {epoch}."
                )
            if wanted and self.batch_size is not None:
                pieces = np.array_split(np.arange(len(items)), self.world_size)
                items, keys = [items[i] for i in pieces[self.rank]], keys[torch.from_numpy(pieces[self.rank])]
            batch = self.collate(items, keys) if wanted else None
            self.wait_seconds += time.perf_counter() - began
            if wanted:
                yield batch


class JointLoader:
    """One batch of each of several data sets per step; an epoch is the longest one's, shorter ones start again reshuffled.

    Args:
        loaders: Task -> its batches.
        beside: Others that an epoch is as long as, too, but whose batches aren't taken.
    """

    def __init__(
        self, loaders: "Mapping[str, Loader | StreamLoader]", beside: "Sequence[Loader | StreamLoader]" = ()
    ) -> None:
        self.loaders = dict(loaders)
        self._beside = tuple(beside)

    @property
    def wait_seconds(self) -> float:
        """Time the consumer has waited for data since the loader was built."""
        return sum(loader.wait_seconds for loader in self.loaders.values())

    def __len__(self) -> int:
        """Steps per epoch."""
        return max(map(len, (*self.loaders.values(), *self._beside)))

    def epoch(self, epoch: int, start: int = 0, stride: int = 1) -> Iterator[dict[str, Any]]:
        """Every ``stride``-th step of an epoch from ``start`` on: task -> batch."""
        longest = len(self)

        def endless(loader: "Loader | StreamLoader") -> Iterator[Any]:
            # A pass of a shorter one is an epoch of its own, with an order of its own.
            done, place = divmod(epoch * longest + start, len(loader))
            while True:
                yield from loader.epoch(done, place)
                done, place = done + 1, 0

        streams = {task: endless(loader) for task, loader in self.loaders.items()}
        for position in range(start, longest):
            batches = {task: next(stream) for task, stream in streams.items()}
            if (position - start) % stride == 0:
                yield batches


@contextlib.contextmanager
def own_random_state(key: int) -> Iterator[None]:
    """Python's, NumPy's and torch's generators seeded from ``key`` inside the block, and as before after it."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002  a data set may draw from it
    random.seed(key)
    np.random.seed(key % 2**32)  # noqa: NPY002
    torch.default_generator.manual_seed(key)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])  # noqa: NPY002
        torch.set_rng_state(before[2])
