"""Reading run folders into what the page shows.

A *study* is one comparison, or several training runs on the same data and tasks: ``title``, ``about``, ``notes``,
``task_names``, ``metric_names`` (per task), ``method_names``, ``seeds``, ``history_unit``, ``results`` (as in a
comparison's results.json), ``runs`` and ``settings`` (pairs of heading and mapping). A run has ``method``, ``seed``,
``task`` (of a single-task run, else None), ``history`` (one entry per validation) and ``trace`` (single steps).

Lists of names come beside the mappings because JavaScript sorts keys that look like numbers.
"""

import csv
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml

from torchmto.lab.atomic import BrokenFileError, plain, read_json
from torchmto.lab.compare.folder import SCHEMA_VERSION
from torchmto.lab.data.base import Kind, Task
from torchmto.lab.metrics import higher_is_better

__all__ = ["ReportError", "Study", "read_studies"]

Study = dict[str, Any]
_RECORDS = ("phase", "priority_shares", "affinity", "noise_floor", "groups")
"""What the page shows of a method's records, besides the shares by layer."""


class ReportError(ValueError):
    """A folder that no report can be made of."""


def read_studies(folders: Sequence[Path]) -> list[Study]:
    """The studies in these folders; training runs that can be compared become one.

    Args:
        folders: Folders of ``torchmto compare`` or ``torchmto train``.

    Raises:
        ReportError: If a folder isn't a finished one of these, or one of its files is broken.
    """
    studies: list[Study] = []
    trainings: dict[str, Study] = {}
    for folder in folders:
        results = _read_results(folder)
        try:
            if "methods" in results:
                studies.append(_comparison(folder, results))
                continue
            study = _training(folder, results)
        except (AttributeError, KeyError, TypeError, IndexError, ValueError) as error:
            if isinstance(error, ReportError):
                raise
            raise ReportError(f"{folder} doesn't hold what it should: {type(error).__name__} {error}.") from error
        key = json.dumps([study.pop("data"), study["task_names"]], sort_keys=True)
        if key in trainings:
            _merge(trainings[key], study, folder)
        else:
            trainings[key] = study
            studies.append(study)
    return studies


def _read_results(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise ReportError(f"There is no folder {folder}.")
    path = folder / "results.json"
    if not path.is_file():
        unfinished = any((folder / name).exists() for name in ("config.json", "config.yaml"))
        hint = (
            "it isn't finished; the command that made it goes on with it" if unfinished else "it isn't a run's folder"
        )
        raise ReportError(f"{folder} has no results.json: {hint}.")
    try:
        results = plain(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, RecursionError) as error:
        raise ReportError(f"{path} is broken: it isn't JSON ({error}).") from error
    if not isinstance(results, dict) or not (
        {"methods", "tasks"} <= set(results) or {"primary", "cost"} <= set(results)
    ):
        raise ReportError(f"{path} holds neither a comparison nor a training run.")
    return results


# ---------------------------------------------------------------------------------------------------- comparisons


def _comparison(folder: Path, results: dict[str, Any]) -> Study:
    if results["schema_version"] != SCHEMA_VERSION:
        found = results["schema_version"]
        raise ReportError(f"{folder}/results.json has version {found!r}; this torchmto reads version {SCHEMA_VERSION}.")
    tasks, config = list(results["tasks"]), results["config"]
    for method in results["methods"].values():
        _check_method(method, tasks)
    runs = [_comparison_run(path, results) for path in sorted((folder / "runs").glob("*.json"))]
    seeds = int(config["seeds"])
    missing = len(results["methods"]) * seeds - sum(run["task"] is None for run in runs)
    about = f"Data: {config['data']}; model: {config['model']}; {config['epochs']} epochs, batches of {config['batch_size']}."
    return {
        "title": folder.resolve().name,
        "about": f"{about} Figures are of the test split, at the epoch that the validation split chose.",
        "notes": [f"{missing} runs have no file in {folder.name}/runs; their curves are missing."]
        if missing > 0
        else [],
        "task_names": tasks,
        "metric_names": [list(results["tasks"][task]["metrics"]) for task in tasks],
        "method_names": list(results["methods"]),
        "seeds": seeds,
        "history_unit": "epoch",
        "results": results,
        "runs": runs,
        "settings": [["Configuration", config]],
    }


def _check_method(method: Mapping[str, Any], tasks: Sequence[str]) -> None:
    """Raise a KeyError or TypeError where the page would look in vain."""
    delta = method["delta_m"]
    if delta is not None:
        _ = delta["mean"] + 0.0, delta["ci95"], list(delta["per_seed"])
    _ = method["cost"]["num_forward"], [method["tasks"][task] for task in tasks]


def _comparison_run(path: Path, results: Mapping[str, Any]) -> dict[str, Any]:
    try:
        content = read_json(path, "torchmto compare run", SCHEMA_VERSION)
    except BrokenFileError as error:
        raise ReportError(str(error)) from error
    config, result = content["config"], content["result"]
    task = config["tasks"][0] if len(config["tasks"]) == 1 else None
    pairs = max(len(results["tasks"]) * (len(results["tasks"]) - 1) / 2, 1)
    history = [
        {
            "at": entry["epoch"] + 1,
            "losses": entry["losses"],
            "validation": _primary_only(entry["validation"], results["tasks"]),
            "conflict_share": None if entry["num_conflicts"] is None else entry["num_conflicts"] / pairs,
        }
        for entry in result["history"]
    ]
    trace = [] if task is not None else [_point(point, point["losses"], point["records"]) for point in result["trace"]]
    return {"method": config["method"], "seed": config["seed"], "task": task, "history": history, "trace": trace}


def _primary_only(metrics: Mapping[str, Any], tasks: Mapping[str, Any]) -> dict[str, Any]:
    names = {task: tasks[task]["primary_metric"] for task in metrics}
    return {task: {names[task]: values.get(names[task])} for task, values in metrics.items()}


def _point(point: Mapping[str, Any], names: Any, records: Mapping[str, Any]) -> dict[str, Any]:
    kept: dict[str, Any] = {"step": point["step"]}
    if point.get("cosines") is not None:
        kept["names"] = list(names)
    kept |= {key: point[key] for key in ("weights", "cosines", "mean_cosine") if point.get(key) is not None}
    kept["records"] = {key: records[key] for key in _RECORDS if records.get(key) is not None}
    if layers := records.get("layer_priority_shares"):
        kept["layers"] = [[name, shares] for name, shares in layers.items()]
    return kept


# -------------------------------------------------------------------------------------------------- training runs


def _training(folder: Path, results: dict[str, Any]) -> Study:
    with (folder / "config.yaml").open(encoding="utf-8") as file:
        config = plain(yaml.safe_load(file))
    tasks = list(results["primary"])
    measured = results["test"] or results["validation"]
    cost = results["cost"]
    per_batch = {name: cost[name] / cost["steps"] for name in ("num_forward", "num_backward", "num_optimizer_steps")}
    name = config["method"]["name"]
    method = {
        "delta_m": None,
        "reason": "a single run has no single-task runs to compare with",
        "tasks": {
            task: {metric: {"mean": value, "std": None} for metric, value in measured[task].items()} for task in tasks
        },
        "cost": {**per_batch, "seconds_per_batch": cost["seconds_per_step"]},
    }
    starts = _read_list(folder / "environment.json")
    outcome = {key: results.get(key) for key in ("measure", "score", "best_step")}
    split = "test" if results["test"] else "validation"
    return {
        "data": {key: config["data"].get(key) for key in ("name", "options", "split_seed")} | {"split": split},
        "title": folder.resolve().name,
        "about": f"Data: {config['data']['name']}. Figures are of the {split} split, with the best weights.",
        "notes": [],
        "task_names": tasks,
        "metric_names": [list(measured[task]) for task in tasks],
        "method_names": [name],
        "seeds": 1,
        "history_unit": "step",
        "results": {
            "tasks": {
                task: {
                    "primary_metric": results["primary"][task],
                    "metrics": {metric: {"higher_is_better": _direction(metric)} for metric in measured[task]},
                }
                for task in tasks
            },
            "methods": {name: method},
            "single_task": None,
            "versions": starts[-1].get("versions", {}) if starts else {},
        },
        "runs": [_training_run(folder, name, config["seed"], results["primary"])],
        "settings": [[f"Run {folder.resolve().name}", {**outcome, **config}]],
    }


def _direction(metric: str) -> bool:
    """Whether higher is better: a training run's results don't say the kinds of its tasks, but no metric has both."""
    for kind in get_args(Kind):
        try:
            return higher_is_better(Task("any", kind, 1), metric)
        except KeyError:
            continue
    raise ReportError(f"No task has a metric `{metric}`.")


def _read_list(path: Path) -> list[Any]:
    if not path.is_file():
        return []
    content = plain(json.loads(path.read_text(encoding="utf-8")))
    return content if isinstance(content, list) else []


def _training_run(folder: Path, method: str, seed: int, primary: Mapping[str, str]) -> dict[str, Any]:
    figures = _figures(folder / "metrics.csv")
    records = _records(folder / "records.jsonl")
    pairs = max(len(primary) * (len(primary) - 1) / 2, 1)
    history, trace = [], []
    for step in sorted({*figures, *records}):
        row = figures.get(step, {})
        validation = {
            task: {metric: row[key]}
            for task, metric in primary.items()
            if (key := f"validation/{task}/{metric}") in row
        }
        losses = _by_task(row, "loss", primary)
        conflicts = row.get("conflicts/pairs")
        if validation or losses:
            share = None if conflicts is None else conflicts / pairs
            history.append({"at": step, "losses": losses, "validation": validation or None, "conflict_share": share})
        shares = _by_task(row, "priority_shares", primary)
        found = {**({"priority_shares": shares} if shares else {}), **records.get(step, {})}
        weights = _by_task(row, "weight", primary)
        point = {"step": step, "weights": weights or None, "mean_cosine": row.get("conflicts/mean_cosine")}
        if found or weights or point["mean_cosine"] is not None:
            trace.append(_point(point, losses, found))
    return {"method": method, "seed": seed, "task": None, "history": history, "trace": trace}


def _by_task(row: Mapping[str, float], prefix: str, tasks: Mapping[str, str]) -> dict[str, float]:
    return {task: row[key] for task in tasks if (key := f"{prefix}/{task}") in row}


def _figures(path: Path) -> dict[int, dict[str, float]]:
    """The table as step -> name -> value; lines that a killed run left half written are passed over."""
    figures: dict[int, dict[str, float]] = {}
    if not path.is_file():
        return figures
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.reader(file):
            if len(row) == 3 and row[0].isdecimal():
                try:
                    value = float(row[2])
                except ValueError:
                    continue
                if math.isfinite(value):
                    figures.setdefault(int(row[0]), {})[row[1]] = value
    return figures


def _records(path: Path) -> dict[int, dict[str, Any]]:
    records: dict[int, dict[str, Any]] = {}
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                entry = plain(json.loads(line))
                records[int(entry.pop("step"))] = entry
            except (ValueError, KeyError, TypeError, AttributeError):
                continue
    return records


def _merge(study: Study, other: Study, folder: Path) -> None:
    """Add one more training run to a study."""
    (name,) = other["method_names"]
    label = f"{name} ({folder.resolve().name})"
    while label in study["method_names"]:
        label += "'"
    if name not in study["method_names"]:
        label = name
    study["method_names"].append(label)
    study["results"]["methods"][label] = other["results"]["methods"][name]
    study["runs"] += [{**run, "method": label} for run in other["runs"]]
    study["settings"] += other["settings"]
    study["title"] = f"{len(study['method_names'])} training runs"
