"""One number per validation, by which the best epoch is chosen."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torchmto.lab.data import Task
from torchmto.lab.metrics import primary_metric
from torchmto.metrics import delta_m

Metrics = dict[str, dict[str, float]]
"""Task -> metric -> value."""


@dataclass(frozen=True)
class Measure:
    """A score of a validation, higher is better.

    Attributes:
        name: Short, for a line of output.
        description: What it is.
        score: Primary metric by task -> score; -inf where a metric isn't finite.
    """

    name: str
    description: str
    score: Callable[[Mapping[str, float]], float]

    def __call__(self, primary: Mapping[str, float]) -> float:
        """The score."""
        return self.score(primary) if all(math.isfinite(value) for value in primary.values()) else -math.inf


def measure_of(tasks: Sequence[Task], baseline: Mapping[str, float] | None, untrained: Metrics) -> Measure:
    """Δm where single-task values are known, else the mean validation score.

    The latter averages over tasks the primary metric where higher is better (they are shares, 1 is perfect), and 1 minus its
    ratio to the untrained network's where lower is better.

    Args:
        tasks: The tasks.
        baseline: Single-task values by task.
        untrained: Validation metrics of the untrained network.

    Example:
        >>> tasks = [Task("a", "classification", 3), Task("b", "regression", 1)]
        >>> measure = measure_of(tasks, None, {"a": {"accuracy": 0.3}, "b": {"rmse": 2.0}})
        >>> measure({"a": 0.5, "b": 1.0})
        0.5
    """
    primary = {task.name: primary_metric(task) for task in tasks}
    if baseline is not None:
        single = dict(baseline)
        higher = {name: better for name, (_, better) in primary.items()}
        return Measure(
            "Δm",
            "delta_m: mean relative improvement over the given single-task values, in percent, on the validation split",
            lambda values: delta_m(dict(values), single, higher),
        )
    scales = {name: untrained[name][metric] for name, (metric, _) in primary.items()}

    def mean(values: Mapping[str, float]) -> float:
        return sum(_score(values[name], scales[name], higher) for name, (_, higher) in primary.items()) / len(primary)

    return Measure(
        "mean validation score",
        "mean validation score: over tasks, the primary metric where higher is better, 1 - metric / that of the untrained "
        "network where lower is better (no single-task baseline was given, so no delta_m)",
        mean,
    )


def _score(value: float, untrained: float, higher: bool) -> float:
    if higher:
        return value
    # An untrained network that isn't finite, or is perfect, gives no scale.
    return 1 - value / untrained if math.isfinite(untrained) and untrained > 0 else -value


__all__ = ["Measure", "Metrics", "measure_of"]
