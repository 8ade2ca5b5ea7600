"""Folders as `torchmto compare` and `torchmto train` leave them, made up in milliseconds."""

import base64
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from torchmto.lab.atomic import write_json
from torchmto.lab.grid.versus import versus

METHODS = ("gd", "pcgrad", "connection_strength", "task_groups")
TASKS = ("left", "right", "offset")


def _metric(task: str, tasks: Sequence[str]) -> str:
    return "rmse" if task == tasks[-1] else "accuracy"


def comparison(
    folder: Path,
    *,
    methods: Sequence[str] = METHODS,
    tasks: Sequence[str] = TASKS,
    seeds: int = 2,
    points: int = 6,
    made: dict[str, str] | None = None,
) -> dict[str, Any]:
    """A finished comparison, of today's runs if ``made`` says where; returns its results.json."""
    draw = random.Random(0)
    (folder / "runs").mkdir(parents=True)
    cost = {"num_forward": 1.0, "num_backward": 3.0, "num_optimizer_steps": 1.0, "peak_memory_bytes": None}

    def figures() -> dict[str, Any]:
        return {
            t: {_metric(t, tasks): {"mean": draw.random(), "std": 0.01}, "extra": {"mean": draw.random(), "std": 0.0}}
            for t in tasks
        }

    def costs() -> dict[str, Any]:
        return {**cost, "seconds_per_batch": draw.random()}

    results = {
        "schema_version": 1,
        "tasks": {
            t: {
                "kind": "any",
                "primary_metric": _metric(t, tasks),
                "metrics": {
                    _metric(t, tasks): {"higher_is_better": t != tasks[-1]},
                    "extra": {"higher_is_better": True},
                },
            }
            for t in tasks
        },
        "methods": {
            name: {
                "delta_m": {
                    "mean": draw.uniform(-30, 30),
                    "ci95": draw.random(),
                    "per_seed": [draw.random() for _ in range(seeds)],
                },
                "tasks": figures(),
                "cost": costs(),
                "selected_epochs": [1] * seeds,
            }
            for name in methods
        },
        "single_task": {"tasks": figures(), "cost": costs()},
        "versions": {"torchmto": "0.1.0", "python": "3.11"},
        "config": {
            "methods": list(methods),
            "seeds": seeds,
            "data": "digits",
            "model": "convnet",
            "epochs": 2,
            "batch_size": 8,
        },
    }
    # One method without an average change, as where a single-task value is 0.
    results["methods"][methods[-1]] |= {"delta_m": None, "reason": "`offset` is 0 for the single-task model."}
    results["config"] |= {"data_options": {}, "data_seed": 0}
    write_json(folder / "config.json", "torchmto compare", 1, results["config"])
    by_method: dict[str, list[Any]] = {name: [] for name in methods}
    for seed in range(seeds):
        for number, name in enumerate([*methods, *tasks]):
            single = number >= len(methods)
            here = [name] if single else list(tasks)
            trace = [_point(name, step + 1, tasks, draw) for step in range(points)]
            history = _history(
                here, tasks, draw, points=points, steps=number + 1, conflicts=not single and name != "gd"
            )
            config = {"method": "gd" if single else name, "seed": seed, "tasks": here if single else []}
            test = {t: {_metric(t, tasks): draw.random(), "extra": 0.5} for t in here}
            result = {"history": history, "trace": [] if single else trace, "test": test, "cost": cost}
            if made is not None:
                result |= {"made": made, "seconds": 30.0}
            if not single:
                by_method[name].append(result)
            content = {"results_version": 2, "config": config, "result": result}
            write_json(folder / "runs" / f"run{number}-seed{seed}.json", "torchmto compare run", 1, content)
    results["versus"] = versus(
        by_method,
        {name: entry["delta_m"] and entry["delta_m"]["per_seed"] for name, entry in results["methods"].items()},
        {t: (_metric(t, tasks), t != tasks[-1]) for t in tasks},
    )
    (folder / "results.json").write_text(json.dumps(results))
    return results


def _history(
    here: Sequence[str], tasks: Sequence[str], draw: random.Random, *, points: int, steps: int, conflicts: bool
) -> list[dict[str, Any]]:
    return [
        {
            "epoch": epoch,
            "losses": {t: draw.random() for t in here},
            "num_conflicts": draw.random() if conflicts else None,
            "validation": {t: {_metric(t, tasks): draw.random(), "extra": 0.5} for t in here},
            "score": draw.uniform(-20, 20),
            "batches": points * (epoch + 1) // 2,
            "optimizer_steps": steps * points * (epoch + 1) // 2,
            "seconds": draw.random() + epoch,
        }
        for epoch in range(2)
    ]


def _point(name: str, step: int, tasks: Sequence[str], draw: random.Random) -> dict[str, Any]:
    shares = {t: 1 / len(tasks) for t in tasks}
    records: dict[str, Any] = {}
    point = {"step": step, "losses": dict.fromkeys(tasks, 1.0), "weights": None, "num_conflicts": None, "cosines": None}
    if name.startswith("pcgrad"):
        point["cosines"] = [[draw.uniform(-1, 1) for _ in tasks] for _ in tasks]
        point["weights"] = {t: draw.random() for t in tasks}
    if name.startswith("connection_strength"):
        records = {
            "phase": 1,
            "priority_shares": shares,
            "layer_priority_shares": {"trunk.0": shares, "trunk.1": shares},
        }
    if name.startswith("task_groups"):
        affinity = [[draw.uniform(-1, 1) for _ in tasks] for _ in tasks]
        groups = [[tasks[0], *tasks[2:]], [tasks[1]]] if step > 2 else [[t] for t in tasks]
        records = {"groups": groups, "affinity": affinity, "noise_floor": dict.fromkeys(tasks, 0.4)}
    return {**point, "records": records}


def training(
    folder: Path,
    *,
    method: str = "pcgrad",
    tasks: Sequence[str] = TASKS,
    value: float = 0.5,
    seed: int = 0,
    **files: str,
) -> dict[str, Any]:
    """A finished training run, whose settings know of ``files``; returns its results.json."""
    folder.mkdir(parents=True)
    measured = {t: {_metric(t, TASKS): value} for t in tasks}
    draw = random.Random(0)
    results = {
        "version": 2,
        "measure": "mean validation score",
        "score": 0.4,
        "best_step": 20,
        "primary": {t: _metric(t, TASKS) for t in tasks},
        "higher_is_better": {t: {_metric(t, TASKS): t != TASKS[-1]} for t in tasks},
        "validation": measured,
        "test": measured,
        "cost": {"num_forward": 1.0, "num_backward": 3.0, "num_optimizer_steps": 1.0, "seconds_per_batch": 0.1},
        "seconds": 2.5,
        "versions": {"torch": "2.6"},
        "made": {"date": "2026-03-04T05:06:07+00:00", "machine": "Linux x86_64, 2 cores", "revision": None},
        "history": _history(tasks, TASKS, draw, points=20, steps=1, conflicts=True),
        "trace": [_point(method, step, tasks, draw) for step in (1, 10, 20)],
    }
    (folder / "results.json").write_text(json.dumps(results))
    settings = {"data": {"name": "digits", "options": {}, "split_seed": 0}, "method": {"name": method}, "seed": seed}
    settings |= files
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    return results


PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="


def experiment(folder: Path, *, text: str = "a finding") -> dict[str, Any]:
    """A finished experiment with one comparison; returns its results.json."""
    comparison(folder / "arms" / "first", methods=METHODS[:2])
    results = {
        "schema_version": 1,
        "experiment": folder.name,
        "study": "comparison",
        "complete": False,
        "seeds": 2,
        "notes": ["**Smoke run**: 2 seeds."],
        "numbers": {},
        "tables": [{"title": text, "header": ["method", text], "rows": [[text, "1.0"]], "notes": [text]}],
        "versions": {"torchmto": "0.1.0"},
    }
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "plots").mkdir()
    (folder / "plots" / "dot.png").write_bytes(base64.b64decode(PIXEL))
    (folder / "plots" / "dot.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg"/>')
    (folder / "plots" / "other.png").write_text("<svg onload=alert(1)>")
    return results
