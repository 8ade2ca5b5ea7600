"""How good a multi-task model is, relative to single-task models, in one number."""

import math
from collections.abc import Mapping, Sequence
from typing import TypeVar

__all__ = ["delta_m"]

Value = TypeVar("Value")


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
    names = list(values) if isinstance(values, Mapping) else None
    numbers = _in_order("values", values, names)
    references = _in_order("baseline", baseline, names, len(numbers))
    directions = _in_order("higher_is_better", higher_is_better, names, len(numbers))
    if not numbers:
        raise ValueError("Parameter `values` should hold one metric for each task. Found none.")
    total = 0.0
    for task, value, reference, higher in zip(
        names or range(len(numbers)), numbers, references, directions, strict=True
    ):
        for name, number in (("values", float(value)), ("baseline", float(reference))):
            if not math.isfinite(number):
                raise ValueError(f"Parameter `{name}` should be finite. Found `{name}[{task!r}] = {number}`.")
        if float(reference) == 0:
            raise ValueError(
                f"Parameter `baseline` should be non-zero: a change relative to 0 has no meaning. "
                f"Found `baseline[{task!r}] = {reference}`."
            )
        change = (float(value) - float(reference)) / abs(float(reference))
        total += change if higher else -change
    return 100 * total / len(numbers)


def _in_order(
    parameter: str,
    given: Sequence[Value] | Mapping[str, Value],
    names: list[str] | None,
    length: int | None = None,
) -> list[Value]:
    """The entries of ``given`` in the order of ``names``, or as they are where there are no names."""
    if isinstance(given, str | bytes) or isinstance(given, Mapping) != (names is not None):
        kind = "sequence" if names is None else "mapping from task to number"
        raise TypeError(f"Parameter `{parameter}` should be a {kind}, as `values` is. Found `{parameter} = {given!r}`.")
    if isinstance(given, Mapping):
        assert names is not None
        if set(given) != set(names):
            raise ValueError(
                f"Parameter `{parameter}` should have the tasks {sorted(names)}. Found the tasks {sorted(given)}."
            )
        return [given[name] for name in names]
    if length is not None and len(given) != length:
        raise ValueError(f"Parameter `{parameter}` should have {length} entries, as `values` has. Found {len(given)}.")
    return list(given)
