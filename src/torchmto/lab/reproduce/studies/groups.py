"""Selective task groups: which groups form, how their number moves, and affinities against their noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    """Compare groupings, and look at the groups."""
    arms, complete = run_arms(context)
    findings = Findings(complete=complete)
    add_comparison(findings, arms)
    findings.numbers["groupings"] = {}
    for name, arm in arms.items():
        groupings = {method: entry for method in arm.experiment.methods if (entry := _grouping(arm, method))}
        if groupings:
            findings.numbers["groupings"][name] = groupings
            findings.tables.append(_table(name, groupings))
            findings.figures[f"groups-{name}"] = _figure(groupings)
    return findings


def _grouping(arm: ArmResult, method: str) -> dict[str, Any] | None:
    """The averaged grouping, the number of groups over time, and affinities, of a method that records groups."""
    runs = arm.runs(method)
    if not runs or "groups" not in runs[0]["trace"][-1]["records"]:
        return None
    tasks = list(runs[0]["history"][0]["losses"])
    together, counts, last_groups, affinities, floors = [], [], [], [], []
    for run in runs:
        records = [(point["step"], point["records"]) for point in run["trace"]]
        together.append(np.mean([_together(tasks, record["groups"]) for _, record in records], axis=0))
        counts.append([len(record["groups"]) for _, record in records])
        last_groups.append(records[-1][1]["groups"])
        affinities.append(np.array([record["affinity"] for _, record in records], dtype=float))
        floors += [list(record["noise_floor"].values()) for _, record in records if "noise_floor" in record]
    length = min(map(len, counts))
    second_half = [matrix[len(matrix) // 2 :] for matrix in affinities]
    return {
        "tasks": tasks,
        "together": np.mean(together, axis=0),
        "steps": [point["step"] for point in runs[0]["trace"]][:length],
        "num_groups": np.mean([count[:length] for count in counts], axis=0),
        "last_groups": last_groups,
        "affinity": np.mean([matrix[-1] for matrix in affinities], axis=0),
        "affinity_over_time": np.mean([matrix[:length] for matrix in affinities], axis=0),
        "affinity_std_second_half": float(np.mean([matrix.std(axis=0).mean() for matrix in second_half])),
        "noise_floor": float(np.abs(np.array(floors, dtype=float)).mean()) if floors else None,
    }


def _together(tasks: Sequence[str], groups: Sequence[Sequence[str]]) -> np.ndarray[Any, Any]:
    group_of = {task: number for number, group in enumerate(groups) for task in group}
    labels = np.array([group_of[task] for task in tasks])
    together: np.ndarray[Any, Any] = (labels[:, None] == labels[None, :]).astype(float)
    return together


def _table(name: str, groupings: Mapping[str, Mapping[str, Any]]) -> Table:
    rows = []
    for method, entry in groupings.items():
        own = np.diagonal(entry["affinity"])
        others = entry["affinity"][~np.eye(len(own), dtype=bool)]
        rows.append(
            [
                method,
                number(float(np.mean(entry["num_groups"]))),
                "; ".join(" ".join("+".join(group) for group in groups) for groups in entry["last_groups"]),
                f"{own.mean():.1e}",
                f"{others.mean() if others.size else 0:.1e}",
                f"{entry['affinity_std_second_half']:.1e}",
                "-" if entry["noise_floor"] is None else f"{entry['noise_floor']:.1e}",
            ]
        )
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
    return Table(f"Groups, arm {name}", header, rows, [note])


def _figure(groupings: Mapping[str, Mapping[str, Any]]) -> Figure:
    from matplotlib.figure import Figure  # noqa: PLC0415  without pyplot no display is needed

    figure = Figure(figsize=(2.9 * len(groupings) + 1, 5.2), layout="constrained")
    axes = figure.subplots(2, len(groupings), squeeze=False)
    for (top, bottom), (method, entry) in zip(axes.T, groupings.items(), strict=True):
        top.imshow(entry["together"], vmin=0, vmax=1, cmap="Blues")
        top.set_xticks(range(len(entry["tasks"])), entry["tasks"], rotation=45, ha="right", fontsize=6)
        top.set_yticks(range(len(entry["tasks"])), entry["tasks"], fontsize=6)
        top.set_title(method.removeprefix("task_groups"), fontsize=6)
        bottom.plot(entry["steps"], entry["num_groups"])
        bottom.set(xlabel="step", ylim=(0, len(entry["tasks"]) + 0.5))
        bottom.grid(alpha=0.3)
    axes[0][0].set_ylabel("share of time in one group")
    axes[1][0].set_ylabel("number of groups")
    return figure
