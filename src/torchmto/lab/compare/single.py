"""One run of a comparison, from its configuration to everything that is kept of it."""

import copy
import math
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeGuard

from torchmto import StepInfo
from torchmto.lab.data import DataBundle, Split, Task
from torchmto.lab.memory import PeakMemory
from torchmto.lab.metrics import primary_metric
from torchmto.lab.training import Metrics, RunConfig, build_run, evaluate, primary_values, tell_method, train_epoch
from torchmto.lab.versions import versions
from torchmto.metrics import delta_m

__all__ = ["is_finite", "train_and_measure", "validation_score"]

TRACE_POINTS = 60
"""About how many steps of a run are kept with everything the method records."""


class Recorder:
    """Collects what the steps of a run report: sums per epoch, costs, and a trace of single steps.

    Args:
        total_steps: Batches in the run, which decides how far apart the traced steps are.
    """

    def __init__(self, total_steps: int) -> None:
        self.steps = 0
        self.seconds = 0.0
        self.passes = {"num_forward": 0, "num_backward": 0, "num_optimizer_steps": 0}
        self.trace: list[dict[str, Any]] = []
        self._every = max(1, total_steps // TRACE_POINTS)
        self._last = total_steps
        self._losses: dict[str, list[float]] = {}
        self._conflicts: list[int] = []

    def add(self, info: StepInfo, seconds: float) -> None:
        """Take over one step."""
        self.steps += 1
        self.seconds += seconds
        for name in self.passes:
            self.passes[name] += getattr(info, name)
        for task, loss in info.losses.items():
            self._losses.setdefault(task, []).append(loss)
        if info.num_conflicts is not None:
            self._conflicts.append(info.num_conflicts)
        if self.steps % self._every == 0 or self.steps in {1, self._last}:
            self.trace.append(
                {
                    "step": self.steps,
                    "losses": dict(info.losses),
                    "weights": None if info.weights is None else dict(info.weights),
                    "num_conflicts": info.num_conflicts,
                    "cosines": info.cosines,
                    "records": dict(info.records),
                }
            )

    def end_epoch(self) -> dict[str, Any]:
        """Means over the epoch, and how far the run is."""
        means = {
            "losses": {task: sum(values) / len(values) for task, values in self._losses.items()},
            "num_conflicts": sum(self._conflicts) / len(self._conflicts) if self._conflicts else None,
            "batches": self.steps,
            "optimizer_steps": self.passes["num_optimizer_steps"],
            "seconds": self.seconds,
        }
        self._losses, self._conflicts = {}, []
        return means

    def cost(self) -> dict[str, float]:
        """Passes and seconds per batch."""
        per_batch = {name: count / self.steps for name, count in self.passes.items()}
        return {**per_batch, "seconds_per_batch": self.seconds / self.steps}


def is_finite(value: float | None) -> TypeGuard[float]:
    """Whether this is a finite number; in files the others are null.

    Example:
        >>> is_finite(0.5), is_finite(math.inf), is_finite(None)
        (True, False, False)
    """
    return value is not None and math.isfinite(value)


def validation_score(
    values: Mapping[str, float | None], tasks: tuple[Task, ...], baseline: Mapping[str, float] | None
) -> float | None:
    """What the best epoch has most of: validation Δm, or for a single task its metric. None: nothing to go by."""
    higher = {task.name: primary_metric(task)[1] for task in tasks}
    known = {name: value for name, value in values.items() if is_finite(value)}
    if len(known) < len(values):
        return None
    try:
        if baseline is not None:
            return delta_m(known, {name: baseline[name] for name in known}, higher)
    except (ValueError, TypeError):  # a baseline of 0, or one that isn't finite
        return None
    if len(tasks) > 1:
        return None
    ((name, value),) = known.items()
    return value if higher[name] else -value


def train_and_measure(
    config: RunConfig,
    bundle: DataBundle,
    *,
    baseline: Mapping[str, float] | None = None,
    on_step: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Train, pick the epoch by the validation split, and measure the test split once.

    Args:
        config: What to train.
        bundle: The data.
        baseline: Single-task value of every task's primary metric on the validation split; None for a baseline itself.
        on_step: Called after every batch with the number of batches done.

    Returns:
        ``history`` (per epoch: mean losses, validation metrics, score, and the batches, optimizer steps and seconds so far),
        ``trace`` (single steps, with what the method records), ``selected_epoch``, ``validation`` and ``test`` (task -> metric
        -> value at that epoch), ``cost``,
        ``seconds`` and ``versions``.
    """
    began = time.perf_counter()
    memory = PeakMemory(config.device)
    run = build_run(config, bundle, baseline=baseline)
    recorder = Recorder(run.total_steps)
    history: list[dict[str, Any]] = []
    best: dict[str, Any] = {}

    def measure(split: Split) -> Metrics:
        # With the training's batch size the training, not this, decides the peak of memory.
        return evaluate(run.model, bundle, split, tasks=run.tasks, batch_size=config.batch_size, device=config.device)

    def after_step(info: StepInfo, seconds: float) -> None:
        recorder.add(info, seconds)
        if on_step is not None:
            on_step(recorder.steps)

    for epoch in range(config.epochs):
        train_epoch(run, epoch, after_step)
        validation = measure("validation")
        values = primary_values(validation, run.tasks)
        tell_method(run.multitask, values, run.tasks)
        score = validation_score(values, run.tasks, baseline)
        history.append({"epoch": epoch, **recorder.end_epoch(), "validation": validation, "score": score})
        if not best or best["score"] is None or (score is not None and score > best["score"]):
            best = {"score": score, "epoch": epoch, "state": copy.deepcopy(run.model.state_dict())}

    run.model.load_state_dict(best["state"])
    return {
        "history": history,
        "trace": recorder.trace,
        "selected_epoch": best["epoch"],
        "validation": history[best["epoch"]]["validation"],
        "test": measure("test"),
        "cost": {**recorder.cost(), "peak_memory_bytes": memory.bytes()},
        "seconds": time.perf_counter() - began,
        "versions": versions(),
    }
