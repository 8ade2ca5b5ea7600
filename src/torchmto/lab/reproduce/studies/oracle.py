"""Does connection strength say who should lead a channel? Checked against Definition 3's measurement, gradients and seeds."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from torchmto.lab.reproduce.findings import FEW_SEEDS, Findings, Table, number
from torchmto.lab.reproduce.recipe import method_settings
from torchmto.lab.reproduce.studies.context import Context
from torchmto.lab.reproduce.studies.copies import with_copies
from torchmto.lab.reproduce.units import complete, run_units
from torchmto.lab.run.build import closure_of, problem_of
from torchmto.lab.run.config import RunConfig
from torchmto.lab.run.evaluation import Network
from torchmto.lab.run.loop import Trainer
from torchmto.lab.statistics import confidence95, spearman
from torchmto.structure import (
    SplitNorm,
    StructuredLayer,
    active_task,
    find_norm_pairs,
    normalized_strength,
    oracle_priority,
    top_priority,
)
from torchmto.structure.preserve import undisturbed
from torchmto.structure.strength import Measure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["run"]

MEASURES: tuple[Measure, ...] = ("parameters", "gradients", "saliency")
_Floats = np.ndarray[Any, np.dtype[np.float64]]


def run(context: Context) -> Findings:
    """Train, probe after every epoch, and compare."""
    options = {"channels": 8, "probe": 128, "step_size": 1e-3, "orders": 3, "num_tasks": None, **context.recipe.options}
    units: dict[str, dict[str, Any]] = {}
    for arm in context.recipe.arms:
        base = context.recipe.run_config(arm, context.data_root)
        for method in arm.methods:
            for seed in range(context.seeds):
                orders = range(options["orders"] if seed == 0 else 1)
                for order in orders:
                    shown = method_settings(base, method, seed=seed)
                    units[f"{arm.name} {method} seed {seed} order {order}"] = {
                        "arm": arm.name,
                        "method": method,
                        "config": shown,
                        "order": order,
                        **options,
                    }
    results = run_units(context.folder / "units", units, _probe_run, budget=context.budget, say=context.say)
    findings = Findings(complete=complete(units, results))
    if context.seeds < FEW_SEEDS:
        findings.notes.append(f"**Smoke run**: {context.seeds} seeds.")
    findings.notes.append(
        "Strengths are the shares of the layer's channels; the oracle's leader lowers the summed loss of the probing batch "
        "most by a small step on the channel alone. Agreement by chance is 1 over the number of tasks."
    )
    by_arm: dict[str, list[tuple[Mapping[str, Any], Mapping[str, Any]]]] = {}
    for name, result in results.items():
        label = f"{units[name]['arm']}: {units[name]['method']}"
        by_arm.setdefault(label, []).append((units[name], result))
    findings.numbers = {"agreement": {}, "stability": {}}
    for label, runs in by_arm.items():
        agreement = _agreement([result for parameters, result in runs if parameters["order"] == 0])
        findings.numbers["agreement"][label] = agreement
        findings.tables.append(_agreement_table(label, agreement))
        findings.figures["agreement-" + "".join(c if c.isalnum() else "_" for c in label)[:50]] = _figure(
            label, agreement
        )
        stability = _stability([result for parameters, result in runs if parameters["config"]["seed"] == 0])
        shares = [result["epochs"][-1]["shares"] for parameters, result in runs if parameters["order"] == 0]
        findings.numbers["stability"][label] = {**stability, "shares_by_seed": shares}
    if findings.numbers["stability"]:
        findings.tables.append(_stability_table(findings.numbers["stability"]))
    return findings


# ------------------------------------------------------------------------------------------------ one run


def _probe_run(parameters: Mapping[str, Any]) -> dict[str, Any]:
    problem, config = problem_of(RunConfig.from_dict(parameters["config"]))
    if parameters["num_tasks"] is not None:
        problem = with_copies(problem, parameters["num_tasks"])
    trainer = Trainer(config, problem)
    # The seed decides the weights; the order of the batches may be another one.
    trainer.loader = problem.loader(
        "train", config.data.batch_size or 64, seed=config.seed + 1000 * parameters["order"]
    )
    epochs = []
    trainer.parts.model.train()
    for _ in range(config.epochs or 1):
        trainer.train_epoch()
        epochs.append(_probe(trainer, parameters))
    return {"tasks": list(problem.task_names), "epochs": epochs}


def _probe(trainer: Trainer, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Strengths by all measures, and the oracle's verdict on some channels of every layer, on one batch."""
    parts, problem = trainer.parts, trainer.problem
    model = copy.deepcopy(parts.model).double()
    batch = next(iter(problem.loader("validation", parameters["probe"], augment=False).epoch(0)))
    batch["input"] = batch["input"].double()
    batch["targets"] = {name: t.double() if t.is_floating_point() else t for name, t in batch["targets"].items()}
    names = list(problem.task_names)
    closure = closure_of(problem, Network(model), parts.losses, batch, parts.computer)

    def losses(tasks: tuple[str, ...]) -> dict[str, Tensor]:
        return {name: loss for name, (loss, _) in closure(tasks).items()}

    model.train()
    layers = [layer for layer in find_norm_pairs(model) if isinstance(layer.norm_out, SplitNorm)]
    generator = torch.Generator().manual_seed(0)
    chosen = {layer.name: torch.randperm(layer.num_channels, generator=generator) for layer in layers}
    chosen = {name: channels[: parameters["channels"]].sort().values for name, channels in chosen.items()}
    groups = [(layer, [int(channel)]) for layer in layers for channel in chosen[layer.name]]
    oracle = oracle_priority(model, losses, groups, names, step_size=parameters["step_size"])
    gradients = _gradients(model, losses, layers, names)
    entry: dict[str, Any] = {"layers": {}}
    counts = torch.zeros(len(names))
    tops = []
    start = 0
    for layer in layers:
        channels = chosen[layer.name]
        decrease = oracle.decrease[start : start + len(channels)]
        top = oracle.top[start : start + len(channels)]
        start += len(channels)
        shares = {
            measure: normalized_strength(layer.strengths(names, measure=measure, task_grads=gradients[layer.name]))
            for measure in MEASURES
        }
        leaders = {measure: top_priority(share) for measure, share in shares.items()}
        counts += torch.bincount(leaders["parameters"][leaders["parameters"] >= 0], minlength=len(names))
        tops += leaders["parameters"].tolist()
        entry["layers"][layer.name] = {
            "agreement": {m: float((leaders[m][channels] == top).double().mean()) for m in MEASURES},
            "correlation": {m: _correlation(share[:, channels].T, decrease) for m, share in shares.items()},
            "with_gradients": _correlation(shares["parameters"].T, shares["gradients"].T),
        }
    entry["shares"] = dict(zip(names, (counts / counts.sum().clamp_min(1)).tolist(), strict=True))
    entry["tops"] = tops
    return entry


def _gradients(
    model: torch.nn.Module, losses: Any, layers: Sequence[StructuredLayer], names: Sequence[str]
) -> dict[str, Tensor]:
    by_layer: dict[str, list[Tensor]] = {layer.name: [] for layer in layers}
    weights = [layer.weight for layer in layers]
    with undisturbed(model):
        for name in names:
            with active_task(name):
                loss = losses((name,))[name]
            for layer, gradient in zip(layers, torch.autograd.grad(loss, weights), strict=True):
                by_layer[layer.name].append(gradient)
    return {name: torch.stack(rows) for name, rows in by_layer.items()}


def _correlation(first: Tensor, second: Tensor) -> float | None:
    """Rank correlation over the channels, mean over the tasks: ``[channels, tasks]`` each."""
    known = [spearman(a.tolist(), b.tolist()) for a, b in zip(first.T, second.T, strict=True)]
    values = [value for value in known if value is not None]
    return sum(values) / len(values) if values else None


# ------------------------------------------------------------------------------------------------ over runs


def _agreement(results: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Per epoch: means over layers, and over seeds with interval."""
    rows = []
    for epoch in range(min((len(result["epochs"]) for result in results), default=0)):
        row: dict[str, Any] = {"epoch": epoch + 1}
        for quantity in ("agreement", "correlation"):
            for measure in MEASURES:
                seeds = [_over_layers(result["epochs"][epoch], quantity, measure) for result in results]
                row[f"{quantity} {measure}"] = _mean(seeds)
        row["with_gradients"] = _mean([_over_layers(result["epochs"][epoch], "with_gradients") for result in results])
        rows.append(row)
    return rows


def _over_layers(epoch: Mapping[str, Any], quantity: str, measure: str | None = None) -> float:
    values = [entry[quantity] if measure is None else entry[quantity][measure] for entry in epoch["layers"].values()]
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else float("nan")


def _mean(values: Sequence[float]) -> dict[str, float | None]:
    return {"mean": float(np.mean(values)), "ci95": confidence95(values)}


def _agreement_table(label: str, agreement: Sequence[Mapping[str, Any]]) -> Table:
    columns = [key for key in agreement[0] if key != "epoch"]
    rows = [[str(row["epoch"]), *(number(row[c]["mean"], row[c]["ci95"]) for c in columns)] for row in agreement]
    header = [
        "epoch",
        *(c.replace("agreement", "oracle agrees:").replace("correlation", "rank corr. oracle:") for c in columns),
    ]
    header[-1] = "rank corr. parameters, gradients"
    note = (
        "Mean over layers and seeds. Agreement: share of channels whose leader the measure and the oracle have in common. "
        "Rank correlation: over channels, mean over tasks."
    )
    return Table(f"Strength and oracle, {label}", header, rows, [note])


def _stability(results: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """How often two runs from identical weights, with batches in another order, agree on a channel's leader."""
    tops: list[_Floats] = [np.array(result["epochs"][-1]["tops"], dtype=float) for result in results]
    agree, chance = [], []
    for i in range(len(tops)):
        for j in range(i):
            agree.append(float((tops[i] == tops[j]).mean()))
            leaders = {*tops[i].tolist(), *tops[j].tolist()}
            chance.append(sum(float((tops[i] == t).mean() * (tops[j] == t).mean()) for t in leaders))
    return {
        "agreement": float(np.mean(agree)) if agree else None,
        "chance": float(np.mean(chance)) if chance else None,
    }


def _stability_table(stability: Mapping[str, Mapping[str, Any]]) -> Table:
    rows = [
        [
            label,
            number(entry["agreement"]),
            number(entry["chance"]),
            "; ".join(
                " ".join(f"{task} {share:.2f}" for task, share in seed.items()) for seed in entry["shares_by_seed"]
            ),
        ]
        for label, entry in stability.items()
    ]
    note = (
        "Same leader: of all channels, two runs from identical weights with batches in another order, mean over pairs of "
        "runs. By chance: what the runs' shares alone would give."
    )
    header = ["run", "same leader", "by chance", "share of channels led at the end, by seed"]
    return Table("Stability of priorities", header, rows, [note])


def _figure(label: str, agreement: Sequence[Mapping[str, Any]]) -> Figure:
    from matplotlib.figure import Figure  # noqa: PLC0415  without pyplot no display is needed

    figure = Figure(figsize=(8, 3), layout="constrained")
    epochs = [row["epoch"] for row in agreement]
    for axis, quantity in zip(figure.subplots(1, 2), ("agreement", "correlation"), strict=True):
        for measure in MEASURES:
            axis.plot(epochs, [row[f"{quantity} {measure}"]["mean"] for row in agreement], marker="o", label=measure)
        axis.set(xlabel="epoch", title=f"{quantity} with the oracle")
        axis.grid(alpha=0.3)
    figure.axes[0].legend(fontsize="small")
    figure.suptitle(label, fontsize=8)
    return figure
