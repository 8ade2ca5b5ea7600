"""The training runs of an experiment: each arm is one comparison of `torchmto.lab.compare` in a folder of its own."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from torchmto.lab.atomic import canonical, write_bytes
from torchmto.lab.compare import Experiment, FailedRunsError, RunFolder, compare, summarize, write_outputs
from torchmto.lab.compare.folder import run_key, run_label
from torchmto.lab.compare.runner import Stage
from torchmto.lab.compare.single import validation_score
from torchmto.lab.data import DataBundle, Task, load_data
from torchmto.lab.metrics import primary_metric
from torchmto.lab.reproduce.budget import BudgetSpentError, BudgetWatcher
from torchmto.lab.reproduce.recipe import Arm, RecipeError
from torchmto.lab.training import RunConfig, chosen_tasks, primary_values

if TYPE_CHECKING:  # the studies import this module
    from torchmto.lab.reproduce.studies.context import Context

__all__ = ["ArmResult", "TunedExperiment", "check_arm", "run_arms"]

Result = Mapping[str, Any]


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
        failed: What went wrong in tuning, a line for each run.
    """

    arm: Arm
    experiment: TunedExperiment
    bundle: DataBundle
    results: Mapping[str, Result]
    summary: Mapping[str, Any]
    complete: bool
    failed: Sequence[str] = ()

    def runs(self, method: str) -> list[Result]:
        """The runs of a method, by seed."""
        return [self.results[run_key(run)] for run in self.experiment.method_runs() if run.method == method]


@dataclass(frozen=True)
class _Grid:
    """The runs of a comparison, and their folder."""

    experiment: TunedExperiment
    bundle: DataBundle
    folder: RunFolder
    singles: Sequence[RunConfig]
    methods: Sequence[RunConfig]

    @property
    def runs(self) -> list[RunConfig]:
        """All of them."""
        return [*self.singles, *self.methods]


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
        RecipeError: If an arm's settings make no sense; nothing is trained.
        FailedRunsError: If runs failed, or in tuning all runs of a method or single-task model.
    """
    done: dict[str, ArmResult] = {}
    complete = True
    others: list[_Grid] = []
    for arm, planned in [(arm, _planned(context, arm)) for arm in context.recipe.arms]:
        context.say(f"{arm.name}: {', '.join(arm.methods)}")
        tuned = _tune(context, arm, planned, others) if context.recipe.tune else (planned, [])
        result = None if tuned is None else _run(context, arm, *tuned, others=others)
        complete = complete and result is not None and result.complete
        if result is not None:
            done[arm.name] = result
    return done, complete


def check_arm(context: Context, arm: Arm, methods: tuple[str, ...]) -> None:
    """Build everything once, so that a mistake shows before hours of training.

    Raises:
        FileNotFoundError: If the arm's data isn't there.
        RecipeError: If its settings make no sense for these methods.
    """
    recipe = context.recipe
    try:
        run = recipe.run_config(arm, context.data_root)
        for settings in ({}, arm.method_run, *({**recipe.tune_run, **settings} for settings in recipe.tune)):
            experiment = Experiment(methods, 1, replace(run, **settings))
            experiment.check(_data(experiment))
    except (ValueError, TypeError) as error:
        raise RecipeError(f"{recipe.name}, arm {arm.name}: {error}") from error


def _planned(context: Context, arm: Arm) -> TunedExperiment:
    """An arm's comparison before tuning."""
    check_arm(context, arm, arm.methods)
    own = {method: dict(arm.method_run) for method in arm.methods if arm.method_run}
    run = context.recipe.run_config(arm, context.data_root)
    return TunedExperiment(arm.methods, context.seeds, run, chosen=own)


def _data(experiment: Experiment) -> DataBundle:
    return _load(experiment.run.data, experiment.run.data_seed, canonical(experiment.run.data_options))


def _run(
    context: Context, arm: Arm, experiment: TunedExperiment, failed: Sequence[str], *, others: list[_Grid]
) -> ArmResult | None:
    grid = _open(context, arm.name, experiment, others)
    results, error = _train(context, grid)
    if error is not None:
        raise error
    seeds = 0
    while seeds < experiment.seeds and all(run_key(run) in results for run in grid.runs if run.seed == seeds):
        seeds += 1
    if seeds == 0:
        context.say(f"  {arm.name}: no seed is finished yet.")
        return None
    finished = replace(experiment, seeds=seeds)
    summary = summarize(finished, grid.bundle, results, arm.reference)
    write_outputs(finished, grid.folder, summary, results)
    return ArmResult(arm, finished, grid.bundle, results, summary, seeds == experiment.seeds, failed)


def _open(context: Context, name: str, experiment: TunedExperiment, others: list[_Grid]) -> _Grid:
    """A comparison with its folder, and in that all runs which another one of the same call has done already."""
    path = context.folder / "arms" / name
    path.mkdir(parents=True, exist_ok=True)
    settings = {key: value for key, value in experiment.settings.items() if key != "seeds"}  # more may be added later
    bundle = _data(experiment)
    singles = experiment.single_task_runs(experiment.task_names(bundle))
    grid = _Grid(experiment, bundle, RunFolder(path, settings), singles, experiment.method_runs())
    for other in others:
        _take_over(grid, other)
    others.append(grid)
    return grid


def _take_over(grid: _Grid, other: _Grid) -> None:
    """Copy finished runs of the same configuration.

    A multi-task run depends on its baselines too (they decide its epoch), so those must be the same, and there: where one
    failed in tuning, another value stood in.
    """
    same = all(run in other.singles and other.folder.file(run).exists() for run in grid.singles)
    for run in grid.runs if same else grid.singles:
        there, here = other.folder.file(run), grid.folder.file(run)
        if run in other.runs and there.exists() and not here.exists():
            write_bytes(here, there.read_bytes())


def _train(
    context: Context,
    grid: _Grid,
    stages: Sequence[Stage] = ("single-task", "methods"),
    stand_ins: Mapping[str, float] | None = None,
) -> tuple[dict[str, Result], FailedRunsError | None]:
    """Train what isn't finished yet, until the time is up; all finished runs by their keys, and what failed."""
    error = None
    try:
        watcher = BudgetWatcher(context.budget, context.say)
        compare(
            grid.experiment,
            grid.folder,
            grid.bundle,
            jobs=context.jobs,
            watcher=watcher,
            stages=stages,
            stand_ins=stand_ins,
        )
    except BudgetSpentError:
        pass
    except FailedRunsError as failed:
        error = failed
    return dict(grid.folder.load(grid.runs)), error


# ----------------------------------------------------------------------------------------------------------- tuning


@dataclass
class _Trial:
    """One of the settings that tuning chooses from, and what is known of it."""

    settings: Mapping[str, Any]
    grid: _Grid
    results: Mapping[str, Result] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    @property
    def failed(self) -> list[str]:
        """What went wrong, a line for each run."""
        settings = ", ".join(f"{key} {value}" for key, value in self.settings.items())
        runs = [(run, self.failures[run_key(run)]) for run in self.grid.runs if run_key(run) in self.failures]
        return [f"{run_label(run)}, {settings}: {text.partition(chr(10))[0]}" for run, text in runs]


def _tune(
    context: Context, arm: Arm, experiment: TunedExperiment, others: list[_Grid]
) -> tuple[TunedExperiment, list[str]] | None:
    """Each method and each single-task model at its best settings by validation on the first seed, and what failed.

    All methods try all settings, also where a single-task run failed: what stands in for its value, by which methods choose
    their epoch, is the task's best one at the other settings, by which their settings are chosen in the end.

    What an arm changes for its multi-task runs alone (``method_run``) isn't tuned for: they run at the settings of plain ones.

    Returns:
        None if there was no time for all of it.
    """
    recipe = context.recipe
    trials = []
    for number, settings in enumerate(recipe.tune):
        run = replace(experiment.run, **recipe.tune_run, **settings)
        trial = replace(experiment, seeds=1, run=run, chosen={})
        trials.append(_Trial(settings, _open(context, f"{arm.name}-tuning-{number}", trial, others)))
    if not _try(context, trials, "single-task"):
        return None
    chosen: dict[str, Mapping[str, Any]] = {}
    baseline: dict[str, float] = {}
    tasks = chosen_tasks(trials[0].grid.bundle, experiment.run.tasks)
    for task in tasks:
        name = f"single-task {task.name}"
        score, chosen[name] = _best(name, trials, [task], None)
        baseline[task.name] = score if primary_metric(task)[1] else -score
    if not _try(context, trials, "methods", baseline):
        return None
    for method in experiment.methods:
        _, best = _best(method, trials, tasks, baseline)
        chosen[method] = {**best, **experiment.chosen.get(method, {})}
    return replace(experiment, chosen=chosen), [line for trial in trials for line in trial.failed]


def _try(
    context: Context, trials: Sequence[_Trial], stage: Stage, stand_ins: Mapping[str, float] | None = None
) -> bool:
    """Train at all settings; whether there was time for all runs."""
    lacking = 0
    for trial in trials:
        trial.results, error = _train(context, trial.grid, [stage], stand_ins)
        if error is not None:
            context.say(f"  {error}")
            trial.failures |= {run_key(run): text for run, text in error.failures}
        runs = trial.grid.singles if stage == "single-task" else trial.grid.methods
        lacking += sum(run_key(run) not in {**trial.results, **trial.failures} for run in runs)
    return not lacking


def _best(
    name: str, trials: Sequence[_Trial], tasks: Sequence[Task], baseline: Mapping[str, float] | None
) -> tuple[float, Mapping[str, Any]]:
    """The best score on the validation split of a method or single-task model, and the settings that gave it."""
    scores: list[tuple[float, Mapping[str, Any]]] = []
    for trial in trials:
        (key,) = (run_key(run) for run in trial.grid.runs if run_label(run) == f"{name}, seed 0")
        if key not in trial.results:
            continue
        validation = primary_values(dict(trial.results[key]["validation"]), tasks)
        score = validation_score(validation, tuple(tasks), baseline)
        if score is None:
            trial.failures[key] = "no finite score on the validation split"
        else:
            scores.append((score, trial.settings))
    if not scores:
        raise FailedRunsError(f"{name}: no setting in tuning gave a finite score on the validation split.")
    return max(scores, key=lambda entry: entry[0])
