"""Comparing methods, from Python."""

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from torchmto.checks import needed
from torchmto.lab.atomic import plain, write_bytes
from torchmto.lab.grid.executors import Executor, default_jobs, make_executor
from torchmto.lab.grid.experiment import DEFAULT_METHODS, Experiment
from torchmto.lab.grid.folder import GridFolder, run_key
from torchmto.lab.grid.outputs import write_outputs
from torchmto.lab.grid.result import Result
from torchmto.lab.grid.runner import FailedRunsError, Silence, Stage, Watcher, run_grid
from torchmto.lab.grid.summary import summarize
from torchmto.lab.grid.tuning import SPACE, Attempt, check_tunable, sampled
from torchmto.lab.grid.tuning import Plan as TuningPlan
from torchmto.lab.grid.tuning import tune as tune_all
from torchmto.lab.problem import Problem
from torchmto.lab.run.build import problem_of
from torchmto.lab.run.config import ConfigError, RunConfig, check_used, config_of
from torchmto.lab.specs import parse_method, parse_methods

__all__ = ["Grid", "compare", "plan"]


class Grid:
    """A planned comparison: checked, with its folder, not yet run.

    Attributes:
        experiment: What is compared.
        folder: Where.
        problem: What is learnt, with the tasks that take part.
        tuning: What each tries first, if anything.
    """

    def __init__(
        self, experiment: Experiment, folder: GridFolder, problem: Problem, tuning: TuningPlan | None = None
    ) -> None:
        self.experiment, self.folder, self.problem, self.tuning = experiment, folder, problem, tuning

    def run(self, executor: Executor, watcher: Watcher | None = None) -> Result:
        """Run what isn't finished, tuned first where that was planned, and write tables and plots."""
        experiment, found = self.experiment, {}
        if self.tuning is not None:
            tuning = tune_all(experiment, self.problem, self.tuning, self._rounds(executor, watcher))
            experiment, found = replace(experiment, chosen=tuning.chosen), {"tuning": tuning.as_dict()}
        results = run_grid(experiment, self.folder, self.problem, executor=executor, watcher=watcher)
        write_outputs(experiment, self.folder, {**summarize(experiment, self.problem, results), **found}, results)
        if found:
            text = json.dumps(plain(found["tuning"]), indent=1) + "\n"
            write_bytes(self.folder.path / "tuning.json", text.encode())
        return Result(self.folder.path)

    def _rounds(self, executor: Executor, watcher: Watcher | None) -> Attempt:
        """What runs a round of tuning, in ``tuning/`` of the folder."""

        def attempt(
            name: str, trial: Experiment, stage: Stage, baseline: Mapping[str, float] | None
        ) -> tuple[Mapping[str, Any], Mapping[str, str]]:
            path, problem = self.folder.path / "tuning" / name, self.problem
            place = GridFolder.of(path, trial, problem, changed_source=self.folder.changed_source)
            try:
                results = run_grid(
                    trial, place, problem, executor=executor, watcher=watcher, stages=[stage], baseline=baseline
                )
            except FailedRunsError as error:
                runs = [*trial.single_task_runs(problem.task_names), *trial.method_runs()]
                return place.load(runs), {run_key(run): text for run, text in error.failures}
            return results, {}

        return attempt


_UNUSED = {
    "seed": "the seeds are 0, 1, ..., as many as `seeds` says",
    "method.name": "`methods` names the methods",
    "method.options": "`methods` names the methods with their hyper-parameters",
    "devices": "each Run of a comparison is one process",
    "nodes": "each Run of a comparison is one process",
    "loggers": "only a single Run has logs",
    "log_every": "only a single Run has logs",
    "evaluate_test": "a comparison's figures are of the test split",
}
"""Settings without effect in a comparison, and why."""


def check_names_no_method(given: Mapping[str, Any]) -> None:
    """Raise a ConfigError if settings name a method, be it the default one: there would be others all the same."""
    method = given.get("method", {})
    for name in ("name", "options"):
        if f"method.{name}" in given or isinstance(method, str) or name in method:
            raise ConfigError(
                f"The setting `method.{name}` has no effect here: {_UNUSED[f'method.{name}']}. Leave it out."
            )


def plan(
    config: RunConfig,
    out: Path | str,
    *,
    problem: Problem | None = None,
    methods: Sequence[str] = DEFAULT_METHODS,
    seeds: int = 3,
    tune: int = 0,
    tune_by: Literal["random", "tpe"] = "random",
    baselines: bool = True,
    changed_source: bool = False,
) -> Grid:
    """Plan a comparison.

    Args:
        config: What all Runs have in common.
        out: The folder.
        problem: What is learnt, where the settings' reference doesn't lead to it.
        methods: Texts of methods.
        seeds: How many.
        tune: Settings that each may try first.
        tune_by: Drawn at random, the same for all, or by TPE for each on its own.
        baselines: Whether single-task models are trained, too; without them there is no Δm.
        changed_source: Go on though the file that defines the problem has changed.

    Raises:
        ConfigError: If settings make no sense, or have no effect.
        FolderError: If the folder belongs to something else.
        ImportError: If a package is missing that its metrics or plots need.
    """
    needed("A comparison", "matplotlib.figure")  # its plots come last, and hours later
    config = replace(config, threads=config.threads or 1)
    config.validate()
    idle = dict(_UNUSED)
    if config.checkpoint_every is None:
        idle["keep"] = "checkpoints are kept with `checkpoint_every` only"
    if baselines:
        idle["baseline"] = "a comparison trains its own single-task models"
    check_used(config, idle, tuned=SPACE if tune else ())
    tuning = sampled(tune, tune_by) if tune else None
    given, (problem, config) = config, problem_of(config, problem)
    if tuning is not None:
        check_tunable(problem, given)
    elif tune_by != "random":
        raise ConfigError(f"`tune_by = {tune_by!r}` needs `tune`, the number of settings that each may try.")
    labels = tuple(parse_method(method).label for method in methods)
    experiment = Experiment(labels, seeds, config, baselines=baselines)
    experiment.check(problem)
    folder = GridFolder.of(out, experiment, problem, tune=tune, changed_source=changed_source)
    return Grid(experiment, folder, problem, tuning)


def compare(
    problem: Problem | str,
    methods: Sequence[str] | str = DEFAULT_METHODS,
    *,
    seeds: int = 3,
    out: Path | str = "runs/compare",
    jobs: int | None = None,
    executor: str | Executor = "local",
    ray_address: str | None = None,
    tune: int = 0,
    tune_by: Literal["random", "tpe"] = "random",
    baselines: bool = True,
    progress: bool = True,
    changed_source: bool = False,
    config: RunConfig | Mapping[str, Any] | None = None,
    **settings: Any,
) -> Result:
    """Compare methods with single-task models and one another, over several seeds.

    An interrupted comparison goes on when it is called again.

    Args:
        problem: What is learnt, or its reference (``"digits"``, ``"farm.py:farm"``).
        methods: Texts of methods, such as ``"wpcgrad(mode=pairwise)"``.
        seeds: How many.
        out: The folder.
        jobs: Runs at a time; by default one per core, at most 4, and as many as the cluster at ``ray_address`` takes.
        executor: Where they run: ``"local"``, ``"ray"``, ``"slurm"``.
        ray_address: Of a Ray cluster; a local one by default.
        tune: Settings that each method and each single-task model may try first.
        tune_by: Drawn at random, the same for all, or by TPE for each on its own.
        baselines: Whether single-task models are trained, too; without them there is no Δm.
        progress: Whether to show how far it is.
        changed_source: Go on though the file that defines the problem has changed.
        config: Settings of all Runs.
        **settings: Some of them, as `torchmto.lab.run.config.config_of` takes them.

    Returns:
        The result, which `load_result` reads again.

    Raises:
        ConfigError: If a setting makes no sense.
        ProblemError: If a part of the problem isn't what it should be.
        FolderError: If the folder belongs to something else.
        FailedRunsError: If runs failed; the others are kept.
    """
    for given in (settings, config):
        if isinstance(given, Mapping):
            check_names_no_method(given)
    if not isinstance(executor, str) and (jobs, ray_address) != (None, None):
        raise ConfigError(
            "`jobs` and `ray_address` have no effect beside an `executor` that is an object. Leave them out."
        )
    base = config if isinstance(config, RunConfig) else config_of(config or {})
    wanted = config_of(({"data.name": problem} if isinstance(problem, str) else {}) | settings, base)
    texts = [spec.label for spec in parse_methods(methods)] if isinstance(methods, str) else list(methods)
    if isinstance(executor, str):
        make_executor(executor, jobs, Path(out), ray_address)  # says what is wrong before there is a folder
    grid = plan(
        wanted,
        out,
        problem=None if isinstance(problem, str) else problem,
        methods=texts,
        seeds=seeds,
        tune=tune,
        tune_by=tune_by,
        baselines=baselines,
        changed_source=changed_source,
    )
    if isinstance(executor, str):
        usual = default_jobs(grid.experiment.run.device)
        executor = make_executor(executor, jobs, grid.folder.path, ray_address, usual=usual)
    with contextlib.ExitStack() as stack:
        watcher: Watcher = Silence()
        if progress:
            from torchmto.lab.grid.progress import progress_bars  # noqa: PLC0415  it needs rich

            watcher = stack.enter_context(progress_bars(grid.experiment, grid.problem))
        return grid.run(executor, watcher)
