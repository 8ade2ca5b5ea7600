"""What a step costs: time and memory of every method over tasks, batch sizes and model sizes."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from torchmto.lab.memory import PeakMemory
from torchmto.lab.reproduce.findings import Findings, Table, number
from torchmto.lab.reproduce.recipe import method_settings
from torchmto.lab.reproduce.studies.context import Context
from torchmto.lab.reproduce.studies.copies import with_copies
from torchmto.lab.reproduce.units import complete, run_units
from torchmto.lab.run.build import build, problem_of
from torchmto.lab.run.config import RunConfig, config_of
from torchmto.lab.run.random_state import seed_everything
from torchmto.methods import methods

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["run"]

NEED_ARGUMENTS = frozenset({"static", "constant"})


def run(context: Context) -> Findings:
    """Time steps on one batch."""
    options = {
        "steps": 12,
        "num_tasks": [5, 11],
        "batch_size": [64],
        "width": [16],
        "all_methods": False,
        **context.recipe.options,
    }
    units: dict[str, dict[str, Any]] = {}
    for arm in context.recipe.arms:
        base = context.recipe.run_config(arm, context.data_root)
        chosen = sorted(set(methods()) - NEED_ARGUMENTS) if options["all_methods"] else arm.methods
        for tasks in options["num_tasks"]:
            for batch_size in options["batch_size"]:
                for width in options["width"]:
                    for method in chosen:
                        name = f"{method} K={tasks} batch={batch_size} width={width}"
                        units[name] = {
                            "config": method_settings(base, method, batch_size=batch_size),
                            "method": method,
                            "batch_size": batch_size,
                            "num_tasks": tasks,
                            "width": width,
                            "steps": options["steps"],
                        }
    results = run_units(context.folder / "units", units, _time_steps, budget=context.budget, say=context.say)
    findings = Findings(numbers={"units": results}, complete=complete(units, results))
    findings.notes.append(
        f"Median over {options['steps']} steps on one batch after two of warm-up, {torch.get_num_threads()} threads, on a "
        "machine that may be doing other things: compare within a column. Memory: rise of the process's resident peak."
    )
    by_size: dict[tuple[int, int, int], dict[str, Mapping[str, Any]]] = {}
    for name, result in results.items():
        unit = units[name]
        size = unit["num_tasks"], unit["batch_size"], unit["width"]
        by_size.setdefault(size, {})[unit["method"]] = result
    findings.tables.append(_table(by_size))
    if by_size:
        findings.figures["time"] = _figure(by_size)
    return findings


def _time_steps(parameters: Mapping[str, Any]) -> dict[str, Any]:
    width = parameters["width"]
    options = {"model.options": {"widths": [width, 2 * width, 4 * width]}, "epochs": 1}
    problem, config = problem_of(config_of(options, RunConfig.from_dict(parameters["config"])))
    problem = with_copies(problem, parameters["num_tasks"])
    memory = PeakMemory()
    seed_everything(config.seed)
    parts = build(config, problem)
    batch = next(iter(parts.loader.epoch(0)))
    parts.model.train()
    seconds = []
    for step in range(parameters["steps"] + 2):
        began = time.perf_counter()
        info = parts.multitask.step(parts.closure(batch))
        parts.scheduler.step()
        if step >= 2:
            seconds.append(time.perf_counter() - began)
    return {
        "median": float(np.median(seconds)),
        "quartiles": np.quantile(seconds, [0.25, 0.75]).tolist(),
        "peak_memory_bytes": memory.bytes(),
        "num_forward": info.num_forward,
        "num_backward": info.num_backward,
        "num_optimizer_steps": info.num_optimizer_steps,
    }


def _table(by_size: Mapping[tuple[int, int, int], Mapping[str, Mapping[str, Any]]]) -> Table:
    names = sorted({method for entry in by_size.values() for method in entry})
    header = ["method"]
    for tasks, batch, width in by_size:
        header += [f"K={tasks}, batch {batch}, width {width}: ms", "times gd", "MB"]
    rows = []
    for name in names:
        row = [name]
        for entry in by_size.values():
            if name not in entry:
                row += ["-", "-", "-"]
                continue
            result, gd = entry[name], entry.get("gd")
            peak = result["peak_memory_bytes"]
            row += [
                number(1000 * result["median"], digits=1),
                number(None if gd is None else result["median"] / gd["median"]),
                number(None if peak is None else peak / 1e6, digits=0),
            ]
        rows.append(row)
    return Table("Time per batch", header, rows)


def _figure(by_size: Mapping[tuple[int, int, int], Mapping[str, Mapping[str, Any]]]) -> Figure:
    from matplotlib.figure import Figure  # noqa: PLC0415  without pyplot no display is needed

    names: Sequence[str] = sorted({method for entry in by_size.values() for method in entry})
    figure = Figure(figsize=(8, 1 + 0.22 * len(names)), layout="constrained")
    axis = figure.subplots()
    for size, entry in by_size.items():
        known = [name for name in names if name in entry]
        times = [1000 * entry[name]["median"] for name in known]
        axis.plot(times, [names.index(name) for name in known], "o", label="K={}, batch {}, width {}".format(*size))
    axis.set_yticks(range(len(names)), names, fontsize=7)
    axis.set(xlabel="ms per batch", xscale="log")
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")
    return figure
