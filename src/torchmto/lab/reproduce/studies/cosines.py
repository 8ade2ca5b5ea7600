"""Cosines of the tasks' gradients while training, from the steps that runs kept a trace of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from torchmto.lab.reproduce.arms import ArmResult
from torchmto.lab.reproduce.findings import Findings, Table, number

__all__ = ["add_cosines", "cosine_statistics"]

THIRDS = ("first", "last")


def add_cosines(findings: Findings, arms: Mapping[str, ArmResult]) -> None:
    """Add a table for every arm that has methods which compute all tasks' gradients at one point."""
    for name, arm in arms.items():
        entries = {method: cosine_statistics(arm.runs(method)) for method in arm.experiment.methods}
        known = {method: entry for method, entry in entries.items() if entry is not None}
        if known:
            findings.numbers.setdefault("cosines", {})[name] = known
            findings.tables.append(_table(name, known))


def cosine_statistics(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Cosines between pairs of tasks in the first and the last third of training.

    Args:
        runs: Results of training runs, with ``trace``: steps with ``losses`` (task to loss) and ``cosines`` (a matrix in the
            order of ``losses``, or None).

    Returns:
        For ``first`` and ``last`` (third of each run): ``mean``, ``std`` and ``negative_share`` over pairs, traced steps and
        runs, and ``pairs`` (``"a, b"`` to the pair's mean). None if no step has cosines, or there is only one task.

    Example:
        >>> step = {"losses": {"a": 1.0, "b": 2.0}, "cosines": [[1.0, -0.5], [-0.5, 1.0]]}
        >>> cosine_statistics([{"trace": [step] * 3}])["last"]["mean"]
        -0.5
    """
    statistics: dict[str, Any] = {}
    for third in THIRDS:
        pairs: dict[str, list[float]] = {}
        for run in runs:
            for pair, cosine in _cosines(_third(run["trace"], third)):
                pairs.setdefault(pair, []).append(cosine)
        values = np.array([cosine for entry in pairs.values() for cosine in entry])
        if len(values) == 0:
            return None
        statistics[third] = {
            "mean": float(values.mean()),
            "std": float(values.std()),
            "negative_share": float((values < 0).mean()),
            "pairs": {pair: float(np.mean(entry)) for pair, entry in pairs.items()},
        }
    return statistics


def _third(trace: Sequence[Mapping[str, Any]], third: str) -> Sequence[Mapping[str, Any]]:
    length = -(-len(trace) // 3)
    return trace[:length] if third == "first" else trace[-length:]


def _cosines(trace: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, float]]:
    for step in trace:
        if step["cosines"] is not None:
            for (i, one), (j, other) in combinations(enumerate(step["losses"]), 2):
                yield f"{one}, {other}", step["cosines"][i][j]


def _table(name: str, entries: Mapping[str, Mapping[str, Any]]) -> Table:
    rows = []
    for method, entry in entries.items():
        pair, lowest = min(entry["last"]["pairs"].items(), key=lambda item: item[1])
        spreads = [f"{entry[third]['mean']:+.3f} (std {entry[third]['std']:.3f})" for third in THIRDS]
        shares = [number(100 * entry[third]["negative_share"], digits=0) for third in THIRDS]
        rows.append([method, *spreads, *shares, f"{pair}: {lowest:+.3f}"])
    note = (
        "Cosines of the tasks' gradients on the shared parameters, over pairs of tasks, seeds and about 20 traced steps of the "
        "first and of the last third of training; the pair with the lowest mean in the last third. Methods that never hold all "
        "tasks' gradients at one point aren't here."
    )
    header = ["method", "first third", "last third", "conflicts % first", "conflicts % last", "lowest pair"]
    return Table(f"Gradient cosines, arm {name}", header, rows, [note])
