"""Where Runs go: this process, local processes, Ray, Slurm. Each takes jobs and hands back results, the same ones."""

import contextlib
import functools
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from pathlib import Path
from queue import Empty
from typing import Any, Self

from torchmto.checks import check_integer, found, nearest, needed
from torchmto.lab.atomic import canonical, plain
from torchmto.lab.grid.identity import identity
from torchmto.lab.problem import Problem
from torchmto.lab.references import load_problem
from torchmto.lab.run.build import Computer, device_of
from torchmto.lab.run.checkpoint import CheckpointFolder
from torchmto.lab.run.config import MOST, ConfigError, RunConfig
from torchmto.lab.run.loop import Trainer, is_state
from torchmto.lab.user_code import user_frames
from torchmto.methods.registry import own_methods, register_method

EXECUTORS = ("local", "ray", "slurm")
Advance = Callable[[str, int], None]
Done = Callable[[str, "Outcome"], None]


@dataclass(frozen=True)
class Job:
    """One Run, as it travels to where it is done.

    Attributes:
        key: Its name among the jobs.
        config: Its settings.
        baseline: Single-task validation values of its seed; None for a baseline itself.
        problem: The problem pickled by cloudpickle, where its reference doesn't lead to it.
        checkpoints: Where its checkpoints are and go, if it keeps any.
        place: The working folder and the folders to import from.
        methods: Own methods' classes, each pickled by cloudpickle, by name.
    """

    key: str
    config: RunConfig
    baseline: Mapping[str, float | None] | None
    problem: bytes | None = None
    checkpoints: Path | None = None
    place: tuple[str, tuple[str, ...]] = ("", ())
    methods: Mapping[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What became of a job.

    Attributes:
        result: What `Trainer.fit` gives; None if it failed.
        error: What went wrong, in a line.
        frames: Where in the user's code it went wrong, if it did there.
    """

    result: dict[str, Any] | None
    error: str = ""
    frames: str = ""


def execute(job: Job, problem: Problem | None = None, on_step: Callable[[int], None] | None = None) -> Outcome:
    """Do a Run. What goes wrong in it comes back, so that the others go on.

    Args:
        job: The Run.
        problem: The problem, where it is at hand.
        on_step: Called after every step with the number of steps done.
    """
    try:
        _go(job.place)
        _register(job.methods)
        if problem is None:
            problem = _unpickled(job.problem) if job.problem else loaded(job.config)
        return Outcome(_train(job, problem.only(job.config.data.tasks or ()), on_step))
    except (Exception, SystemExit) as error:  # noqa: BLE001  whatever it is, it is this Run's alone
        return Outcome(None, _said(error), user_frames(error))


def _lost(error: BaseException) -> Outcome:
    """What a cluster says of a job that it lost, in a line."""
    return Outcome(None, _said(error).splitlines()[0])


def _said(error: BaseException) -> str:
    """An error's message, or its kind where it has none."""
    return str(error).strip() or type(error).__name__


def _train(job: Job, problem: Problem, on_step: Callable[[int], None] | None) -> dict[str, Any]:
    config, checkpoints, state = job.config, None, None
    if job.checkpoints is not None:
        checkpoints = CheckpointFolder(job.checkpoints, config.keep)
        checkpoints.clean()
        state = checkpoints.newest(functools.partial(_is_of, job))
        if state is not None:
            checkpoints.go_on_from(state["progress"])
    trainer = Trainer(
        config,
        problem,
        computer=Computer.of(config),
        checkpoints=checkpoints,
        baseline=job.baseline,
        state=state,
        on_step=on_step,
    )
    return trainer.fit()


def _is_of(job: Job, state: Mapping[str, Any]) -> bool:
    """Whether a checkpoint's state is one of this job."""
    if not is_state(state) or state.get("baseline") != plain(job.baseline):
        return False
    with contextlib.suppress(ConfigError):  # settings that there were once
        return identity(RunConfig.from_dict(json.loads(state["config"]))) == identity(job.config)
    return False


def loaded(config: RunConfig) -> Problem:
    """The problem that a Run's reference leads to; the last ones are kept."""
    data = config.data
    return _loaded(data.reference, canonical(data.options), data.split_seed, (config.source, config.content))


@functools.lru_cache(maxsize=2)
def _loaded(reference: str, options: str, seed: int, files: tuple[str | None, ...]) -> Problem:  # noqa: ARG001  other files, another problem
    return load_problem(reference, json.loads(options), seed)


@functools.lru_cache(maxsize=1)
def _unpickled(problem: bytes) -> Problem:
    loaded: Problem = pickle.loads(problem)  # noqa: S301  it comes from the process that started this one
    return loaded


def _go(place: tuple[str, tuple[str, ...]]) -> None:
    """Into the folder, and to the import paths, of the process that made the job."""
    folder, paths = place
    sys.path += [path for path in paths if path not in sys.path]
    if folder and Path(folder).is_dir() and os.getcwd() != folder:  # noqa: PTH109
        os.chdir(folder)


def _register(methods: Mapping[str, bytes]) -> None:
    """Make the methods known that the process that made the job knows."""
    for name, cls in methods.items():
        with contextlib.suppress(ImportError):  # of a file that the problem's reference leads to, which registers it
            register_method(name)(pickle.loads(cls))  # noqa: S301  it comes from the process that started this one


def here() -> tuple[str, tuple[str, ...]]:
    """The place that jobs made in this process are done at."""
    return os.getcwd(), tuple(sys.path)  # noqa: PTH109


_UNPICKLABLE = (TypeError, pickle.PicklingError, AttributeError, RuntimeError)


def pickled(problem: Problem) -> bytes | None:
    """A problem for another process; None where its reference leads there.

    Raises:
        ValueError: If it can't be sent.
    """
    if problem.origin is not None and problem.origin.loadable:
        return None
    import cloudpickle  # noqa: PLC0415

    try:
        data: bytes = cloudpickle.dumps(problem)
    except _UNPICKLABLE as error:
        raise ValueError(
            f"The problem can't be sent to other processes ({error}). Give it by its reference (FILE.py:FUNCTION), or use "
            "one job."
        ) from error
    return data


class Executor(ABC):
    """Does jobs. Used as a context; leaving it by an error ends what still runs."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        """Nothing to end."""

    @abstractmethod
    def run(self, jobs: Sequence[Job], problem: Problem, advance: Advance, done: Done) -> None:
        """Do all jobs.

        Args:
            jobs: What to do.
            problem: What all of them learn.
            advance: Told how many steps a job has done, where that is known.
            done: Told what became of a job, as soon as it is known; may raise.
        """


class Here(Executor):
    """Runs in this process, one after the other."""

    def run(self, jobs: Sequence[Job], problem: Problem, advance: Advance, done: Done) -> None:
        """Do all jobs."""
        for job in jobs:
            done(job.key, execute(job, problem, functools.partial(advance, job.key)))


class Local(Executor):
    """Runs in several processes of this machine.

    Args:
        jobs: How many at a time.
    """

    def __init__(self, jobs: int) -> None:
        self._jobs = jobs
        self._context = multiprocessing.get_context("spawn")

    def __enter__(self) -> Self:
        self._queue = self._context.Queue()
        self._others = set(multiprocessing.active_children())
        self._pool = self._new_pool()
        return self

    def _new_pool(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(
            self._jobs, mp_context=self._context, initializer=_start_worker, initargs=(self._queue, os.getpid())
        )

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._pool.shutdown(wait=kind is None, cancel_futures=True)
        if kind is not None:
            for process in set(multiprocessing.active_children()) - self._others:
                process.terminate()
        self._queue.close()
        self._queue.cancel_join_thread()

    def run(self, jobs: Sequence[Job], problem: Problem, advance: Advance, done: Done) -> None:
        """Do all jobs; those of a worker that was killed are done once more."""
        left = {job.key: job for job in _sendable(jobs, problem)}
        for _ in range(_ATTEMPTS):
            pending = self._submit(list(left.values()))
            while pending:
                finished = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED).done
                for key, steps in self._reports():
                    advance(key, steps)
                for future in finished:
                    key = pending.pop(future)
                    with contextlib.suppress(BrokenProcessPool):
                        outcome = future.result()
                        del left[key]
                        done(key, outcome)
            if not left:
                return
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = self._new_pool()
        for key in left:
            done(key, Outcome(None, "its worker process was killed, more than once (out of memory?)"))

    def _submit(self, jobs: Sequence[Job]) -> dict[Future[Outcome], str]:
        """Hand out the work. Workers inherit a blocked SIGINT: Ctrl-C is for this process, which ends them."""
        can_block = hasattr(signal, "pthread_sigmask")
        if can_block:
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        futures: dict[Future[Outcome], str] = {}
        try:
            with _without_main():
                for job in jobs:
                    with contextlib.suppress(BrokenProcessPool):  # the rest comes in the next attempt
                        futures[self._pool.submit(_work, job)] = job.key
        finally:
            if can_block:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        return futures

    def _reports(self) -> Iterator[tuple[str, int]]:
        with contextlib.suppress(Empty):
            while True:
                yield self._queue.get_nowait()


_ATTEMPTS = 3


def _sendable(jobs: Sequence[Job], problem: Problem) -> list[Job]:
    import cloudpickle  # noqa: PLC0415

    methods = {}
    for name, cls in own_methods().items():
        with contextlib.suppress(*_UNPICKLABLE):  # the jobs that need it say that they don't know it
            methods[name] = cloudpickle.dumps(cls)
    data, place = pickled(problem), here()
    return [replace(job, problem=data, place=place, methods=methods) for job in jobs]


@contextlib.contextmanager
def _without_main() -> Iterator[None]:
    """Processes that start in the block don't run the user's script again: what they need of it is pickled."""
    main = sys.modules["__main__"]
    hidden = {name: getattr(main, name) for name in ("__file__", "__spec__") if hasattr(main, name)}
    main.__spec__ = None
    if hasattr(main, "__file__"):
        del main.__file__
    try:
        yield
    finally:
        for name, value in hidden.items():
            setattr(main, name, value)


def _gpus(job: Job) -> int:
    """What a scheduler is asked for: jobs see no others."""
    return int(job.config.device.startswith("cuda"))


class _Scheduled(Executor):
    """Runs in the hands of a scheduler.

    Args:
        jobs: How many it has at a time; None for all.
    """

    def __init__(self, jobs: int | None) -> None:
        self._most = jobs
        self._running: dict[Any, str] = {}

    def run(self, jobs: Sequence[Job], problem: Problem, advance: Advance, done: Done) -> None:
        """Do all jobs; what the scheduler lost has failed."""
        waiting = _sendable(jobs, problem)
        self._running = {}
        while waiting or self._running:
            room = len(waiting) if self._most is None else self._most - len(self._running)
            now, waiting = waiting[:room], waiting[room:]
            if now:
                self._running |= {handle: job.key for handle, job in zip(self._submit(now), now, strict=True)}
            for handle, result in self._finished():
                key = self._running.pop(handle)
                try:
                    outcome = result()
                except Exception as error:  # noqa: BLE001  a lost job says so in many ways
                    outcome = _lost(error)
                done(key, outcome)

    @abstractmethod
    def _submit(self, jobs: Sequence[Job]) -> Any:
        """Hand jobs over; their handles."""

    @abstractmethod
    def _finished(self) -> Sequence[tuple[Any, Callable[[], Outcome]]]:
        """Wait a moment; handles of those that have ended, each with what gives its outcome, or raises if the job was lost."""


@contextlib.contextmanager
def _own_sigterm() -> Iterator[None]:
    """What SIGTERM does stays as it was: Ray makes it end the process with 1, in its native code with a stack."""
    former = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit as ended:
        raise KeyboardInterrupt from ended
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_DFL if former is None else former)


class Ray(_Scheduled):
    """Runs as tasks of Ray, which retries those whose worker is lost.

    The cluster is a local one that starts by itself, or that at an address.

    Args:
        jobs: Runs at a time, and CPUs of a local cluster; None for as many as the cluster at the address takes.
        address: Of a real cluster.
    """

    def __init__(self, jobs: int | None, address: str | None = None) -> None:
        self._ray = needed("`--executor ray`", "ray", "ray")
        super().__init__(jobs)
        self._address = address

    def __enter__(self) -> Self:
        self._own = not self._ray.is_initialized()
        if self._own:
            # A worker imports what this process imports.
            local = {} if self._address else {"num_cpus": self._most, "include_dashboard": False}
            os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
            with _own_sigterm():
                self._ray.init(address=self._address, log_to_driver=False, logging_level="ERROR", **local)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._own:
            self._ray.shutdown()

    def _submit(self, jobs: Sequence[Job]) -> Any:
        for job in jobs:
            cpus = 1 if self._address is None else job.config.threads or 1
            yield self._ray.remote(num_cpus=cpus, num_gpus=_gpus(job), max_retries=_ATTEMPTS)(execute).remote(job)

    def _finished(self) -> Sequence[tuple[Any, Callable[[], Outcome]]]:
        finished, _ = self._ray.wait(list(self._running), num_returns=1, timeout=1.0)
        return [(ref, functools.partial(self._ray.get, ref)) for ref in finished]


class Slurm(_Scheduled):
    """Runs as jobs of a Slurm array, by submitit.

    Args:
        jobs: How many at a time.
        folder: Where submitit keeps its files, which all machines have to see.
        cluster: None for Slurm; ``"local"`` for submitit's processes on this machine.
    """

    def __init__(self, jobs: int, folder: Path, cluster: str | None = None) -> None:
        self._submitit = needed("`--executor slurm`", "submitit", "slurm")
        super().__init__(jobs if cluster == "local" else None)  # submitit's local executor knows no limit
        self._jobs, self._folder, self._cluster = jobs, folder, cluster

    def __enter__(self) -> Self:
        self._executor = self._submitit.AutoExecutor(folder=self._folder, cluster=self._cluster or "slurm")
        if self._cluster is None:
            self._executor.update_parameters(slurm_array_parallelism=self._jobs)
        return self

    def __exit__(self, *exception: object) -> None:
        for job in self._running:
            job.cancel()

    def _submit(self, jobs: Sequence[Job]) -> Any:
        cpus = max(job.config.threads or 1 for job in jobs)
        gpus = max(map(_gpus, jobs)) or None
        self._executor.update_parameters(timeout_min=_MINUTES, cpus_per_task=cpus, gpus_per_node=gpus)
        return self._executor.map_array(execute, jobs)

    def _finished(self) -> Sequence[tuple[Any, Callable[[], Outcome]]]:
        time.sleep(0.2)
        return [(handle, handle.result) for handle in self._running if handle.done()]


_MINUTES = 24 * 60


def make_executor(
    name: str, jobs: int | None, folder: Path, ray_address: str | None = None, *, usual: int = 1
) -> Executor:
    """An executor by its name.

    Args:
        name: ``local``, ``ray``, ``slurm``, or ``slurm:CLUSTER`` for another of submitit's.
        jobs: Runs at a time; None for the usual number, and for as many as the Ray cluster at an address takes.
        folder: Of the Runs.
        ray_address: Of a Ray cluster; a local one starts by default.
        usual: Runs at a time by default.

    Raises:
        ValueError: If there is none of this name, Slurm isn't here, or the number makes no sense.
        ImportError: If its package is missing; says what to type.
    """
    kind, _, place = name.partition(":")
    if kind not in EXECUTORS:
        raise ValueError(found("executor", f"one of {', '.join(EXECUTORS)}", name) + nearest(kind, EXECUTORS))
    if ray_address is not None and kind != "ray":
        raise ValueError(f"`ray_address` belongs to the executor `ray`. Found `executor = {name!r}`.")
    number = usual if jobs is None else check_integer("jobs", jobs, minimum=1, maximum=MOST)
    if kind == "ray":
        return Ray(number if ray_address is None else jobs, ray_address)
    if kind == "slurm":
        slurm = Slurm(number, folder / ".slurm", place or None)
        if not place and shutil.which("sbatch") is None:
            raise ValueError(
                "There is no Slurm here (`sbatch` isn't found): `--executor slurm` has to run on its login node."
            )
        return slurm
    return Here() if number == 1 else Local(number)


def default_jobs(device: str) -> int:
    """Runs at a time: one on an accelerator, else one per core, at most four."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, 4) if device_of(device).type == "cpu" else 1


# --------------------------------------------------------------------------------------- inside a local worker

_progress: Any = None
"""The queue that takes (key of the job, steps done)."""


def _start_worker(queue: Any, parent: int) -> None:
    global _progress  # noqa: PLW0603  the only way to hand a queue to a pool's workers
    _progress = queue
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """A worker whose parent was killed has nobody to work for."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _work(job: Job) -> Outcome:
    told = time.monotonic()

    def on_step(steps: int) -> None:
        nonlocal told
        if time.monotonic() - told > 0.2:
            told = time.monotonic()
            _progress.put((job.key, steps))

    return execute(job, on_step=on_step)
