"""One number per validation, by which the best epoch is chosen."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from torchmto.lab.data.base import Task
from torchmto.lab.metrics import primary_metric
from torchmto.metrics import delta_m

Values = Mapping[str, float | None]


@dataclass(frozen=True)
class Measure:
    """A score of a validation, higher is better.

    Attributes:
        name: Short, for a line of output.
        description: What it is.
        score: Primary metric by task, all finite -> score.
    """

    name: str
    description: str
    score: Callable[[Mapping[str, float]], float]

    def __call__(self, primary: Values) -> float | None:
        """The score; None where a metric isn't finite or there is nothing to compare it with."""
        known = {name: value for name, value in primary.items() if is_finite(value)}
        if len(known) < len(primary):
            return None
        try:
            return self.score(known)
        except (ValueError, TypeError):  # a baseline of 0, or one that isn't finite
            return None


def is_finite(value: float | None) -> TypeGuard[float]:
    """Whether this is a finite number; in files the others are null.

    Example:
        >>> is_finite(0.5), is_finite(math.inf), is_finite(None)
        (True, False, False)
    """
    return value is not None and math.isfinite(value)


def is_better(score: float | None, earlier: Sequence[float | None]) -> bool:
    """Whether an epoch takes the place of the best one so far: by a higher score, or the last where none tells them apart.

    A missing score is less than any, and tells epochs apart no more than equal ones do: of a metric that stays at 0 the same
    epoch counts as where a Δm to it isn't defined.

    Args:
        score: The epoch's.
        earlier: Those of the epochs before it.

    Example:
        >>> is_better(2.0, [0.5, 1.0]), is_better(1.0, [0.5, 1.0]), is_better(None, [None, 1.0])
        (True, False, False)
        >>> is_better(0.0, [0.0, 0.0]), is_better(None, [None])
        (True, True)
    """
    best = max((known for known in earlier if known is not None), default=None)
    return not tells_apart([*earlier, score]) or (score is not None and (best is None or score > best))


def tells_apart(scores: Sequence[float | None]) -> bool:
    """Whether the scores of a Run's epochs say which one is best.

    Example:
        >>> tells_apart([0.5, 0.6]), tells_apart([0.0, 0.0]), tells_apart([None, None])
        (True, False, False)
    """
    return len(set(scores)) > 1


def is_delta_m(result: Mapping[str, Any]) -> bool:
    """Whether a Run's scores are Δm; results that don't say what they are come from when they always were.

    Example:
        >>> is_delta_m({"measure": measure_of([Task("a", "regression", 1)], {"a": 2.0}).description}), is_delta_m({})
        (True, True)
        >>> is_delta_m({"measure": measure_of([Task("a", "regression", 1)], None).description})
        False
    """
    return str(result.get("measure", "delta_m")).startswith("delta_m")


def needs_untrained(tasks: Sequence[Task], baseline: Values | None) -> bool:
    """Whether scores are relative to what the untrained network gives."""
    return baseline is None and len(tasks) > 1


def measure_of(
    tasks: Sequence[Task], baseline: Values | None, untrained: Mapping[str, Mapping[str, float]] | None = None
) -> Measure:
    """Δm where single-task values are known; a single task's metric; else the mean validation score.

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
        single = {name: value for name, value in baseline.items() if value is not None}
        higher = {name: better for name, (_, better) in primary.items()}
        return Measure(
            "Δm",
            "delta_m: mean relative improvement over the given single-task values, in percent, on the validation split",
            lambda values: delta_m(dict(values), {name: single[name] for name in values if name in single}, higher),
        )
    if len(tasks) == 1:
        ((name, (metric, better)),) = primary.items()
        return Measure(
            metric, f"{metric} on the validation split", lambda values: values[name] if better else -values[name]
        )
    scales = {name: (untrained or {}).get(name, {}).get(metric, math.nan) for name, (metric, _) in primary.items()}

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
