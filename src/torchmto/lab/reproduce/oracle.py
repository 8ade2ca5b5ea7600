"""Does connection strength say who should lead a channel? Checked against Definition 3's measurement, gradients and seeds.

A problem whose own evaluation probes the network after every epoch, so that the grid runs it like any other.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from torchmto.lab.data.base import Batch, MultiTaskDataset
from torchmto.lab.problem import Problem
from torchmto.lab.references import load_problem
from torchmto.lab.reproduce.arms import ArmResult
from torchmto.lab.reproduce.copies import with_copies
from torchmto.lab.reproduce.findings import figure, number
from torchmto.lab.run.build import Computer, closure_of, losses_of
from torchmto.lab.run.evaluation import Network
from torchmto.lab.statistics import confidence95, spearman
from torchmto.lab.terminal import Table
from torchmto.structure import (
    SplitNorm,
    StructuredLayer,
    active_task,
    find_norm_pairs,
    normalized_strength,
    oracle_priority,
    top_priority,
)
from torchmto.structure.strength import Measure
from torchmto.undo import undisturbed

MEASURES: tuple[Measure, ...] = ("parameters", "gradients", "saliency")
COLUMNS = {
    **{f"agreement {measure}": f"oracle agrees: {measure}" for measure in MEASURES},
    **{f"correlation {measure}": f"rank corr. oracle: {measure}" for measure in MEASURES},
    "with gradients": "rank corr. parameters, gradients",
}


class Reordered(MultiTaskDataset):
    """The same samples under other numbers, so that a run's seed gives another order."""

    def __init__(self, data: MultiTaskDataset, seed: int) -> None:
        super().__init__(data.tasks)
        self.data = data
        self.numbers = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))

    def __len__(self) -> int:
        return len(self.data)

    def batch(self, indices: Tensor) -> Batch:
        """The samples under these numbers."""
        return self.data.batch(self.numbers[indices])


def probed(
    *,
    of: str = "digits",
    channels: int = 8,
    probe: int = 128,
    step_size: float = 1e-3,
    tasks: Sequence[str] = (),
    num_tasks: int = 0,
    order: int = 0,
    seed: int = 0,
    **options: Any,
) -> Problem:
    """A problem whose evaluation compares measures of priority with the oracle's verdict, on validation samples.

    Args:
        of: The problem.
        channels: Channels probed in each layer.
        probe: Samples of the probing batch.
        step_size: Of the oracle's steps.
        tasks: Those of the problem's tasks that are meant; default all.
        num_tasks: So many tasks by copies; 0 for the problem's own.
        order: Another order of the samples than with 0, from the same initial weights.
        seed: Of the problem.
        **options: The problem's own.
    """
    problem = load_problem(of, options, seed).only(tasks)
    if num_tasks:
        problem = with_copies(problem, num_tasks)
    if order:
        problem = replace(problem, train=Reordered(problem.train, order))
    primary = dict.fromkeys(problem.task_names, ("share", True))

    def evaluate(model: nn.Module) -> dict[str, dict[str, float]]:
        with torch.enable_grad():
            return _probe(model, problem, channels, probe, step_size)

    return replace(problem, evaluate=evaluate, primary=primary)


def _probe(
    model: nn.Module, problem: Problem, channels: int, probe: int, step_size: float
) -> dict[str, dict[str, float]]:
    """Each task's share of channels led; with the first task what is of no task: means over layers, and who leads."""
    model = copy.deepcopy(model).double().train()
    batch = next(iter(problem.loader("validation", probe, augment=False).epoch(0)))
    batch["input"] = batch["input"].double()
    batch["targets"] = {name: t.double() if t.is_floating_point() else t for name, t in batch["targets"].items()}
    names = list(problem.task_names)
    computer = Computer(next(model.parameters()).device, "32", None)
    closure = closure_of(problem, Network(model), losses_of(problem, {}), batch, computer)

    def losses(tasks: tuple[str, ...]) -> dict[str, Tensor]:
        return {name: loss for name, (loss, _) in closure(tasks).items()}

    layers = [layer for layer in find_norm_pairs(model) if isinstance(layer.norm_out, SplitNorm)]
    generator = torch.Generator().manual_seed(0)
    chosen = [torch.randperm(layer.num_channels, generator=generator)[:channels].sort().values for layer in layers]
    probes = [(layer, [int(c)]) for layer, picked in zip(layers, chosen, strict=True) for c in picked]
    verdict = oracle_priority(model, losses, probes, names, step_size=step_size)
    gradients = _gradients(model, losses, layers, names)
    counts = torch.zeros(len(names))
    found: dict[str, list[float]] = {name: [] for name in COLUMNS}
    who: dict[str, float] = {}
    sizes = [len(picked) for picked in chosen]
    decreases, tops = (torch.split(tensor, sizes) for tensor in (verdict.decrease, verdict.top))
    for layer, picked, decrease, top in zip(layers, chosen, decreases, tops, strict=True):
        tensors = {m: layer.strengths(names, measure=m, task_grads=gradients[layer.name]) for m in MEASURES}
        shares = {measure: normalized_strength(strength) for measure, strength in tensors.items()}
        for measure, share in shares.items():
            leaders = top_priority(share)[picked]
            found[f"agreement {measure}"].append(float((leaders == top).double().mean()))
            found[f"correlation {measure}"].append(_correlation(share[:, picked].T, decrease))
        found["with gradients"].append(_correlation(shares["parameters"].T, shares["gradients"].T))
        leaders = top_priority(shares["parameters"])
        counts += torch.bincount(leaders[leaders >= 0], minlength=len(names))
        who |= {f"leader of {layer.name} {int(c)}": float(leaders[c]) for c in picked}
    portions = (counts / counts.sum().clamp_min(1)).tolist()
    figures = {name: {"share": share} for name, share in zip(names, portions, strict=True)}
    figures[names[0]] |= {name: _mean(values) for name, values in found.items()} | who
    return figures


def _gradients(
    model: nn.Module, losses: Any, layers: Sequence[StructuredLayer], names: Sequence[str]
) -> dict[str, Tensor]:
    by_layer: dict[str, list[Tensor]] = {layer.name: [] for layer in layers}
    with undisturbed(model):
        for name in names:
            with active_task(name):
                loss = losses((name,))[name]
            gradients = torch.autograd.grad(loss, [layer.weight for layer in layers])
            for layer, gradient in zip(layers, gradients, strict=True):
                by_layer[layer.name].append(gradient)
    return {name: torch.stack(rows) for name, rows in by_layer.items()}


def _correlation(first: Tensor, second: Tensor) -> float:
    """Rank correlation over the channels, mean over the tasks: ``[channels, tasks]`` each; NaN where there is none."""
    known = [spearman(a.tolist(), b.tolist()) for a, b in zip(first.T, second.T, strict=True)]
    return _mean([value for value in known if value is not None])


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if np.isfinite(value)]
    return sum(known) / len(known) if known else float("nan")


# --------------------------------------------------------------------------------------------------------- over runs


def oracle(arm: ArmResult) -> tuple[Any, Table]:
    """Agreement with the oracle by epoch, mean over seeds, and who leads at the end."""
    first = arm.problem.task_names[0]
    numbers: dict[str, Any] = {}
    rows = []
    for method in arm.experiment.methods:
        runs = [[epoch["validation"] for epoch in run["history"]] for run in arm.runs(method)]
        by_epoch = [
            {column: _over_seeds([epoch[first][column] for epoch in epochs]) for column in COLUMNS}
            for epochs in zip(*runs, strict=True)
        ]
        shares = [{task: figures["share"] for task, figures in run[-1].items()} for run in runs]
        numbers[method] = {"epochs": by_epoch, "shares_by_seed": shares}
        ends = "; ".join(" ".join(f"{task} {share:.2f}" for task, share in own.items()) for own in shares)
        for place, row in enumerate(by_epoch, start=1):
            shown = ends if place == len(by_epoch) else ""
            rows.append([f"{method}, epoch {place}", *(figure(row[column]) for column in COLUMNS), shown])
    note = (
        "Means over layers and seeds. Strengths are the shares of the layer's channels; the oracle's leader lowers the summed "
        "loss of the probing batch most by a small step on the channel alone; agreement by chance is 1 over the number of "
        "tasks. Rank correlation: over channels, mean over tasks. Share: of all channels, by seed."
    )
    header = ["run", *COLUMNS.values(), "share of channels led"]
    return numbers, Table(f"Strength and oracle, arm {arm.arm.name}", header, rows, [note])


def _over_seeds(values: Sequence[float | None]) -> dict[str, float | None] | None:
    known = [value for value in values if value is not None and np.isfinite(value)]
    return {"mean": sum(known) / len(known), "ci95": confidence95(known)} if known else None


def stability(arms: Mapping[str, ArmResult]) -> tuple[Any, Table]:
    """Of runs from identical weights, arms of another order: how often they agree on a channel's leader, and by chance."""
    ends: dict[tuple[str, int], list[Mapping[str, float]]] = {}
    for arm in arms.values():
        for method in arm.experiment.methods:
            for seed, run in enumerate(arm.runs(method)):
                own = run["history"][-1]["validation"][arm.problem.task_names[0]]
                ends.setdefault((method, seed), []).append(own)
    numbers: dict[str, dict[str, float]] = {}
    for method in dict.fromkeys(method for method, _ in ends):
        every = [same_leaders(a, b) for (m, _), own in ends.items() if m == method for a, b in combinations(own, 2)]
        if every:
            numbers[method] = {"agreement": _mean([a for a, _ in every]), "chance": _mean([c for _, c in every])}
    rows = [[method, number(entry["agreement"]), number(entry["chance"])] for method, entry in numbers.items()]
    note = (
        "Same leader: of the probed channels, two runs from identical weights with batches in another order, mean over pairs "
        "of arms. By chance: what the leaders' frequencies alone would give."
    )
    return numbers, Table("Stability of priorities", ["method", "same leader", "by chance"], rows, [note])


def same_leaders(first: Mapping[str, float], second: Mapping[str, float]) -> tuple[float, float]:
    """Share of channels with the same leader, and what it would be by chance.

    Example:
        >>> same_leaders({"leader of a 0": 1.0, "leader of a 1": 0.0}, {"leader of a 0": 1.0, "leader of a 1": 1.0})
        (0.5, 0.5)
    """
    a, b = (np.array([v for name, v in end.items() if name.startswith("leader of")]) for end in (first, second))
    return float((a == b).mean()), float(sum((a == t).mean() * (b == t).mean() for t in np.unique([a, b])))
