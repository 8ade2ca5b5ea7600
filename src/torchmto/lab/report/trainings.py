"""Folders of `torchmto train`: those on the same data and tasks share a table; single-task runs are their baselines."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchmto.checks import shown
from torchmto.lab.atomic import canonical, plain
from torchmto.lab.references import without_place
from torchmto.lab.report.base import ReportError, Study, provenance, study
from torchmto.lab.report.comparisons import shown_run
from torchmto.lab.run.folder import read_yaml
from torchmto.lab.run.loop import RUN_VERSION
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
        about: What the figures are of.
        result: What `torchmto.lab.run.loop.Trainer.fit` gave.
        settings: Its configuration and outcome.
    """

    name: str
    method: str
    seed: int
    data: str
    primary: Mapping[str, str]
    measured: Mapping[str, Metrics]
    about: str
    result: Mapping[str, Any]
    settings: Mapping[str, Any]

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
        data = _data_key(config["data"], config.get("free", {}), "test")
    elif "data_options" in config:  # version 1: flat settings
        flat = {"name": config["data"], "options": config["data_options"], "split_seed": config.get("data_seed", 0)}
        data = _data_key(flat, {}, "test")
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
    results = {
        "tasks": {
            task: {
                "primary_metric": metric,
                "metrics": {
                    name: {"higher_is_better": better}
                    for name, better in first.result["higher_is_better"][task].items()
                },
            }
            for task, metric in first.primary.items()
        },
        "methods": {
            label: {
                **_delta_m(training, known),
                "tasks": {
                    task: {metric: {"mean": value, "std": None} for metric, value in training.measured[task].items()}
                    for task in tasks
                },
                "cost": training.result["cost"],
            }
            for label, training in zip(labels, members, strict=True)
        },
        "single_task": {"tasks": {t: _mean_metrics(known[t]) for t in tasks}, "cost": {}} if complete else None,
        "versus": None,
        "versions": first.result["versions"],
    }
    drawn = [
        *((label, training, None) for label, training in zip(labels, members, strict=True)),
        *((f"single:{training.task}", training, training.task) for training in helpers),
    ]
    return study(
        title=first.name if len(members) == 1 else f"{len(members)} training runs",
        about=first.about,
        made=provenance([t.result["made"] for t in everyone], [t.result["seconds"] for t in everyone]),
        warnings=["One seed: nothing here is settled, whatever the differences look like."] if len(members) > 1 else [],
        notes=[
            f"The curves of {t.name} are missing: its results.json has none."
            for t in everyone
            if not t.result["history"]
        ],
        task_names=tasks,
        metric_names=[list(first.measured[task]) for task in tasks],
        method_names=labels,
        seeds=1,
        baseline=", ".join(sources) if complete else None,
        results=results,
        runs=[
            shown_run({"result": t.result, "method": label, "task": task, "seed": t.seed}, results)
            for label, t, task in drawn
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
    higher = {task: training.result["higher_is_better"][task][metric] for task, metric in training.primary.items()}
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
        ReportError: If it is of another version.
    """
    if (found := results["version"]) != RUN_VERSION:
        raise ReportError(
            f"{folder}/results.json has version {shown(found)}; this torchmto reads version {RUN_VERSION}."
        )
    config = plain(read_yaml(folder / "config.yaml"))
    split = "test" if results["test"] else "validation"
    return Training(
        name=folder.resolve().name,
        method=config["method"]["name"],
        seed=config["seed"],
        data=_data_key(config["data"], config, split),
        primary=results["primary"],
        measured=results[split],
        about=f"Data: {config['data']['name']}. Figures are of the {split} split, with the best weights.",
        result={"history": [], "trace": [], "versions": {}, "made": {}, **results},
        settings={**{key: results.get(key) for key in ("measure", "score", "best_step")}, **config},
    )


def _data_key(data: Mapping[str, Any], files: Mapping[str, Any], split: str) -> str:
    """What has to be equal for data to be the same: what they are called, wherever they are, and what their files hold."""
    name, options, seed = without_place(data["name"]), data.get("options") or {}, data.get("split_seed", 0)
    return canonical([name, options, seed, split, files.get("content"), files.get("source")])
