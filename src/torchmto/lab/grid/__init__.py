"""Methods side by side: a grid of Runs over methods and seeds, single-task baselines, one table.

`Experiment` says what is compared, `run_grid` runs it in a folder by an executor (and goes on where an earlier call stopped),
`write_outputs` turns the finished runs into tables and plots.
"""

from torchmto.lab.folders import FolderError
from torchmto.lab.grid.experiment import Experiment
from torchmto.lab.grid.folder import GridFolder
from torchmto.lab.grid.outputs import write_outputs
from torchmto.lab.grid.runner import FailedRunsError, run_grid
from torchmto.lab.grid.summary import summarize

__all__ = [
    "Experiment",
    "FailedRunsError",
    "FolderError",
    "GridFolder",
    "run_grid",
    "summarize",
    "write_outputs",
]
