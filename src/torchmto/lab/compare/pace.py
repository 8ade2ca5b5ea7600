"""How far a run was after each of its epochs: in batches, optimizer steps and seconds.

A method that takes several optimizer steps per batch gets more updates out of the same data than gd does, so methods are
looked at both after equal batches and after equal optimizer steps.
"""

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["UNITS", "progress", "steps_by_batch"]

UNITS = ("batches", "optimizer_steps", "seconds")
"""What progress is counted in; seconds are those of training steps alone."""


def progress(result: Mapping[str, Any]) -> list[dict[str, float]]:
    """Batches, optimizer steps and seconds of training up to the end of every epoch.

    Runs of older versions recorded the totals only. Their batches and seconds are spread evenly over the epochs; their
    optimizer steps in proportion to what the trace says of single steps, see `steps_by_batch`.

    Args:
        result: Of `torchmto.lab.compare.single.train_and_measure`.

    Returns:
        One mapping per epoch.

    Example:
        >>> cost = {"num_optimizer_steps": 2.0, "seconds_per_batch": 0.5}
        >>> progress({"history": [{}, {}], "trace": [{"step": 10, "records": {}}], "cost": cost})[0]
        {'batches': 5, 'optimizer_steps': 10.0, 'seconds': 2.5}
    """
    history = result["history"]
    if all(unit in epoch for epoch in history for unit in UNITS):
        return [{unit: epoch[unit] for unit in UNITS} for epoch in history]
    cost, total = result["cost"], result["trace"][-1]["step"]
    steps = steps_by_batch(result["trace"], total * cost["num_optimizer_steps"])
    ends = [round(total * (number + 1) / len(history)) for number in range(len(history))]
    return [
        {"batches": end, "optimizer_steps": steps[end - 1], "seconds": end * cost["seconds_per_batch"]} for end in ends
    ]


def steps_by_batch(trace: Sequence[Mapping[str, Any]], total: float) -> list[float]:
    """Optimizer steps taken up to each batch, estimated where only some batches were looked at.

    Phase 1 of connection strength takes one step per task, task groups one per group, all others the same number each time.
    A batch that wasn't looked at is taken to be like the next one that was, and the sum is scaled to what was counted.

    Args:
        trace: Single steps of a run, the last one included.
        total: Optimizer steps of the whole run.

    Returns:
        One number per batch, the last of which is ``total``.

    Example:
        >>> trace = [{"step": 2, "losses": {"a": 1, "b": 1}, "records": {"phase": 1}}, {"step": 4, "records": {"phase": 2}}]
        >>> steps_by_batch(trace, 6)
        [2.0, 4.0, 5.0, 6.0]
    """
    sums: list[float] = []
    for point in trace:
        here = _relative_steps(point)
        while len(sums) < point["step"]:
            sums.append((sums[-1] if sums else 0.0) + here)
    return [value * total / sums[-1] for value in sums]


def _relative_steps(point: Mapping[str, Any]) -> int:
    records = point["records"]
    if "phase" in records:
        return len(point["losses"]) if records["phase"] == 1 else 1
    return len(records["groups"]) if "groups" in records else 1
