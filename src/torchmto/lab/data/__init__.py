"""Data sets for multi-task learning: one interface, three splits each, batches that resume bit for bit."""

from torchmto.lab.data.base import (
    SPLITS,
    Batch,
    Kind,
    MultiTaskDataset,
    Split,
    Task,
    TensorData,
    labelled_tasks,
)
from torchmto.lab.data.loading import BatchPlan, Loader
from torchmto.lab.data.registry import DatasetInfo, dataset_info, datasets, load_data

__all__ = [
    "SPLITS",
    "Batch",
    "BatchPlan",
    "DatasetInfo",
    "Kind",
    "Loader",
    "MultiTaskDataset",
    "Split",
    "Task",
    "TensorData",
    "dataset_info",
    "datasets",
    "labelled_tasks",
    "load_data",
]
