"""From finished runs to the figures of a comparison: means over seeds, Δm with its confidence interval, costs."""

from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

from torchmto.lab.data.base import Task
from torchmto.lab.grid.experiment import Experiment
from torchmto.lab.grid.folder import SCHEMA_VERSION
from torchmto.lab.grid.identity import run_key
from torchmto.lab.grid.versus import versus
from torchmto.lab.metrics import chance_level, higher_is_better, primary_metric
from torchmto.lab.problem import Problem
from torchmto.lab.run.evaluation import primary_values
from torchmto.lab.run.scores import is_finite, tells_apart
from torchmto.lab.statistics import confidence95, std
from torchmto.lab.versions import versions
from torchmto.metrics import delta_m

Result = Mapping[str, Any]
_PASSES = ("num_forward", "num_backward", "num_optimizer_steps")


def summarize(
    experiment: Experiment, problem: Problem, results: Mapping[str, Result], reference: str = "gd"
) -> dict[str, Any]:
    """What goes into results.json.

    Δm compares each run with the single-task runs of the same seed, on the test split, over one metric per task. All
    costs are per batch; single-task costs are summed over the tasks (memory: the largest). Seconds are means over seeds,
    memory the median.

    Args:
        experiment: What was compared.
        problem: What was learnt, with the tasks that took part.
        results: Every run by its key.
        reference: The method that the others are compared with, if it is among them, else the first.

    Returns:
        ``schema_version``, ``tasks``, ``methods``, ``runs`` (the keys of each one's runs by seed), ``problem`` (whether it has
        an ``evaluate`` or batches of its own), ``undecided`` (the seeds of those whose epoch no validation score could choose),
        ``single_task``, ``versus`` (see `torchmto.lab.grid.versus.versus`), ``versions`` and ``config``.
    """
    tasks = problem.task_list
    names = [task.name for task in tasks]
    files: dict[str, list[str]] = {}
    for config in experiment.single_task_runs(names):
        files.setdefault(f"single:{(config.data.tasks or [''])[0]}", []).append(run_key(config))
    files |= {method: [run_key(config) for config in experiment.method_runs(method)] for method in experiment.methods}
    every = {name: [results[key] for key in keys] for name, keys in files.items()}
    by_method = {method: every[method] for method in experiment.methods}
    singles = list(zip(*(every[f"single:{name}"] for name in names), strict=True)) if experiment.baselines else []
    tests = [{name: values for run in runs for name, values in run["test"].items()} for runs in singles]

    methods: dict[str, Any] = {}
    for method, runs in by_method.items():
        measured = [run["test"] for run in runs]
        alone = {"delta_m": None, "reason": "no single-task models were trained"}
        methods[method] = {
            **(_delta_m(measured, tests, tasks) if experiment.baselines else alone),
            "tasks": _over_seeds(measured, tasks),
            "cost": _mean_cost([run["cost"] for run in runs]),
            "selected_epochs": [run["selected_epoch"] for run in runs],
        }
    return {
        "schema_version": SCHEMA_VERSION,
        "tasks": {
            task.name: {
                "kind": task.kind,
                "primary_metric": primary_metric(task)[0],
                "metrics": {
                    name: {"higher_is_better": higher_is_better(task, name), "chance": chance_level(task, name)}
                    for name in measured[0][task.name]
                },
            }
            for task in tasks
        },
        "methods": methods,
        "runs": files,
        "problem": {"evaluate": problem.evaluate is not None, "ready_batches": problem.ready_batches},
        "undecided": {name: seeds for name, runs in every.items() if (seeds := _undecided(runs, problem))},
        "single_task": {
            "tasks": _over_seeds(tests, tasks),
            "cost": _mean_cost([_cost([run["cost"] for run in runs], max) for runs in singles]),
        }
        if experiment.baselines
        else None,
        "versus": versus(
            by_method,
            {name: entry["delta_m"] and entry["delta_m"]["per_seed"] for name, entry in methods.items()},
            {task.name: primary_metric(task) for task in tasks},
            reference,
        ),
        "versions": versions(),
        "config": {**experiment.settings, "data": experiment.run.as_dict()["data"]},  # with the path of the data here
    }


def _undecided(runs: Sequence[Result], problem: Problem) -> list[int]:
    """The seeds of runs whose validation scores don't say which epoch is best; an own `evaluate` chooses none."""
    scores = [[epoch["score"] for epoch in run["history"]] for run in runs if problem.evaluate is None]
    return [seed for seed, own in enumerate(scores) if len(own) > 1 and not tells_apart(own)]


def _delta_m(
    tests: Sequence[Mapping[str, Any]], singles: Sequence[Mapping[str, Any]], tasks: Sequence[Task]
) -> dict[str, Any]:
    for task in tasks:
        metric, _ = primary_metric(task)
        for kind, runs in (("run", tests), ("single-task run", singles)):
            for seed, run in enumerate(runs):
                if not is_finite(run[task.name][metric]):
                    reason = f"{task.name}'s {metric} isn't a finite number in the {kind} of seed {seed}."
                    return {"delta_m": None, "reason": reason}
        for seed, run in enumerate(singles):
            if run[task.name][metric] == 0:
                reason = (
                    f"{task.name}'s {metric} is 0 in the single-task run of seed {seed}: no change is relative to that."
                )
                return {"delta_m": None, "reason": reason}
    higher = {task.name: primary_metric(task)[1] for task in tasks}
    per_seed = [
        delta_m(primary_values(dict(test), tasks), primary_values(dict(single), tasks), higher)
        for test, single in zip(tests, singles, strict=True)
    ]
    mean = sum(per_seed) / len(per_seed)
    return {"delta_m": {"mean": mean, "ci95": confidence95(per_seed), "per_seed": per_seed}}


def _over_seeds(tests: Sequence[Mapping[str, Any]], tasks: Sequence[Task]) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for task in tasks:
        figures[task.name] = {}
        for metric in tests[0][task.name]:
            values = [test[task.name][metric] for test in tests]
            known = None not in values
            figures[task.name][metric] = {
                "mean": sum(values) / len(values) if known else None,
                "std": std(values) if known else None,
            }
    return figures


def _mean_cost(costs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    # The median, because the first run of a process also pays for libraries that load on first use.
    return _cost(costs, median, len(costs))


def _cost(costs: Sequence[Mapping[str, Any]], peak: Callable[[list[int]], float], share: int = 1) -> dict[str, Any]:
    """The sum of costs divided by ``share``, and of their peaks what ``peak`` makes of them."""
    total = {name: sum(cost[name] for cost in costs) / share for name in (*_PASSES, "seconds_per_batch")}
    peaks = [cost["peak_memory_bytes"] for cost in costs]
    return {**total, "peak_memory_bytes": None if None in peaks else peak(peaks)}
