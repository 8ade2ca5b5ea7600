"""Folders of `torchmto train`: those on the same data and tasks share a table; single-task runs are their baselines."""

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np

from torchmto.lab.atomic import canonical, plain
from torchmto.lab.data.base import Kind, Task
from torchmto.lab.grid.noise import noise_floor
from torchmto.lab.metrics import higher_is_better, metric_names
from torchmto.lab.references import without_place
from torchmto.lab.report.base import ReportError, Study, provenance, study, traced_point
from torchmto.lab.run.folder import read_yaml
from torchmto.lab.statistics import std
from torchmto.metrics import delta_m

Metrics = Mapping[str, float | None]


@dataclass(frozen=True)
class Training:
    """A finished training run.

    Attributes:
        name: Its folder's.
        method: Its method's.
        seed: Its seed.
        data: What has to be equal for two runs to be comparable, as text.
        primary: Each task's primary metric.
        measured: Metrics by task, of the test split if there are any, else of the validation split.
        directions: Whether higher is better, by metric, where the run says it.
        about: What the figures are of.
        cost: Passes and seconds per batch.
        run: Its curves, as the page shows them.
        settings: Its configuration and outcome.
        versions: What it was made with.
        made: When and where, for each start.
        seconds: Its wall time.
    """

    name: str
    method: str
    seed: int
    data: str
    primary: Mapping[str, str]
    measured: Mapping[str, Metrics]
    directions: Mapping[str, bool]
    about: str
    cost: Mapping[str, float]
    run: Mapping[str, Any]
    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    made: Sequence[Mapping[str, Any]]
    seconds: float

    @property
    def is_single(self) -> bool:
        """Whether it trained one task alone."""
        return len(self.primary) == 1

    @property
    def task(self) -> str:
        """Its only task, or the first."""
        return next(iter(self.primary))


@dataclass(frozen=True)
class Baseline:
    """What a task reaches alone.

    Attributes:
        source: Where that comes from, in words.
        data: As a training run's.
        task: The task.
        seed: Of the run; None for a mean over seeds.
        metrics: Its metrics.
    """

    source: str
    data: str
    task: str
    seed: int | None
    metrics: Metrics


def comparison_baselines(folder: Path, results: Mapping[str, Any]) -> list[Baseline]:
    """The single-task values of a comparison, which also serve training runs on the same data."""
    config = results["config"]
    if not results.get("single_task"):
        return []
    if isinstance(config["data"], Mapping):
        own = config["data"]
        data = _data_key(own["name"], own["options"], own["split_seed"], "test")
    elif "data_options" in config:  # version 1: flat settings
        data = _data_key(config["data"], config["data_options"], config.get("data_seed", 0), "test")
    else:
        return []
    source = f"the comparison {folder.resolve().name}"
    return [
        Baseline(source, data, task, None, {metric: figure["mean"] for metric, figure in metrics.items()})
        for task, metrics in results["single_task"]["tasks"].items()
    ]


def training_studies(trainings: Sequence[Training], baselines: Sequence[Baseline]) -> list[Study]:
    """The studies of these runs.

    Args:
        trainings: All runs.
        baselines: Of comparisons; those of single-task runs come first.
    """
    several: dict[tuple[str, tuple[str, ...]], list[Training]] = {}
    for training in trainings:
        several.setdefault((training.data, tuple(training.primary)), []).append(training)
    singles = [training for training in trainings if training.is_single]
    own = [Baseline(f"the run {t.name}", t.data, t.task, t.seed, t.measured[t.task]) for t in singles]
    together = {(data, task) for data, tasks in several if len(tasks) > 1 for task in tasks}
    studies = []
    for (data, tasks), members in several.items():
        if len(tasks) > 1:
            known = {task: _baselines_of(task, data, members[0].primary[task], [own, baselines]) for task in tasks}
            helpers = [training for training in singles if training.data == data and training.task in tasks]
            studies.append(_study(members, helpers, known))
        elif (data, tasks[0]) not in together:
            studies.append(_study(members, [], {}))
    return studies


def _baselines_of(
    task: str, data: str, metric: str, sources: Sequence[Sequence[Baseline]]
) -> list[tuple[Baseline, float]]:
    """A task's baselines and their values, of the first source that has any."""
    for source in sources:
        found = [(b, b.metrics.get(metric)) for b in source if (b.task, b.data) == (task, data)]
        if known := [(baseline, value) for baseline, value in found if value is not None]:
            return known
    return []


def _study(
    members: Sequence[Training], helpers: Sequence[Training], known: Mapping[str, Sequence[tuple[Baseline, float]]]
) -> Study:
    first, everyone = members[0], [*members, *helpers]
    tasks = list(first.primary)
    labels: list[str] = []
    for training in members:
        label = training.method if training.method not in labels else f"{training.method} ({training.name})"
        while label in labels:
            label += "'"
        labels.append(label)
    sources = dict.fromkeys(baseline.source for values in known.values() for baseline, _ in values)
    complete = bool(known) and all(known.values())
    return study(
        title=first.name if len(members) == 1 else f"{len(members)} training runs",
        about=first.about,
        made=provenance([start for t in everyone for start in t.made], [t.seconds for t in everyone]),
        warnings=["One seed: nothing here is settled, whatever the differences look like."] if len(members) > 1 else [],
        task_names=tasks,
        metric_names=[list(first.measured[task]) for task in tasks],
        method_names=labels,
        seeds=1,
        history_unit="step",
        steps_estimated=True,
        baseline=", ".join(sources) if complete else None,
        results={
            "tasks": {
                task: {
                    "primary_metric": first.primary[task],
                    "metrics": {
                        metric: {"higher_is_better": _direction(metric, first.directions)}
                        for metric in first.measured[task]
                    },
                }
                for task in tasks
            },
            "methods": {
                label: {
                    **_delta_m(training, known),
                    "tasks": {
                        task: {
                            metric: {"mean": value, "std": None} for metric, value in training.measured[task].items()
                        }
                        for task in tasks
                    },
                    "cost": training.cost,
                }
                for label, training in zip(labels, members, strict=True)
            },
            "single_task": {"tasks": {t: _mean_metrics(known[t]) for t in tasks}, "cost": {}} if complete else None,
            "versus": None,
            "versions": first.versions,
        },
        runs=[
            *({**training.run, "method": label} for label, training in zip(labels, members, strict=True)),
            *({**training.run, "task": training.task} for training in helpers),
        ],
        settings=[[f"Run {training.name}", training.settings] for training in everyone],
    )


def _delta_m(training: Training, known: Mapping[str, Sequence[tuple[Baseline, float]]]) -> dict[str, Any]:
    """Δm to the baselines of the run's own seed where each task has one, else to their mean; or why there is none."""
    if training.is_single:
        return {"delta_m": None, "reason": "it is a single-task run itself"}
    missing = [task for task in training.primary if not known[task]]
    if missing:
        shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        return {"delta_m": None, "reason": f"no single-task run of {shown} on this data is among the folders"}
    same_seed = all(any(baseline.seed == training.seed for baseline, _ in values) for values in known.values())
    references = {}
    for task, found in known.items():
        numbers = [value for baseline, value in found if not same_seed or baseline.seed == training.seed]
        references[task] = sum(numbers) / len(numbers)
    measured = {task: training.measured[task][metric] for task, metric in training.primary.items()}
    values = {task: value for task, value in measured.items() if value is not None}
    if len(values) < len(measured):
        return {"delta_m": None, "reason": "a task has no finite figure"}
    for task, metric in training.primary.items():
        if references[task] == 0:
            return {"delta_m": None, "reason": f"{task}'s {metric} is 0 in its single-task run"}
    higher = {task: _direction(metric, training.directions) for task, metric in training.primary.items()}
    try:
        change = delta_m(values, references, higher)
    except ValueError as error:
        return {"delta_m": None, "reason": str(error)}
    return {"delta_m": {"mean": change, "ci95": None, "per_seed": [change]}}


def _mean_metrics(values: Sequence[tuple[Baseline, float]]) -> dict[str, Any]:
    """All metrics of a task's baselines, over their seeds."""
    figures: dict[str, Any] = {}
    for metric in values[0][0].metrics:
        numbers = [value for baseline, _ in values if (value := baseline.metrics.get(metric)) is not None]
        if len(numbers) == len(values):
            figures[metric] = {"mean": sum(numbers) / len(numbers), "std": std(numbers)}
    return figures


# ------------------------------------------------------------------------------------------------------ reading


def read_training(folder: Path, results: Mapping[str, Any]) -> Training:
    """A training run.

    Args:
        folder: Where it is.
        results: Its results.json.

    Raises:
        ReportError: If a metric is unknown.
    """
    config = plain(read_yaml(folder / "config.yaml"))
    cost = _cost(results)
    per_batch = {name: cost[name] for name in ("num_forward", "num_backward", "num_optimizer_steps")}
    starts = _read_list(folder / "environment.json")
    outcome = {key: results.get(key) for key in ("measure", "score", "best_step")}
    split = "test" if results["test"] else "validation"
    data = config["data"]
    return Training(
        name=folder.resolve().name,
        method=config["method"]["name"],
        seed=config["seed"],
        data=_data_key(data["name"], data.get("options") or {}, data.get("split_seed", 0), split),
        primary=results["primary"],
        measured=results["test"] or results["validation"],
        directions={m: higher for own in results.get("higher_is_better", {}).values() for m, higher in own.items()},
        about=f"Data: {data['name']}. Figures are of the {split} split, with the best weights.",
        cost={**per_batch, "seconds_per_batch": cost["seconds_per_batch"]},
        run=_run(folder, config["seed"], results["primary"], cost),
        settings={**outcome, **config},
        versions=starts[-1].get("versions", {}) if starts else {},
        made=[{"revision": start.get("git"), **start} for start in starts],
        seconds=results.get("seconds", cost["steps"] * cost["seconds_per_batch"]),
    )


def _cost(results: Mapping[str, Any]) -> dict[str, Any]:
    """A run's costs per batch, and its ``steps``."""
    cost = dict(results["cost"])
    if results["version"] == 1:  # passes of all steps together
        for name in ("num_forward", "num_backward", "num_optimizer_steps"):
            cost[name] /= cost["steps"]
        cost["seconds_per_batch"] = cost["seconds_per_step"]
    return cost


def _data_key(name: str, options: Mapping[str, Any], seed: int, split: str) -> str:
    return canonical([without_place(name), options, seed, split])


def _direction(metric: str, said: Mapping[str, bool]) -> bool:
    """Whether higher is better: older results don't say it, but no metric of the lab's kinds has both."""
    if metric in said:
        return said[metric]
    for kind in get_args(Kind):
        if metric in metric_names(kind):
            return higher_is_better(Task("any", kind, 1), metric)
    raise ReportError(f"No task has a metric `{metric}`.")


def _read_list(path: Path) -> list[Any]:
    if not path.is_file():
        return []
    content = plain(json.loads(path.read_text(encoding="utf-8")))
    return content if isinstance(content, list) else []


def _run(folder: Path, seed: int, primary: Mapping[str, str], cost: Mapping[str, Any]) -> dict[str, Any]:
    figures = _figures(folder / "metrics.csv")
    records = _records(folder / "records.jsonl")
    pairs = max(len(primary) * (len(primary) - 1) / 2, 1)
    history: list[dict[str, Any]] = []
    trace: list[dict[str, Any]] = []
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
            trace.append(traced_point(point, losses, found))
    counted = [
        (step, row["cost/num_optimizer_steps"]) for step, row in figures.items() if "cost/num_optimizer_steps" in row
    ]
    ends = [point["at"] for point in history]
    total = cost["num_optimizer_steps"] * cost["steps"]
    taken = _steps_until(ends, sorted(counted) or [(cost["steps"], 1)], total)
    for point, steps in zip(history, taken, strict=True):
        point |= {"optimizer_steps": steps, "seconds": point["at"] * cost["seconds_per_batch"]}
    floor = noise_floor(records.values())
    return {"method": "", "seed": seed, "task": None, "history": history, "trace": trace, "noise_floor": floor}


def _steps_until(batches: Sequence[int], per_batch: Sequence[tuple[int, float]], total: float) -> list[float]:
    """Optimizer steps taken up to some batches, where only some were looked at.

    A batch that wasn't looked at is taken to be like the next one that was, and the sum is scaled to what was counted.

    Args:
        batches: Up to which batches.
        per_batch: Numbers of batches, ascending, and how many steps were taken in them, up to a common factor.
        total: Optimizer steps of the whole run, which ends with the last of these batches.

    Returns:
        One number for each of ``batches``.

    Example:
        >>> _steps_until([2, 3, 4], [(2, 3), (4, 1)], 8)
        [6.0, 7.0, 8.0]
    """
    at = [0, *(batch for batch, _ in per_batch)]
    sums = np.concatenate([[0.0], np.cumsum(np.diff(at) * [steps for _, steps in per_batch])])
    found: list[float] = (np.interp(batches, at, sums) * total / sums[-1]).tolist()
    return found


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
