"""The training runs of an experiment: each arm is one comparison of `torchmto.lab.grid` in a folder of its own."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torchmto.lab.atomic import write_bytes
from torchmto.lab.grid import Experiment, GridFolder, summarize, write_outputs
from torchmto.lab.grid.executors import Executor, loaded
from torchmto.lab.grid.identity import run_key
from torchmto.lab.grid.plan import check_settings
from torchmto.lab.grid.runner import try_grid
from torchmto.lab.grid.tuning import SPACE, Plan, tune
from torchmto.lab.problem import Problem
from torchmto.lab.reproduce.budget import Budget, BudgetWatcher
from torchmto.lab.reproduce.recipe import Arm, Recipe, RecipeError
from torchmto.lab.run.build import problem_of
from torchmto.lab.run.config import RunConfig, config_of

Result = Mapping[str, Any]


@dataclass(frozen=True)
class Context:
    """What was asked for.

    Attributes:
        recipe: What to run.
        folder: Where everything goes.
        data_root: What ``{data}`` in the recipe stands for.
        seeds: How many.
        budget: The time.
        executor: Where training runs go.
        say: Prints a line.
    """

    recipe: Recipe
    folder: Path
    data_root: Path
    seeds: int
    budget: Budget
    executor: Executor
    say: Callable[[str], None]


@dataclass(frozen=True)
class ArmResult:
    """The finished seeds of an arm.

    Attributes:
        arm: What was asked for.
        experiment: Its finished part: only seeds of which every run is there, and of the methods that were added to the
            recipe's only those that have as many.
        problem: What is learnt.
        results: Every run by its key.
        summary: As `torchmto.lab.grid.summarize` gives it.
        complete: Whether all methods and seeds asked for are there.
        failed: What went wrong in tuning, a line for each run.
    """

    arm: Arm
    experiment: Experiment
    problem: Problem
    results: Mapping[str, Result]
    summary: Mapping[str, Any]
    complete: bool
    failed: Sequence[str] = ()

    def runs(self, method: str) -> list[Result]:
        """The runs of a method, by seed."""
        return [self.results[run_key(run)] for run in self.experiment.method_runs(method)]


@dataclass(frozen=True)
class _Grid:
    """The runs of a comparison, and their folder."""

    experiment: Experiment
    problem: Problem
    folder: GridFolder
    singles: Sequence[RunConfig]
    methods: Sequence[RunConfig]

    @property
    def runs(self) -> list[RunConfig]:
        """All of them."""
        return [*self.singles, *self.methods]


def _settled(config: RunConfig) -> tuple[Problem, RunConfig]:
    return problem_of(config, loaded(config))


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
        tuned: tuple[Experiment, Sequence[str]] | None = (planned, [])
        if context.recipe.tune:
            tuned = _tune(context, arm, planned, others)
        result = None if tuned is None else _run(context, arm, *tuned, others=others)
        complete = complete and result is not None and result.complete
        if result is not None:
            done[arm.name] = result
    return done, complete


def check_arm(context: Context, arm: Arm) -> None:
    """Build everything once, so that a mistake shows before hours of training.

    Raises:
        FileNotFoundError: If the arm's data isn't there.
        RecipeError: If its settings make no sense.
    """
    recipe = context.recipe
    try:
        run = recipe.run_config(arm, context.data_root)
        for settings in ({}, arm.method_run, *({**recipe.tune_run, **settings} for settings in recipe.tune)):
            wanted = config_of(settings, run)
            check_settings(wanted, baselines=arm.baselines, tuned=SPACE if recipe.tune else ())
            problem, config = _settled(wanted)
            Experiment(arm.methods, 1, config).check(problem)
    except (ValueError, TypeError) as error:
        raise RecipeError(f"{recipe.name}, arm {arm.name}: {error}") from error


def _planned(context: Context, arm: Arm) -> Experiment:
    """An arm's comparison before tuning."""
    own = {method: dict(arm.method_run) for method in arm.methods if arm.method_run}
    _, run = _settled(context.recipe.run_config(arm, context.data_root))
    return Experiment(arm.methods, min(context.seeds, arm.seeds or context.seeds), run, own, arm.baselines)


def _run(
    context: Context, arm: Arm, experiment: Experiment, failed: Sequence[str], *, others: list[_Grid]
) -> ArmResult | None:
    grid = _open(context, arm.name, experiment, others)
    watcher = BudgetWatcher(context.budget, context.say)
    results, error = try_grid(experiment, grid.folder, grid.problem, executor=context.executor, watcher=watcher)
    if error is not None:
        raise error

    def finished_seeds(method: str) -> int:
        runs = [*grid.singles, *experiment.method_runs(method)]
        missing = [run.seed for run in runs if run_key(run) not in results]
        return min(missing, default=experiment.seeds)

    by_method = {method: finished_seeds(method) for method in experiment.methods}
    seeds = min((count for method, count in by_method.items() if method not in arm.added), default=0)
    if seeds == 0:
        context.say(f"  {arm.name}: no seed is finished yet.")
        return None
    methods = tuple(method for method, count in by_method.items() if count >= seeds)
    finished = replace(experiment, methods=methods, seeds=seeds)
    summary = summarize(finished, grid.problem, results, arm.reference)
    write_outputs(grid.folder, summary, results)
    complete = seeds == experiment.seeds and methods == arm.methods
    return ArmResult(arm, finished, grid.problem, results, summary, complete, failed)


def _open(context: Context, name: str, experiment: Experiment, others: list[_Grid]) -> _Grid:
    """A comparison with its folder, and in that all runs which another one of the same call has done already."""
    problem, _ = _settled(experiment.run)
    singles = experiment.single_task_runs(problem.task_names)
    folder = GridFolder.of(context.folder / "arms" / name, experiment, problem)
    grid = _Grid(experiment, problem, folder, singles, experiment.method_runs())
    for other in others:
        _take_over(grid, other)
    others.append(grid)
    return grid


def _take_over(grid: _Grid, other: _Grid) -> None:
    """Copy finished runs of the same configuration.

    A multi-task run depends on its seed's baselines too (they decide its epoch), so those must be the same, and there: where
    one failed in tuning, another value stood in.
    """
    apart = {run.seed for run in grid.singles if not (run in other.singles and other.folder.file(run).exists())}
    for run in [*grid.singles, *(run for run in grid.methods if run.seed not in apart)]:
        there, here = other.folder.file(run), grid.folder.file(run)
        if run in other.runs and there.exists() and not here.exists():
            write_bytes(here, there.read_bytes())


def _tune(
    context: Context, arm: Arm, experiment: Experiment, others: list[_Grid]
) -> tuple[Experiment, list[str]] | None:
    """Each method and each single-task model at its best settings, and what failed; None if there was no time for it.

    A method that was added and isn't finished is left out, so that the others keep their figures.
    What an arm changes for its multi-task runs alone (``method_run``) isn't tuned for: they run at the settings of plain ones.
    """
    recipe = context.recipe
    short = replace(experiment, run=config_of(recipe.tune_run, experiment.run))

    def folder_of(name: str, trial: Experiment) -> GridFolder:
        return _open(context, f"{arm.name}-tuning-{name}", trial, others).folder

    problem, _ = _settled(short.run)
    watcher = BudgetWatcher(context.budget, context.say)
    found = tune(short, problem, Plan(recipe.tune), folder_of, executor=context.executor, watcher=watcher)
    for line in found.failed:
        context.say(f"  {line}")
    finished = tuple(method for method in experiment.methods if method in found.chosen)
    if not set(arm.methods) - set(arm.added) <= set(finished):
        return None
    return replace(experiment, methods=finished, chosen=found.chosen), found.failed
