"""wPCGrad: what a task gains from priority, and what the others lose."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torchmto.lab.metrics import primary_metric
from torchmto.lab.reproduce.arms import ArmResult, run_arms
from torchmto.lab.reproduce.findings import Findings, Table, number
from torchmto.lab.reproduce.statistics import paired
from torchmto.lab.reproduce.studies.comparison import add_comparison, test_values
from torchmto.lab.reproduce.studies.context import Context
from torchmto.lab.specs import parse_method
from torchmto.lab.training import chosen_tasks

__all__ = ["run"]


def run(context: Context) -> Findings:
    """Compare priorities, and follow each task through them."""
    arms, complete = run_arms(context)
    findings = Findings(complete=complete)
    add_comparison(findings, arms)
    findings.numbers["tasks"] = {name: _tasks(arm) for name, arm in arms.items()}
    findings.tables += [_table(name, entry) for name, entry in findings.numbers["tasks"].items()]
    return findings


def _tasks(arm: ArmResult) -> dict[str, Any]:
    """Each task's metric relative to the reference method, in % and so that more is better; conflicts per step."""
    reference = arm.arm.reference if arm.arm.reference in arm.experiment.methods else arm.experiment.methods[0]
    base = test_values(arm, reference)
    rows: dict[str, Any] = {}
    for method in arm.experiment.methods:
        values = test_values(arm, method)
        changes = {}
        for task in chosen_tasks(arm.bundle, arm.experiment.run.tasks):
            sign = 1 if primary_metric(task)[1] else -1
            relative = [100 * sign * (v - b) / abs(b) for v, b in zip(values[task.name], base[task.name], strict=True)]
            changes[task.name] = vars(paired(relative, [0.0] * len(relative)))
        conflicts = [epoch["num_conflicts"] for run in arm.runs(method) for epoch in run["history"]]
        known = [value for value in conflicts if value is not None]
        priority = parse_method(method).hyperparameters.get("priority")
        rows[method] = {
            "changes": changes,
            "conflicts_per_step": sum(known) / len(known) if known else None,
            "priority": dict(priority) if isinstance(priority, Mapping) else priority,
        }
    return {"reference": reference, "methods": rows}


def _table(name: str, entry: Mapping[str, Any]) -> Table:
    tasks = list(next(iter(entry["methods"].values()))["changes"])
    shown = tasks[:12]
    rows = [
        [
            method,
            *(number(row["changes"][task]["mean"], row["changes"][task]["ci95"]) for task in shown),
            number(row["conflicts_per_step"]),
        ]
        for method, row in entry["methods"].items()
    ]
    note = (
        f"Change of each task's test metric relative to {entry['reference']} in %, more is better, paired by seed."
        + (f" The first {len(shown)} of {len(tasks)} tasks." if len(shown) < len(tasks) else "")
    )
    return Table(f"Tasks, arm {name}", ["method", *shown, "conflicts/step"], rows, [note])
