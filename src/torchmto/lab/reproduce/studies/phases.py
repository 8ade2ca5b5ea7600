"""The phases of connection strength: what each contributes, how losses move together, who leads the channels."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np

from torchmto.lab.reproduce.arms import ArmResult, run_arms
from torchmto.lab.reproduce.findings import Findings, Table, number
from torchmto.lab.reproduce.studies.comparison import add_comparison
from torchmto.lab.reproduce.studies.context import Context

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["run"]


def run(context: Context) -> Findings:
    """Compare the phases, and look at loss trends and priority shares."""
    arms, complete = run_arms(context)
    findings = Findings(complete=complete)
    add_comparison(findings, arms)
    findings.numbers["loss_trends"] = {name: _trends(arm) for name, arm in arms.items()}
    for name, arm in arms.items():
        findings.tables.append(_trend_table(name, findings.numbers["loss_trends"][name]))
        shares = _shares(arm)
        if shares:
            findings.numbers.setdefault("priority_shares", {})[name] = shares
            findings.figures[f"priority_shares-{name}"] = _shares_figure(shares)
    return findings


def _trends(arm: ArmResult) -> dict[str, Any]:
    """Correlation of the steps' changes of pairs of training losses, by method."""
    trends: dict[str, Any] = {}
    for method in arm.experiment.methods:
        by_pair: dict[str, list[float]] = {}
        for run in arm.runs(method):
            losses = {
                task: np.diff([point["losses"].get(task, np.nan) for point in run["trace"]])
                for task in run["history"][0]["losses"]
            }
            for a, b in combinations(losses, 2):
                known = np.isfinite(losses[a]) & np.isfinite(losses[b])
                if known.sum() > 2 and np.ptp(losses[a][known]) > 0 and np.ptp(losses[b][known]) > 0:
                    correlation = float(np.corrcoef(losses[a][known], losses[b][known])[0, 1])
                    by_pair.setdefault(f"{a}, {b}", []).append(correlation)
        trends[method] = {pair: float(np.mean(values)) for pair, values in by_pair.items()}
    return trends


def _trend_table(name: str, trends: Mapping[str, Mapping[str, float]]) -> Table:
    pairs = sorted({pair for entry in trends.values() for pair in entry})
    rows = [[method, *(number(entry.get(pair)) for pair in pairs)] for method, entry in trends.items()]
    note = (
        "Pearson correlation of the changes of two tasks' training losses between traced steps (about 60 a run, on different "
        "batches, whose difficulty is common to all tasks and part of the correlation), mean over seeds."
    )
    return Table(f"Correlation of loss trends, arm {name}", ["method", *pairs], rows, [note])


def _shares(arm: ArmResult) -> dict[str, Any]:
    """Who leads how many channels over the run, for every method that records it: mean over seeds."""
    shares: dict[str, Any] = {}
    for method in arm.experiment.methods:
        runs = [
            [
                (point["step"], point["records"]["priority_shares"])
                for point in run["trace"]
                if "priority_shares" in point["records"]
            ]
            for run in arm.runs(method)
        ]
        if not runs or not runs[0]:
            continue
        length = min(map(len, runs))
        tasks = list(runs[0][0][1])
        shares[method] = {
            "steps": [step for step, _ in runs[0][:length]],
            "tasks": {task: np.mean([[r[i][1][task] for i in range(length)] for r in runs], axis=0) for task in tasks},
            "last_by_seed": {task: [r[length - 1][1][task] for r in runs] for task in tasks},
        }
    return shares


def _shares_figure(shares: Mapping[str, Any]) -> Figure:
    from matplotlib.figure import Figure  # noqa: PLC0415  without pyplot no display is needed

    columns = min(3, len(shares))
    rows = -(-len(shares) // columns)
    figure = Figure(figsize=(3.4 * columns + 0.6, 2.6 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharey=True).flatten()
    for axis, (method, entry) in zip(axes, shares.items(), strict=False):
        for task, values in entry["tasks"].items():
            axis.plot(entry["steps"], values, label=task)
        axis.set_title(method.removeprefix("connection_strength"), fontsize=7)
        axis.set(ylim=(0, 1), xlabel="step")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("share of channels led")
    axes[0].legend(fontsize="x-small")
    return figure
