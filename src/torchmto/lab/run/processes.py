"""The processes that train one model together: how they are started, who acts for all, how they agree.

The first one owns the run's folder, its logs and its decisions; the others get what it read or decided. An error of
one process ends all of them, its message first.
"""

import contextlib
import logging
import os
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from torchmto.lab.run.config import ConfigError
from torchmto.step import RankFailedError

Result = TypeVar("Result")


class RankError(RankFailedError):
    """Another process of the run failed, and so ended it for all.

    Args:
        rank: Which one.
        error: What it said.
    """

    def __init__(self, rank: int, error: str) -> None:
        super().__init__(f"Rank {rank} failed, so the run ended on all ranks. {error}")


class Processes:
    """The processes of the initialised process group; this process alone if there is none.

    What they tell each other here travels over gloo, as it lies in the main memory.

    Attributes:
        rank: This process' number.
        size: How many there are.
    """

    def __init__(self) -> None:
        active = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if active else 0
        self.size = dist.get_world_size() if active else 1
        own = active and dist.get_backend() != "gloo"
        self._group = dist.new_group(backend="gloo") if own else None

    @property
    def is_first(self) -> bool:
        """Whether this process acts for all."""
        return self.rank == 0

    def first(self, work: Callable[[], Result]) -> Result:
        """Let the first process work; all get its result, which has to be something that pickles.

        Raises:
            RankError: On the others, if it failed; it raises its own error.
        """
        told: list[Any] = [None]
        with self.together():
            if self.is_first:
                told = [work()]
        if self.size > 1:
            dist.broadcast_object_list(told, src=0, group=self._group)
        return told[0]  # type: ignore[no-any-return]

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """An error inside the block, on whichever process, is known to all when they leave it.

        Raises:
            RankError: On the processes without an error, if another had one.
        """
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            if self.size == 1:
                raise
            failure = error
        if self.largest(failure is not None):
            told = self.gather(None if failure is None else _described(failure))
            if failure is not None:
                raise failure
            rank, message = next((rank, error) for rank, error in enumerate(told) if error is not None)
            raise RankError(rank, message)

    def largest(self, number: int) -> int:
        """The largest of the processes' numbers."""
        if self.size == 1:
            return number
        value = torch.tensor(number, dtype=torch.int64)
        dist.all_reduce(value, op=dist.ReduceOp.MAX, group=self._group)
        return int(value)

    def gather(self, value: Result) -> list[Result]:
        """Every process' value, in the order of the ranks."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._group)
        return values

    @torch.no_grad()
    def equalize(self, tensors: Iterable[Tensor]) -> None:
        """Give tensors the first process' values; unlike processors may draw slightly other random numbers."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _in_torchrun() -> bool:
    return dist.is_available() and dist.is_torchelastic_launched()


def placement(devices: int, nodes: int) -> tuple[int, int]:
    """Processes per node and nodes: as torchrun started them, else as the settings say."""
    if not _in_torchrun():
        return devices, nodes
    devices = int(os.environ["LOCAL_WORLD_SIZE"])
    return devices, int(os.environ["WORLD_SIZE"]) // devices


@contextlib.contextmanager
def launched(device: str, devices: int, nodes: int) -> Iterator[tuple[Processes, torch.device | None]]:
    """The processes of a run: those that torchrun or a cluster started, else Lightning Fabric starts them.

    Fabric does so by running this program again, with the same arguments and ``LOCAL_RANK`` set.

    Args:
        device: Of the settings.
        devices: Processes on this machine.
        nodes: Machines.

    Yields:
        The processes, and this one's device where there are several.

    Raises:
        ConfigError: If the machine has no such devices.
    """
    if devices * nodes == 1 and not (dist.is_available() and dist.is_initialized()):
        yield Processes(), None
        return
    from lightning_fabric import Fabric  # noqa: PLC0415  takes seconds, and one process needs nothing of it
    from lightning_fabric.utilities.exceptions import MisconfigurationException  # noqa: PLC0415

    accelerator = "gpu" if device.startswith("cuda") else device
    try:
        fabric = Fabric(accelerator=accelerator, devices=devices, num_nodes=nodes, strategy="ddp")
    except (MisconfigurationException, ValueError) as error:
        raise ConfigError(f"`devices = {devices}` on {nodes} node(s) can't be used here: {error}") from error
    own = not (dist.is_available() and dist.is_initialized())
    if own:  # `fabric run` has done it before
        _launch(fabric)
    yield Processes(), fabric.device
    # After an error the others may not be there any more to agree on the end.
    if own and dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def _launch(fabric: Any) -> None:
    if _in_torchrun() and os.environ["WORLD_SIZE"] != "1":
        _join_attempt("nccl" if fabric.device.type == "cuda" else "gloo")
    disabled = logging.root.manager.disable
    logging.disable(logging.INFO)  # else Fabric announces every process in a frame of dashes
    try:
        fabric.launch()
    finally:
        logging.disable(disabled)


def _join_attempt(backend: str) -> None:
    """Initialise the process group of a torchrun job.

    Fabric would do it. But torchrun keeps one store for all attempts, in which restarted workers find the addresses of
    the dead, and wait for them: every attempt needs keys of its own.
    """
    from torch.distributed.rendezvous import rendezvous  # noqa: PLC0415 - not there where torch was built without

    shared, rank, size = next(rendezvous("env://"))
    store = dist.PrefixStore(attempt_name(shared, rank, size), shared)  # type: ignore[attr-defined]
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)


def attempt_name(store: Any, rank: int, size: int) -> str:
    """A name for this start of a job's processes that all of them know, whatever earlier ones left in the store.

    torchrun's own count of restarts won't do: it may differ between machines. So every process shows a word that nobody
    said before, and waits until the first one answers to it.

    Args:
        store: A ``torch.distributed.Store``.
        rank: This process' number.
        size: How many there are.
    """
    own = uuid.uuid4().hex
    if rank > 0:
        store.set(f"rank {rank} says", own)
        name: str = store.get(f"answer to {own}").decode()
        store.set(f"{name} heard by {rank}", "yes")
        return name
    missing = set(range(1, size))
    while missing:
        for other in tuple(missing):
            if store.check([f"rank {other} says"]):
                store.set(f"answer to {store.get(f'rank {other} says').decode()}", own)
            if store.check([f"{own} heard by {other}"]):
                missing.remove(other)
        time.sleep(0.01)
    return own


def elastic_job() -> tuple[str, bool] | None:
    """The torchrun job that this process belongs to, and whether it may have started before; None outside of torchrun.

    A job with a name of its own is told from others by it. One without is new unless torchrun has restarted its workers.
    """
    if not _in_torchrun():
        return None
    name = os.environ["TORCHELASTIC_RUN_ID"]
    return name, name != "none" or int(os.environ["TORCHELASTIC_RESTART_COUNT"]) > 0


def speaks() -> bool:
    """Whether this process prints what all have to say; also once the process group is gone."""
    fabric = sys.modules.get("lightning_fabric.utilities.rank_zero")
    return fabric is None or getattr(fabric.rank_zero_only, "rank", 0) == 0


def is_follower() -> bool:
    """Whether Fabric started this process beside the one the user started.

    The exit code of the latter is the run's. Fabric kills it if another code than 0 is seen here first.
    """
    return os.environ.get("LOCAL_RANK", "0") != "0" and not _in_torchrun()
