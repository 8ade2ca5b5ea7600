"""Folders of `torchmto train`: those on the same data and tasks share a table; single-task runs are their baselines."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchmto.checks import shown
from torchmto.lab.atomic import canonical, plain
from torchmto.lab.references import without_place
from torchmto.lab.report.base import ReportError, Study, provenance, shown_run, study
from torchmto.lab.run.folder import read_yaml
from torchmto.lab.run.loop import RUN_VERSION
from torchmto.lab.statistics import std
from torchmto.metrics import delta_m

COSTS = ("num_forward", "num_backward", "num_optimizer_steps", "seconds_per_batch")
Metrics = Mapping[str, float | None]


@dataclass(frozen=True)
class Training:
    """A finished training run.

    Attributes:
        name: Its folder's.
        config: Its settings.
        results: Its results.json.
        split: The test split if it has figures, else the validation split.
        data: What has to be equal for two runs to be comparable, as text.
    """

    name: str
    config: Mapping[str, Any]
    results: Mapping[str, Any]
    split: str
    data: str

    @property
    def method(self) -> str:
        """Its method's name."""
        return str(self.config["method"]["name"])

    @property
    def primary(self) -> Mapping[str, str]:
        """Each task's primary metric."""
        return dict(self.results["primary"])

    @property
    def measured(self) -> Mapping[str, Metrics]:
        """Metrics by task."""
        return dict(self.results[self.split])

    @property
    def higher(self) -> Mapping[str, bool]:
        """Whether a higher primary metric is better."""
        return {task: self.results["higher_is_better"][task][metric] for task, metric in self.primary.items()}

    @property
    def is_single(self) -> bool:
        """Whether it trained one task alone."""
        return len(self.primary) == 1

    @property
    def task(self) -> str:
        """Its only task, or the first."""
        return next(iter(self.primary))

    def shown(self, label: str, primary: Mapping[str, str], task: str | None = None) -> dict[str, Any]:
        """Its curves. Scores aren't drawn: only with a `baseline` they would be a Δm."""
        run = shown_run(self.results, primary, method=label, seed=self.config["seed"], task=task)
        return {**run, "history": [{**entry, "score": None} for entry in run["history"]]}


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
    own = results["config"]["data"]
    if not results.get("single_task"):
        return []
    data = _data_key(own["name"], own["options"], own["split_seed"], "test")
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
    own = [Baseline(f"the run {t.name}", t.data, t.task, t.config["seed"], t.measured[t.task]) for t in singles]
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
        about=f"Data: {first.config['data']['name']}. Figures are of the {first.split} split, with the best weights.",
        made=provenance([t.results["made"] for t in everyone], [t.results["seconds"] for t in everyone]),
        warnings=["One seed: nothing here is settled, whatever the differences look like."] if len(members) > 1 else [],
        task_names=tasks,
        metric_names=[list(first.measured[task]) for task in tasks],
        method_names=labels,
        seeds=1,
        alone=True,
        baseline=", ".join(sources) if complete else None,
        results={
            "tasks": {
                task: {
                    "primary_metric": first.primary[task],
                    "metrics": {
                        metric: {"higher_is_better": first.results["higher_is_better"][task][metric]}
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
                    "cost": {name: training.results["cost"][name] for name in COSTS},
                }
                for label, training in zip(labels, members, strict=True)
            },
            "single_task": {"tasks": {t: _mean_metrics(known[t]) for t in tasks}, "cost": {}} if complete else None,
            "versus": None,
            "versions": first.results["versions"],
        },
        runs=[
            *(training.shown(label, first.primary) for label, training in zip(labels, members, strict=True)),
            *(training.shown("", first.primary, training.task) for training in helpers),
        ],
        settings=[
            [f"Run {t.name}", {**{key: t.results[key] for key in ("measure", "score", "best_step")}, **t.config}]
            for t in everyone
        ],
    )


def _delta_m(training: Training, known: Mapping[str, Sequence[tuple[Baseline, float]]]) -> dict[str, Any]:
    """Δm to the baselines of the run's own seed where each task has one, else to their mean; or why there is none."""
    if training.is_single:
        return {"delta_m": None, "reason": "it is a single-task run itself"}
    missing = [task for task in training.primary if not known[task]]
    if missing:
        shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        return {"delta_m": None, "reason": f"no single-task run of {shown} on this data is among the folders"}
    seed = training.config["seed"]
    same_seed = all(any(baseline.seed == seed for baseline, _ in values) for values in known.values())
    references = {}
    for task, found in known.items():
        numbers = [value for baseline, value in found if not same_seed or baseline.seed == seed]
        references[task] = sum(numbers) / len(numbers)
    measured = {task: training.measured[task][metric] for task, metric in training.primary.items()}
    values = {task: value for task, value in measured.items() if value is not None}
    if len(values) < len(measured):
        return {"delta_m": None, "reason": "a task has no finite figure"}
    try:
        change = delta_m(values, references, training.higher)
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
    if (found := results.get("version")) != RUN_VERSION:
        raise ReportError(
            f"{folder}/results.json has version {shown(found)}; this torchmto reads version {RUN_VERSION}."
        )
    config = plain(read_yaml(folder / "config.yaml"))
    split, data = "test" if results["test"] else "validation", config["data"]
    return Training(
        folder.resolve().name,
        config,
        results,
        split,
        _data_key(data["name"], data["options"], data["split_seed"], split),
    )


def _data_key(name: str, options: Mapping[str, Any], seed: int, split: str) -> str:
    return canonical([without_place(name), options, seed, split])
