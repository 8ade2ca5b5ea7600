"""The table of a comparison: on the terminal, as Markdown and as CSV."""

import csv
import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["csv_text", "header", "markdown", "rich_table", "rows"]

Summary = Mapping[str, Any]


def header(summary: Summary) -> list[str]:
    """Titles of the columns; an arrow says which way a metric is better."""
    titles = ["method", "Δm %"]
    for name, task in summary["tasks"].items():
        metric = task["primary_metric"]
        arrow = "↑" if task["metrics"][metric]["higher_is_better"] else "↓"
        titles.append(f"{name} {metric} {arrow}")
    return [*titles, "forwards", "backwards", "steps", "ms/batch", "peak MB"]


def rows(summary: Summary) -> list[list[str]]:
    """The cells, single-task models first; means over seeds, ± is the 95 % CI for Δm, else the standard deviation."""
    table = [_row("single-task", summary["single_task"], summary, "0")]
    for name, method in summary["methods"].items():
        table.append(_row(name, method, summary, _delta(method["delta_m"])))
    return table


def _row(name: str, entry: Mapping[str, Any], summary: Summary, delta: str) -> list[str]:
    cells = [name, delta]
    for task, about in summary["tasks"].items():
        cells.append(_mean_std(entry["tasks"][task][about["primary_metric"]]))
    cost = entry["cost"]
    peak = cost["peak_memory_bytes"]
    return [
        *cells,
        *(f"{cost[key]:.3g}" for key in ("num_forward", "num_backward", "num_optimizer_steps")),
        f"{1000 * cost['seconds_per_batch']:.1f}",
        "-" if peak is None else f"{peak / 1e6:.0f}",
    ]


def _delta(delta: Mapping[str, Any] | None) -> str:
    if delta is None:
        return "-"
    interval = "" if delta["ci95"] is None else f" ± {delta['ci95']:.2f}"
    return f"{delta['mean']:+.2f}{interval}"


def _mean_std(figure: Mapping[str, float | None]) -> str:
    return "-" if figure["mean"] is None else f"{figure['mean']:.3f} ± {figure['std']:.3f}"


def notes(summary: Summary) -> list[str]:
    """What a reader needs to know to read the table."""
    config = summary["config"]
    settings = (
        f"{config['data']}, model {config['model']}, {config['epochs']} epochs, batches of {config['batch_size']}, "
        f"{config['seeds']} seed{'s' if config['seeds'] > 1 else ''}. Test split; the epoch is chosen on the "
        "validation split."
    )
    legend = (
        "Δm: mean relative change to single-task models of the same seed, ± 95 % confidence interval; task metrics "
        "± standard deviation. Passes and steps are per batch; for single-task models summed over the tasks."
    )
    lines = [settings, legend]
    lines += [
        f"No Δm for {name}: {method['reason']}"
        for name, method in summary["methods"].items()
        if method["delta_m"] is None
    ]
    return lines


def rich_table(summary: Summary) -> "Table":
    """For the terminal."""
    from rich.table import Table  # noqa: PLC0415

    table = Table(caption="\n".join(notes(summary)), caption_justify="left")
    for position, title in enumerate(header(summary)):
        table.add_column(title, justify="right" if position else "left", no_wrap=position > 0)
    for row in rows(summary):
        table.add_row(*row)
    return table


def markdown(summary: Summary) -> str:
    """A Markdown page with the table."""
    titles = header(summary)
    lines = ["| " + " | ".join(titles) + " |", "|" + "|".join(["---", *["---:"] * (len(titles) - 1)]) + "|"]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows(summary)]
    made_with = ", ".join(f"{name} {version}" for name, version in summary["versions"].items())
    return "\n".join([*lines, "", *(f"{line}\n" for line in notes(summary)), f"Made with {made_with}.", ""])


def csv_text(summary: Summary) -> str:
    """One line per method, task and metric, and per method and cost, with full precision."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["method", "task", "quantity", "mean", "spread", "spread_is"])
    for name, entry in {"single_task": summary["single_task"], **summary["methods"]}.items():
        delta = entry.get("delta_m")
        if delta is not None:
            writer.writerow([name, "", "delta_m", delta["mean"], delta["ci95"], "ci95"])
        for task, metrics in entry["tasks"].items():
            for metric, figure in metrics.items():
                writer.writerow([name, task, metric, figure["mean"], figure["std"], "std"])
        for quantity, value in entry["cost"].items():
            writer.writerow([name, "", quantity, value, "", ""])
    return text.getvalue()
