"""Data sets for multi-task learning: one interface, three splits each, batches that resume bit for bit."""

from torchmto.lab.data.base import Batch, Task, labelled_tasks
from torchmto.lab.data.registry import dataset_info, datasets, load_data

__all__ = ["Batch", "Task", "dataset_info", "datasets", "labelled_tasks", "load_data"]
