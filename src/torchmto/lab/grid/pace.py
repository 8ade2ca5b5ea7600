"""How far a run was after each of its epochs: in batches, optimizer steps and seconds.

A method that takes several optimizer steps per batch gets more updates out of the same data than gd does, so methods are
looked at both after equal batches and after equal optimizer steps.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

__all__ = ["UNITS", "is_recorded", "progress", "steps_until"]

UNITS = ("batches", "optimizer_steps", "seconds")
"""What progress is counted in; seconds are those of training steps alone."""


def progress(result: Mapping[str, Any]) -> list[dict[str, float]]:
    """Batches, optimizer steps and seconds of training up to the end of every epoch.

    Runs of older versions recorded the totals only. Their batches and seconds are spread evenly over the epochs; their
    optimizer steps are estimated: phase 1 of connection strength takes one per task, task groups take one per group, all
    other methods the same number each time.

    Args:
        result: Of `torchmto.lab.grid.single.train_and_measure`.

    Returns:
        One mapping per epoch.

    Example:
        >>> cost = {"num_optimizer_steps": 2.0, "seconds_per_batch": 0.5}
        >>> progress({"history": [{}, {}], "trace": [{"step": 10, "records": {}}], "cost": cost})[0]
        {'batches': 5, 'optimizer_steps': 10.0, 'seconds': 2.5}
    """
    history = result["history"]
    if is_recorded(history):
        return [{unit: epoch[unit] for unit in UNITS} for epoch in history]
    cost, total = result["cost"], result["trace"][-1]["step"]
    ends = [round(total * (number + 1) / len(history)) for number in range(len(history))]
    per_batch = [(point["step"], _relative_steps(point)) for point in result["trace"]]
    steps = steps_until(ends, per_batch, total * cost["num_optimizer_steps"])
    return [
        {"batches": end, "optimizer_steps": taken, "seconds": end * cost["seconds_per_batch"]}
        for end, taken in zip(ends, steps, strict=True)
    ]


def is_recorded(history: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the epochs say themselves how far they were."""
    return all(unit in epoch for epoch in history for unit in UNITS)


def steps_until(batches: Sequence[int], per_batch: Sequence[tuple[int, float]], total: float) -> list[float]:
    """Optimizer steps taken up to some batches, where only some were looked at.

    A batch that wasn't looked at is taken to be like the next one that was, and the sum is scaled to what was counted.

    Args:
        batches: Up to which batches.
        per_batch: Numbers of batches, ascending, and how many steps were taken in them, up to a common factor.
        total: Optimizer steps of the whole run, which ends with the last of these batches.

    Returns:
        One number for each of ``batches``.

    Example:
        >>> steps_until([2, 3, 4], [(2, 3), (4, 1)], 8)
        [6.0, 7.0, 8.0]
    """
    at = [0, *(batch for batch, _ in per_batch)]
    sums = np.concatenate([[0.0], np.cumsum(np.diff(at) * [steps for _, steps in per_batch])])
    found: list[float] = (np.interp(batches, at, sums) * total / sums[-1]).tolist()
    return found


def _relative_steps(point: Mapping[str, Any]) -> int:
    records = point["records"]
    if "phase" in records:
        return len(point["losses"]) if records["phase"] == 1 else 1
    return len(records["groups"]) if "groups" in records else 1
