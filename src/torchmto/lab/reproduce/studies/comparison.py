"""Methods side by side in each arm: Δm with intervals, paired differences, wins, ranks; and arms against one another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from torchmto.lab.grid.tuning import edges
from torchmto.lab.reproduce.arms import ArmResult, run_arms
from torchmto.lab.reproduce.findings import FEW_SEEDS, Findings, Table, number
from torchmto.lab.reproduce.recipe import Recipe
from torchmto.lab.reproduce.studies.context import Context
from torchmto.lab.reproduce.studies.cosines import add_cosines
from torchmto.lab.run.config import config_of
from torchmto.lab.statistics import holm, paired

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["add_comparison", "per_seed", "run", "task_columns"]

MANY = 12
"""Tables with a column per task show so many of them."""


def run(context: Context) -> Findings:
    """Run the arms and compare the methods in each."""
    arms, complete = run_arms(context)
    findings = Findings(complete=complete)
    add_comparison(findings, arms)
    if context.recipe.tune:
        findings.tables += [_settings_table(name, arm, context.recipe) for name, arm in arms.items()]
    return findings


def add_comparison(findings: Findings, arms: Mapping[str, ArmResult]) -> None:
    """Add the tables that every comparison has."""
    seeds = min((arm.experiment.seeds for arm in arms.values()), default=0)
    if arms and seeds < FEW_SEEDS:
        findings.notes.append(
            f"**Smoke run**: {seeds} seed{'s' if seeds > 1 else ''}. It shows that everything works and roughly what comes "
            "out; differences whose interval includes 0 decide nothing."
        )
    findings.numbers["arms"] = {name: _arm_numbers(arm) for name, arm in arms.items()}
    for name, arm in arms.items():
        findings.tables.append(_arm_table(name, arm, findings.numbers["arms"][name]))
        if (
            len({entry["cost"]["num_optimizer_steps"] for entry in findings.numbers["arms"][name]["methods"].values()})
            > 1
        ):
            findings.tables.append(_budget_table(name, findings.numbers["arms"][name]["budgets"]))
        findings.tables.append(_losses_table(name, findings.numbers["arms"][name]["methods"]))
        findings.figures[f"delta_m-{name}"] = _forest(name, arm, findings.numbers["arms"][name])
    add_cosines(findings, arms)
    across = _across(arms)
    if across:
        findings.numbers["across_arms"] = across
        findings.tables.append(_across_table(across))


def per_seed(arm: ArmResult, method: str) -> list[float] | None:
    """Δm of a method's runs, by seed; None where it isn't defined."""
    delta = arm.summary["methods"][method]["delta_m"]
    return None if delta is None else list(delta["per_seed"])


def last_losses(arm: ArmResult, method: str) -> dict[str, float]:
    """Each task's training loss of the last epoch, averaged over seeds."""
    ends = [run["history"][-1]["losses"] for run in arm.runs(method)]
    return {
        task: float(np.mean([end[task] for end in ends if task in end]))
        for task in dict.fromkeys(t for e in ends for t in e)
    }


def _arm_numbers(arm: ArmResult) -> dict[str, Any]:
    versus = arm.summary["versus"]
    reference, ranks = versus["reference"], versus["ranks"]["tasks"]
    numbers: dict[str, Any] = {"reference": reference, "seeds": arm.experiment.seeds, "methods": {}}
    for method in arm.experiment.methods:
        losses = last_losses(arm, method)
        entry: dict[str, Any] = {
            "delta_m": arm.summary["methods"][method]["delta_m"],
            "cost": arm.summary["methods"][method]["cost"],
            "last_train_loss": float(np.mean(list(losses.values()))),
            "last_train_losses": losses,
            "settings": dict(arm.experiment.chosen.get(method, {})),
            "average_rank": None if ranks is None else ranks["average"][method],
        }
        against = versus["methods"][method]
        if against["delta_m"] is not None:
            entry["difference"] = against["delta_m"]
        if method != reference:
            entry["wins_ties_losses"] = against["wins_ties_losses"]
        numbers["methods"][method] = entry
    numbers["critical_difference"] = None if ranks is None else ranks["critical_difference"]
    numbers["ranks"], numbers["budgets"] = versus["ranks"], versus["budgets"]
    return numbers


def _arm_table(name: str, arm: ArmResult, numbers: Mapping[str, Any]) -> Table:
    reference = numbers["reference"]
    rows = []
    for method, entry in numbers["methods"].items():
        delta, difference = entry["delta_m"], entry.get("difference")
        rows.append(
            [
                method,
                number(None) if delta is None else number(delta["mean"], delta["ci95"]),
                number(None) if difference is None else number(difference["mean"], difference["ci95"]),
                number(None if difference is None else difference["p_holm"], digits=4),
                "/".join(map(str, entry["wins_ties_losses"])) if "wins_ties_losses" in entry else "-",
                number(entry["average_rank"]),
                number(entry["last_train_loss"], digits=4),
                number(entry["cost"]["num_optimizer_steps"]),
                number(1000 * entry["cost"]["seconds_per_batch"], digits=1),
            ]
        )
    run = config_of(arm.arm.method_run, arm.experiment.run)
    tuned = any({"learning_rate", "lr", "optimizer"} & set(entry) for entry in arm.experiment.chosen.values())
    optimizer = "each at its chosen settings" if tuned else f"{run.optimizer.name} {run.optimizer.lr:g}"
    settings = (
        f"{arm.problem.name}, {run.model.name or 'its own model'}, {run.epochs} epochs of batches of "
        f"{run.data.batch_size}, {optimizer}, seeds 0 to {arm.experiment.seeds - 1}."
    )
    critical = ""
    if numbers["critical_difference"] is not None:
        difference = number(numbers["critical_difference"])
        critical = f", which aren't independent (a difference of {difference} would be significant if they were)"
    notes = [
        f"{arm.arm.about} {settings}".strip(),
        (
            f"Δm to single-task models of the same seed and optimizer; differences to {reference} paired by seed, p "
            f"corrected by Holm; wins/ties/losses count tasks and seeds; ranks over tasks and seeds{critical}; "
            "± is the 95 % interval."
        ),
    ]
    header = [
        "method",
        "Δm %",
        f"Δm minus {reference}",
        "p",
        "w/t/l",
        "rank",
        "last train loss",
        "steps/batch",
        "ms/batch",
    ]
    return Table(f"Arm {name}", header, rows, notes)


def task_columns(tasks: Sequence[str]) -> tuple[Sequence[str], str]:
    """The tasks that a table has columns for, and what its note says of the others.

    Example:
        >>> task_columns(["a", "b"])
        (['a', 'b'], '')
    """
    return tasks[:MANY], f" The first {MANY} of {len(tasks)} tasks." if len(tasks) > MANY else ""


def _losses_table(name: str, methods: Mapping[str, Any]) -> Table:
    shown, more = task_columns(list(next(iter(methods.values()))["last_train_losses"]))
    rows = [
        [who, *(number(entry["last_train_losses"].get(task), digits=4) for task in shown)]
        for who, entry in methods.items()
    ]
    note = f"Each task's training loss of the last epoch, as the model meets it while it learns; mean over seeds.{more}"
    return Table(f"Training losses, arm {name}", ["method", *shown], rows, [note])


def _budget_table(name: str, budgets: Mapping[str, Any]) -> Table:
    methods = list(budgets["batches"]["methods"])
    cells = [[within["methods"][method] for within in budgets.values()] for method in methods]
    rows = [
        [method, *(number(None) if entry is None else number(entry["mean"], entry["ci95"]) for entry in row)]
        for method, row in zip(methods, cells, strict=True)
    ]
    header = ["method", *(f"{within['limit']:.4g} {unit.replace('_', ' ')}" for unit, within in budgets.items())]
    note = (
        "Best validation Δm within as many batches, optimizer steps and seconds of training as the thriftiest method took, "
        "mean over seeds; ± 95 % interval; -: not one epoch. The learning rate falls over the whole run and isn't adapted to "
        "the smaller budget."
    )
    return Table(f"Equal budgets, arm {name}", header, rows, [note])


def _settings_table(name: str, arm: ArmResult, recipe: Recipe) -> Table:
    """What tuning chose, and where the choice is at the edge of what was on offer: a better one may lie beyond."""
    rows = [
        [
            who,
            ", ".join(f"{key} {value}" for key, value in settings.items()),
            ", ".join(edges(settings, recipe.tune)) or "-",
        ]
        for who, settings in arm.experiment.chosen.items()
    ]
    shorter = "".join(f", with {key} {value}" for key, value in recipe.tune_run.items())
    note = f"Chosen among {len(recipe.tune)} settings by validation on seed 0{shorter}. Edge: the largest or smallest on offer."
    failed = f"Failed while tuning, and so not chosen: {'; '.join(arm.failed)}."
    return Table(
        f"Chosen settings, arm {name}", ["run", "settings", "edge"], rows, [note, failed] if arm.failed else [note]
    )


def _across(arms: Mapping[str, ArmResult]) -> list[dict[str, Any]]:
    """The same method in two arms of the same data: paired differences to the first arm that has it."""
    rows: list[dict[str, Any]] = []
    first: dict[tuple[str, str | None], str] = {}
    for name, arm in arms.items():
        for method in arm.experiment.methods:
            key = method, arm.experiment.run.data.name
            if key not in first:
                first[key] = name
                continue
            before, after = per_seed(arms[first[key]], method), per_seed(arm, method)
            if before is not None and after is not None:
                pairs = min(len(before), len(after))
                difference = paired(after[:pairs], before[:pairs])
                rows.append({"method": method, "arm": name, "minus": first[key], **vars(difference)})
    corrected = holm({str(place): row["p"] for place, row in enumerate(rows)})
    return [{**row, "p_holm": corrected[str(place)]} for place, row in enumerate(rows)]


def _across_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    cells = [
        [
            r["method"],
            r["arm"],
            r["minus"],
            number(r["mean"], r["ci95"]),
            number(r["p_holm"], digits=4),
            str(r["pairs"]),
        ]
        for r in rows
    ]
    note = "Differences of Δm, paired by seed, each arm relative to its own single-task models; p corrected by Holm."
    return Table("The same method in different arms", ["method", "arm", "minus arm", "Δm", "p", "seeds"], cells, [note])


def _forest(name: str, arm: ArmResult, numbers: Mapping[str, Any]) -> Figure:
    from matplotlib.figure import Figure  # noqa: PLC0415  without pyplot no display is needed

    methods = list(numbers["methods"])
    figure = Figure(figsize=(9, 1.2 + 0.35 * len(methods)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for place, method in enumerate(methods):
        entry = numbers["methods"][method]
        if entry["delta_m"] is not None:
            left.errorbar(
                entry["delta_m"]["mean"], place, xerr=entry["delta_m"]["ci95"] or 0.0, fmt="o", color="C0", capsize=3
            )
            left.plot(entry["delta_m"]["per_seed"], [place] * arm.experiment.seeds, ".", color="C1", markersize=4)
        if entry["average_rank"] is not None:
            right.plot(entry["average_rank"], place, "s", color="C2")
    left.axvline(0, color="black", linewidth=0.8)
    left.set_yticks(range(len(methods)), [m if len(m) < 44 else m[:41] + "..." for m in methods], fontsize=7)
    left.invert_yaxis()
    left.set(xlabel="Δm % (mean, 95 % interval, seeds)", title=name)
    right.set(xlabel="average rank over tasks and seeds")
    for axis in (left, right):
        axis.grid(alpha=0.3)
    return figure
