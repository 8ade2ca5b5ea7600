"""PNG plots of a comparison: learning curves, priority shares, affinities, groups."""

import io
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from torchmto.lab.grid.noise import noise_floor
from torchmto.lab.run.pictures import literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Result = Mapping[str, Any]
_COLUMN = 3.6
"""Width of one panel in inches."""


def plots(summary: Mapping[str, Any], results: Mapping[str, Result]) -> dict[str, bytes]:
    """The plots there is something to show in, as file name -> PNG.

    Args:
        summary: The figures of a comparison.
        results: Every run by its key.
    """
    tasks = list(summary["tasks"])
    runs = {name: [results[key] for key in keys] for name, keys in summary["runs"].items()}
    figures = {"learning_curves": _learning_curves(summary, runs)}
    for method in summary["methods"]:
        slug = "".join(letter if letter.isalnum() else "_" for letter in method)[:60].strip("_")
        for name, draw in (("priority_shares", _priority_shares), ("affinity", _affinity), ("groups", _groups)):
            if list(_traced(runs[method][0], name)):
                figures[f"{name}-{slug}"] = draw(method, tasks, runs[method])
    return {f"{name}.png": picture(figure) for name, figure in figures.items()}


def delta_m_figure(summary: Mapping[str, Any], task: str | None = None) -> "Figure":
    """The methods' Δm with intervals and seeds, or a task's primary metric with its standard deviation over seeds."""
    methods = summary["methods"]
    figure, (axis,) = _figure(1, 1.2 + 0.35 * len(methods))
    for place, entry in enumerate(methods.values()):
        if task is None:
            delta = entry["delta_m"]
            if delta is not None:
                axis.errorbar(delta["mean"], place, xerr=delta["ci95"] or 0.0, fmt="o", color="C0", capsize=3)
                axis.plot(delta["per_seed"], [place] * len(delta["per_seed"]), ".", color="C1", markersize=4)
            continue
        value = entry["tasks"][task][summary["tasks"][task]["primary_metric"]]
        if value["mean"] is not None:
            axis.errorbar(value["mean"], place, xerr=value["std"] or 0.0, fmt="o", color="C0", capsize=3)
    if task is None:
        axis.axvline(0, color="black", linewidth=0.8)
    shown = [name if len(name) < 44 else f"{name[:41]}..." for name in methods]
    axis.set_yticks(range(len(methods)), list(map(literal, shown)))
    axis.invert_yaxis()
    label = "Δm %, mean, 95 % interval, seeds" if task is None else f"{task} {summary['tasks'][task]['primary_metric']}"
    axis.set(xlabel=literal(label))
    axis.grid(alpha=0.3)
    return figure


def _figure(columns: int, height: float = 3.0) -> "tuple[Figure, list[Axes]]":
    from matplotlib.figure import Figure  # noqa: PLC0415  without pyplot no display is needed

    figure = Figure(figsize=(_COLUMN * max(columns, 1.4), height), layout="constrained")
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])


def picture(figure: "Figure", kind: str = "png") -> bytes:
    """A figure as ``png`` or ``svg``, the same file for the same figure."""
    data = io.BytesIO()
    figure.savefig(data, format=kind, dpi=130, metadata={"png": {"Software": None}, "svg": {"Date": None}}[kind])
    return data.getvalue()


def _traced(run: Result, name: str) -> Iterator[tuple[int, Any]]:
    """(step, value) of everything the method recorded under a name."""
    for point in run["trace"]:
        if name in point["records"]:
            yield point["step"], point["records"][name]


def _learning_curves(summary: Mapping[str, Any], runs: Mapping[str, Sequence[Result]]) -> "Figure":
    tasks = summary["tasks"]
    figure, axes = _figure(len(tasks), 3.4)
    for axis, (task, about) in zip(axes, tasks.items(), strict=True):
        metric = about["primary_metric"]
        singles = runs.get(f"single:{task}", ())
        for label, seeds in {"single-task": singles, **{name: runs[name] for name in summary["methods"]}}.items():
            values = [[epoch["validation"][task][metric] for epoch in run["history"]] for run in seeds]
            style: dict[str, Any] = {"color": "black", "linestyle": "--"} if label == "single-task" else {}
            if values:
                mean = np.array(values, dtype=float).mean(axis=0)
                axis.plot(np.arange(1, len(mean) + 1), mean, marker=".", label=literal(label), **style)
        axis.set(title=literal(task), xlabel="epoch", ylabel=literal(f"validation {metric}"))
        axis.locator_params(axis="x", integer=True)
        axis.grid(alpha=0.3)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize="small")
    return figure


def _priority_shares(method: str, tasks: Sequence[str], seeds: Sequence[Result]) -> "Figure":
    figure, (axis,) = _figure(1)
    for task in tasks:
        series = [[value.get(task, np.nan) for _, value in _traced(run, "priority_shares")] for run in seeds]
        steps = [step for step, _ in _traced(seeds[0], "priority_shares")]
        length = min(len(values) for values in series)
        array = np.array([values[:length] for values in series], dtype=float)
        axis.plot(steps[:length], array.mean(axis=0), label=literal(task))
        axis.fill_between(steps[:length], array.min(axis=0), array.max(axis=0), alpha=0.2)
    axis.set(title=literal(method), xlabel="step", ylabel="share of channels led", ylim=(0, 1))
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")
    return figure


def _affinity(method: str, tasks: Sequence[str], seeds: Sequence[Result]) -> "Figure":
    last = [list(_traced(run, "affinity"))[-1][1] for run in seeds]
    matrix = np.array(last, dtype=float).mean(axis=0)
    floor = noise_floor(point["records"] for run in seeds for point in run["trace"])
    figure, (axis,) = _figure(1, 3.4)
    limit = float(np.nanmax(np.abs(matrix))) or 1.0
    image = axis.imshow(matrix, cmap="RdBu", vmin=-limit, vmax=limit)
    for row, column in np.ndindex(*matrix.shape) if len(tasks) <= 12 else ():
        shade = "white" if abs(matrix[row, column]) > 0.6 * limit else "black"
        text = f"{matrix[row, column]:.1e}"
        text = f"({text})" if abs(matrix[row, column]) < (floor or {}).get(tasks[column], 0.0) else text
        axis.text(column, row, text, ha="center", va="center", fontsize=7, color=shade)
    names = list(map(literal, tasks))
    axis.set_xticks(range(len(tasks)), names, rotation=30, ha="right")
    axis.set_yticks(range(len(tasks)), names)
    about = "no noise floor was measured" if floor is None else "(…): below the noise floor of one batch"
    axis.set(title=literal(f"{method}: affinity at the end"), xlabel=f"effect on\n{about}", ylabel="step of")
    figure.colorbar(image, ax=axis, shrink=0.8)
    return figure


def _groups(method: str, tasks: Sequence[str], seeds: Sequence[Result]) -> "Figure":
    figure, axes = _figure(len(seeds), 0.8 + 0.3 * max(len(tasks), 4))
    for seed, (axis, run) in enumerate(zip(axes, seeds, strict=True)):
        points = list(_traced(run, "groups"))
        picture = np.full((len(tasks), len(points)), np.nan)
        for column, (_, groups) in enumerate(points):
            for number, group in enumerate(sorted(groups, key=lambda members: min(tasks.index(m) for m in members))):
                for member in group:
                    picture[tasks.index(member), column] = number
        edges = [0, *(step for step, _ in points)]
        axis.pcolormesh(edges, range(len(tasks) + 1), picture, cmap="tab10", vmin=-0.5, vmax=9.5)
        axis.set_yticks([row + 0.5 for row in range(len(tasks))], list(map(literal, tasks)))
        axis.invert_yaxis()
        axis.set(title=f"seed {seed}", xlabel="step")
    figure.suptitle(literal(f"{method}: tasks of one colour are one group"))
    return figure
