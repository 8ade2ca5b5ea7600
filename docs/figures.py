"""Draws the figures of the documentation: ``python docs/figures.py [NAME ...]``.

Those of "Concepts" come from short runs on the built-in digits, ``recipe`` from what a run of a recipe left in results/.
"""

from __future__ import annotations

import csv
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import torchmto
from torchmto.lab.memory import tensor_peak
from torchmto.lab.references import build_network, load_problem
from torchmto.structure import has_split_norms, split_norms

HERE = Path(__file__).resolve().parent / "figures"
TASKS = ("left", "right", "offset")
COLOURS = {"left": "#0072B2", "right": "#D55E00", "offset": "#009E73"}
STYLES = {"left": "-", "right": "--", "offset": "-."}
LOSSES = {"left": F.cross_entropy, "right": F.cross_entropy, "offset": F.mse_loss}
EPOCHS = 5


class Run:
    """A network on the digits, one method, and what every step reported."""

    def __init__(self, method: Any, *, split: bool = False) -> None:
        torch.manual_seed(0)
        self.problem = load_problem("digits", {})
        self.model = build_network(self.problem, None, {"widths": [16, 32, 64]})
        if split:
            split_norms(self.model, TASKS)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=3e-3)
        self.mt = torchmto.MultiTask(self.model, self.optimizer, tasks=TASKS, method=method, seed=0)

    def batches(self) -> Iterator[Mapping[str, Any]]:
        """All batches of the run."""
        loader = self.problem.loader("train", 64)
        for epoch in range(EPOCHS):
            yield from loader.epoch(epoch)

    def losses(self, batch: Mapping[str, Any], tasks: tuple[str, ...] = TASKS) -> dict[str, Tensor]:
        """The losses of some tasks."""
        inputs = (batch["input"], tasks) if has_split_norms(self.model) else (batch["input"],)
        outputs = self.model(*inputs)
        return {task: LOSSES[task](outputs[task], batch["targets"][task]) for task in tasks}

    def steps(self) -> Iterator[torchmto.StepInfo]:
        """Train, step by step."""
        for batch in self.batches():
            yield self.mt.step(lambda tasks, batch=batch: self.losses(batch, tasks))


def smooth(values: Any, width: int = 25) -> Any:
    """A running mean over steps."""
    return np.convolve(values, np.ones(width) / width, mode="valid")


def save(figure: Any, name: str) -> None:
    """Write one figure, the same bytes for the same curves."""
    figure.savefig(HERE / f"{name}.svg", metadata={"Date": None}, bbox_inches="tight")
    plt.close(figure)


def conflict() -> None:
    """Cosines of the tasks' gradients while PCGrad trains, and how many pairs conflict."""
    cosines = np.stack([info.cosines.numpy() for info in Run("pcgrad").steps()])
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2))
    for (i, j), style in zip(((0, 1), (0, 2), (1, 2)), ("-", "--", "-."), strict=True):
        line = smooth(cosines[:, i, j])
        left.plot(np.arange(len(line)) + 12, line, style, label=f"{TASKS[i]}, {TASKS[j]}")
        right.hist(
            cosines[:, i, j],
            bins=np.linspace(-0.8, 0.8, 33),
            histtype="step",
            ls=style,
            label=f"{TASKS[i]}, {TASKS[j]}",
        )
    left.axhline(0, color="grey", lw=0.8)
    right.axvline(0, color="grey", lw=0.8)
    left.set(xlabel="step", ylabel="cosine, mean of 25 steps")
    right.set(xlabel="cosine", ylabel="steps")
    left.legend()
    save(figure, "conflict")


def projection() -> None:
    """The directions that methods take from the gradients of two tasks, at the step where their sum harmed one of them most."""
    run = Run("gd")
    trunk = [parameter for name, parameter in run.model.named_parameters() if not name.startswith("heads")]
    harm, tasks, gramian = 1.0, ("", ""), torch.eye(2)
    for number, batch in enumerate(run.batches()):
        if number % 5 == 0:
            losses = run.losses(batch)
            grads = [torch.autograd.grad(losses[task], trunk, retain_graph=True) for task in TASKS]
            rows = torch.stack([torch.cat([g.flatten() for g in row]) for row in grads])
            products = (rows @ rows.T).double()
            for i, j in ((0, 1), (0, 2), (1, 2)):
                found = products[[i, j]][:, [i, j]]
                cosine = float((found.sum(1) / (found.diagonal() * found.sum()).sqrt()).min())
                if cosine < harm:
                    harm, tasks, gramian = cosine, (TASKS[i], TASKS[j]), found
        run.mt.step(lambda tasks, batch=batch: run.losses(batch, tasks))
    figure, axes = plt.subplots(figsize=(5.4, 4.2))
    basis = torch.linalg.cholesky(gramian)
    basis = basis / basis.norm(dim=1).max()
    angles = torch.linspace(0, 2 * torch.pi, 721)
    circle = torch.stack([angles.cos(), angles.sin()], 1).double()
    kind = (circle @ basis.T >= 0).all(1)
    size = 1.25 * float(basis.sum(0).norm().clamp(min=1))
    axes.fill(*_sector(circle[kind], size), color="#DDDDDD", label="harms neither task")
    for row, task in zip(basis, tasks, strict=True):
        _arrow(axes, row, COLOURS[task], f"gradient of {task}", "-")
    methods = {"gd": "k", "pcgrad": "#CC79A7", "cagrad": "#E69F00", "mgda": "#56B4E9", "upgrad": "#7F3C8D"}
    for (name, colour), style in zip(methods.items(), ("-", "--", "-.", ":", (0, (5, 1))), strict=True):
        weights = torch.ones(2).double() if name == "gd" else torchmto.make_method(name).weights(basis @ basis.T)
        _arrow(axes, weights @ basis, colour, name, style)
    axes.set_aspect("equal")
    axes.set(xticks=[], yticks=[], title=f"cosine {float(gramian[0, 1] / gramian.diagonal().prod().sqrt()):.2f}")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    save(figure, "projection")


def _sector(directions: Tensor, size: float) -> tuple[Any, Any]:
    """The outline of the cone that these directions of the circle fill."""
    angles = torch.atan2(directions[:, 1], directions[:, 0])
    arc = torch.linspace(float(angles.min()), float(angles.max()), 50)
    corner = torch.zeros(1)
    return torch.cat([corner, size * arc.cos()]).numpy(), torch.cat([corner, size * arc.sin()]).numpy()


def _arrow(axes: Any, end: Tensor, colour: str, label: str, style: Any) -> None:
    x, y = end.tolist()
    axes.plot([0, x], [0, y], color=colour, ls=style, lw=2, label=label)
    axes.plot([x], [y], "o", color=colour, ms=5)


def priority() -> None:
    """Which share of the trunk's channels each task leads, in phase 1 of connection strength."""
    run = Run(torchmto.make_method("connection_strength", schedule="phase1"), split=True)
    shares = [info.records["priority_shares"] for info in run.steps()]
    figure, axes = plt.subplots(figsize=(5.4, 3.2))
    for task in TASKS:
        axes.plot([entry[task] for entry in shares], STYLES[task], color=COLOURS[task], label=task)
    axes.axhline(1 / 3, color="grey", lw=0.8)
    axes.set(xlabel="step", ylabel="share of channels led")
    axes.legend()
    save(figure, "priority")


def groups() -> None:
    """Affinities and groups while task_groups trains."""
    told = [info.records for info in Run(torchmto.make_method("task_groups", noise_floor=True)).steps()]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), width_ratios=(1, 1.6))
    matrix = 1e3 * told[-1]["affinity"].numpy()
    image = left.imshow(matrix, cmap="PuOr", vmin=-abs(matrix).max(), vmax=abs(matrix).max())
    for i in range(3):
        for j in range(3):
            dark = abs(matrix[i, j]) > 0.6 * abs(matrix).max()
            left.text(j, i, f"{matrix[i, j]:.2f}", ha="center", va="center", color="white" if dark else "black")
    left.set(xticks=range(3), xticklabels=TASKS, yticks=range(3), yticklabels=TASKS, xlabel="on the loss of")
    left.set(ylabel="a step for", title="affinity x 1000, last step")
    figure.colorbar(image, ax=left, shrink=0.8)
    pairs = [("left", "right"), ("left", "offset"), ("right", "offset")]
    for row, pair in enumerate(pairs):
        joined = [any(set(pair) <= set(group) for group in entry["groups"]) for entry in told]
        right.eventplot(np.flatnonzero(joined), lineoffsets=row, linelengths=0.7, linewidths=0.6, colors="k")
    alone = [len(entry["groups"]) == 3 for entry in told]
    right.eventplot(np.flatnonzero(alone), lineoffsets=3, linelengths=0.7, linewidths=0.6, colors="grey")
    right.set(yticks=range(4), yticklabels=[*(f"{a} with {b}" for a, b in pairs), "each alone"], xlabel="step")
    right.set(xlim=(0, len(told)), title="groups of each step")
    figure.tight_layout()
    save(figure, "groups")


def engines() -> None:
    """Processor time and peak memory of a PCGrad step by engine, an MLP of five layers of 512, batch 64."""
    counts = (2, 4, 8, 16, 32)
    engines = ("parameters", "layerwise", "representation", "auto")
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2))
    for engine, style, mark in zip(("plain sum", *engines), ("k:", "C0-", "C1--", "C2-.", "C3-"), "xosv^", strict=True):
        seconds, peaks = zip(*(_step_cost(engine, count) for count in counts), strict=True)
        left.plot(counts, 1e3 * np.array(seconds), style, marker=mark, label=engine)
        right.plot(counts, np.array(peaks) / 1e6, style, marker=mark, label=engine)
    for axes, what in ((left, "ms of processor time per step"), (right, "peak MB of tensors above the model")):
        axes.set(xlabel="tasks", ylabel=what, xscale="log", yscale="log", xticks=counts, xticklabels=counts)
        axes.minorticks_off()
    right.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    save(figure, "engines")


def _step_cost(engine: str, num_tasks: int) -> tuple[float, int]:
    torch.manual_seed(0)
    layers = [layer for _ in range(5) for layer in (nn.Linear(512, 512), nn.ReLU())]
    trunk, heads = nn.Sequential(*layers), nn.ModuleList(nn.Linear(512, 1) for _ in range(num_tasks))
    model = nn.ModuleList([trunk, heads])
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    tasks = [str(i) for i in range(num_tasks)]
    x, y = torch.randn(64, 512), torch.randn(64, 1)
    how: dict[str, Any] = {"method": "gd"}
    if engine != "plain sum":
        features = trunk if engine == "representation" else None
        how = {"method": "pcgrad", "gradients": engine, "features": features}

    def closure(asked: tuple[str, ...]) -> dict[str, Tensor]:
        features = trunk(x)
        return {task: (heads[int(task)](features) - y).square().mean() for task in asked}

    def first_steps() -> torchmto.MultiTask:
        mt = torchmto.MultiTask(model, optimizer, tasks=tasks, **how)
        mt.step(closure)
        mt.step(closure)
        return mt

    peak = tensor_peak(first_steps)
    mt = first_steps()
    times = []
    for _ in range(5):
        start = time.process_time()
        mt.step(closure)
        times.append(time.process_time() - start)
    return min(times), peak


def recipe() -> None:
    """Losses and validation metrics of the run in results/nyud-vit."""
    series: dict[str, list[tuple[int, float]]] = {}
    with (HERE.parent.parent / "results" / "nyud-vit" / "metrics.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            series.setdefault(row["name"], []).append((int(row["step"]), float(row["value"])))
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2))
    for task, style in (("segmentation", "-"), ("depth", "--"), ("normals", "-."), ("edges", ":")):
        steps, losses = zip(*series[f"loss/{task}"], strict=True)
        left.plot(steps[4:], smooth(losses, 5) / losses[0], style, label=task)
    for name, label, style in (
        ("segmentation/mIoU", "mIoU", "o-"),
        ("depth/rmse", "depth rmse, m", "s--"),
        ("normals/mean_angle", "mean angle, radians", "^-."),
        ("edges/odsF", "edges odsF", "v:"),
    ):
        steps, values = zip(*series[f"validation/{name}"], strict=True)
        right.plot(steps, np.deg2rad(values) if "angle" in name else values, style, label=label)
    left.set(xlabel="batch", ylabel="training loss by the first")
    right.set(xlabel="batch", ylabel="validation")
    left.legend(loc="lower left")
    right.legend()
    figure.tight_layout()
    save(figure, "recipe")


FIGURES = {figure.__name__: figure for figure in (conflict, projection, priority, groups, engines, recipe)}


def main(names: list[str]) -> int:
    """Draw the figures that are named, or all."""
    torch.set_num_threads(1)
    mpl.use("svg")
    mpl.rcParams.update(
        {"svg.hashsalt": "torchmto", "font.size": 10, "axes.spines.top": False, "axes.spines.right": False}
    )
    for name in names or FIGURES:
        FIGURES[name]()
        print(HERE / f"{name}.svg")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
