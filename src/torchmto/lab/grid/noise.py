"""The noise floor of affinities: what a step that changes nothing seems to change."""

import math
from collections.abc import Iterable, Mapping
from typing import Any


def noise_floor(records: Iterable[Mapping[str, Any]]) -> dict[str, float] | None:
    """Mean absolute affinity of a step that changes nothing, by the task whose loss is looked at.

    It is that of single batches. Affinities are moving averages, whose own noise is lower: one above the floor would show in a
    single batch, one below it can't be told from dropout and the like without averaging.

    Args:
        records: What ``task_groups(noise_floor=True)`` recorded in several steps.

    Returns:
        The floors; None if none were measured.

    Example:
        >>> noise_floor([{"noise_floor": {"a": 0.25}}, {"noise_floor": {"a": -0.75}}, {}])
        {'a': 0.5}
    """
    found: dict[str, list[float]] = {}
    for record in records:
        for task, value in (record.get("noise_floor") or {}).items():
            if value is not None and math.isfinite(value):
                found.setdefault(task, []).append(abs(value))
    return {task: sum(values) / len(values) for task, values in found.items()} or None
