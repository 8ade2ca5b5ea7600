"""The table of a comparison: on the terminal, as Markdown and as CSV."""

import csv
import io
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torchmto.lab.terminal import FramedTable, Table

Summary = Mapping[str, Any]
MOST_COLUMNS = 6


def main_table(summary: Summary) -> FramedTable:
    """One row per method; an arrow says which way a metric is better."""
    titles = [] if many_tasks(summary) else [_title(name, task) for name, task in summary["tasks"].items()]
    header = ["method", "Δm %", *titles, "forwards", "backwards", "steps", "ms/batch", "peak MB"]
    return FramedTable("", header, rows(summary), notes(summary))


def rows(summary: Summary) -> list[list[str]]:
    """The cells, single-task models first; means over seeds, ± is the 95 % CI for Δm, else the standard deviation."""
    single = summary["single_task"]
    table = [] if single is None else [_row("single-task", single, summary, "0")]
    for name, method in summary["methods"].items():
        table.append(_row(name, method, summary, _delta(method["delta_m"])))
    return table


def many_tasks(summary: Summary) -> bool:
    """Whether there are too many tasks for a column each; they then have a table of their own, a row each."""
    return len(summary["tasks"]) > MOST_COLUMNS


def task_table(summary: Summary) -> FramedTable:
    """One row per task, for many of them."""
    single = [] if summary["single_task"] is None else ["single-task"]
    return FramedTable("", ["task", *single, *summary["methods"]], task_rows(summary))


def task_rows(summary: Summary) -> list[list[str]]:
    """Cells of the table of many tasks."""
    entries = [entry for entry in (summary["single_task"], *summary["methods"].values()) if entry is not None]
    return [
        [_title(name, task), *(_mean_std(entry["tasks"][name][task["primary_metric"]], summary) for entry in entries)]
        for name, task in summary["tasks"].items()
    ]


def _title(name: str, task: Mapping[str, Any]) -> str:
    metric = task["primary_metric"]
    return f"{name} {metric} {'↑' if task['metrics'][metric]['higher_is_better'] else '↓'}"


def _row(name: str, entry: Mapping[str, Any], summary: Summary, delta: str) -> list[str]:
    tasks = {} if many_tasks(summary) else summary["tasks"]
    cost = entry["cost"]
    peak = cost["peak_memory_bytes"]
    return [
        name,
        delta,
        *(_mean_std(entry["tasks"][task][about["primary_metric"]], summary) for task, about in tasks.items()),
        *(f"{cost[key]:.3g}" for key in ("num_forward", "num_backward", "num_optimizer_steps")),
        f"{1000 * cost['seconds_per_batch']:.1f}",
        "-" if peak is None else f"{peak / 1e6:.0f}",
    ]


def _delta(delta: Mapping[str, Any] | None) -> str:
    if delta is None:
        return "-"
    interval = "" if delta["ci95"] is None else f" ± {delta['ci95']:.2f}"
    return f"{delta['mean']:+.2f}{interval}"


def _mean_std(figure: Mapping[str, float | None], summary: Summary) -> str:
    if figure["mean"] is None:
        return "-"
    spread = f" ± {figure['std']:.3f}" if summary["config"]["seeds"] > 1 else ""
    return f"{figure['mean']:.3f}{spread}"


def versus_table(summary: Summary) -> Table:
    """Differences to the reference, paired by seed, ± is the 95 % CI; ranks are over tasks and seeds."""
    versus = summary["versus"]
    ranks = versus["ranks"]["tasks"]
    header = ["method", f"Δm minus {versus['reference']}", "p (Holm)", "wins-ties-losses", "mean rank"]
    cells = [
        [
            name,
            _delta(entry["delta_m"]),
            _p(entry["delta_m"]),
            "-".join(map(str, entry["wins_ties_losses"])),
            "-" if ranks is None else f"{ranks['average'][name]:.2f}",
        ]
        for name, entry in versus["methods"].items()
    ]
    return Table("", header, cells)


def _p(difference: Mapping[str, Any] | None) -> str:
    return "-" if difference is None or difference["p_holm"] is None else f"{difference['p_holm']:.4f}"


def notes(summary: Summary) -> list[str]:
    """What a reader needs to know to read the table."""
    config = summary["config"]
    data, model = config["data"], config["model"]
    settings = (
        f"{data['name']}, model {model['name'] or 'its own'}, {config['epochs']} epochs, {batches(summary)}, "
        f"{config['seeds']} seed{'s' if config['seeds'] > 1 else ''}. {selection(summary)}"
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
    return lines + caveats(summary)


def batches(summary: Summary) -> str:
    """What batches are made of: those of some problems come ready-made."""
    ready = summary.get("problem", {}).get("ready_batches", False)
    return "batches of its own" if ready else f"batches of {summary['config']['data']['batch_size']}"


def selection(summary: Summary) -> str:
    """What the figures are of, and at which epoch."""
    if summary.get("problem", {}).get("evaluate", False):
        return "Figures are what the problem's own `evaluate` gives after the last epoch."
    return "Test split; the epoch is chosen on the validation split."


def caveats(summary: Summary) -> list[str]:
    """Names the methods that are left out, and the Runs whose epoch couldn't be chosen, in a line each, if there are any."""
    left_out = summary.get("unfinished", ())
    lines = [f"Left out, as Runs of theirs failed: {', '.join(left_out)}."] if left_out else []
    runs = [
        f"{name.replace('single:', 'single-task ', 1)} (seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))})"
        for name, seeds in summary.get("undecided", {}).items()
    ]
    told = "No score on the validation split tells the epochs of these Runs apart, so the last one counts"
    return [*lines, *([f"{told}: {', '.join(runs)}."] if runs else [])]


def rich_tables(summary: Summary) -> list[FramedTable]:
    """For the terminal: the table, after that of the tasks where there are many."""
    return [*([task_table(summary)] if many_tasks(summary) else []), main_table(summary)]


def markdown(summary: Summary) -> str:
    """A Markdown page with the table, one of the tasks where there are many, and one of differences to the reference."""
    made_with = ", ".join(f"{name} {version}" for name, version in summary["versions"].items())
    main = main_table(summary)
    tables: list[Table] = [replace(main, notes=())]
    lines = [*main.notes]
    if many_tasks(summary):
        tables.append(task_table(summary))
    if len(summary["methods"]) > 1:
        tables.append(versus_table(summary))
        lines.append(
            "Differences are paired by seed; p values are of paired t tests, corrected for their number by Holm; wins, ties "
            "and losses count tasks and seeds, ranks are means over both."
        )
    pages = [table.markdown() for table in tables]
    return "\n".join([*pages, *(f"{line}\n" for line in lines), f"Made with {made_with}.", ""])


def csv_text(summary: Summary) -> str:
    """One line per method, task and metric, and per method and cost, with full precision."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["method", "task", "quantity", "mean", "spread", "spread_is"])
    for name, entry in {"single_task": summary["single_task"], **summary["methods"]}.items():
        if entry is None:
            continue
        delta = entry.get("delta_m")
        if delta is not None:
            writer.writerow([name, "", "delta_m", delta["mean"], delta["ci95"], "ci95"])
        for task, metrics in entry["tasks"].items():
            for metric, figure in metrics.items():
                writer.writerow([name, task, metric, figure["mean"], figure["std"], "std"])
        for quantity, value in entry["cost"].items():
            writer.writerow([name, "", quantity, value, "", ""])
    return text.getvalue()
