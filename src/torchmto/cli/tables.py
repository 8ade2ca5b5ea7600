"""Results as plain text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

COLUMNS = {
    "validation_untrained": "untrained (val)",
    "validation": "validation",
    "test_untrained": "untrained",
    "test": "test",
}
ROWS = 24
"""Tasks up to which every metric has a line; with more only the primary ones are shown, the first of them."""


def metric_table(results: Mapping[str, Any]) -> str:
    """Metrics by task and split.

    Args:
        results: Some of ``validation_untrained``, ``validation``, ``test``, each task -> metric -> value; and ``primary``,
            task -> the metric that stands for it, which gets an asterisk.

    Example:
        >>> print(metric_table({"test": {"depth": {"rmse": 0.5}}, "primary": {"depth": "rmse"}}))
        metric         test
        depth rmse*     0.5
    """
    columns = [name for name in COLUMNS if results.get(name)]
    metrics = results[columns[-1]]
    primary = results["primary"]
    many = len(metrics) > ROWS
    names = [(task, name) for task, values in metrics.items() for name in values if not many or name == primary[task]]
    shown = names[:ROWS] if many else names
    rows = [["metric", *(COLUMNS[name] for name in columns)]]
    for task, name in shown:
        label = f"{task} {name}{'*' if primary[task] == name else ''}"
        rows.append([label, *(f"{results[column][task][name]:.4g}" for column in columns)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            [
                row[0].ljust(widths[0]),
                *(cell.rjust(max(width, 7)) for cell, width in zip(row[1:], widths[1:], strict=True)),
            ]
        )
        for row in rows
    ]
    if len(names) > len(shown):
        lines.append(f"... {len(names) - len(shown)} more tasks in the results file")
    return "\n".join(lines)
