"""Comparing methods, from Python."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torchmto.checks import needed
from torchmto.lab.grid.executors import Executor, default_jobs, make_executor
from torchmto.lab.grid.experiment import DEFAULT_METHODS, Experiment
from torchmto.lab.grid.folder import GridFolder
from torchmto.lab.grid.outputs import write_outputs
from torchmto.lab.grid.result import Result
from torchmto.lab.grid.runner import Silence, Watcher, run_grid
from torchmto.lab.grid.summary import summarize
from torchmto.lab.problem import Problem
from torchmto.lab.run.build import problem_of
from torchmto.lab.run.config import ConfigError, RunConfig, config_of
from torchmto.lab.specs import parse_method, parse_methods

__all__ = ["Grid", "compare", "plan"]


class Grid:
    """A planned comparison: checked, with its folder, not yet run.

    Attributes:
        experiment: What is compared.
        folder: Where.
        problem: What is learnt, with the tasks that take part.
    """

    def __init__(self, experiment: Experiment, folder: GridFolder, problem: Problem) -> None:
        self.experiment, self.folder, self.problem = experiment, folder, problem

    def run(self, executor: Executor, watcher: Watcher | None = None) -> Result:
        """Run what isn't finished, and write tables and plots."""
        results = run_grid(self.experiment, self.folder, self.problem, executor=executor, watcher=watcher)
        write_outputs(self.experiment, self.folder, summarize(self.experiment, self.problem, results), results)
        return Result(self.folder.path)


def plan(
    config: RunConfig,
    out: Path | str,
    *,
    problem: Problem | None = None,
    methods: Sequence[str] = DEFAULT_METHODS,
    seeds: int = 3,
    tune: int = 0,
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
        baselines: Whether single-task models are trained, too; without them there is no Δm.
        changed_source: Go on though the file that defines the problem has changed.

    Raises:
        ConfigError: If settings make no sense.
        FolderError: If the folder belongs to something else.
        ImportError: If a package is missing that its metrics or plots need.
    """
    needed("A comparison", "matplotlib.figure")  # its plots come last, and hours later
    config = replace(config, threads=config.threads or 1)
    config.validate()
    if not config.evaluate_test:
        raise ConfigError("A comparison's figures are of the test split. Found `evaluate_test = False`.")
    problem, config = problem_of(config, problem)
    labels = tuple(parse_method(method).label for method in methods)
    experiment = Experiment(labels, seeds, config, baselines=baselines)
    experiment.check(problem)
    folder = GridFolder.of(out, experiment, problem, tune=tune, changed_source=changed_source)
    return Grid(experiment, folder, problem)


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
        jobs: Runs at a time.
        executor: Where they run: ``"local"``, ``"ray"``, ``"slurm"``.
        ray_address: Of a Ray cluster; a local one by default.
        tune: Settings that each method and each single-task model may try first.
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
    base = config if isinstance(config, RunConfig) else config_of(config or {})
    wanted = config_of(({"data.name": problem} if isinstance(problem, str) else {}) | settings, base)
    texts = [spec.label for spec in parse_methods(methods)] if isinstance(methods, str) else list(methods)
    grid = plan(
        wanted,
        out,
        problem=None if isinstance(problem, str) else problem,
        methods=texts,
        seeds=seeds,
        tune=tune,
        baselines=baselines,
        changed_source=changed_source,
    )
    number = jobs or default_jobs(grid.experiment.run.device)
    if isinstance(executor, str):
        executor = make_executor(executor, number, grid.folder.path, ray_address)
    with contextlib.ExitStack() as stack:
        watcher: Watcher = Silence()
        if progress:
            from torchmto.lab.grid.progress import progress_bars  # noqa: PLC0415  it needs rich

            watcher = stack.enter_context(progress_bars(grid.experiment, grid.problem))
        if tune:
            from torchmto.lab.grid.tuning import tuned  # noqa: PLC0415  it needs optuna

            return tuned(grid, tune, executor, watcher)
        return grid.run(executor, watcher)
