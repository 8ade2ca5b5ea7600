"""Folders of `torchmto compare`."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torchmto.checks import shown
from torchmto.lab.atomic import BrokenFileError, read_json
from torchmto.lab.grid.folder import SCHEMA_VERSION, run_files, run_name
from torchmto.lab.grid.noise import noise_floor
from torchmto.lab.grid.tables import batches, caveats, selection
from torchmto.lab.grid.versus import UNITS
from torchmto.lab.report.base import ReportError, Study, provenance, study
from torchmto.lab.run.scores import is_delta_m
from torchmto.lab.versions import RESULTS_VERSION, results_version

Content = Mapping[str, Any]
"""Of a run's file, see `_read_run`."""
_RECORDS = ("phase", "priority_shares", "affinity", "groups")
"""What the page shows of a method's records, besides the shares by layer and the noise floor."""


def comparison_study(folder: Path, results: dict[str, Any]) -> Study:
    """What the page shows of a comparison.

    Args:
        folder: Where it is.
        results: Its results.json.

    Raises:
        ReportError: If a file is broken or of another version.
    """
    schema = results["schema_version"]
    if schema not in _READABLE:
        known = " and ".join(map(str, _READABLE))
        raise ReportError(f"{folder}/results.json has version {shown(schema)}; this torchmto reads versions {known}.")
    tasks, config = list(results["tasks"]), results["config"]
    for method in results["methods"].values():
        _check_method(method, tasks)
    contents = [_read_run(path, schema, name) for name, path in run_files(folder, results)]
    data, model, made_of = config["data"], config["model"], f"batches of {config.get('batch_size')}"
    if schema == SCHEMA_VERSION:
        data, model, made_of = data["name"], model["name"] or "its own", batches(results)
    about = f"Data: {data}; model: {model or 'the default of the data'}; {config['epochs']} epochs, {made_of}."
    return study(
        title=folder.resolve().name,
        about=f"{about} {selection(results)}",
        made=provenance(
            [content["result"].get("made") or {} for content in contents],
            [content["result"]["seconds"] for content in contents if "seconds" in content["result"]],
        ),
        notes=_notes(folder, results, contents),
        task_names=tasks,
        metric_names=[list(results["tasks"][task]["metrics"]) for task in tasks],
        method_names=list(results["methods"]),
        seeds=int(config["seeds"]),
        baseline="single-task models of the same seed" if results.get("single_task") else None,
        warnings=warnings(results),
        results=results,
        runs=[shown_run(content, results) for content in contents],
        settings=[["Configuration", config]],
    )


def _check_method(method: Mapping[str, Any], tasks: Sequence[str]) -> None:
    """Raise a KeyError or TypeError where the page would look in vain."""
    delta = method["delta_m"]
    if delta is not None:
        _ = delta["mean"] + 0.0, delta["ci95"], list(delta["per_seed"])
    _ = method["cost"]["num_forward"], [method["tasks"][task] for task in tasks]


def _read_run(path: Path, schema: int, name: str | None = None) -> Content:
    """A run's file: its ``result``, ``method`` (None for a baseline), ``task`` (None for others) and ``seed``."""
    try:
        content = read_json(path, "torchmto compare run", schema)
    except BrokenFileError as error:
        raise ReportError(str(error)) from error
    if (found := results_version(content)) != _READABLE[schema]:
        raise ReportError(
            f"{path} was made by code whose results mean something else (version {found!r}; this torchmto reads version "
            f"{_READABLE[schema]} of such a file)."
        )
    config = content["config"]
    if name is None and schema == SCHEMA_VERSION:
        name = run_name(config)
    elif name is None:  # flat settings
        (*more, task) = config["tasks"] or [""]
        name = f"single:{task}" if config["tasks"] and not more else config["method"]
    task = name.removeprefix("single:") if name.startswith("single:") else None
    return {"result": content["result"], "method": name, "task": task, "seed": config["seed"]}


_READABLE = {1: 2, SCHEMA_VERSION: RESULTS_VERSION}
"""Versions of files that a page can be made of, and what their results mean."""


def _notes(folder: Path, results: Mapping[str, Any], contents: Sequence[Content]) -> list[str]:
    notes = caveats(results)
    expected = len(results["methods"]) * int(results["config"]["seeds"])
    missing = expected - sum(content["task"] is None for content in contents)
    if missing > 0:
        notes.append(f"{missing} runs have no file in {folder.name}/runs; their curves are missing.")
    made_with = {content["result"].get("versions", {}).get("torchmto") for content in contents} - {None}
    if len(made_with) > 1:
        notes.append(
            f"The runs were made with different versions of torchmto: {', '.join(sorted(map(str, made_with)))}."
        )
    return notes


def warnings(results: Mapping[str, Any]) -> list[str]:
    """What a reader has to know before any figure: tasks that no method has learnt, and that nothing is settled."""
    methods, versus = results["methods"], results["versus"]
    found = []
    single = [results["single_task"]] if results.get("single_task") else []
    guessed = [task for task, about in results["tasks"].items() if _at_chance(task, about, methods.values())]
    nobody = [task for task in guessed if _at_chance(task, results["tasks"][task], single)]
    for tasks, why in (
        (nobody, "nobody has learnt anything there, and differences mean nothing"),
        (
            [task for task in guessed if task not in nobody],
            "the single-task models aren't, and differences between methods mean nothing there",
        ),
    ):
        which = "every task" if len(tasks) == len(results["tasks"]) else ", ".join(tasks)
        found += [f"Every method is at chance in {which}: {why}."] if tasks else []
    if versus is None or len(methods) < 2:
        return found
    seeds, reference = int(results["config"]["seeds"]), versus["reference"]
    every = [
        difference
        for entry in versus["methods"].values()
        for difference in (entry["delta_m"], *(task["change"] for task in entry["tasks"].values()))
        if difference
    ]
    if seeds == 1:
        found.append("One seed: nothing here is settled, whatever the differences look like.")
    elif not any(difference["p_holm"] is not None and difference["p_holm"] < 0.05 for difference in every):
        found.append(
            f"Nothing is settled: after correction no method differs significantly from {reference} over {seeds} seeds, "
            "neither in Δm nor in any task."
        )
    return found


def _at_chance(task: str, about: Mapping[str, Any], entries: Iterable[Mapping[str, Any]]) -> bool:
    """Whether in each entry a metric is what guessing gives: within a standard deviation between 2 and 10 % of what is left.

    A larger one comes from seeds that have learnt beside others that haven't, and nothing is known of one without a figure.
    """
    chances = {metric: entry["chance"] for metric, entry in about["metrics"].items() if entry.get("chance") is not None}
    metric = about["primary_metric"] if about["primary_metric"] in chances else next(iter(chances), None)
    if metric is None:
        return False
    chance = chances[metric]
    figures = [entry["tasks"][task][metric] for entry in entries]
    least, most = 0.02 * (1 - chance), 0.1 * (1 - chance)
    return all(f["mean"] is not None and f["mean"] <= chance + min(max(f["std"] or 0.0, least), most) for f in figures)


def shown_run(content: Content, results: Mapping[str, Any]) -> dict[str, Any]:
    """A run as the page shows it.

    Args:
        content: Its ``result``, as `torchmto.lab.run.loop.Trainer.fit` gives it, and as `_read_run` says.
        results: Of the study.
    """
    result, single = content["result"], content["task"] is not None
    scored = not single and is_delta_m(result)
    pairs = max(len(results["tasks"]) * (len(results["tasks"]) - 1) / 2, 1)
    history = [
        {
            "at": entry["epoch"] + 1,
            **{unit: entry[unit] for unit in UNITS},
            "losses": entry["losses"],
            "validation": _primary_only(entry["validation"], results["tasks"]),
            "score": entry["score"] if scored else None,
            "conflict_share": None if entry["num_conflicts"] is None else entry["num_conflicts"] / pairs,
        }
        for entry in result["history"]
    ]
    trace = [] if single else [_traced_point(point) for point in result["trace"]]
    return {
        "method": content["method"],
        "seed": content["seed"],
        "task": content["task"],
        "history": history,
        "trace": trace,
        "noise_floor": noise_floor(point["records"] for point in result["trace"]),
    }


def _traced_point(point: Mapping[str, Any]) -> dict[str, Any]:
    """A single step as the page shows it."""
    records, kept = point["records"], {"step": point["step"]}
    if point.get("cosines") is not None:
        kept["names"] = list(point["losses"])
    kept |= {key: point[key] for key in ("weights", "cosines") if point.get(key) is not None}
    kept["records"] = {key: records[key] for key in _RECORDS if records.get(key) is not None}
    if layers := records.get("layer_priority_shares"):
        kept["layers"] = [[name, shares] for name, shares in layers.items()]
    return kept


def _primary_only(metrics: Mapping[str, Any], tasks: Mapping[str, Any]) -> dict[str, Any]:
    names = {task: tasks[task]["primary_metric"] for task in metrics}
    return {task: {names[task]: values.get(names[task])} for task, values in metrics.items()}
