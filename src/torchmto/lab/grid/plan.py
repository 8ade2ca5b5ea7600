"""Comparing methods, from Python."""

import contextlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from torchmto.checks import needed
from torchmto.lab.atomic import plain, write_bytes
from torchmto.lab.grid.executors import Executor, default_jobs, make_executor
from torchmto.lab.grid.experiment import DEFAULT_METHODS, Experiment
from torchmto.lab.grid.folder import GridFolder
from torchmto.lab.grid.identity import run_key
from torchmto.lab.grid.outputs import write_outputs
from torchmto.lab.grid.result import Result
from torchmto.lab.grid.runner import Watcher, try_grid
from torchmto.lab.grid.summary import summarize
from torchmto.lab.grid.tuning import SPACE, Sampled, check_tunable
from torchmto.lab.grid.tuning import tune as tune_all
from torchmto.lab.problem import Problem
from torchmto.lab.run.build import problem_of
from torchmto.lab.run.config import ConfigError, RunConfig, check_used, config_for
from torchmto.lab.specs import parse_method, parse_methods

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


def check_settings(config: RunConfig, *, baselines: bool, tuned: Collection[str] = ()) -> None:
    """Raise a ConfigError if a setting of a comparison's Runs has no effect.

    Args:
        config: What all Runs have in common.
        baselines: Whether single-task models are trained.
        tuned: Settings that take several values.
    """
    unused = dict(_UNUSED)
    if config.checkpoint_every is None:
        unused["keep"] = "checkpoints are kept with `checkpoint_every` only"
    if baselines:
        unused["baseline"] = "a comparison trains its own single-task models"
    check_used(config, unused, tuned=tuned)


def check_names_no_method(given: Mapping[str, Any]) -> None:
    """Raise a ConfigError if settings name a method, be it the default one: there would be others all the same."""
    method = given.get("method", {})
    for name in ("name", "options"):
        if f"method.{name}" in given or isinstance(method, str) or name in method:
            raise ConfigError(
                f"The setting `method.{name}` has no effect here: {_UNUSED[f'method.{name}']}. Leave it out."
            )


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
        FailedRunsError: If runs failed; the others are kept, and the results are those of the methods that have all of theirs.
    """
    for given in (settings, config):
        if isinstance(given, Mapping):
            check_names_no_method(given)
    if not isinstance(executor, str) and (jobs, ray_address) != (None, None):
        raise ConfigError(
            "`jobs` and `ray_address` have no effect beside an `executor` that is an object. Leave them out."
        )
    wanted, own = config_for(problem, config, settings)
    wanted = replace(wanted, threads=wanted.threads or 1)
    wanted.validate()
    if isinstance(executor, str):  # says what is missing first
        executor = make_executor(executor, jobs, Path(out), ray_address, usual=default_jobs(wanted.device))
    needed("A comparison", "matplotlib.figure")  # its plots come last, and hours later
    check_settings(wanted, baselines=baselines, tuned=SPACE if tune else ())
    plan = Sampled(tune, tune_by) if tune else None
    learnt, run = problem_of(wanted, own)
    if plan is not None:
        check_tunable(learnt, wanted)
    elif tune_by != "random":
        raise ConfigError(f"`tune_by = {tune_by!r}` needs `tune`, the number of settings that each may try.")
    specs = parse_methods(methods) if isinstance(methods, str) else [parse_method(text) for text in methods]
    experiment = Experiment(tuple(spec.label for spec in specs), seeds, run, baselines=baselines)
    experiment.check(learnt)
    folder = GridFolder.of(out, experiment, learnt, tune=tune, changed_source=changed_source)
    with contextlib.ExitStack() as stack:
        watcher = Watcher()
        if progress:
            from torchmto.lab.grid.progress import progress_bars  # noqa: PLC0415  it needs rich

            watcher = stack.enter_context(progress_bars(experiment, learnt))
        found: dict[str, Any] = {}
        if plan is not None:

            def round_of(name: str, trial: Experiment) -> GridFolder:
                return GridFolder.of(folder.path / "tuning" / name, trial, learnt, changed_source=changed_source)

            tuning = tune_all(experiment, learnt, plan, round_of, executor=executor, watcher=watcher)
            experiment, found = replace(experiment, chosen=tuning.chosen), {"tuning": plain(tuning.as_dict())}
        results, failed = try_grid(experiment, folder, learnt, executor=executor, watcher=watcher)
    _write(experiment, folder, learnt, results, found)
    if failed is not None:
        raise failed
    return Result(folder.path)


def _write(
    experiment: Experiment, folder: GridFolder, problem: Problem, results: Mapping[str, Any], found: Mapping[str, Any]
) -> None:
    """Write the results of the methods of which all Runs are finished, if those of the single-task models are."""
    singles = experiment.single_task_runs(problem.task_names)

    def is_whole(method: str) -> bool:
        return all(run_key(run) in results for run in (*singles, *experiment.method_runs(method)))

    whole = tuple(filter(is_whole, experiment.methods))
    if not whole:
        return
    unfinished = [method for method in experiment.methods if method not in whole]
    summary = summarize(replace(experiment, methods=whole), problem, results)
    write_outputs(folder, {**summary, "unfinished": unfinished, **found}, results)
    if found:
        write_bytes(folder.path / "tuning.json", (json.dumps(found["tuning"], indent=1) + "\n").encode())
