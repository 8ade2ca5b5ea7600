"""Methods side by side: a grid of runs over methods and seeds, single-task baselines, one table.

`Experiment` says what is compared, `compare` runs it in a folder (and goes on where an earlier call stopped),
`write_outputs` turns the finished runs into tables and plots.
"""

from torchmto.lab.compare.experiment import Experiment, default_experiment
from torchmto.lab.compare.folder import FolderError, RunFolder
from torchmto.lab.compare.outputs import write_outputs
from torchmto.lab.compare.runner import FailedRunsError, compare, default_jobs
from torchmto.lab.compare.summary import summarize

__all__ = [
    "Experiment",
    "FailedRunsError",
    "FolderError",
    "RunFolder",
    "compare",
    "default_experiment",
    "default_jobs",
    "summarize",
    "write_outputs",
]
