"""wPCGrad: what a task gains from priority, and what the others lose."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torchmto.lab.reproduce.arms import ArmResult, run_arms
from torchmto.lab.reproduce.findings import Findings, Table, number
from torchmto.lab.reproduce.studies.comparison import add_comparison, task_columns
from torchmto.lab.reproduce.studies.context import Context
from torchmto.lab.specs import parse_method

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
    versus = arm.summary["versus"]
    rows: dict[str, Any] = {}
    for method in arm.experiment.methods:
        conflicts = [epoch["num_conflicts"] for run in arm.runs(method) for epoch in run["history"]]
        known = [value for value in conflicts if value is not None]
        priority = parse_method(method).hyperparameters.get("priority")
        rows[method] = {
            "changes": {task: entry["change"] for task, entry in versus["methods"][method]["tasks"].items()},
            "conflicts_per_step": sum(known) / len(known) if known else None,
            "priority": dict(priority) if isinstance(priority, Mapping) else priority,
        }
    return {"reference": versus["reference"], "methods": rows}


def _table(name: str, entry: Mapping[str, Any]) -> Table:
    shown, more = task_columns(list(next(iter(entry["methods"].values()))["changes"]))
    rows = [
        [method, *(_change(row["changes"][task]) for task in shown), number(row["conflicts_per_step"])]
        for method, row in entry["methods"].items()
    ]
    note = f"Change of each task's test metric relative to {entry['reference']} in %, more is better, paired by seed.{more}"
    return Table(f"Tasks, arm {name}", ["method", *shown, "conflicts/step"], rows, [note])


def _change(change: Mapping[str, Any] | None) -> str:
    return number(None) if change is None else number(change["mean"], change["ci95"])
