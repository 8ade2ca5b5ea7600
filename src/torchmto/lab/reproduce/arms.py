"""The training runs of an experiment: each arm is one comparison of `torchmto.lab.compare` in a folder of its own."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from torchmto.lab.atomic import canonical, write_bytes
from torchmto.lab.compare import Experiment, FailedRunsError, RunFolder, compare, summarize, write_outputs
from torchmto.lab.compare.folder import run_key
from torchmto.lab.compare.single import validation_score
from torchmto.lab.data import DataBundle, Task, load_data
from torchmto.lab.metrics import primary_metric
from torchmto.lab.reproduce.budget import BudgetSpentError, BudgetWatcher
from torchmto.lab.reproduce.recipe import Arm
from torchmto.lab.reproduce.studies.context import Context
from torchmto.lab.training import RunConfig, chosen_tasks, primary_values

__all__ = ["ArmResult", "TunedExperiment", "run_arms"]

Result = Mapping[str, Any]
Others = tuple[RunFolder, list[RunConfig], list[RunConfig]]
"""An arm's folder, its single-task runs and the others."""


@dataclass(frozen=True)
class TunedExperiment(Experiment):
    """A comparison in which methods and single-task models may have settings of their own.

    Args:
        chosen: Fields of `torchmto.lab.training.RunConfig` by method, and by ``single-task <task>``.
    """

    chosen: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def settings(self) -> dict[str, Any]:
        """All settings in one mapping, with those of single methods."""
        return {**super().settings, "chosen": {name: dict(entry) for name, entry in self.chosen.items()}}

    def single_task_runs(self, tasks: Sequence[str]) -> list[RunConfig]:
        """One baseline per seed and task, with the task's own settings."""
        runs = super().single_task_runs(tasks)
        return [replace(run, **self.chosen.get(f"single-task {run.tasks[0]}", {})) for run in runs]

    def method_runs(self) -> list[RunConfig]:
        """One run per seed and method, with the method's own settings."""
        return [replace(run, **self.chosen.get(run.method, {})) for run in super().method_runs()]


@dataclass(frozen=True)
class ArmResult:
    """The finished seeds of an arm.

    Attributes:
        arm: What was asked for.
        experiment: Its finished part: only seeds of which every run is there.
        bundle: The data.
        results: Every run by its key.
        summary: As `torchmto.lab.compare.summarize` gives it.
        complete: Whether all seeds asked for are there.
    """

    arm: Arm
    experiment: TunedExperiment
    bundle: DataBundle
    results: Mapping[str, Result]
    summary: Mapping[str, Any]
    complete: bool

    def runs(self, method: str) -> list[Result]:
        """The runs of a method, by seed."""
        return [self.results[run_key(run)] for run in self.experiment.method_runs() if run.method == method]


@lru_cache(maxsize=2)
def _load(data: str, seed: int, options: str) -> DataBundle:
    return load_data(data, seed, **json.loads(options))


def run_arms(context: Context) -> tuple[dict[str, ArmResult], bool]:
    """Run every arm of the recipe, until the time is up.

    Runs that another arm of the experiment has done already are taken over.

    Returns:
        The arms of which at least one seed is finished, by name, and whether everything asked for is.

    Raises:
        FileNotFoundError: If an arm's data isn't there.
    """
    done: dict[str, ArmResult] = {}
    complete = True
    others: list[Others] = []
    for arm in context.recipe.arms:
        context.say(f"{arm.name}: {', '.join(arm.methods)}")
        run = context.recipe.run_config(arm, context.data_root)
        bundle = _load(run.data, run.data_seed, canonical(run.data_options))
        own = {method: dict(arm.method_run) for method in arm.methods if arm.method_run}
        experiment = TunedExperiment(arm.methods, context.seeds, run, chosen=own)
        if context.recipe.tune:
            chosen = _tune(context, arm, experiment, bundle, others)
            if chosen is None:
                complete = False
                continue
            experiment = replace(
                experiment, chosen={name: {**entry, **own.get(name, {})} for name, entry in chosen.items()}
            )
        result = _run(context, arm, experiment, bundle, others)
        complete = complete and result is not None and result.complete
        if result is not None:
            done[arm.name] = result
    return done, complete


def _run(
    context: Context,
    arm: Arm,
    experiment: TunedExperiment,
    bundle: DataBundle,
    others: list[Others],
) -> ArmResult | None:
    folder, results = _train(context, arm.name, experiment, bundle, others=others)
    runs = _runs(experiment, experiment.task_names(bundle))
    seeds = 0
    while seeds < experiment.seeds and all(run_key(run) in results for run in runs if run.seed == seeds):
        seeds += 1
    if seeds == 0:
        context.say(f"  {arm.name}: no seed is finished yet.")
        return None
    finished = replace(experiment, seeds=seeds)
    summary = summarize(finished, bundle, results, arm.reference)
    write_outputs(finished, folder, summary, results)
    return ArmResult(arm, finished, bundle, results, summary, seeds == experiment.seeds)


def _runs(experiment: TunedExperiment, tasks: Sequence[str]) -> list[RunConfig]:
    """All runs of a comparison."""
    return [*experiment.single_task_runs(tasks), *experiment.method_runs()]


def _train(
    context: Context,
    name: str,
    experiment: TunedExperiment,
    bundle: DataBundle,
    *,
    others: list[Others],
    may_fail: bool = False,
) -> tuple[RunFolder, dict[str, Result]]:
    """Train what isn't finished yet, until the time is up; all finished runs by their keys."""
    experiment.check(bundle)
    path = context.folder / "arms" / name
    path.mkdir(parents=True, exist_ok=True)
    settings = {key: value for key, value in experiment.settings.items() if key != "seeds"}  # more may be added later
    folder = RunFolder(path, settings)
    singles = experiment.single_task_runs(experiment.task_names(bundle))
    methods = experiment.method_runs()
    _take_over(folder, singles, methods, others)
    others.append((folder, singles, methods))
    try:
        watcher = BudgetWatcher(context.budget, context.say)
        results = compare(experiment, folder, bundle, jobs=context.jobs, watcher=watcher)
    except BudgetSpentError:
        results = folder.load([*singles, *methods])
    except FailedRunsError as error:
        if not may_fail:
            raise
        context.say(f"  {error}")
        results = folder.load([*singles, *methods])
    return folder, dict(results)


def _take_over(
    folder: RunFolder,
    singles: Sequence[RunConfig],
    methods: Sequence[RunConfig],
    others: Sequence[Others],
) -> None:
    """Copy finished runs of the same configuration from other arms.

    A multi-task run depends on its baselines too (they decide its epoch), so those must be the same.
    """
    for other, other_singles, other_methods in others:
        same = all(run in other_singles for run in singles)
        for run in (*singles, *(methods if same else ())):
            known = run in other_singles or run in other_methods
            if known and other.file(run).exists() and not folder.file(run).exists():
                write_bytes(folder.file(run), other.file(run).read_bytes())


def _tune(
    context: Context,
    arm: Arm,
    experiment: TunedExperiment,
    bundle: DataBundle,
    others: list[Others],
) -> dict[str, dict[str, Any]] | None:
    """The best settings of each method and each single-task model by validation on the first seed; None: no time.

    What an arm changes for its multi-task runs alone (``method_run``) isn't tuned for: they run at the settings of plain ones.
    """
    tasks = chosen_tasks(bundle, experiment.run.tasks)
    trials: list[tuple[Mapping[str, Any], TunedExperiment, dict[str, Result]]] = []
    for number, settings in enumerate(context.recipe.tune):
        trial = replace(
            experiment, seeds=1, run=replace(experiment.run, **context.recipe.tune_run, **settings), chosen={}
        )
        _, results = _train(context, f"{arm.name}-tuning-{number}", trial, bundle, others=others, may_fail=True)
        trials.append((settings, trial, results))
    names = [task.name for task in tasks]
    asked = [(run_key(run), results) for _, trial, results in trials for run in _runs(trial, names)]
    if context.budget.spent and any(key not in results for key, results in asked):
        return None

    def best(name: str, scored: Sequence[Task], baseline: Mapping[str, float] | None) -> tuple[float, dict[str, Any]]:
        scores = []
        for settings, trial, results in trials:
            if baseline is None:
                (run,) = trial.single_task_runs([task.name for task in scored])
            else:
                run = next(run for run in trial.method_runs() if run.method == name)
            if run_key(run) in results:
                validation = primary_values(dict(results[run_key(run)]["validation"]), scored)
                score = validation_score(validation, tuple(scored), baseline)
                scores += [] if score is None else [(score, dict(settings))]
        if not scores:
            raise ValueError(f"No setting gave `{name}` a finite validation score.")
        return max(scores, key=lambda entry: entry[0])

    chosen: dict[str, dict[str, Any]] = {}
    baseline: dict[str, float] = {}
    for task in tasks:
        score, chosen[f"single-task {task.name}"] = best(f"single-task {task.name}", [task], None)
        baseline[task.name] = score if primary_metric(task)[1] else -score
    for method in experiment.methods:
        _, chosen[method] = best(method, tasks, baseline)
    return chosen
