"""Metrics as a table."""

from collections.abc import Mapping
from typing import Any

from torchmto.lab.terminal import Table

COLUMNS = {
    "validation_untrained": "val., untrained",
    "validation": "validation",
    "test": "test",
    "metrics": "value",
}
"""Entries of results that are metrics, and their headings."""
ROWS = 24
"""Tasks up to which every metric has a line; of more tasks only the primary metrics are shown, of the first of them."""


def metric_table(results: Mapping[str, Any]) -> Table:
    """Metrics by task and split.

    Args:
        results: Some of the entries of `COLUMNS`, each task -> metric -> value; and ``primary``, task -> the metric that
            stands for it, which gets an asterisk.

    Example:
        >>> metric_table({"test": {"depth": {"rmse": 0.5}}, "primary": {"depth": "rmse"}}).rows
        [['depth rmse*', '0.5']]
    """
    columns = [name for name in COLUMNS if results.get(name)]
    metrics = results[columns[-1]]
    primary = results["primary"]
    many = len(metrics) > ROWS
    names = [(task, name) for task, values in metrics.items() for name in values if not many or name == primary[task]]
    rows = []
    for task, name in names[:ROWS] if many else names:
        label = f"{task} {name}{'*' if primary[task] == name else ''}"
        rows.append([label, *(f"{results[column][task][name]:.4g}" for column in columns)])
    more = [f"... and {len(names) - ROWS} more tasks"] if many else []
    return Table("", ["metric", *(COLUMNS[name] for name in columns)], rows, more)
