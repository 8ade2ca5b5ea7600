"""Methods against a reference, seed by seed: paired differences, wins and losses, ranks, and equal budgets."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from torchmto.lab.run.scores import is_delta_m
from torchmto.lab.statistics import (
    Paired,
    average_ranks,
    confidence95,
    critical_difference,
    friedman,
    holm,
    paired,
    wins,
)

Result = Mapping[str, Any]
UNITS = ("batches", "optimizer_steps", "seconds")
"""What progress is counted in, since a method that takes several optimizer steps per batch gets more updates out of the same
data; seconds are those of training steps alone."""
Tasks = Mapping[str, tuple[str, bool]]
"""Each task's primary metric, and whether higher is better."""


def versus(
    runs: Mapping[str, Sequence[Result]],
    delta_m: Mapping[str, Sequence[float] | None],
    tasks: Tasks,
    reference: str = "gd",
) -> dict[str, Any]:
    """Compare all methods with one of them, and with one another.

    Args:
        runs: Each method's results (with ``test``, ``history``, ``trace`` and ``cost``), in the same order of seeds.
        delta_m: Each method's Δm by seed, in that order; None where it isn't defined.
        tasks: Primary metrics.
        reference: What the others are compared with; if it isn't among the methods, the first one is.

    Returns:
        ``reference``; ``methods``: for each the paired difference of ``delta_m`` in percentage points and of each of its
        ``tasks`` in % of the reference's value, more is better, with p values corrected by Holm (over all methods, and over
        all methods and tasks), and ``wins_ties_losses`` over seeds, by task and in all; ``ranks``, see `_ranks`;
        ``budgets``, see `_budgets`.
    """
    names = list(runs)
    reference = reference if reference in names else names[0]
    values = {name: {task: _values(runs[name], task, metric) for task, (metric, _) in tasks.items()} for name in names}
    base, base_delta = values[reference], delta_m[reference]
    methods: dict[str, Any] = {}
    for name in names:
        own = delta_m[name]
        by_task = {task: _against(values[name][task], base[task], higher) for task, (_, higher) in tasks.items()}
        counts = [entry["wins_ties_losses"] for entry in by_task.values()]
        difference = None if own is None or base_delta is None or name == reference else paired(own, base_delta)
        methods[name] = {
            "delta_m": _plain(difference),
            "tasks": by_task,
            "wins_ties_losses": [sum(column) for column in zip(*counts, strict=True)],
        }
    others = [name for name in names if name != reference]
    _correct([methods[name]["delta_m"] for name in others])
    _correct([entry["change"] for name in others for entry in methods[name]["tasks"].values()])
    return {
        "reference": reference,
        "methods": methods,
        "ranks": {"seeds": _ranks_by_seed(delta_m), "tasks": _ranks_by_task(values, tasks)},
        "budgets": _budgets(runs),
    }


def paired_changes(values: Sequence[float | None], base: Sequence[float | None], higher: bool) -> Paired | None:
    """Mean change relative to the base in %, pair by pair and so that more is better; None where a value or base is missing.

    Example:
        >>> paired_changes([1.1, 2.2], [1.0, 2.0], False).mean.__round__(6)
        -10.0
    """
    changes = []
    for value, other in zip(values, base, strict=True):
        if value is None or not other:
            return None
        changes.append((100 if higher else -100) * (value - other) / abs(other))
    return paired(changes, [0.0] * len(changes))


def _values(runs: Sequence[Result], task: str, metric: str) -> list[float | None]:
    """A metric on the test split by seed; None where it isn't a finite number."""
    found = [run["test"][task][metric] for run in runs]
    return [None if value is None or not math.isfinite(value) else value for value in found]


def _against(values: Sequence[float | None], base: Sequence[float | None], higher: bool) -> dict[str, Any]:
    pairs = [(a, b) for a, b in zip(values, base, strict=True) if a is not None and b is not None]
    counts = wins([a for a, _ in pairs], [b for _, b in pairs], higher_is_better=higher)
    return {"change": _plain(paired_changes(values, base, higher)), "wins_ties_losses": list(counts)}


def _plain(difference: Paired | None) -> dict[str, Any] | None:
    return None if difference is None else {**asdict(difference), "p_holm": None}


def _correct(differences: Sequence[dict[str, Any] | None]) -> None:
    """Fill in the corrected p values of one family of tests."""
    known = {str(number): entry for number, entry in enumerate(differences) if entry is not None}
    for number, p in holm({number: entry["p"] for number, entry in known.items()}).items():
        known[number]["p_holm"] = p


# ------------------------------------------------------------------------------------------------------------ ranks


def _ranks_by_seed(delta_m: Mapping[str, Sequence[float] | None]) -> dict[str, Any] | None:
    """Ranks by Δm; the seeds are independent, so the tests hold. None where a method has no Δm."""
    if any(entry is None for entry in delta_m.values()):
        return None
    return _ranks(list(delta_m), np.array([entry for entry in delta_m.values() if entry is not None], dtype=float).T)


def _ranks_by_task(values: Mapping[str, Mapping[str, Sequence[float | None]]], tasks: Tasks) -> dict[str, Any] | None:
    """Ranks in every task and seed, which aren't independent, so the tests are too optimistic."""
    scores = [
        [np.nan if value is None else (1 if higher else -1) * value for value in own[task]]
        for task, (_, higher) in tasks.items()
        for own in values.values()
    ]
    blocks = np.array(scores, dtype=float).reshape(len(tasks), len(values), -1).swapaxes(1, 2).reshape(-1, len(values))
    known = blocks[np.isfinite(blocks).all(axis=1)]
    return _ranks(list(values), known) if len(known) else None


def _ranks(names: Sequence[str], scores: "np.ndarray[Any, np.dtype[np.float64]]") -> dict[str, Any]:
    """``average`` rank of every method, 1 for the best; ``friedman``'s test; Nemenyi's ``critical_difference`` at 5 %."""
    test = friedman(scores)
    ranks = dict(zip(names, average_ranks(scores).tolist(), strict=True))
    critical = critical_difference(len(names), len(scores)) if len(names) > 1 else None
    return {
        "blocks": len(scores),
        "average": ranks,
        "friedman": None if test is None else asdict(test),
        "critical_difference": critical,
    }


# ---------------------------------------------------------------------------------------------------- equal budgets


def _budgets(runs: Mapping[str, Sequence[Result]]) -> dict[str, Any]:
    """The best validation Δm that every method reached within what the thriftiest method used in all.

    How far a method was after an epoch is a mean over its seeds, because single timings are noisy.

    Returns:
        By unit (`UNITS`): ``limit``, and by method ``per_seed``, ``mean`` and ``ci95``, or None where
        it had no epoch within the limit or a run has no score that is a Δm.
    """
    budgets: dict[str, Any] = {}
    for unit in UNITS:
        ends = {
            name: [
                sum(epoch[unit] for epoch in epochs) / len(epochs)
                for epochs in zip(*(run["history"] for run in own), strict=True)
            ]
            for name, own in runs.items()
        }
        limit = min(end[-1] for end in ends.values())
        methods = {
            name: _over_seeds([_best_within(run, ends[name], limit) for run in own]) for name, own in runs.items()
        }
        budgets[unit] = {"limit": limit, "methods": methods}
    return budgets


def _best_within(run: Result, ends: Sequence[float], limit: float) -> float | None:
    scores = [
        epoch["score"]
        for epoch, end in zip(run["history"], ends, strict=True)
        if is_delta_m(run) and end <= limit * (1 + 1e-9) and epoch["score"] is not None
    ]
    return max(scores, default=None)


def _over_seeds(scores: Sequence[float | None]) -> dict[str, Any] | None:
    known = [score for score in scores if score is not None]
    if len(known) < len(scores) or not known:
        return None
    return {"mean": sum(known) / len(known), "ci95": confidence95(known), "per_seed": known}
