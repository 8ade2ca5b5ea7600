"""Twenty tasks and more: growth of costs, and what happens to tasks that are copies of one another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from torchmto.lab.metrics import primary_metric
from torchmto.lab.reproduce.findings import FEW_SEEDS, Findings, Table, number
from torchmto.lab.reproduce.recipe import method_settings
from torchmto.lab.reproduce.studies.context import Context
from torchmto.lab.reproduce.studies.copies import with_copies
from torchmto.lab.reproduce.units import complete, run_units
from torchmto.lab.run.build import problem_of
from torchmto.lab.run.config import RunConfig
from torchmto.lab.run.loop import Trainer
from torchmto.lab.statistics import confidence95

__all__ = ["run"]


def run(context: Context) -> Findings:
    """Train with copies of the tasks, exact and noisy."""
    options = {"num_tasks": [3, 20, 40], "noise": [0.0, 0.3], **context.recipe.options}
    units: dict[str, dict[str, Any]] = {}
    for arm in context.recipe.arms:
        base = context.recipe.run_config(arm, context.data_root)
        for seed in range(context.seeds):
            for tasks in options["num_tasks"]:
                for noise in options["noise"] if tasks > min(options["num_tasks"]) else [0.0]:
                    for method in arm.methods:
                        units[f"{method} K={tasks} noise={noise} seed={seed}"] = {
                            "config": method_settings(base, method, seed=seed),
                            "method": method,
                            "num_tasks": tasks,
                            "noise": noise,
                        }
    results = run_units(context.folder / "units", units, _train, budget=context.budget, say=context.say)
    findings = Findings(complete=complete(units, results))
    if context.seeds < FEW_SEEDS:
        findings.notes.append(f"**Smoke run**: {context.seeds} seeds.")
    by_setting: dict[tuple[str, int, float], list[Mapping[str, Any]]] = {}
    for name, result in results.items():
        unit = units[name]
        by_setting.setdefault((unit["method"], unit["num_tasks"], unit["noise"]), []).append(result)
    rows = []
    for (method, tasks, noise), runs in by_setting.items():
        times = [run["cost"]["seconds_per_batch"] for run in runs]
        scores = [run["mean_score"] for run in runs]
        spreads = [run["copies_share_std"] for run in runs if run["copies_share_std"] is not None]
        together = [run["copies_together"] for run in runs if run["copies_together"] is not None]
        entry: dict[str, Any] = {
            "method": method,
            "num_tasks": tasks,
            "noise": noise,
            "seconds_per_batch": float(np.mean(times)),
            "score": {"mean": float(np.mean(scores)), "ci95": confidence95(scores)},
            "copies_share_std": float(np.mean(spreads)) if spreads else None,
            "copies_together": float(np.mean(together)) if together else None,
            "share_over_seeds_std": _over_seeds(runs),
        }
        findings.numbers.setdefault("settings", []).append(entry)
        rows.append(
            [
                method,
                str(tasks),
                str(noise),
                number(1000 * entry["seconds_per_batch"], digits=1),
                number(entry["score"]["mean"], entry["score"]["ci95"], digits=3),
                number(entry["copies_share_std"], digits=3),
                number(entry["share_over_seeds_std"], digits=3),
                number(entry["copies_together"]),
            ]
        )
    header = [
        "method",
        "tasks",
        "noise",
        "ms/batch",
        "score",
        "share: std, copies",
        "share: std, seeds",
        "copies together",
    ]
    note = (
        "Score: mean test score of the first tasks (accuracy, or minus the error). Share: of channels led at the end, its "
        "standard deviation over the copies of one task, and over seeds. Copies together: how often a copy is in its "
        "original's group at the end."
    )
    findings.tables.append(Table("Copies of tasks", header, rows, [note]))
    return findings


def _train(parameters: Mapping[str, Any]) -> dict[str, Any]:
    original, config = problem_of(RunConfig.from_dict(parameters["config"]))
    problem = with_copies(original, parameters["num_tasks"], noise=parameters["noise"])
    result = Trainer(config, problem).fit()
    scores = []
    for task in original.task_list:
        metric, higher = primary_metric(task)
        scores.append((1 if higher else -1) * result["test"][task.name][metric])
    records = result["trace"][-1]["records"]
    families = {
        task.name: [t.name for t in problem.task_list[i :: len(original.task_list)]]
        for i, task in enumerate(original.task_list)
    }
    shares = records.get("priority_shares")
    spread = together = None
    if shares is not None:
        spread = float(np.mean([np.std([shares.get(name, 0.0) for name in names]) for names in families.values()]))
    if "groups" in records:
        group_of = {name: number for number, group in enumerate(records["groups"]) for name in group}
        pairs = [group_of[name] == group_of[names[0]] for names in families.values() for name in names[1:]]
        together = float(np.mean(pairs)) if pairs else None
    return {
        "cost": result["cost"],
        "mean_score": float(np.mean(scores)),
        "shares": shares,
        "copies_share_std": spread,
        "copies_together": together,
        "test": result["test"],
        "seconds": result["seconds"],
    }


def _over_seeds(runs: list[Mapping[str, Any]]) -> float | None:
    shares = [run["shares"] for run in runs if run["shares"] is not None]
    if len(shares) < 2:
        return None
    return float(np.mean([np.std([entry.get(task, 0.0) for entry in shares], ddof=1) for task in shares[0]]))
