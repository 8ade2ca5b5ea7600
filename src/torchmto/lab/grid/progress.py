"""Progress of a comparison on the terminal: one bar for the grid with the time left, one per run."""

from collections.abc import Sequence
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from torchmto.lab.grid.experiment import Experiment, is_single_task, run_label
from torchmto.lab.grid.identity import run_key
from torchmto.lab.grid.runner import Watcher
from torchmto.lab.problem import Problem
from torchmto.lab.run.config import RunConfig
from torchmto.lab.specs import MethodSpec
from torchmto.lab.terminal import make_console


def work(config: RunConfig, num_tasks: int) -> float:
    """What a batch of a run costs, roughly, in forward passes of one model; a backward counts two."""
    if is_single_task(config):
        return 3.0
    try:
        cost = MethodSpec(config.method.name, config.method.options).make().cost(num_tasks)
    except (TypeError, ValueError):  # needs hyper-parameters that only the run knows
        return 3.0 * num_tasks
    return cost.num_forward + 2.0 * cost.num_backward


def progress_bars(experiment: Experiment, problem: Problem) -> "ProgressBars":
    """Bars for a comparison, on a terminal or in a notebook; lines elsewhere."""
    run = experiment.run
    steps = len(problem.loader("train", run.data.batch_size or 1)) // run.accumulate
    return ProgressBars(make_console(180), len(problem.task_names), (run.epochs or 1) * steps)


class ProgressBars(Watcher):
    """Draws bars; on something that isn't a terminal prints a line per finished run.

    Args:
        console: Where to draw.
        num_tasks: Tasks of a multi-task run.
        batches: Batches of a run.
    """

    def __init__(self, console: Console, num_tasks: int, batches: int) -> None:
        self.console = console
        self.finished = 0
        self.total = 0
        self._batches = batches
        self._num_tasks = num_tasks
        self._bars: dict[str, TaskID] = {}
        self._done: dict[str, int] = {}
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=False),
            console=console,
            speed_estimate_period=120,
            transient=True,
        )

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def plan(self, runs: Sequence[RunConfig], finished: Sequence[RunConfig]) -> None:
        """Set up the bar of the grid, in place of an earlier one's: tuning watches a grid per round."""
        for task in self._progress.task_ids:
            self._progress.remove_task(task)
        self._bars.clear()
        self._done.clear()
        self.total, self.finished = len(runs), len(finished)
        left = [config for config in runs if config not in finished]
        if finished and left:
            self.console.print(f"Going on: {len(finished)} of {len(runs)} runs are finished already.")
        self._grid = self._progress.add_task(
            self._title(), total=sum(work(config, self._num_tasks) for config in left) * self._batches or 1
        )

    def _title(self) -> str:
        return f"{self.finished} of {self.total} runs"

    def advance(self, config: RunConfig, batches: int) -> None:
        """Move the run's bar and the grid's."""
        key = run_key(config)
        if batches <= self._done.get(key, 0):  # a report may be overtaken by the run's end
            return
        if key not in self._bars:
            self._bars[key] = self._progress.add_task(run_label(config), total=self._batches)
        self._progress.update(self._bars[key], completed=batches)
        new = batches - self._done.get(key, 0)
        self._done[key] = batches
        self._progress.advance(self._grid, new * work(config, self._num_tasks))

    def finish(self, config: RunConfig, result: dict[str, Any]) -> None:
        """Remove the run's bar."""
        self.advance(config, self._batches)
        if (bar := self._bars.pop(run_key(config), None)) is not None:  # none where a Run has no step
            self._progress.remove_task(bar)
        self.finished += 1
        self._progress.update(self._grid, description=self._title())
        if not self.console.is_terminal:
            self.console.print(f"{self.finished:>4} of {self.total}  {run_label(config)}  {result['seconds']:.1f} s")
