"""Task-specific structure of a shared trunk: split norms, channel priorities, task affinities."""

from torchmto.structure.affinity import ProximalAffinity, normalized_affinity
from torchmto.structure.dataflow import Recording, record_dataflow
from torchmto.structure.layers import StructuredLayer
from torchmto.structure.oracle import OraclePriority, oracle_priority
from torchmto.structure.pairing import find_norm_pairs
from torchmto.structure.priority import (
    channel_dots,
    group_coefficients,
    priority_coefficients,
    project_by_priority,
    weighted_channels,
)
from torchmto.structure.recon import TaskSpecific, conflict_scores, make_task_specific
from torchmto.structure.stacked import stacked
from torchmto.structure.strength import (
    connection_strength,
    gradient_strength,
    normalized_strength,
    scaled_strength,
    top_priority,
)
from torchmto.task_norms import (
    SplitNorm,
    active_task,
    active_tasks,
    current_tasks,
    has_split_norms,
    is_norm,
    split_norms,
)
from torchmto.undo import undisturbed

__all__ = [
    "OraclePriority",
    "ProximalAffinity",
    "Recording",
    "SplitNorm",
    "StructuredLayer",
    "TaskSpecific",
    "active_task",
    "active_tasks",
    "channel_dots",
    "conflict_scores",
    "connection_strength",
    "current_tasks",
    "find_norm_pairs",
    "gradient_strength",
    "group_coefficients",
    "has_split_norms",
    "is_norm",
    "make_task_specific",
    "normalized_affinity",
    "normalized_strength",
    "oracle_priority",
    "priority_coefficients",
    "project_by_priority",
    "record_dataflow",
    "scaled_strength",
    "split_norms",
    "stacked",
    "top_priority",
    "undisturbed",
    "weighted_channels",
]
