"""The training loop: steps, validation, checkpoints, interruption."""

import contextlib
import functools
import itertools
import json
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from types import FrameType
from typing import Any

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from torchmto import StepInfo
from torchmto.lab.atomic import plain
from torchmto.lab.data.base import Split
from torchmto.lab.memory import PeakMemory
from torchmto.lab.metrics import higher_is_better, primary_metric
from torchmto.lab.problem import Problem
from torchmto.lab.run.build import Computer, Parts, build
from torchmto.lab.run.checkpoint import CheckpointError, CheckpointFolder, read_checkpoint
from torchmto.lab.run.config import RunConfig
from torchmto.lab.run.environment import made
from torchmto.lab.run.evaluation import (
    Measured,
    Metrics,
    measure,
    merged_values,
    metric_states,
    own_figures,
    primary_values,
    tell_method,
)
from torchmto.lab.run.folder import RunFolder
from torchmto.lab.run.logs import Logger, RecordLog, make_loggers, step_figures, told_by
from torchmto.lab.run.processes import Processes
from torchmto.lab.run.random_state import (
    random_state,
    random_state_of_evaluation,
    restore_random_state,
    seed_everything,
    seed_of_rank,
)
from torchmto.lab.run.scores import Measure, is_better, measure_of, needs_untrained
from torchmto.lab.versions import versions

STATE_VERSION = 3
RUN_VERSION = 2
"""Of what a Run gives; stands in a single one's ``results.json``."""
TRACE_POINTS = 60
"""About how many steps of a Run are kept with everything the method records."""
Say = Callable[[str], None]


class Interrupted(Exception):  # noqa: N818 - not an error
    """A signal asked the run to end; its state is saved."""


class _Leave(Exception):  # noqa: N818
    """Ends an evaluation that a signal came into."""


@dataclass
class Progress:
    """How far a Run is, and what it has seen on the way; saved with it.

    Attributes:
        epoch: Finished epochs.
        position: Steps done in the epoch after them.
        step: Steps done in all.
        num_forward: Forward passes of all steps.
        num_backward: Backward passes of all steps.
        num_optimizer_steps: Optimizer steps of all steps.
        num_skipped: Steps left out because something wasn't finite.
        seconds: Time spent in training steps, waiting for data included.
        wait_seconds: Of it, time spent waiting for data.
        untrained: Validation metrics of the untrained network, where scores are relative to them.
        validation: Validation metrics of the last epoch that was validated.
        score: Its score.
        best_score: The best score so far.
        best_step: The step it belongs to; -1 before the first.
        best_epoch: The number of its epoch.
        best_validation: Its validation metrics.
        lost: Entries at the history's begin whose best one's weights aren't there any more, so that none of them counts.
        sums: Task -> sum and number of its losses since the last validation.
        conflicts: Sum and number of the steps' conflicts since then.
        history: One entry per validated epoch.
        trace: Single steps, with what the method records.
    """

    epoch: int = 0
    position: int = 0
    step: int = 0
    num_forward: int = 0
    num_backward: int = 0
    num_optimizer_steps: int = 0
    num_skipped: int = 0
    seconds: float = 0.0
    wait_seconds: float = 0.0
    untrained: Metrics = field(default_factory=dict)
    validation: Metrics = field(default_factory=dict)
    score: float | None = None
    best_score: float | None = None
    best_step: int = -1
    best_epoch: int = -1
    best_validation: Metrics = field(default_factory=dict)
    lost: int = 0
    sums: dict[str, list[float]] = field(default_factory=dict)
    conflicts: list[float] = field(default_factory=lambda: [0, 0])
    history: list[dict[str, Any]] = field(default_factory=list)
    trace: list[dict[str, Any]] = field(default_factory=list)

    def add(self, info: StepInfo, *, traced: bool) -> None:
        """Count a step, and keep what it tells if it is to be traced."""
        self.position += 1
        self.step += 1
        self.num_forward += info.num_forward
        self.num_backward += info.num_backward
        self.num_optimizer_steps += info.num_optimizer_steps
        self.num_skipped += info.skipped
        for task, loss in info.losses.items():
            total, number = self.sums.get(task, (0.0, 0))
            self.sums[task] = [total + loss, number + 1]
        if info.num_conflicts is not None:
            self.conflicts = [self.conflicts[0] + info.num_conflicts, self.conflicts[1] + 1]
        if traced:
            names = ("losses", "weights", "num_conflicts", "cosines", "records")
            self.trace.append({"step": self.step, **plain({name: getattr(info, name) for name in names})})

    def end_epoch(self, number: int) -> None:
        """Write down the epoch that was just validated."""
        self.history.append(
            {
                "epoch": number,
                "losses": {task: total / count for task, (total, count) in self.sums.items()},
                "num_conflicts": self.conflicts[0] / self.conflicts[1] if self.conflicts[1] else None,
                "batches": self.step,
                "optimizer_steps": self.num_optimizer_steps,
                "seconds": self.seconds - self.wait_seconds,
                "validation": self.validation,
                "score": self.score,
            }
        )
        self.sums, self.conflicts = {}, [0, 0]


class Trainer:
    """One Run: built from settings, or taken up from a checkpoint. Every Run of `train`, `compare` and `reproduce` is one.

    Every process of the Run has its own trainer, and calls the same methods in the same order.

    Args:
        config: The settings, validated, with nothing left open.
        problem: What it learns.
        folder: Where the first process saves everything; None for a Run that leaves nothing but its result.
        checkpoints: Where the state goes, if it is kept; by default into the folder.
        computer: Device and precision.
        processes: Those of the Run.
        baseline: Single-task value of every task's primary metric on the validation split.
        state: A checkpoint to go on from.
        say: Prints a line.
        on_step: Called after every step with the number of steps done.
    """

    def __init__(
        self,
        config: RunConfig,
        problem: Problem,
        folder: RunFolder | None = None,
        computer: Computer | None = None,
        processes: Processes | None = None,
        *,
        checkpoints: CheckpointFolder | None = None,
        baseline: Mapping[str, float | None] | None = None,
        state: Mapping[str, Any] | None = None,
        say: Say = lambda _: None,
        on_step: Callable[[int], None] | None = None,
    ) -> None:
        self.config = config
        self.problem = problem
        self.folder = folder
        self.processes = processes or Processes()
        self.say = say
        self.on_step = on_step
        self.baseline = config.baseline if config.baseline is not None else baseline
        self.checkpoints = checkpoints
        if folder is not None:
            self.checkpoints = CheckpointFolder(folder.checkpoints, config.keep)
        self.progress = Progress()
        self._kept: dict[str, Any] | None = None
        """The best weights, where there are no checkpoints."""
        self._began = time.perf_counter()
        self._memory = PeakMemory(computer.device if computer else "cpu")
        seed_everything(config.seed)
        with deterministic(config.deterministic), self.processes.together():
            known = {name: value for name, value in (self.baseline or {}).items() if value is not None}
            self.parts: Parts = build(
                config,
                problem,
                computer,
                baseline=known or None,
                rank=self.processes.rank,
                world_size=self.processes.size,
            )
        self.processes.equalize(self.parts.model.state_dict().values())
        self.average = None
        if config.ema is not None:
            self.average = AveragedModel(self.parts.model, multi_avg_fn=get_ema_multi_avg_fn(config.ema))  # type: ignore[no-untyped-call]
        self.loader = self.parts.loader
        self.total_steps = (config.epochs or 1) * self.parts.steps_per_epoch
        self.saved_step = -1
        self.resumed = state is not None
        self._signal = 0
        self._loggers: list[Logger] = []
        self._records: RecordLog | None = None
        with self.processes.together():
            if state is not None:
                self._restore(state)
            elif not self.processes.is_first:
                # The first goes on with the generators that the initial weights came from.
                seed_everything(seed_of_rank(config.seed, self.processes.rank, 0))

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """All that the rest of the run depends on."""
        parts = self.parts
        scaler = parts.computer.scaler
        return {
            "version": STATE_VERSION,
            "config": json.dumps(self.config.as_dict()),
            "progress": asdict(self.progress),
            "model": parts.model.state_dict(),
            "losses": parts.loss_modules.state_dict(),
            "optimizer": parts.optimizer.state_dict(),
            "scheduler": parts.scheduler.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "multitask": parts.multitask.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "baseline": plain(self.baseline),
            "random": self.processes.gather(random_state(parts.computer.device)),
        }

    def _restore(self, state: Mapping[str, Any]) -> None:
        parts = self.parts
        try:
            parts.model.load_state_dict(state["model"])
            parts.loss_modules.load_state_dict(state.get("losses", {}))  # which there once was none of
            parts.optimizer.load_state_dict(state["optimizer"])
            parts.scheduler.load_state_dict(state["scheduler"])
            if parts.computer.scaler is not None:
                parts.computer.scaler.load_state_dict(state["scaler"])
            parts.multitask.load_state_dict(state["multitask"])
            if self.average is not None:
                self.average.load_state_dict(state["average"])
            self.progress = Progress(**state["progress"])
            self.problem.settle(self.progress.best_validation or self.progress.untrained)
            self._restore_random(state["random"])
        except (KeyError, ValueError, TypeError, RuntimeError) as error:
            raise CheckpointError(f"The checkpoint doesn't fit the run's settings and data: {error}") from error
        self.saved_step = self.progress.step

    def _restore_random(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Each process' own generators; a process that wasn't there when they were saved starts from a seed of its own."""
        rank = self.processes.rank
        if rank < len(states):
            restore_random_state(states[rank], self.parts.computer.device)
        else:
            seed_everything(seed_of_rank(self.config.seed, rank, self.progress.step))

    def _save(self, *, best: bool = False) -> None:
        if self.checkpoints is None:
            if best:
                weights = self._evaluated.state_dict()
                self._kept = {name: value.detach().clone() for name, value in weights.items()}
            return
        step, state, checkpoints = self.progress.step, self.state_dict(), self.checkpoints
        self.processes.first(lambda: checkpoints.save(step, state, best=best))
        self.saved_step = step

    @property
    def _evaluated(self) -> torch.nn.Module:
        """The model whose figures count: the average, if there is one."""
        return self.parts.model if self.average is None else self.average.module

    # ------------------------------------------------------------------ interruption

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM end the run after the current step; a second one ends it at once."""

        def handle(number: int, _: FrameType | None) -> None:
            self._signal = number
            signal.signal(number, previous[number])
            self.say(f"{signal.Signals(number).name}: saving after this step (once more to stop at once) ...")

        numbers = (int(signal.SIGINT), int(signal.SIGTERM))
        main = threading.current_thread() is threading.main_thread()  # the only one that can handle signals
        previous: dict[int, Any] = {number: signal.getsignal(number) for number in numbers if main}
        for number in previous:
            signal.signal(number, handle)
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _stop_if_asked(self) -> None:
        number = self.processes.largest(self._signal)
        if number:
            # Before the first save the untrained network isn't measured: the run starts anew, by the same measure.
            if 0 <= self.saved_step != self.progress.step:
                self._save()
            raise Interrupted(
                f"Interrupted by {signal.Signals(number).name} after {self.progress.step} steps, all of them saved."
            )

    def _leave_if_asked(self) -> None:
        if self._signal:
            raise _Leave

    # ------------------------------------------------------------------ the loop

    def fit(self) -> dict[str, Any]:
        """Train to the end.

        Returns:
            ``history`` (per validated epoch: mean losses, validation metrics, score, and the batches, optimizer steps and
            seconds so far), ``trace`` (single steps, with what the method records), ``selected_epoch``, ``validation`` and
            ``test`` (task -> metric -> value at that epoch), ``cost`` per batch, ``seconds``, ``versions``; and more, all of
            which is in ``results.json`` of a single Run, too.

        Raises:
            Interrupted: If a signal came; the state is saved.
            CheckpointError: If a checkpoint can't be written.
        """
        with contextlib.ExitStack() as stack:
            stack.enter_context(threads(self.config.threads))
            stack.enter_context(deterministic(self.config.deterministic))
            if self.folder is not None:
                stack.enter_context(self._signals())
            resume_step = self.progress.step if self.resumed else None
            with self.processes.together():
                self._open_logs(stack, resume_step)
            try:
                self._fit()
                return self._finish()
            except _Leave:
                self._stop_if_asked()
                raise AssertionError from None

    def _open_logs(self, stack: contextlib.ExitStack, resume_step: int | None) -> None:
        """The first process' logs, closed with the stack; the others have none."""
        config = self.config
        if not self.processes.is_first or self.folder is None:
            return
        self._loggers = make_loggers(config.loggers or (), self.folder.path, config.as_dict(), resume_step=resume_step)
        for logger in self._loggers:
            stack.push(functools.partial(_finish, logger))
        self._records = RecordLog(self.folder.path / "records.jsonl", resume_step=resume_step)
        stack.callback(self._records.close)

    def _fit(self) -> None:
        progress, config = self.progress, self.config
        if not self.resumed:
            if self.folder is not None or needs_untrained(self.problem.task_list, self.baseline):
                progress.untrained = self.evaluate("validation")
            self._log({f"validation/{name}": value for name, value in _flat(progress.untrained)})
            self._save()
        while progress.epoch < (config.epochs or 1):
            self._train_epoch()
            self._end_epoch()

    def _train_epoch(self) -> None:
        parts, progress, config = self.parts, self.progress, self.config
        parts.model.train()
        batches = self.loader.epoch(progress.epoch, progress.position * config.accumulate)
        waited, began = self.loader.wait_seconds, time.perf_counter()
        every = max(1, self.total_steps // TRACE_POINTS)
        while progress.position < parts.steps_per_epoch:
            self._stop_if_asked()
            with self.processes.together():
                closures = [parts.closure(batch) for batch in itertools.islice(batches, config.accumulate)]
            info = parts.multitask.step(closures if config.accumulate > 1 else closures[0])
            self._step_scheduler()
            if self.average is not None:
                self.average.update_parameters(parts.model)
            if parts.computer.device.type == "cuda":
                torch.cuda.synchronize(parts.computer.device)
            now, wait = time.perf_counter(), self.loader.wait_seconds
            number = progress.step + 1
            progress.add(info, traced=number % every == 0 or number in {1, self.total_steps})
            progress.seconds += now - began
            progress.wait_seconds += wait - waited
            began, waited = now, wait
            self._log_step(info)
            if self.on_step is not None:
                self.on_step(progress.step)
            every_step = config.checkpoint_every or 200
            if progress.step % every_step == 0 and progress.position < parts.steps_per_epoch:
                self._save()
                began = time.perf_counter()
        del batches
        self._stop_if_asked()

    def _step_scheduler(self) -> None:
        with warnings.catch_warnings():
            # With fp16 the scaler leaves out the first optimizer steps; the schedule counts batches all the same.
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
            self.parts.scheduler.step()

    def _log_step(self, info: StepInfo) -> None:
        step = self.progress.step
        last = self.progress.position == self.parts.steps_per_epoch
        if self.folder is not None and (step % self.config.log_every == 0 or last):
            figures = step_figures(info, self.parts.multitask.tasks)
            self._log({**figures, "lr": float(self.parts.scheduler.get_last_lr()[0])})
        if last:
            with self.processes.together():
                if self._records is not None:
                    self._records.write(step, info.records)

    def _log(self, figures: dict[str, float]) -> None:
        with self.processes.together():
            for logger in self._loggers:
                with told_by(logger):
                    logger.log_metrics(figures, self.progress.step)

    def _end_epoch(self) -> None:
        """Validate, tell the method, save. All of it comes again if a signal or a crash comes before the save."""
        progress, config, tasks = self.progress, self.config, self.problem.task_list
        epoch = progress.epoch + 1
        best = False
        if epoch % config.evaluate_every == 0 or epoch == config.epochs:
            validation = self.evaluate("validation")
            primary = primary_values(validation, tasks)
            progress.validation, progress.score = validation, self._measure(primary)
            # An own `evaluate` has no split to choose by: the last epoch is what is reported.
            earlier = [entry["score"] for entry in progress.history[progress.lost :]]
            best = self.problem.evaluate is not None or is_better(progress.score, earlier)
            if best:
                progress.best_score, progress.best_step, progress.best_epoch = progress.score, progress.step, epoch - 1
                progress.best_validation = validation
            progress.end_epoch(epoch - 1)
            score = {} if progress.score is None else {"validation/score": progress.score}
            self._log({**{f"validation/{n}": v for n, v in _flat(validation)}, **score})
            tell_method(self.parts.multitask, primary, tasks)
            self._say_epoch(epoch, primary)
        self.parts.multitask.end_window()
        progress.epoch, progress.position = epoch, 0
        self._save(best=best)

    @functools.cached_property
    def _measure(self) -> Measure:
        return measure_of(self.problem.task_list, self.baseline, self.progress.untrained)

    def _say_epoch(self, epoch: int, primary: Mapping[str, float]) -> None:
        progress = self.progress
        tasks = list(self.problem.task_list)
        shown = ", ".join(f"{task.name} {primary_metric(task)[0]} {primary[task.name]:.4g}" for task in tasks[:6])
        more = f", ... ({len(tasks)} tasks)" if len(tasks) > 6 else ""
        score = "-" if progress.score is None else f"{progress.score:.4g}"
        self.say(
            f"epoch {epoch}/{self.config.epochs}: {self._measure.name} {score}; {shown}{more}; "
            f"{progress.seconds / progress.step:.3f} s per step, data wait {self.data_wait:.1%} of it"
        )

    @property
    def data_wait(self) -> float:
        """Share of the training time spent waiting for data."""
        return self.progress.wait_seconds / max(self.progress.seconds, 1e-12)

    def evaluate(self, split: Split) -> Metrics:
        """All metrics on one split, of the averaged weights where there are such; the processes share the batches."""
        with random_state_of_evaluation(self.config.seed, self.processes.rank, self.parts.computer.device):
            return self._figures(split)

    def _figures(self, split: Split) -> Metrics:
        processes, network = self.processes, self.parts.network
        if self.problem.evaluate is not None:
            figures = processes.first(lambda: own_figures(self._evaluated, self.problem))
            self.problem.settle(figures)  # on the other processes, too
            return figures
        measured: Measured | None = None
        network.interrupt = self._leave_if_asked
        network.model = self._evaluated
        try:
            with processes.together(), contextlib.suppress(_Leave):
                measured = measure(
                    network,
                    self.problem,
                    split,
                    # With the training's batch size the training, not this, decides the peak of memory.
                    batch_size=self.config.data.batch_size or 256,
                    device=self.parts.computer.device,
                    rank=processes.rank,
                    world_size=processes.size,
                )
        finally:
            network.interrupt, network.model = None, self.parts.model
        if processes.largest(measured is None):
            raise _Leave
        assert measured is not None
        own = measured
        states = processes.gather(metric_states(own)) if processes.size > 1 else []
        return processes.first(lambda: merged_values(own, states[1:]))

    def _finish(self) -> dict[str, Any]:
        """Load the best weights, evaluate them on the test split once, and give the results."""
        progress, checkpoints, tasks = self.progress, self.checkpoints, self.problem.task_list
        if checkpoints is not None:
            best = self.processes.first(lambda: read_checkpoint(checkpoints.best))
            if best["progress"]["step"] != progress.best_step:
                raise CheckpointError(
                    f"`{checkpoints.best}` isn't the best checkpoint of this run, of step {progress.best_step}. Found that of "
                    f"step {best['progress']['step']}."
                )
            load_weights_of(self.parts, best)
        else:
            assert self._kept is not None
            self.parts.model.load_state_dict(self._kept)
        self.average = None
        validation = progress.best_validation
        test: Metrics | None = None
        if self.config.evaluate_test:
            test = validation if self.problem.evaluate is not None else self.evaluate("test")
        per_batch = {
            name: getattr(progress, name) / progress.step
            for name in ("num_forward", "num_backward", "num_optimizer_steps")
        }
        result: dict[str, Any] = {
            "version": RUN_VERSION,
            "measure": self._measure.description,
            "score": progress.best_score,
            "best_step": progress.best_step,
            "selected_epoch": progress.best_epoch,
            "primary": {task.name: primary_metric(task)[0] for task in tasks},
            "higher_is_better": {
                task.name: {metric: higher_is_better(task, metric) for metric in validation[task.name]}
                for task in tasks
            },
            "validation_untrained": progress.untrained,
            "validation": validation,
            "test": test,
            "cost": {
                **per_batch,
                "seconds_per_batch": (progress.seconds - progress.wait_seconds) / progress.step,
                "peak_memory_bytes": self._memory.bytes(),
                "steps": progress.step,
                "skipped_steps": progress.num_skipped,
                "seconds_per_epoch": progress.seconds / progress.epoch,
                "data_wait": self.data_wait,
            },
            "seconds": time.perf_counter() - self._began,
            "versions": versions(),
            "made": made(),
            "history": progress.history,
            "trace": progress.trace,
        }
        folder = self.folder
        if folder is not None:
            self.processes.first(lambda: folder.write_results(result, self.parts.model))
        return result


def _finish(logger: Logger, kind: type[BaseException] | None, *_: object) -> None:
    with told_by(logger):
        interrupted = kind is not None and issubclass(kind, Interrupted | KeyboardInterrupt)
        logger.finalize("finished" if kind is None else "killed" if interrupted else "failed")


@contextlib.contextmanager
def deterministic(asked: bool) -> Iterator[None]:
    """If asked for, torch's deterministic kernels inside the block, as far as it has them; afterwards as before."""
    before = torch.are_deterministic_algorithms_enabled()
    only_warned = torch.is_deterministic_algorithms_warn_only_enabled()
    if asked:
        torch.use_deterministic_algorithms(mode=True, warn_only=True)
    try:
        yield
    finally:
        if asked:
            torch.use_deterministic_algorithms(before, warn_only=only_warned)


@contextlib.contextmanager
def threads(number: int | None) -> Iterator[None]:
    """So many threads of torch inside the block; None: as many as there are."""
    before = torch.get_num_threads()
    if number is not None:
        torch.set_num_threads(number)
    try:
        yield
    finally:
        if number is not None:
            torch.set_num_threads(before)


def is_state(state: Mapping[str, Any]) -> bool:
    """Whether this is what a `Trainer` of this version saves."""
    return state.get("version") == STATE_VERSION and {"config", "progress", "model", "multitask"} <= set(state)


def load_weights_of(parts: Parts, state: Mapping[str, Any]) -> None:
    """Give the model the weights a checkpoint evaluates: the averaged ones where it has such.

    Raises:
        CheckpointError: If they don't fit the model.
    """
    try:
        average = state.get("average")
        prefix = "module."
        weights = {n.removeprefix(prefix): v for n, v in average.items() if n.startswith(prefix)} if average else None
        parts.model.load_state_dict(weights or state["model"])
    except (KeyError, RuntimeError, TypeError, AttributeError) as error:
        raise CheckpointError(f"The checkpoint's weights don't fit the model: {error}") from error


def _flat(metrics: Metrics) -> list[tuple[str, float]]:
    return [(f"{task}/{name}", value) for task, values in metrics.items() for name, value in values.items()]
