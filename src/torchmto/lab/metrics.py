"""Streaming metrics of the lab's tasks, exact over batches and over processes.

Every metric is a `torchmetrics.Metric`: ``update(prediction, target)`` takes what the model puts out (logits
where the kind has logits) and the target with its missing entries, ``compute()`` gives the figure over
everything seen, by all processes. Its state is sums and counts over the data set, never means of means, so
neither the batch size nor the number of processes changes a figure. Shares are fractions in ``[0, 1]``,
angles are degrees, depth errors have the target's unit.

================  ==========================================================================
kind              metrics, the one that stands for the task in `torchmto.metrics.delta_m` first
================  ==========================================================================
classification    accuracy, f1 (mean over classes)
binary            accuracy, f1, auroc (over all answers)
regression        rmse, mae, r2 (mean over outputs)
segmentation      mIoU, pixel_accuracy, mean_accuracy
depth             rmse, abs_error, rel_error, delta1, delta2, delta3
normals           mean_angle, median_angle, within_11.25, within_22.5, within_30
edges             odsF
saliency          mIoU, maxF
map               rmse, mae
================  ==========================================================================
"""

from typing import TYPE_CHECKING

from torchmto.lab.data.base import Task

if TYPE_CHECKING:
    from torchmetrics import Metric

_METRICS = {
    "classification": ("accuracy", "f1"),
    "binary": ("accuracy", "f1", "auroc"),
    "regression": ("rmse", "mae", "r2"),
    "segmentation": ("mIoU", "pixel_accuracy", "mean_accuracy"),
    "depth": ("rmse", "abs_error", "rel_error", "delta1", "delta2", "delta3"),
    "normals": ("mean_angle", "median_angle", "within_11.25", "within_22.5", "within_30"),
    "edges": ("odsF",),
    "saliency": ("mIoU", "maxF"),
    "map": ("rmse", "mae"),
    "own": (),
}
"""Kind -> metrics; the first is the one of delta_m."""
_LOWER = frozenset({"rmse", "mae", "abs_error", "rel_error", "mean_angle", "median_angle"})
"""The metrics of which lower values are better."""


def metric_names(kind: str) -> tuple[str, ...]:
    """Names of a kind's metrics.

    Example:
        >>> metric_names("map")
        ('rmse', 'mae')
    """
    return _METRICS[kind]


def task_metrics(task: Task) -> "dict[str, Metric]":
    """New metrics of one task, by name, as listed in this module's docstring.

    Args:
        task: The task.

    Returns:
        Metrics with empty state. A ``MetricCollection`` of them needs ``compute_groups=False``: it takes
        metrics whose states are equal after one batch, as two thresholds may be, for one metric.

    >>> task = Task("depth", "depth", 1)
    >>> metrics = task_metrics(task)
    >>> import torch
    >>> metrics["rmse"].update(torch.full((1, 1, 2, 2), 3.0), torch.tensor([[[[1.0, 1.0], [1.0, 0.0]]]]))
    >>> float(metrics["rmse"].compute())
    2.0
    """
    if "metrics" in task.extra:
        own = {name: metric.clone() for name, metric in task.extra["metrics"].items()}
        for metric in own.values():
            metric.reset()
        return own
    from torchmto.lab.streaming import METRICS  # noqa: PLC0415  torchmetrics takes seconds to import

    return {name: make(task) for name, make in METRICS[task.kind].items()}


def primary_metric(task: Task) -> tuple[str, bool]:
    """The one metric that stands for a task in `torchmto.metrics.delta_m`.

    The choice is the literature's: mIoU, rmse of depth, mean angle, odsF, accuracy, and rmse rather than R²
    for regression, as R² may be 0 or negative. Saliency takes mIoU as in Jeong and Yoon, CVPR 2024; others
    take maxF, which ``Task(..., extra={"primary_metric": "maxF"})`` selects.

    Args:
        task: The task; its ``extra["primary_metric"]`` may name another of its metrics.

    Returns:
        The metric's name, and whether higher is better.

    Raises:
        ValueError: If the task has no metric of that name.

    >>> primary_metric(Task("depth", "depth", 1))
    ('rmse', False)
    """
    known = {metric: metric not in _LOWER for metric in _METRICS[task.kind]} | task.extra.get("directions", {})
    name = task.extra.get("primary_metric", next(iter(known), None))
    if name not in known:
        raise ValueError(
            f"`primary_metric` of the {task.kind} task `{task.name}` should be one of {', '.join(known) or 'its own'}. "
            f"Found {name!r}."
        )
    return name, known[name]


def higher_is_better(task: Task, metric: str) -> bool:
    """Whether a higher value of a task's metric is better; of an own metric that nobody says it of, lower is."""
    own: dict[str, bool] = task.extra.get("directions", {})
    return own.get(metric, metric in _METRICS[task.kind] and metric not in _LOWER)


def chance_level(task: Task, metric: str) -> float | None:
    """What a model reaches without looking at its input, of the kinds' own metrics that tell it; None for others.

    Example:
        >>> chance_level(Task("digit", "classification", 10), "accuracy")
        0.1
    """
    if "metrics" in task.extra:
        return None
    share = 1 / task.channels
    classes = {"accuracy": share, "f1": share, "mIoU": share, "mean_accuracy": share}
    known = {"classification": classes, "segmentation": classes, "binary": {"auroc": 0.5}, "regression": {"r2": 0.0}}
    return known.get(task.kind, {}).get(metric)
