"""How good a multi-task model is, relative to single-task models, in one number."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["delta_m"]


def delta_m(
    values: Sequence[float] | Mapping[str, float],
    baseline: Sequence[float] | Mapping[str, float],
    higher_is_better: Sequence[bool] | Mapping[str, bool],
) -> float:
    r"""Mean relative improvement over a baseline, in percent; positive is better.

    .. math:: \Delta_m = \frac{100}{K} \sum_{i=1}^K (-1)^{l_i} \frac{M_i - B_i}{B_i}

    where :math:`M_i` is task i's metric, :math:`B_i` its value in the baseline (a single-task model) and
    :math:`l_i` is 1 where a lower value is better. It takes **one** metric per task: a task with ten metrics
    would otherwise count ten times.

    Args:
        values: One metric per task, as a sequence or as a mapping from task name to metric.
        baseline: The baseline's metrics: the same order, or the same names.
        higher_is_better: For each task whether a higher metric is better.

    Returns:
        The mean relative improvement in percent.

    Raises:
        TypeError: If mappings and sequences are mixed.
        ValueError: If tasks are missing, there are none, a number isn't finite, or a baseline is 0, for which
            a relative change has no meaning.

    Source: Maninis et al., Attentive Single-Tasking of Multiple Tasks, CVPR 2019, equation 3. Deviation: a
    negative baseline (R² can be) divides by its absolute value, so that better stays positive.

    >>> round(delta_m([0.594, 38.67, 20.52], [0.667, 33.18, 20.75], [False, True, False]), 2)
    9.53
    >>> delta_m({"seg": 55.0}, {"seg": 50.0}, {"seg": True})
    10.0
    """
    numbers = _by_task("values", values, values)
    references = _by_task("baseline", baseline, values)
    directions = _by_task("higher_is_better", higher_is_better, values)
    if not numbers:
        raise ValueError("Parameter `values` should hold one metric for each task. Found none.")
    total = 0.0
    for task, given in numbers.items():
        value, reference = float(given), float(references[task])
        for name, number in (("values", value), ("baseline", reference)):
            if not math.isfinite(number):
                raise ValueError(f"Parameter `{name}` should be finite. Found `{name}[{task!r}] = {number}`.")
        if reference == 0:
            raise ValueError(
                f"Parameter `baseline` should be non-zero: a change relative to 0 has no meaning. "
                f"Found `baseline[{task!r}] = {reference}`."
            )
        change = (value - reference) / abs(reference)
        total += change if directions[task] else -change
    return 100 * total / len(numbers)


def _by_task(parameter: str, given: Any, like: Any) -> dict[Any, Any]:
    """The entries of ``given`` by task, or by number where ``like`` has no names."""
    named = isinstance(like, Mapping)
    if isinstance(given, str | bytes) or isinstance(given, Mapping) != named:
        kind = "mapping from task to number" if named else "sequence"
        raise TypeError(f"Parameter `{parameter}` should be a {kind}, as `values` is. Found `{parameter} = {given!r}`.")
    if named and set(given) != set(like):
        raise ValueError(f"Parameter `{parameter}` should have the tasks {sorted(like)}. Found {sorted(given)}.")
    if len(given) != len(like):
        raise ValueError(
            f"Parameter `{parameter}` should have {len(like)} entries, as `values` has. Found {len(given)}."
        )
    return dict(given if named else enumerate(given))
