"""The training loop: steps, validation, checkpoints, interruption."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from torchmto.lab.data import Split
from torchmto.lab.metrics import primary_metric
from torchmto.lab.trainer.build import Computer, Parts, build
from torchmto.lab.trainer.checkpoint import CheckpointError, CheckpointFolder, read_checkpoint
from torchmto.lab.trainer.config import ConfigError, TrainConfig, changed_settings
from torchmto.lab.trainer.ema import MovingAverage
from torchmto.lab.trainer.folder import RunFolder
from torchmto.lab.trainer.logs import Logger, RecordLog, check_loggers, make_loggers, step_figures
from torchmto.lab.trainer.processes import Processes, elastic_job, launched, placement
from torchmto.lab.trainer.random_state import random_state, restore_random_state, seed_everything, seed_of_rank
from torchmto.lab.trainer.scores import Measure, Metrics, measure_of
from torchmto.lab.training import Measured, measure, merged_values, metric_states, primary_values, tell_method
from torchmto.step import StepInfo

STATE_VERSION = 2
Say = Callable[[str], None]


class Interrupted(Exception):  # noqa: N818 - not an error
    """A signal asked the run to end; its state is saved."""


class _Leave(Exception):  # noqa: N818
    """Ends an evaluation that a signal came into."""


@dataclass
class Progress:
    """How far a run is; saved with it.

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
        untrained: Validation metrics of the untrained network.
        validation: Validation metrics of the last epoch that was validated.
        score: Its score.
        best_score: The best score so far.
        best_step: The step it belongs to; -1 before the first.
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
    score: float = -math.inf
    best_score: float = -math.inf
    best_step: int = -1

    def add(self, info: StepInfo) -> None:
        """Count a step."""
        self.position += 1
        self.step += 1
        self.num_forward += info.num_forward
        self.num_backward += info.num_backward
        self.num_optimizer_steps += info.num_optimizer_steps
        self.num_skipped += info.skipped


class Trainer:
    """One run: built from settings, or taken up from a checkpoint.

    Every process of the run has its own trainer, and calls the same methods in the same order.

    Args:
        config: The settings, validated.
        folder: Where the first process saves everything.
        computer: Device and precision.
        processes: Those of the run.
        state: A checkpoint to go on from.
        say: Prints a line.
    """

    def __init__(
        self,
        config: TrainConfig,
        folder: RunFolder,
        computer: Computer,
        processes: Processes,
        *,
        state: Mapping[str, Any] | None = None,
        say: Say = lambda _: None,
    ) -> None:
        self.config = config
        self.folder = folder
        self.processes = processes
        self.say = say
        self.checkpoints = CheckpointFolder(folder.checkpoints, config.keep)
        self.progress = Progress()
        seed_everything(config.seed)
        if config.deterministic:
            torch.use_deterministic_algorithms(mode=True, warn_only=True)
        with processes.together():
            self.parts: Parts = build(config, computer, processes.size)
        processes.equalize(self.parts.model.state_dict().values())
        self.average = None if config.ema is None else MovingAverage(self.parts.model, config.ema)
        workers = config.data.workers
        if workers is None:
            workers = 2 if self.parts.bundle.input_kind == "image" else 0
        self.loader = self.parts.bundle.loader(
            "train",
            config.data.batch_size,
            seed=config.seed,
            augment=config.data.augment,
            workers=workers,
            rank=processes.rank,
            world_size=processes.size,
        )
        self.saved_step = -1
        self.resumed = state is not None
        self._signal = 0
        with processes.together():
            if state is not None:
                self._restore(state)
            elif not processes.is_first:
                # The first goes on with the generators that the initial weights came from.
                seed_everything(seed_of_rank(config.seed, processes.rank, 0))

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
            "optimizer": parts.optimizer.state_dict(),
            "scheduler": parts.scheduler.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "multitask": parts.multitask.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "random": self.processes.gather(random_state(parts.computer.device)),
        }

    def _restore(self, state: Mapping[str, Any]) -> None:
        parts = self.parts
        try:
            parts.model.load_state_dict(state["model"])
            parts.optimizer.load_state_dict(state["optimizer"])
            parts.scheduler.load_state_dict(state["scheduler"])
            if parts.computer.scaler is not None:
                parts.computer.scaler.load_state_dict(state["scaler"])
            parts.multitask.load_state_dict(state["multitask"])
            if self.average is not None:
                self.average.load_state_dict(state["average"])
            self.progress = Progress(**state["progress"])
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
        step, state = self.progress.step, self.state_dict()
        self.processes.first(lambda: self.checkpoints.save(step, state, best=best))
        self.saved_step = step

    # ------------------------------------------------------------------ interruption

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM end the run after the current step; a second one ends it at once."""

        def handle(number: int, _: FrameType | None) -> None:
            self._signal = number
            signal.signal(number, previous[number])
            self.say(f"{signal.Signals(number).name}: saving after this step (once more to stop at once) ...")

        previous: dict[int, Any] = {}
        try:
            for number in (int(signal.SIGINT), int(signal.SIGTERM)):
                previous[number] = signal.getsignal(number)
                signal.signal(number, handle)
        except ValueError:  # signals can only be handled in the main thread
            previous.clear()
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _stop_if_asked(self) -> None:
        number = self.processes.largest(self._signal)
        if number:
            if self.saved_step != self.progress.step:
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
            What ``results.json`` holds.

        Raises:
            Interrupted: If a signal came; the state is saved.
            CheckpointError: If a checkpoint can't be written.
        """
        with contextlib.ExitStack() as stack:
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
        self._loggers: list[Logger] = []
        self._records: RecordLog | None = None
        if not self.processes.is_first:
            return
        config = self.config
        self._loggers = make_loggers(config.loggers, self.folder.path, config.as_dict(), resume_step=resume_step)
        for logger in self._loggers:
            stack.callback(logger.finalize, "finished")
        self._records = RecordLog(self.folder.path / "records.jsonl", resume_step=resume_step)
        stack.callback(self._records.close)

    def _fit(self) -> None:
        progress = self.progress
        if not progress.untrained:
            progress.untrained = self.evaluate("validation")
            self._log({f"validation/{name}": value for name, value in _flat(progress.untrained)})
            self._save()
        self._measure = measure_of(self.parts.bundle.tasks, self.config.baseline, progress.untrained)
        while progress.epoch < self.config.epochs:
            self._train_epoch()
            self._end_epoch()

    def _train_epoch(self) -> None:
        parts, progress, config = self.parts, self.progress, self.config
        parts.model.train()
        batches = self.loader.epoch(progress.epoch, progress.position * config.accumulate)
        waited, began = self.loader.wait_seconds, time.perf_counter()
        while progress.position < parts.steps_per_epoch:
            self._stop_if_asked()
            with self.processes.together():
                closures = [parts.closure(batch) for batch in itertools.islice(batches, config.accumulate)]
            info = parts.multitask.step(closures)
            self._step_scheduler()
            if self.average is not None:
                self.average.update()
            now, wait = time.perf_counter(), self.loader.wait_seconds
            progress.add(info)
            progress.seconds += now - began
            progress.wait_seconds += wait - waited
            began, waited = now, wait
            self._log_step(info)
            if progress.step % config.checkpoint_every == 0 and progress.position < parts.steps_per_epoch:
                self._save()
                began = time.perf_counter()
        self._stop_if_asked()

    def _step_scheduler(self) -> None:
        with warnings.catch_warnings():
            # With fp16 the scaler leaves out the first optimizer steps; the schedule counts batches all the same.
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
            self.parts.scheduler.step()

    def _log_step(self, info: StepInfo) -> None:
        step = self.progress.step
        last = self.progress.position == self.parts.steps_per_epoch
        if step % self.config.log_every == 0 or last:
            figures = step_figures(info, self.parts.multitask.tasks)
            self._log({**figures, "lr": float(self.parts.scheduler.get_last_lr()[0])})
        if last:
            with self.processes.together():
                if self._records is not None:
                    self._records.write(step, info.records)

    def _log(self, figures: dict[str, float]) -> None:
        with self.processes.together():
            for logger in self._loggers:
                logger.log_metrics(figures, self.progress.step)

    def _end_epoch(self) -> None:
        """Validate, tell the method, save. All of it comes again if a signal or a crash comes before the save."""
        progress, tasks = self.progress, self.parts.bundle.tasks
        epoch = progress.epoch + 1
        best = False
        if epoch % self.config.evaluate_every == 0 or epoch == self.config.epochs:
            validation = self.evaluate("validation")
            primary = primary_values(validation, tasks)
            progress.validation, progress.score = validation, self._measure(primary)
            best = progress.score > progress.best_score or progress.best_step < 0
            if best:
                progress.best_score, progress.best_step = progress.score, progress.step
            self._log({**{f"validation/{n}": v for n, v in _flat(validation)}, "validation/score": progress.score})
            tell_method(self.parts.multitask, primary, tasks)
            self._say_epoch(epoch, primary)
        self.parts.multitask.end_window()
        progress.epoch, progress.position = epoch, 0
        self._save(best=best)

    def _say_epoch(self, epoch: int, primary: Mapping[str, float]) -> None:
        progress = self.progress
        tasks = list(self.parts.bundle.tasks)
        shown = ", ".join(f"{task.name} {primary_metric(task)[0]} {primary[task.name]:.4g}" for task in tasks[:6])
        more = f", ... ({len(tasks)} tasks)" if len(tasks) > 6 else ""
        self.say(
            f"epoch {epoch}/{self.config.epochs}: {self._measure.name} {progress.score:.4g}; {shown}{more}; "
            f"{progress.seconds / progress.step:.3f} s per step, data wait {self.data_wait:.1%} of it"
        )

    @property
    def data_wait(self) -> float:
        """Share of the training time spent waiting for data."""
        return self.progress.wait_seconds / max(self.progress.seconds, 1e-12)

    def evaluate(self, split: Split) -> Metrics:
        """All metrics on one split, of the averaged weights where there are such; the processes share the batches."""
        processes, precise = self.processes, self.parts.precise
        averaged = contextlib.nullcontext() if self.average is None else self.average.applied()
        measured: Measured | None = None
        precise.interrupt = self._leave_if_asked
        try:
            with processes.together(), contextlib.suppress(_Leave), averaged:
                measured = measure(
                    precise,
                    self.parts.bundle,
                    split,
                    batch_size=self.config.data.batch_size,
                    device=self.parts.computer.device,
                    rank=processes.rank,
                    world_size=processes.size,
                )
        finally:
            precise.interrupt = None
        if processes.largest(measured is None):
            raise _Leave
        assert measured is not None
        own = measured
        states = processes.gather(metric_states(own))
        return processes.first(lambda: merged_values(own, states[1:]))

    def _finish(self) -> dict[str, Any]:
        """Load the best weights, evaluate them on the test split once, and write the results."""
        progress = self.progress
        best = self.processes.first(lambda: read_checkpoint(self.checkpoints.best))
        load_weights_of(self.parts, best)
        self.average = None
        results: dict[str, Any] = {
            "version": 1,
            "measure": self._measure.description,
            "score": progress.best_score,
            "best_step": progress.best_step,
            "primary": {task.name: primary_metric(task)[0] for task in self.parts.bundle.tasks},
            "validation_untrained": progress.untrained,
            "validation": best["progress"]["validation"],
            "test": self.evaluate("test") if self.config.evaluate_test else None,
            "cost": {
                "num_forward": progress.num_forward,
                "num_backward": progress.num_backward,
                "num_optimizer_steps": progress.num_optimizer_steps,
                "steps": progress.step,
                "skipped_steps": progress.num_skipped,
                "seconds_per_step": progress.seconds / progress.step,
                "seconds_per_epoch": progress.seconds / progress.epoch,
                "data_wait": self.data_wait,
            },
        }
        return self.processes.first(lambda: self.folder.write_results(results, self.parts.model))


def load_weights_of(parts: Parts, state: Mapping[str, Any]) -> None:
    """Give the model the weights a checkpoint evaluates: the averaged ones where it has such.

    Raises:
        CheckpointError: If they don't fit the model.
    """
    try:
        parts.model.load_state_dict(state["model"])
        if state["average"] is not None:
            average = MovingAverage(parts.model, 0.5)
            average.load_state_dict(state["average"])
            with torch.no_grad():
                for parameter, value in zip(parts.model.parameters(), average.average, strict=True):
                    parameter.copy_(value)
    except (KeyError, RuntimeError, TypeError) as error:
        raise CheckpointError(f"The checkpoint's weights don't fit the model: {error}") from error


def _flat(metrics: Metrics) -> list[tuple[str, float]]:
    return [(f"{task}/{name}", value) for task, values in metrics.items() for name, value in values.items()]


def train(
    config: TrainConfig | None,
    out: Path,
    *,
    resume: bool = False,
    checkpoint: Path | None = None,
    say: Say = lambda _: None,
) -> dict[str, Any]:
    """Train from settings, or take up a run that was interrupted.

    Args:
        config: The settings; when resuming None takes those of the run.
        out: The run's folder.
        resume: Go on from the latest checkpoint in ``out``.
        checkpoint: Go on from this checkpoint instead.
        say: Prints a line.

    Returns:
        What ``out/results.json`` holds.

    Raises:
        ConfigError: If settings make no sense, the folder holds another run, or a resumed run's settings changed.
        CheckpointError: If a checkpoint can't be written or mustn't be loaded.
        Interrupted: If a signal came; the state is saved.
    """
    if config is not None:
        config.validate()
        check_loggers(config.loggers)
    folder = RunFolder(out)
    placed = config or folder.read_settings()
    computer = Computer.of(placed, *placement(placed.devices, placed.nodes))
    with launched(computer.fabric) as processes, contextlib.ExitStack() as stack:
        say = say if processes.is_first else lambda _: None
        config, state = processes.first(
            lambda: _start(stack, folder, config, checkpoint, resume=resume, processes=processes.size, say=say)
        )
        return Trainer(config, folder, computer, processes, state=state, say=say).fit()


def _start(
    stack: contextlib.ExitStack,
    folder: RunFolder,
    config: TrainConfig | None,
    checkpoint: Path | None,
    *,
    resume: bool,
    processes: int,
    say: Say,
) -> tuple[TrainConfig, dict[str, Any] | None]:
    """Take the folder; returns the settings, and the state to go on from."""
    resume = resume or checkpoint is not None
    stack.enter_context(folder.locked(must_exist=resume))
    job = elastic_job()
    if folder.claimed_by(job):
        say("Restarted by torchrun.")
        resume = True
        if CheckpointFolder(folder.checkpoints).steps():
            checkpoint = None
    state = None
    found = _state_to_resume(folder, checkpoint) if resume else None
    if found is not None:
        path, state = found
        config = _resumed_config(config, state, path)
        checkpoints = CheckpointFolder(folder.checkpoints)
        for old in checkpoints.set_aside_after(state["progress"]["step"]):
            say(f"Renamed a checkpoint of a later step: {old}")
        _check_best(checkpoints, state["progress"], say)
        say(f"Going on from {path}, {state['progress']['step']} steps.")
    elif resume:
        say("There is no checkpoint yet: starting anew.")
        config = config or folder.read_settings()
        config.validate()
    elif folder.has_run:
        raise ConfigError(
            f"`{folder.path}` holds a run already. Add --resume to go on with it, or choose another folder."
        )
    assert config is not None
    # The claim first: a job killed between the two finds its own folder again, not one that holds a run.
    folder.write_claim(job)
    folder.write_settings(config, resumed=resume, processes=processes)
    return config, state


def _check_best(checkpoints: CheckpointFolder, progress: dict[str, Any], say: Say) -> None:
    """Make ``best.ckpt`` the one that a state's progress knows as the best, or let the state forget it."""
    best = progress["best_step"]
    if best < 0:
        return
    own = checkpoints.path(best)
    if best == progress["step"] and own.exists():
        checkpoints.mark_best(own)
        return
    with contextlib.suppress(CheckpointError, KeyError):
        if read_checkpoint(checkpoints.best)["progress"]["step"] == best:
            return
    progress |= {"best_step": -1, "best_score": -math.inf}
    say("The best checkpoint so far isn't there any more; the best of the epochs to come will be kept.")


def _state_to_resume(folder: RunFolder, checkpoint: Path | None) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint to go on from; None for a run that was stopped before its first."""
    checkpoints = CheckpointFolder(folder.checkpoints)
    checkpoints.clean()
    if checkpoint is None and not checkpoints.steps() and not checkpoints.best.exists():
        return None
    if checkpoint is None:
        path, state = checkpoints.read_last()
    else:
        path, state = checkpoint, read_checkpoint(checkpoint)
    if not {"config", "progress", "model", "multitask"} <= set(state) or state.get("version") != STATE_VERSION:
        raise CheckpointError(f"`{path}` isn't a checkpoint of a training run of this version of torchmto.")
    return path, state


def _resumed_config(config: TrainConfig | None, state: Mapping[str, Any], path: Path) -> TrainConfig:
    saved = json.loads(state["config"])
    if config is None:
        config = TrainConfig.from_dict(saved)
        config.validate()
        check_loggers(config.loggers)
        return config
    changed = changed_settings(saved, config.as_dict())
    if changed:
        raise ConfigError(
            f"The run of `{path}` has other settings: {', '.join(changed)} changed. Leave out --config and the other "
            "settings to go on with the run's own, or start a new run in another folder."
        )
    return config


__all__ = ["Interrupted", "Measure", "Progress", "Trainer", "load_weights_of", "train"]
