"""Running the grid: in this process or in several, with nothing lost when it is interrupted."""

import contextlib
import json
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from functools import lru_cache, partial
from queue import Empty
from typing import Any, Literal, Protocol, Self

import torch

from torchmto.lab.atomic import canonical, plain
from torchmto.lab.compare.experiment import Experiment
from torchmto.lab.compare.folder import RunFolder, run_key, run_label
from torchmto.lab.compare.single import is_finite, train_and_measure
from torchmto.lab.data import DataBundle, load_data
from torchmto.lab.training import RunConfig, chosen_tasks, primary_values

__all__ = ["FailedRunsError", "Watcher", "compare", "default_jobs"]

Result = dict[str, Any]
Stage = Literal["single-task", "methods"]
Failures = list[tuple[RunConfig, str]]


class FailedRunsError(RuntimeError):
    """Some runs failed; the others are finished and saved.

    Args:
        message: What there is to say.
        failures: The runs, and what went wrong in each.
    """

    def __init__(self, message: str, failures: Failures | None = None) -> None:
        super().__init__(message)
        self.failures = failures or []


class Watcher(Protocol):
    """Who wants to know how far the grid is."""

    def plan(self, runs: Sequence[RunConfig], finished: Sequence[RunConfig]) -> None:
        """All runs of the grid, and those that an earlier call finished."""

    def advance(self, config: RunConfig, batches: int) -> None:
        """A run has done so many batches."""

    def finish(self, config: RunConfig, result: Result) -> None:
        """A run is finished and saved."""


class Silence:
    """A watcher that shows nothing."""

    def plan(self, runs: Sequence[RunConfig], finished: Sequence[RunConfig]) -> None:
        """Nothing."""

    def advance(self, config: RunConfig, batches: int) -> None:
        """Nothing."""

    def finish(self, config: RunConfig, result: Result) -> None:
        """Nothing."""


def default_jobs(device: str) -> int:
    """Runs at a time: one on an accelerator, else one per core, at most four."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, 4) if device == "cpu" else 1


def compare(
    experiment: Experiment,
    folder: RunFolder,
    bundle: DataBundle,
    *,
    jobs: int = 1,
    watcher: Watcher | None = None,
    stages: Sequence[Stage] = ("single-task", "methods"),
    stand_ins: Mapping[str, float] | None = None,
) -> dict[str, Result]:
    """Run what isn't finished yet: first all single-task baselines, then the methods.

    Args:
        experiment: What to run.
        folder: Where finished runs are and go.
        bundle: The data.
        jobs: Runs at a time, each in its own process if there are several.
        watcher: Is told how far the grid is.
        stages: Which of the two to run; methods need all single-task runs finished, or ``stand_ins``.
        stand_ins: Validation values by task, for methods, where a single-task run isn't finished or its value isn't finite.

    Returns:
        The result of every run by `run_key`.

    Raises:
        FolderError: If the folder's files are broken, foreign or in use; nothing is changed.
        FailedRunsError: If runs failed; the others of their stage are finished first.
        KeyboardInterrupt: On Ctrl-C; finished runs stay.
    """
    watcher = watcher or Silence()
    tasks = chosen_tasks(bundle, experiment.run.tasks)
    singles = experiment.single_task_runs([task.name for task in tasks])
    methods = experiment.method_runs()
    by_stage: dict[Stage, list[RunConfig]] = {"single-task": singles, "methods": methods}
    with folder.locked():
        results = folder.load([*singles, *methods])
        runs = [config for stage in stages for config in by_stage[stage]]
        watcher.plan(runs, [config for config in runs if run_key(config) in results])

        def baseline(seed: int) -> dict[str, float]:
            values: dict[str, float] = {}
            for config in singles:
                if config.seed == seed and run_key(config) in results:
                    (task,) = chosen_tasks(bundle, config.tasks)
                    values |= primary_values(results[run_key(config)]["validation"], (task,))
            return values | {task: v for task, v in (stand_ins or {}).items() if not is_finite(values.get(task))}

        def save(config: RunConfig, result: Result) -> None:
            folder.save(config, result)
            results[run_key(config)] = plain(result)
            watcher.finish(config, result)

        with Workers(jobs) if jobs > 1 else OneByOne(bundle) as engine:
            for stage in stages:
                todo = [
                    (config, baseline(config.seed) if stage == "methods" else None)
                    for config in by_stage[stage]
                    if run_key(config) not in results
                ]
                failures = engine.run(todo, watcher, save)
                if failures:
                    text = "\n".join(f"{run_label(config)}: {why}" for config, why in failures)
                    raise FailedRunsError(text, failures)
    return results


Todo = Sequence[tuple[RunConfig, Mapping[str, float] | None]]
Save = Callable[[RunConfig, Result], None]
_EXPECTED = (RuntimeError, ValueError, ArithmeticError, OSError)
"""What may go wrong in one run and leave the others alone: a loss that isn't finite, memory, a file, a killed worker."""


class OneByOne:
    """Runs in this process, one after the other.

    Args:
        bundle: The data.
    """

    def __init__(self, bundle: DataBundle) -> None:
        self._bundle = bundle

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def run(self, todo: Todo, watcher: Watcher, save: Save) -> Failures:
        """Do all runs; returns those that failed."""
        failures: Failures = []
        for config, baseline in todo:
            try:
                result = train_and_measure(
                    config, self._bundle, baseline=baseline, on_step=partial(watcher.advance, config)
                )
            except _EXPECTED as error:
                traceback.print_exc()
                failures.append((config, str(error)))
            else:
                save(config, result)
        return failures


class Workers:
    """Runs in several processes, which share the cores evenly.

    Args:
        jobs: How many.
    """

    def __init__(self, jobs: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._queue = context.Queue()
        self._others = set(multiprocessing.active_children())
        self._pool = ProcessPoolExecutor(
            jobs,
            mp_context=context,
            initializer=_start_worker,
            initargs=(self._queue, max(1, torch.get_num_threads() // jobs), os.getpid()),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        self._pool.shutdown(wait=kind is None, cancel_futures=True)
        if kind is not None:
            for process in set(multiprocessing.active_children()) - self._others:
                process.terminate()
        self._queue.close()
        self._queue.cancel_join_thread()

    def run(self, todo: Todo, watcher: Watcher, save: Save) -> Failures:
        """Do all runs; returns those that failed."""
        configs = {run_key(config): config for config, _ in todo}
        failures: Failures = []
        futures = self._submit(todo)
        pending: set[Future[Result]] = set(futures)
        while pending:
            done, pending = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
            for key, batches in self._reports():
                if key in configs:
                    watcher.advance(configs[key], batches)
            for future in done:
                try:
                    result = future.result()
                except _EXPECTED as error:
                    traceback.print_exc()
                    failures.append((futures[future], str(error)))
                else:
                    save(futures[future], result)
        return failures

    def _submit(self, todo: Todo) -> dict[Future[Result], RunConfig]:
        """Hand out the work. Workers inherit a blocked SIGINT: Ctrl-C is for this process, which ends them."""
        can_block = hasattr(signal, "pthread_sigmask")
        if can_block:
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            return {self._pool.submit(_work, config, baseline): config for config, baseline in todo}
        finally:
            if can_block:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})

    def _reports(self) -> Iterator[tuple[str, int]]:
        with contextlib.suppress(Empty):
            while True:
                yield self._queue.get_nowait()


# --------------------------------------------------------------------------------------- inside a worker

_progress: Any = None
"""The queue that takes (key of the run, batches done)."""


def _start_worker(queue: Any, threads: int, parent: int) -> None:
    global _progress  # noqa: PLW0603  the only way to hand a queue to a pool's workers
    _progress = queue
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """A worker whose parent was killed has nobody to work for."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


@lru_cache(maxsize=1)
def _load(data: str, seed: int, options: str) -> DataBundle:
    return load_data(data, seed, **json.loads(options))


def _work(config: RunConfig, baseline: Mapping[str, float] | None) -> Result:
    key = run_key(config)
    told = time.monotonic()

    def on_step(batches: int) -> None:
        nonlocal told
        if time.monotonic() - told > 0.2:
            told = time.monotonic()
            _progress.put((key, batches))

    bundle = _load(config.data, config.data_seed, canonical(config.data_options))
    return train_and_measure(config, bundle, baseline=baseline, on_step=on_step)
