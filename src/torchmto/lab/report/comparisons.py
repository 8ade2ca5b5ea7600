"""Folders of `torchmto compare`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torchmto.lab.atomic import BrokenFileError, read_json
from torchmto.lab.grid.folder import SCHEMA_VERSION
from torchmto.lab.grid.noise import noise_floor
from torchmto.lab.grid.pace import is_recorded, progress
from torchmto.lab.grid.versus import versus
from torchmto.lab.report.base import ReportError, Study, traced_point

__all__ = ["comparison_study"]

Content = Mapping[str, Any]
"""Of a run's file: ``config`` and ``result``."""


def comparison_study(folder: Path, results: dict[str, Any]) -> Study:
    """What the page shows of a comparison.

    Args:
        folder: Where it is.
        results: Its results.json.

    Raises:
        ReportError: If a file is broken or of another version.
    """
    if results["schema_version"] != SCHEMA_VERSION:
        found = results["schema_version"]
        raise ReportError(f"{folder}/results.json has version {found!r}; this torchmto reads version {SCHEMA_VERSION}.")
    tasks, config = list(results["tasks"]), results["config"]
    for method in results["methods"].values():
        _check_method(method, tasks)
    contents = [_read_run(path) for path in sorted((folder / "runs").glob("*.json"))]
    model = config["model"] or "the default of the data"
    about = f"Data: {config['data']}; model: {model}; {config['epochs']} epochs, batches of {config['batch_size']}."
    return {
        "title": folder.resolve().name,
        "about": f"{about} Figures are of the test split, at the epoch that the validation split chose.",
        "notes": _notes(folder, results, contents),
        "task_names": tasks,
        "metric_names": [list(results["tasks"][task]["metrics"]) for task in tasks],
        "method_names": list(results["methods"]),
        "seeds": int(config["seeds"]),
        "history_unit": "epoch",
        "steps_estimated": not all(is_recorded(content["result"]["history"]) for content in contents),
        "baseline": "single-task models of the same seed",
        "results": {**results, "versus": results.get("versus") or _versus(results, contents)},
        "runs": [_run(content, results) for content in contents],
        "settings": [["Configuration", config]],
    }


def _check_method(method: Mapping[str, Any], tasks: Sequence[str]) -> None:
    """Raise a KeyError or TypeError where the page would look in vain."""
    delta = method["delta_m"]
    if delta is not None:
        _ = delta["mean"] + 0.0, delta["ci95"], list(delta["per_seed"])
    _ = method["cost"]["num_forward"], [method["tasks"][task] for task in tasks]


def _read_run(path: Path) -> Content:
    try:
        return read_json(path, "torchmto compare run", SCHEMA_VERSION)
    except BrokenFileError as error:
        raise ReportError(str(error)) from error


def _is_single(content: Content) -> bool:
    return len(content["config"]["tasks"]) == 1


def _notes(folder: Path, results: Mapping[str, Any], contents: Sequence[Content]) -> list[str]:
    notes = []
    expected = len(results["methods"]) * int(results["config"]["seeds"])
    missing = expected - sum(not _is_single(content) for content in contents)
    if missing > 0:
        notes.append(f"{missing} runs have no file in {folder.name}/runs; their curves are missing.")
    made_with = {content["result"].get("versions", {}).get("torchmto") for content in contents} - {None}
    if len(made_with) > 1:
        notes.append(
            f"The runs were made with different versions of torchmto: {', '.join(sorted(map(str, made_with)))}."
        )
    return notes


def _versus(results: Mapping[str, Any], contents: Sequence[Content]) -> dict[str, Any] | None:
    """Methods against gd, for folders whose results.json has none; None where runs are missing."""
    seeds = int(results["config"]["seeds"])
    by_run = {(c["config"]["method"], c["config"]["seed"]): c["result"] for c in contents if not _is_single(c)}
    if not all((name, seed) in by_run for name in results["methods"] for seed in range(seeds)):
        return None
    return versus(
        {name: [by_run[name, seed] for seed in range(seeds)] for name in results["methods"]},
        {name: entry["delta_m"] and entry["delta_m"]["per_seed"] for name, entry in results["methods"].items()},
        {
            task: (about["primary_metric"], about["metrics"][about["primary_metric"]]["higher_is_better"])
            for task, about in results["tasks"].items()
        },
    )


def _run(content: Content, results: Mapping[str, Any]) -> dict[str, Any]:
    config, result = content["config"], content["result"]
    pairs = max(len(results["tasks"]) * (len(results["tasks"]) - 1) / 2, 1)
    history = [
        {
            "at": entry["epoch"] + 1,
            **here,
            "losses": entry["losses"],
            "validation": _primary_only(entry["validation"], results["tasks"]),
            "score": None if _is_single(content) else entry["score"],
            "conflict_share": None if entry["num_conflicts"] is None else entry["num_conflicts"] / pairs,
        }
        for entry, here in zip(result["history"], progress(result), strict=True)
    ]
    single = _is_single(content)
    trace = [] if single else [traced_point(point, point["losses"], point["records"]) for point in result["trace"]]
    return {
        "method": config["method"],
        "seed": config["seed"],
        "task": config["tasks"][0] if single else None,
        "history": history,
        "trace": trace,
        "noise_floor": noise_floor(point["records"] for point in result["trace"]),
    }


def _primary_only(metrics: Mapping[str, Any], tasks: Mapping[str, Any]) -> dict[str, Any]:
    names = {task: tasks[task]["primary_metric"] for task in metrics}
    return {task: {names[task]: values.get(names[task])} for task, values in metrics.items()}
