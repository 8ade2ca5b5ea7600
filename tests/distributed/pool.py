"""Real processes with a gloo process group, started once and given many jobs.

While they work nothing looks at a clock: a worker answers, or it dies, which is an event too. What hangs is ended by the
time limit of the whole suite, which is below gloo's own.
"""

import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing


def _serve(rank: int, size: int, store: str, connection: Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    groups = {count: dist.new_group(list(range(count))) for count in range(2, size)} | {size: dist.group.WORLD}
    while True:
        try:
            function, count, args = connection.recv()
        except EOFError:
            return
        try:
            connection.send((True, function(rank, count, groups[count], *args)))
        except Exception as error:  # noqa: BLE001 - the parent raises it
            connection.send((False, (type(error).__name__, str(error), traceback.format_exc())))


class Pool:
    """``size`` worker processes; a job runs on the first ``count`` of them."""

    def __init__(self, size: int, folder: Path) -> None:
        self.size, self.folder = size, folder
        self._open()

    def _open(self) -> None:
        context = torch.multiprocessing.get_context("spawn")
        store = str(Path(tempfile.mkdtemp(dir=self.folder)) / "store")
        self.connections: list[Connection] = []
        self.processes = []
        for rank in range(self.size):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self.size, store, there), daemon=True)
            process.start()
            self.connections.append(here)
            self.processes.append(process)

    def start(self, count: int, function: Callable[..., Any], *args: Any) -> None:
        """Give the first ``count`` workers a job."""
        for connection in self.connections[:count]:
            connection.send((function, count, args))

    def _answers(self, count: int) -> Iterator[tuple[int, tuple[bool, Any]]]:
        """The ranks and what they say, in the order in which they are done."""
        waiting = set(range(count))
        while waiting:
            ends = [self.processes[rank].sentinel for rank in waiting]
            ready = wait([*(self.connections[rank] for rank in waiting), *ends])
            for rank in [rank for rank in waiting if self.connections[rank] in ready]:
                waiting.remove(rank)
                yield rank, self.connections[rank].recv()
            for rank in waiting:
                if self.processes[rank].sentinel in ready:
                    raise RuntimeError(f"rank {rank} died with {self.processes[rank].exitcode}")

    def outcomes(self, count: int) -> list[tuple[bool, Any]]:
        """Whether each worker succeeded, and its result or (type, message, traceback)."""
        return [answer for _, answer in sorted(self._answers(count))]

    def run(self, count: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Run a job and return the results of all ranks; raise once one has failed, with whom the others may wait for ever."""
        self.start(count, function, *args)
        results = {}
        for rank, (good, result) in self._answers(count):
            if not good:
                self.close()
                self._open()
                raise AssertionError(f"rank {rank}: {result[2]}")
            results[rank] = result
        return [results[rank] for rank in range(count)]

    def close(self) -> None:
        """End the workers: those that wait for a job end by themselves."""
        for connection in self.connections:
            connection.close()
        for process in self.processes:
            process.join(5)
            process.kill()
            process.join()


sys.path[:] = list(dict.fromkeys([*sys.path, str(Path(__file__).parent), str(Path(__file__).parents[1])]))
