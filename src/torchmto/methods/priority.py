"""Where the probabilities of tasks come from: fixed, from losses, from validation results, or from a loss weighting."""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from torchmto.checks import found, nearest, unknown_task
from torchmto.methods import Indices, LossWeighting, Method, hyper, make_method, methods, states
from torchmto.methods.losses.window import Windowed
from torchmto.methods.per_task import Baseline, PerTask, TaskFloats
from torchmto.step import StepContext, StepInfo

SUM_TOLERANCE = 1e-6
SOURCES = ("loss", "relative_loss", "performance", "uniform")


class Priority(Method):
    """A source of one non-negative score per task; probabilities are the scores of the present tasks, normalised.

    It is a part of a method (it has state, hears reports and ends of windows) and not a method by itself.
    """

    family = "priority"

    @abstractmethod
    def scores(self, losses: Tensor | None, indices: Indices) -> Tensor:
        """Scores of the present tasks, float64 [k]; any scale, NaN for what isn't known."""

    def probabilities(self, losses: Tensor | None, indices: Indices) -> Tensor:
        """Probabilities of the present tasks, float64 [k]; uniform where no score is positive.

        A task without a score gets the mean of the others.
        """
        scores = self.scores(losses, indices).to(device="cpu", dtype=torch.float64).clamp_min(0)
        scores = torch.where(scores.isnan(), scores.nanmean(), scores)
        largest = scores.max()
        if not bool(largest > 0) or not bool(largest.isfinite()):
            return torch.full_like(scores, 1 / len(scores))
        scores = scores / largest
        return scores / scores.sum()

    def step(self, context: StepContext) -> StepInfo:
        """A priority takes no steps.

        Raises:
            TypeError: Always.
        """
        raise TypeError("A priority is a part of a method, not a method.")


class Probabilities(PerTask):
    """Task -> probability (missing tasks have 0), or a sequence in the order of the tasks.

    Raises:
        ValueError: If a probability is negative or they don't sum to 1.
    """

    unit = "probabilities"

    def __init__(self, name: str, given: TaskFloats) -> None:
        super().__init__(name, given, common=False, minimum=0)
        if abs(self.total - 1) > SUM_TOLERANCE:
            raise ValueError(f"{found(name, 'probabilities that sum to 1', given)} The sum is {self.total}.")

    def bind(self, tasks: tuple[str, ...]) -> None:
        """Match probabilities with tasks."""
        if isinstance(self.given, Mapping):
            unknown = [name for name in self.given if name not in tasks]
            if unknown:
                raise ValueError(unknown_task(unknown[0], tasks, f"in `{self.name}`"))
            self.given = {name: self.given.get(name, 0.0) for name in tasks}
        super().bind(tasks)


class FixedPriority(Priority):
    """Constant probabilities, the argument ``priority``."""

    given: Probabilities = hyper.called("priority", hyper.given(hyper.REQUIRED, Probabilities))

    def scores(self, losses: Tensor | None, indices: Indices) -> Tensor:
        """The given probabilities."""
        return self.given.of(indices)


class LossPriority(Windowed, Priority):
    """p_i ∝ (mean loss of the previous window)^gamma; uniform in the first window.

    Args:
        gamma: The exponent.
        relative: Divide each loss by the mean of its first window with a positive one.
        window: Length of a window in steps; None: windows end when ``mt.end_window()`` says so.
    """

    gamma: float = hyper.number(1.0)
    relative: bool = hyper.flag(False)
    # The means of the first and the last window (NaN: not seen yet).
    first: Tensor = states.each(torch.nan)
    last: Tensor = states.each(torch.nan)

    def scores(self, losses: Tensor | None, indices: Indices) -> Tensor:
        """(Mean loss)^gamma; NaN for a task not seen in any window."""
        self.ensure_setup(max(indices) + 1)
        chosen = list(indices)
        means = self.last[chosen].clamp_min(0)
        if self.relative:
            # Without a first positive mean there is nothing to divide: 0 stays 0, and what isn't known unknown.
            means = torch.where(means > 0, means / self.first[chosen], means)
        largest: Tensor = means.nan_to_num(nan=0.0).max()
        return (means / largest.clamp_min(torch.finfo(torch.float64).tiny)) ** self.gamma

    def close(self, means: Tensor) -> None:
        """Take over the window's means; tasks absent from it keep their last mean."""
        mean = torch.where(means.isnan(), self.last, means)
        self.first = torch.where(self.first.isnan() & (mean > 0), mean, self.first)
        self.last = mean


class PerformancePriority(Priority):
    """p_i ∝ (shortfall of a validation metric to its single-task baseline)^gamma; uniform before the first report.

    The shortfall is relative: how far the metric is behind the baseline, divided by the baseline's absolute value, and 0
    where the baseline is reached.

    Args:
        baseline: Task -> the single-task model's value.
        higher_is_better: Task -> whether larger values are better (missing ones are True), or one bool for all.
        gamma: The exponent.
    """

    baseline: Any = hyper.given(None)
    higher_is_better: Mapping[str, bool] | bool = hyper.given(True)
    gamma: float = hyper.number(1.0, minimum=0)
    # The last shortfalls; NaN: not reported yet.
    shortfall: Tensor = states.each(torch.nan)

    def __post_init__(self) -> None:
        """There is nothing to fall short of without single-task values."""
        if not isinstance(self.baseline, Mapping) or not self.baseline:
            needed = "the single-task value of every task (for priority='performance')"
            raise ValueError(found("baseline", needed, self.baseline))
        self.baseline = Baseline(self.baseline, self.higher_is_better)

    def report(self, performance: Mapping[str, float]) -> None:
        """Take over validation results."""
        for name, value in performance.items():
            # Of -0, where the baseline is just reached, 0.
            self.shortfall[self.tasks.index(name)] = max(self.baseline.behind(name, value), 0.0) + 0.0

    def scores(self, losses: Tensor | None, indices: Indices) -> Tensor:
        """Shortfall^gamma; NaN for a task without a report."""
        self.ensure_setup(max(indices) + 1)
        shortfall = self.shortfall[list(indices)]
        return torch.where(shortfall > 0, shortfall**self.gamma, shortfall)


class WeightingPriority(Priority):
    """The weights of a loss weighting, normalised to sum 1."""

    weighting: LossWeighting

    def __init__(self, weighting: LossWeighting) -> None:
        super().__init__()
        self.add_state("weighting", weighting)

    def scores(self, losses: Tensor | None, indices: Indices) -> Tensor:
        """The weighting's weights for these losses."""
        if losses is None:
            return torch.full((len(indices),), torch.nan)
        scores: Tensor = self.weighting.loss_weights(losses, indices)
        return scores


class CallablePriority(Priority):
    """Probabilities from a function of the losses: losses [k] -> k non-negative scores."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def scores(self, losses: Tensor | None, indices: Indices) -> Tensor:
        """What the function returns.

        Raises:
            ValueError: If it isn't one finite, non-negative number per present task.
        """
        if losses is None:
            return torch.ones(len(indices), dtype=torch.float64)
        scores = torch.as_tensor(self.function(losses.detach()), dtype=torch.float64).cpu()
        if scores.shape != (len(indices),) or not bool((scores.isfinite() & (scores >= 0)).all()):
            raise ValueError(found("priority(losses)", f"{len(indices)} finite, non-negative numbers", scores))
        return scores


PrioritySource = str | Mapping[str, float] | Sequence[float] | LossWeighting | Callable[[Tensor], Any]


def make_priority(
    priority: PrioritySource,
    *,
    gamma: float = 1.0,
    window: int | None = None,
    baseline: Mapping[str, float] | None = None,
    higher_is_better: Mapping[str, bool] | bool = True,
) -> Priority:
    """The priority that an argument describes.

    Args:
        priority: "loss", "relative_loss", "performance", "uniform", a loss weighting (name or object), probabilities
            (mapping or sequence), or a callable of the losses.
        gamma: Exponent of losses or shortfalls.
        window: Steps per window of the loss-based sources.
        baseline: Single-task values, for "performance".
        higher_is_better: Direction of the metrics, for "performance".

    Raises:
        TypeError: If ``priority`` is none of these.
        ValueError: If it is an unknown name, or there is a ``baseline`` that it doesn't use.
    """
    if baseline is not None and priority != "performance":
        raise ValueError(found("baseline", "None unless priority='performance'", baseline))
    if isinstance(priority, str):
        if priority in ("loss", "relative_loss"):
            return LossPriority(gamma=gamma, relative=priority == "relative_loss", window=window)
        if priority == "performance":
            return PerformancePriority(baseline=baseline, higher_is_better=higher_is_better, gamma=gamma)
        if priority == "uniform":
            return CallablePriority(torch.ones_like)
        weighting = make_method(priority) if priority in methods() else None
        if not isinstance(weighting, LossWeighting):
            known = ", ".join(map(repr, SOURCES))
            message = found("priority", f"{known}, a loss weighting, probabilities or a callable", priority)
            raise ValueError(message + nearest(priority, (*SOURCES, *methods())))
        return WeightingPriority(weighting)
    if isinstance(priority, LossWeighting):
        return WeightingPriority(priority)
    if isinstance(priority, Mapping | list | tuple):
        return FixedPriority(priority=priority)
    if callable(priority):
        return CallablePriority(priority)
    raise TypeError(found("priority", "a string, probabilities, a loss weighting or a callable", priority))
