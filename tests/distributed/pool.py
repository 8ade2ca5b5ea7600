"""Real processes with a gloo process group, started once and given many jobs."""

import datetime as dt
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

TIMEOUT = 60


def _serve(rank: int, size: int, store: str, connection: Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=size,
        timeout=dt.timedelta(seconds=TIMEOUT),
    )
    groups = {count: dist.new_group(list(range(count))) for count in range(2, size)} | {size: dist.group.WORLD}
    while True:
        job = connection.recv()
        if job is None:
            break
        function, count, args = job
        try:
            connection.send((True, function(rank, count, groups[count], *args)))
        except Exception as error:  # noqa: BLE001 - the parent raises it
            connection.send((False, (type(error).__name__, str(error), traceback.format_exc())))
    dist.destroy_process_group()


class Pool:
    """``size`` worker processes; a job runs on the first ``count`` of them."""

    def __init__(self, size: int, folder: Path) -> None:
        context = torch.multiprocessing.get_context("spawn")
        self.size = size
        self.connections: list[Connection] = []
        self.processes = []
        for rank in range(size):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, size, str(folder / "store"), there), daemon=True)
            process.start()
            self.connections.append(here)
            self.processes.append(process)

    def start(self, count: int, function: Callable[..., Any], *args: Any) -> None:
        """Give the first ``count`` workers a job."""
        for connection in self.connections[:count]:
            connection.send((function, count, args))

    def outcomes(self, count: int) -> list[tuple[bool, Any]]:
        """Whether each worker succeeded, and its result or (type, message, traceback)."""
        results = []
        for rank, connection in enumerate(self.connections[:count]):
            if not connection.poll(TIMEOUT + 30):
                raise TimeoutError(f"rank {rank} hangs")
            results.append(connection.recv())
        return results

    def run(self, count: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Run a job and return the results of all ranks; raise if one failed."""
        self.start(count, function, *args)
        outcomes = self.outcomes(count)
        for rank, (good, result) in enumerate(outcomes):
            if not good:
                raise AssertionError(f"rank {rank}: {result[2]}")
        return [result for _, result in outcomes]

    def close(self) -> None:
        """End the workers."""
        for connection in self.connections:
            connection.send(None)
        for process in self.processes:
            process.join(10)
            if process.is_alive():
                process.kill()


sys.path[:] = list(dict.fromkeys([*sys.path, str(Path(__file__).parent), str(Path(__file__).parents[1])]))
