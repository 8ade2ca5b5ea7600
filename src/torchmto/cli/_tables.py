"""Metrics as plain text."""

from collections.abc import Mapping
from typing import Any

from torchmto._layout import BOUNDLESS, plain_table

COLUMNS = {
    "validation_untrained": "val., untrained",
    "validation": "validation",
    "test": "test",
    "metrics": "value",
}
"""Entries of results that are metrics, and their headings."""
ROWS = 24
"""Tasks up to which every metric has a line; of more tasks only the primary metrics are shown, of the first of them."""


def metric_table(results: Mapping[str, Any], width: int = BOUNDLESS) -> str:
    """Metrics by task and split.

    Args:
        results: Some of the entries of `COLUMNS`, each task -> metric -> value; and ``primary``, task -> the metric that
            stands for it, which gets an asterisk.
        width: Columns of the terminal.

    Example:
        >>> print(metric_table({"test": {"depth": {"rmse": 0.5}}, "primary": {"depth": "rmse"}}))
        metric       test
        depth rmse*   0.5
    """
    columns = [name for name in COLUMNS if results.get(name)]
    metrics = results[columns[-1]]
    primary = results["primary"]
    many = len(metrics) > ROWS
    names = [(task, name) for task, values in metrics.items() for name in values if not many or name == primary[task]]
    rows = [["metric", *(COLUMNS[name] for name in columns)]]
    for task, name in names[:ROWS] if many else names:
        label = f"{task} {name}{'*' if primary[task] == name else ''}"
        rows.append([label, *(f"{results[column][task][name]:.4g}" for column in columns)])
    more = f"\n... and {len(names) - ROWS} more tasks" if many else ""
    return plain_table(rows, width) + more
