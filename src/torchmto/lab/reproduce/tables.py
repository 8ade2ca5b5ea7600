"""What is said about the arms of an experiment: one table each, and the numbers behind it.

`STUDIES` says by the name of a recipe's study which looks at an arm there are besides the comparison of its methods.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd

from torchmto.lab.grid.plots import delta_m_figure
from torchmto.lab.grid.tuning import edges
from torchmto.lab.reproduce.arms import ArmResult
from torchmto.lab.reproduce.findings import FEW_SEEDS, Findings, figure, number
from torchmto.lab.reproduce.oracle import oracle, stability
from torchmto.lab.reproduce.recipe import Recipe
from torchmto.lab.run.config import config_of
from torchmto.lab.statistics import holm, paired
from torchmto.lab.terminal import Table

Look = Callable[[ArmResult], "tuple[Any, Table | None]"]
"""Numbers of an arm, and a table of them if there is something to show."""
Trace = Sequence[Mapping[str, Any]]
MANY = 12
"""Tables with a column per task show so many of them."""


def add_tables(findings: Findings, arms: Mapping[str, ArmResult], recipe: Recipe) -> None:
    """Add all that there is to say about these arms."""
    seeds = min((arm.experiment.seeds for arm in arms.values() if arm.arm.seeds is None), default=0)
    if seeds and seeds < FEW_SEEDS:
        findings.notes.append(
            f"**Smoke run**: {seeds} seed{'s' if seeds > 1 else ''}. It shows that everything works and roughly what comes "
            "out; differences whose interval includes 0 decide nothing."
        )
    for name, arm in arms.items():
        looks = {"arms": comparison, "budgets": budgets, **STUDIES[recipe.study], "cosines": cosines}
        for key, look in looks.items():
            numbers, table = look(arm)
            if numbers:
                findings.numbers.setdefault(key, {})[name] = numbers
            if table is not None and table.rows and len(table.header) > 1:
                findings.tables.append(table)
        if recipe.tune:
            findings.tables.append(settings(arm, recipe))
        if arm.experiment.baselines:
            findings.figures[f"delta_m-{name}"] = delta_m_figure(arm.summary)
    for key, over_all in {"across_arms": across, **WHOLE.get(recipe.study, {})}.items():
        numbers, table = over_all(arms)
        if numbers:
            findings.numbers[key] = numbers
            findings.tables.append(table)


def _by_method(title: str, arm: ArmResult, columns: Mapping[str, Sequence[str]], *notes: str) -> Table:
    """A table of these columns, each with a cell per method."""
    rows = [list(row) for row in zip(arm.experiment.methods, *columns.values(), strict=True)]
    return Table(title.format(arm.arm.name), ["method", *columns], rows, notes)


def _tasks(arm: ArmResult) -> tuple[Sequence[str], str]:
    """The tasks that a table has columns for, and what its note says of the others."""
    names = arm.problem.task_names
    return names[:MANY], f" The first {MANY} of {len(names)} tasks." if len(names) > MANY else ""


# --------------------------------------------------------------------------------------------------- every experiment


def comparison(arm: ArmResult) -> tuple[Any, Table]:
    """Δm with intervals, paired differences, wins, ranks, costs."""
    versus, methods = arm.summary["versus"], arm.summary["methods"]
    reference, ranks = versus["reference"], versus["ranks"]["tasks"]
    numbers = {
        method: {
            **{key: methods[method][key] for key in ("delta_m", "cost")},
            "difference": versus["methods"][method]["delta_m"],
            "wins_ties_losses": versus["methods"][method]["wins_ties_losses"],
            "last_train_losses": _last_losses(arm, method),
            "settings": dict(arm.experiment.chosen.get(method, {})),
        }
        for method in arm.experiment.methods
    }
    run = config_of(arm.arm.method_run, arm.experiment.run)
    tuned = any(config_of(entry, run).optimizer != run.optimizer for entry in arm.experiment.chosen.values())
    optimizer = "each at its chosen settings" if tuned else f"{run.optimizer.name} {run.optimizer.lr:g}"
    columns = {
        "Δm %": [figure(numbers[m]["delta_m"]) for m in numbers],
        f"Δm minus {reference}": [figure(numbers[m]["difference"]) for m in numbers],
        "p": [number((numbers[m]["difference"] or {}).get("p_holm"), digits=4) for m in numbers],
        "w/t/l": ["-" if m == reference else "/".join(map(str, numbers[m]["wins_ties_losses"])) for m in numbers],
        "rank": [number(ranks and ranks["average"][m]) for m in numbers],
        "last train loss": [
            number(float(np.mean(list(numbers[m]["last_train_losses"].values()))), digits=4) for m in numbers
        ],
        "steps/batch": [number(numbers[m]["cost"]["num_optimizer_steps"]) for m in numbers],
        "ms/batch": [number(1000 * numbers[m]["cost"]["seconds_per_batch"], digits=1) for m in numbers],
    }
    about = (
        f"{arm.arm.about} {arm.problem.name}, {run.model.name or 'its own model'}, {run.epochs} epochs of batches of "
        f"{run.data.batch_size}, {optimizer}, seeds 0 to {arm.experiment.seeds - 1}."
    )
    legend = (
        f"Δm to single-task models of the same seed and optimizer; differences to {reference} paired by seed, p corrected by "
        "Holm; wins/ties/losses count tasks and seeds; ranks over tasks and seeds, which aren't independent; ± is the 95 % "
        "interval."
    )
    found = {"reference": reference, "seeds": arm.experiment.seeds, "methods": numbers, "ranks": versus["ranks"]}
    return found, _by_method("Arm {}", arm, columns, about.strip(), legend)


def _last_losses(arm: ArmResult, method: str) -> dict[str, float]:
    """Each task's training loss of the last epoch, averaged over seeds."""
    ends = [run["history"][-1]["losses"] for run in arm.runs(method)]
    names = dict.fromkeys(task for end in ends for task in end)
    return {task: float(np.mean([end[task] for end in ends if task in end])) for task in names}


def budgets(arm: ArmResult) -> tuple[Any, Table | None]:
    """Within equal budgets, where methods take different numbers of optimizer steps; nothing where no method has a Δm."""
    found = arm.summary["versus"]["budgets"]
    if not any(entry for within in found.values() for entry in within["methods"].values()):
        return None, None
    if len({entry["cost"]["num_optimizer_steps"] for entry in arm.summary["methods"].values()}) == 1:
        return found, None
    columns = {
        f"{within['limit']:.4g} {unit.replace('_', ' ')}": [
            figure(within["methods"][m]) for m in arm.experiment.methods
        ]
        for unit, within in found.items()
    }
    note = (
        "Best validation Δm within as many batches, optimizer steps and seconds of training as the thriftiest method took, "
        "mean over seeds; ± 95 % interval; -: not one epoch. The learning rate falls over the whole run and isn't adapted to "
        "the smaller budget."
    )
    return found, _by_method("Equal budgets, arm {}", arm, columns, note)


def settings(arm: ArmResult, recipe: Recipe) -> Table:
    """What tuning chose, and where the choice is at the edge of what was on offer: a better one may lie beyond."""
    rows = [
        [who, ", ".join(f"{k} {v}" for k, v in own.items()), ", ".join(edges(own, recipe.tune)) or "-"]
        for who, own in arm.experiment.chosen.items()
    ]
    shorter = "".join(f", with {key} {value}" for key, value in recipe.tune_run.items())
    notes = [
        f"Chosen among {len(recipe.tune)} settings by validation on seed 0{shorter}. Edge: the largest or smallest on offer."
    ]
    if arm.failed:
        notes.append(f"Failed while tuning, and so not chosen: {'; '.join(arm.failed)}.")
    return Table(f"Chosen settings, arm {arm.arm.name}", ["run", "settings", "edge"], rows, notes)


def across(arms: Mapping[str, ArmResult]) -> tuple[Any, Table]:
    """The same method in two arms of the same data: paired differences to the first arm that has it."""
    found: list[dict[str, Any]] = []
    first: dict[tuple[str, str | None], str] = {}
    for name, arm in arms.items():
        for method in arm.experiment.methods:
            before = first.setdefault((method, arm.experiment.run.data.name), name)
            here, there = (arms[which].summary["methods"][method]["delta_m"] for which in (name, before))
            if before != name and here and there:
                pairs = min(len(here["per_seed"]), len(there["per_seed"]))
                difference = paired(here["per_seed"][:pairs], there["per_seed"][:pairs])
                found.append({"method": method, "arm": name, "minus": before, **vars(difference)})
    corrected = holm({str(place): row["p"] for place, row in enumerate(found)})
    numbers = [{**row, "p_holm": corrected[str(place)]} for place, row in enumerate(found)]
    rows = [
        [r["method"], r["arm"], r["minus"], figure(r), number(r["p_holm"], digits=4), str(r["pairs"])] for r in numbers
    ]
    note = "Differences of Δm, paired by seed, each arm relative to its own single-task models; p corrected by Holm."
    header = ["method", "arm", "minus arm", "Δm", "p", "seeds"]
    return numbers, Table("The same method in different arms", header, rows, [note])


# ------------------------------------------------------------------------------------------------------------ cosines

THIRDS = ("first", "last")


def cosines(arm: ArmResult) -> tuple[Any, Table]:
    """Cosines of the methods that compute all tasks' gradients at one point."""
    every = {method: cosine_statistics([run["trace"] for run in arm.runs(method)]) for method in arm.experiment.methods}
    known = {method: entry for method, entry in every.items() if entry is not None}
    rows = []
    for method, entry in known.items():
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
    return known, Table(f"Gradient cosines, arm {arm.arm.name}", header, rows, [note])


def cosine_statistics(traces: Sequence[Trace]) -> dict[str, Any] | None:
    """Cosines between pairs of tasks in the first and the last third of training.

    Args:
        traces: Of each run the steps, with ``losses`` (task to loss) and ``cosines`` (in the order of ``losses``, or None).

    Returns:
        For ``first`` and ``last`` (third of each run): ``mean``, ``std`` and ``negative_share`` over pairs, traced steps and
        runs, and ``pairs`` (``"a, b"`` to the pair's mean). None if no step has cosines, or there is only one task.

    Example:
        >>> step = {"losses": {"a": 1.0, "b": 2.0}, "cosines": [[1.0, -0.5], [-0.5, 1.0]]}
        >>> cosine_statistics([[step] * 3])["last"]["mean"]
        -0.5
    """
    statistics: dict[str, Any] = {}
    for third in THIRDS:
        pairs: dict[str, list[float]] = {}
        for trace in traces:
            length = -(-len(trace) // 3)
            for pair, cosine in _cosines(trace[:length] if third == "first" else trace[-length:]):
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


def _cosines(trace: Trace) -> Iterator[tuple[str, float]]:
    for step in trace:
        if step["cosines"] is not None:
            for (i, one), (j, other) in combinations(enumerate(step["losses"]), 2):
                yield f"{one}, {other}", step["cosines"][i][j]


# ------------------------------------------------------------------------------------------------------ certain studies


def loss_trends(arm: ArmResult) -> tuple[Any, Table]:
    """How the training losses of pairs of tasks move together, step by step."""
    trends: dict[str, dict[str, float]] = {}
    for method in arm.experiment.methods:
        by_pair: dict[str, list[float]] = {}
        for run in arm.runs(method):
            moves = pd.DataFrame([point["losses"] for point in run["trace"]], dtype=float).diff()
            correlations = moves.corr(min_periods=3)
            for a, b in combinations(correlations, 2):
                if np.isfinite(correlations[a][b]):
                    by_pair.setdefault(f"{a}, {b}", []).append(correlations[a][b])
        trends[method] = {pair: float(np.mean(values)) for pair, values in by_pair.items()}
    pairs = sorted({pair for entry in trends.values() for pair in entry})
    note = (
        "Pearson correlation of the changes of two tasks' training losses between traced steps (about 60 a run, on different "
        "batches, whose difficulty is common to all tasks and part of the correlation), mean over seeds."
    )
    columns = {pair: [number(entry.get(pair)) for entry in trends.values()] for pair in pairs}
    return trends, _by_method("Correlation of loss trends, arm {}", arm, columns, note)


def _last_records(arm: ArmResult, method: str, key: str) -> list[Any]:
    """What each seed's run recorded under a key last, if it did."""
    records = [[step["records"][key] for step in run["trace"] if key in step["records"]] for run in arm.runs(method)]
    return [values[-1] for values in records if values]


def priority_shares(arm: ArmResult) -> tuple[Any, None]:
    """Who leads how many channels at the end, by seed; the report draws it over time."""
    shares = {method: _last_records(arm, method, "priority_shares") for method in arm.experiment.methods}
    return {method: entry for method, entry in shares.items() if entry}, None


def tasks(arm: ArmResult) -> tuple[Any, Table]:
    """Each task's metric relative to the reference method, and conflicts per step."""
    versus, (shown, more) = arm.summary["versus"], _tasks(arm)
    numbers: dict[str, Any] = {}
    for method in arm.experiment.methods:
        conflicts = [epoch["num_conflicts"] for run in arm.runs(method) for epoch in run["history"]]
        known = [value for value in conflicts if value is not None]
        changes = {task: entry["change"] for task, entry in versus["methods"][method]["tasks"].items()}
        numbers[method] = {"changes": changes, "conflicts_per_step": sum(known) / len(known) if known else None}
    columns = {task: [figure(entry["changes"][task]) for entry in numbers.values()] for task in shown}
    columns["conflicts/step"] = [number(entry["conflicts_per_step"]) for entry in numbers.values()]
    reference = versus["reference"]
    note = f"Change of each task's test metric relative to {reference} in %, more is better, paired by seed.{more}"
    return {"reference": reference, "methods": numbers}, _by_method("Tasks, arm {}", arm, columns, note)


def groupings(arm: ArmResult) -> tuple[Any, Table]:
    """Which groups form, how many, and affinities against their noise; the report draws them over time."""
    found = {}
    for method in arm.experiment.methods:
        traces = [[step["records"] for step in run["trace"] if "groups" in step["records"]] for run in arm.runs(method)]
        if not all(traces):
            continue
        affinities = [np.array([record["affinity"] for record in trace], dtype=float) for trace in traces]
        floors = [list(r["noise_floor"].values()) for trace in traces for r in trace if "noise_floor" in r]
        found[method] = {
            "num_groups": float(np.mean([np.mean([len(record["groups"]) for record in trace]) for trace in traces])),
            "last_groups": [trace[-1]["groups"] for trace in traces],
            "affinity": np.mean([matrix[-1] for matrix in affinities], axis=0),
            "spread": float(np.mean([matrix[len(matrix) // 2 :].std(axis=0).mean() for matrix in affinities])),
            "noise_floor": float(np.abs(np.array(floors, dtype=float)).mean()) if floors else None,
        }
    rows = []
    for method, entry in found.items():
        own = np.eye(len(entry["affinity"]), dtype=bool)
        cells = [
            entry["affinity"][own].mean(),
            entry["affinity"][~own].mean() if len(own) > 1 else 0.0,
            entry["spread"],
        ]
        ends = "; ".join(" ".join("+".join(group) for group in groups) for groups in entry["last_groups"])
        floor = "-" if entry["noise_floor"] is None else f"{entry['noise_floor']:.1e}"
        rows.append([method, number(entry["num_groups"]), ends, *(f"{cell:.1e}" for cell in cells), floor])
    header = [
        "method",
        "groups (mean)",
        "groups at the end, by seed",
        "own affinity",
        "others'",
        "its std",
        "noise floor",
    ]
    note = (
        "Affinity: the moving average at the end, mean over tasks and seeds; its std: over the second half of a run, mean "
        "over entries. Noise floor: mean absolute affinity of a step that changes nothing (of single batches, not averaged)."
    )
    return found, Table(f"Groups, arm {arm.arm.name}", header, rows, [note])


def families(arm: ArmResult) -> tuple[Any, Table]:
    """What becomes of tasks that are copies of one another (``left``, ``left_1``, ``left_2``)."""
    by_family: dict[str, list[str]] = {}
    for task in arm.problem.task_names:
        by_family.setdefault(task.partition("_")[0], []).append(task)
    names = by_family.values()
    numbers: dict[str, dict[str, float | None]] = {}
    for method in arm.experiment.methods:
        shares = _last_records(arm, method, "priority_shares")
        together = [
            any(one in group and other in group for group in groups)
            for groups in _last_records(arm, method, "groups")
            for one, *copies in names
            for other in copies
        ]
        spreads = [np.std([share.get(task, 0.0) for task in family]) for share in shares for family in names]
        by_task = [[share.get(task, 0.0) for share in shares] for task in arm.problem.task_names]
        numbers[method] = {
            "copies_share_std": float(np.mean(spreads)) if shares else None,
            "share_over_seeds_std": float(np.std(by_task, axis=1, ddof=1).mean()) if len(shares) > 1 else None,
            "copies_together": float(np.mean(together)) if together else None,
        }
    columns = {
        "share: std, copies": [number(numbers[m]["copies_share_std"], digits=3) for m in numbers],
        "share: std, seeds": [number(numbers[m]["share_over_seeds_std"], digits=3) for m in numbers],
        "copies together": [number(numbers[m]["copies_together"]) for m in numbers],
    }
    note = (
        "Share: of channels led at the end, its standard deviation over the copies of one task, and over seeds. Copies "
        "together: how often a copy is in its original's group at the end."
    )
    return numbers, _by_method("Copies of tasks, arm {}", arm, columns, note)


def costs(arm: ArmResult) -> tuple[Any, Table]:
    """What a batch costs."""
    numbers = {method: arm.summary["methods"][method]["cost"] for method in arm.experiment.methods}
    base = numbers.get("gd", {}).get("seconds_per_batch")
    columns = {
        "ms per batch": [number(1000 * numbers[m]["seconds_per_batch"], digits=1) for m in numbers],
        "times gd": [number(base and numbers[m]["seconds_per_batch"] / base) for m in numbers],
        "MB": [number((numbers[m]["peak_memory_bytes"] or 0) / 1e6 or None, digits=0) for m in numbers],
    }
    note = "Means over a short run on a machine that may do other things: compare within a column. `torchmto bench` is exact."
    return numbers, _by_method("Costs, arm {}", arm, columns, note)


STUDIES: dict[str, dict[str, Look]] = {
    "comparison": {},
    "phases": {"loss_trends": loss_trends, "priority_shares": priority_shares},
    "priorities": {"tasks": tasks},
    "groups": {"groupings": groupings},
    "many_tasks": {"copies": families},
    "cost": {"costs": costs},
    "oracle": {"oracle": oracle},
}
"""What a recipe's ``study`` looks at besides comparing methods: the numbers' name and the look."""
WHOLE: dict[str, dict[str, Callable[[Mapping[str, ArmResult]], tuple[Any, Table]]]] = {
    "oracle": {"stability": stability}
}
"""The same, of all arms together."""
