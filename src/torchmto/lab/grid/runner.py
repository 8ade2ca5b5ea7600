"""Running the grid: baselines first, then methods, with nothing lost when it is interrupted."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torchmto.lab.atomic import plain
from torchmto.lab.grid.executors import Executor, Here, Job, Outcome
from torchmto.lab.grid.experiment import Experiment, run_label
from torchmto.lab.grid.folder import GridFolder
from torchmto.lab.grid.identity import run_key
from torchmto.lab.problem import Problem
from torchmto.lab.run.config import RunConfig
from torchmto.lab.run.evaluation import primary_values

Result = dict[str, Any]
Stage = Literal["single-task", "methods"]
Failures = list[tuple[RunConfig, str]]


class FailedRunsError(RuntimeError):
    """Some runs failed; the others are finished and saved.

    Args:
        message: What there is to say.
        failures: The runs, and what went wrong in each.
        frames: Where in the user's code, if it was there.
    """

    def __init__(self, message: str, failures: Failures | None = None, frames: str = "") -> None:
        super().__init__(message)
        self.failures = failures or []
        self.frames = frames


class StoppedError(Exception):
    """A watcher ended the grid. What is finished is saved; the same call goes on from there."""


class Watcher:
    """Who wants to know how far the grid is; this one does nothing about it. One that has enough raises `StoppedError`."""

    def plan(self, runs: Sequence[RunConfig], finished: Sequence[RunConfig]) -> None:
        """All runs of the grid, and those that an earlier call finished."""

    def advance(self, config: RunConfig, batches: int) -> None:
        """A run has done so many batches."""

    def finish(self, config: RunConfig, result: Result) -> None:
        """A run is finished and saved."""


def run_grid(
    experiment: Experiment,
    folder: GridFolder,
    problem: Problem,
    *,
    executor: Executor | None = None,
    watcher: Watcher | None = None,
    stages: Sequence[Stage] = ("single-task", "methods"),
    baseline: Mapping[str, float] | None = None,
) -> dict[str, Result]:
    """Run what isn't finished yet: first all single-task baselines, then the methods.

    Args:
        experiment: What to run.
        folder: Where finished runs are and go.
        problem: What they learn, with the tasks that take part.
        executor: Where they run; this process by default.
        watcher: Is told how far the grid is.
        stages: Which of the two to run.
        baseline: Single-task validation values by which methods choose their epoch; by default those of the baselines of the
            same seed, which then have to be finished. If empty, by the score of Runs without.

    Returns:
        The result of every run by `run_key`.

    Raises:
        FolderError: If the folder's files are broken, foreign or in use; nothing is changed.
        FailedRunsError: If runs failed; the others of their stage are finished first.
        KeyboardInterrupt: On Ctrl-C; finished runs stay.
    """
    watcher = watcher or Watcher()
    singles = experiment.single_task_runs(problem.task_names)
    methods = experiment.method_runs()
    by_stage: dict[Stage, list[RunConfig]] = {"single-task": singles, "methods": methods}
    with folder.locked():
        results = folder.load([*singles, *methods])
        for result in results.values():
            problem.settle(result["validation"])
        runs = [config for stage in stages for config in by_stage[stage]]
        watcher.plan(runs, [config for config in runs if run_key(config) in results])

        def baseline_of(seed: int) -> Mapping[str, float | None] | None:
            if baseline is not None or not singles:
                return baseline or None
            values: dict[str, float | None] = {}
            for config in singles:
                if config.seed == seed and run_key(config) in results:
                    tasks = problem.only(config.data.tasks or ()).task_list
                    values |= primary_values(results[run_key(config)]["validation"], tasks)
            return values

        every = {run_key(config): config for config in (*singles, *methods)}
        failures: list[tuple[RunConfig, Outcome]] = []

        def done(key: str, outcome: Outcome) -> None:
            if outcome.result is None:
                failures.append((every[key], outcome))
                return
            problem.settle(outcome.result["test"] or {})
            folder.save(every[key], outcome.result)
            results[key] = plain(outcome.result)
            watcher.finish(every[key], outcome.result)

        with executor or Here() as engine:
            for stage in stages:
                jobs = [
                    Job(
                        key,
                        config,
                        baseline_of(config.seed) if stage == "methods" else None,
                        checkpoints=folder.checkpoints(config),
                    )
                    for config in by_stage[stage]
                    if (key := run_key(config)) not in results
                ]
                engine.run(jobs, problem, lambda key, steps: watcher.advance(every[key], steps), done)
                if failures:
                    raise _failed(failures)
    return results


def try_grid(
    experiment: Experiment, folder: GridFolder, problem: Problem, **more: Any
) -> tuple[dict[str, Result], FailedRunsError | None]:
    """As `run_grid`, but where runs failed or a watcher stopped the grid, too: what is finished, and what failed."""
    error = None
    try:
        run_grid(experiment, folder, problem, **more)
    except StoppedError:
        pass
    except FailedRunsError as failed:
        error = failed
    return folder.load([*experiment.single_task_runs(problem.task_names), *experiment.method_runs()]), error


def _failed(failures: Sequence[tuple[RunConfig, Outcome]]) -> FailedRunsError:
    text = "\n".join(f"{run_label(config)}: {outcome.error}" for config, outcome in failures)
    frames = next((outcome.frames for _, outcome in failures if outcome.frames), "")
    return FailedRunsError(text, [(config, outcome.error) for config, outcome in failures], frames)
