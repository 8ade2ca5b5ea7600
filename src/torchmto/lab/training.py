"""One training run in plain PyTorch: what is trained, an epoch, an evaluation.

`build_run` turns a `RunConfig` into model, optimizer and `torchmto.MultiTask`; `train_epoch` takes the steps;
`evaluate` measures. Everything that needs more (devices, checkpoints, logs) builds on these pieces.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from torchmto import MultiTask, StepInfo
from torchmto.checks import check_choice
from torchmto.lab.data import Batch, DataBundle, Loader, Split, Task, labelled_tasks, load_data
from torchmto.lab.losses import TaskLoss, task_loss
from torchmto.lab.metrics import primary_metric, task_metrics
from torchmto.lab.models import build_model
from torchmto.lab.specs import parse_method
from torchmto.structure import active_task, has_split_norms

__all__ = [
    "Run",
    "RunConfig",
    "build_run",
    "check_device",
    "chosen_tasks",
    "evaluate",
    "make_closure",
    "measure",
    "merged_values",
    "metric_states",
    "primary_values",
    "train_epoch",
    "train_step",
]

TASK_NORM_METHODS = frozenset({"connection_strength"})
"""Methods that by definition train a model with one copy of every norm per task."""

OWN_OPTIMIZER_METHODS = frozenset({"adatask"})
"""Methods that adapt step sizes themselves, and so are given plain SGD."""

Metrics = dict[str, dict[str, float]]
"""Task -> metric -> value."""

Measured = dict[str, dict[str, Metric]]
"""Task -> metric's name -> the metric at work."""

MetricStates = dict[str, dict[str, dict[str, Any]]]
"""Task -> metric -> its state by name: tensors, or lists of them."""


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides the outcome of one run.

    Args:
        data: ``NAME`` or ``NAME:PATH`` of a data set.
        data_options: Options of the data set, such as ``{"train": 1000}``.
        data_seed: Decides splits and generated samples.
        tasks: Names of the tasks to train; empty for all. One name makes a single-task baseline.
        model: Name of a lab model; None for the data set's default.
        model_options: The model's options.
        method: A method as text, see `torchmto.lab.specs.parse_method`.
        epochs: Passes over the training split.
        batch_size: Samples per batch.
        learning_rate: At the start; it falls to zero along a cosine, one step per batch whatever the method does.
        weight_decay: Of the optimizer; decoupled from the gradient in AdamW.
        optimizer: ``"adamw"`` or ``"sgd"``. AdaTask, which is Adam itself, always gets plain SGD.
        momentum: Of SGD.
        loss_weights: Factors of the losses before the method sees them, by task, or the name of a loss weighting.
        head_rate: Factor of the heads' learning rate.
        seed: Decides initial weights, order of the samples, dropout and the method's random choices.
        device: ``"cpu"``, ``"cuda"``, ...
    """

    data: str = "digits"
    data_options: Mapping[str, Any] = field(default_factory=dict)
    data_seed: int = 0
    tasks: tuple[str, ...] = ()
    model: str | None = None
    model_options: Mapping[str, Any] = field(default_factory=dict)
    method: str = "gd"
    epochs: int = 5
    batch_size: int = 64
    learning_rate: float = 3e-3
    weight_decay: float = 0.0
    optimizer: str = "adamw"
    momentum: float = 0.9
    loss_weights: Mapping[str, float] | str | None = None
    head_rate: float = 1.0
    seed: int = 0
    device: str = "cpu"


@dataclass
class Run:
    """The parts of a run that change while it trains, and what they work on.

    Attributes:
        config: What was asked for.
        bundle: The data.
        tasks: The tasks being trained.
        model: The network, ``model(x, names) -> {name: output}``.
        optimizer: Of all parameters.
        scheduler: One step per batch.
        multitask: The method at work.
        losses: Task -> loss.
        loader: Training batches.
    """

    config: RunConfig
    bundle: DataBundle
    tasks: tuple[Task, ...]
    model: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    multitask: MultiTask
    losses: dict[str, TaskLoss]
    loader: Loader

    @property
    def total_steps(self) -> int:
        """Batches in the whole run."""
        return self.config.epochs * len(self.loader)


def chosen_tasks(bundle: DataBundle, names: Sequence[str]) -> tuple[Task, ...]:
    """The tasks called ``names``, in the order of the data set; all if there are no names.

    Raises:
        ValueError: If the data set has no such task.
    """
    known = [task.name for task in bundle.tasks]
    for name in names:
        if name not in known:
            raise ValueError(f"The data set `{bundle.name}` has the tasks {', '.join(known)}. Found {name!r}.")
    return tuple(task for task in bundle.tasks if not names or task.name in names)


def check_device(device: str) -> None:
    """Raise a ValueError if there is no such device here."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"Parameter `device` should be a device of this machine. Found {device!r} ({error})."
        ) from error


def build_run(
    config: RunConfig, bundle: DataBundle | None = None, *, baseline: Mapping[str, float] | None = None
) -> Run:
    """Model, optimizer and method of a run, freshly initialised from its seed.

    Runs with one seed start from the same shared weights and see the same batches, whatever the method.

    Args:
        config: What to build.
        bundle: The data, if it is loaded already.
        baseline: Single-task value of every task's primary metric, for ``wpcgrad(priority=performance)``.

    Returns:
        The run, before its first step.

    Raises:
        ValueError: If the configuration makes no sense.
        TypeError: If the method or the model has no such option.
    """
    if bundle is None:
        bundle = load_data(config.data, config.data_seed, **config.data_options)
    tasks = chosen_tasks(bundle, config.tasks)
    names = [task.name for task in tasks]
    spec = parse_method(config.method)
    loader = bundle.loader("train", config.batch_size, seed=config.seed)
    total_steps = config.epochs * len(loader)

    more: dict[str, Any] = {}
    if spec.takes("total_steps"):
        more["total_steps"] = total_steps
    if spec.hyperparameters.get("priority") == "performance" and spec.takes("baseline") and baseline is not None:
        more["baseline"] = {name: baseline[name] for name in names}
        more["higher_is_better"] = {task.name: primary_metric(task)[1] for task in tasks}
    method = spec.make(**more)

    torch.manual_seed(config.seed)
    model = build_model(
        config.model or bundle.default_model,
        tasks,
        bundle.input_shape,
        task_norms=spec.name in TASK_NORM_METHODS,
        **config.model_options,
    ).to(config.device)
    optimizer = build_optimizer(config, model, spec.name)
    return Run(
        config,
        bundle,
        tasks,
        model,
        optimizer,
        torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(total_steps, 1)),
        MultiTask(model, optimizer, tasks=names, method=method, weights=config.loss_weights, seed=config.seed),
        {task.name: task_loss(task) for task in tasks},
        loader,
    )


def build_optimizer(config: RunConfig, model: nn.Module, method: str) -> torch.optim.Optimizer:
    """The optimizer of a run, with the heads in a group of their own where their learning rate differs."""
    groups: list[dict[str, Any]] = [{"params": list(model.parameters())}]
    if config.head_rate != 1:
        heads = set(model.get_submodule("heads").parameters())
        groups = [
            {"params": [p for p in model.parameters() if p not in heads]},
            {"params": [p for p in model.parameters() if p in heads], "lr": config.learning_rate * config.head_rate},
        ]
    decay: dict[str, Any] = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    if method in OWN_OPTIMIZER_METHODS:
        return torch.optim.SGD(groups, **decay)
    if check_choice("optimizer", config.optimizer, ("adamw", "sgd")) == "sgd":
        return torch.optim.SGD(groups, momentum=config.momentum, **decay)
    return torch.optim.AdamW(groups, **decay)


def to_device(batch: Batch, device: str | torch.device) -> Batch:
    """The batch with all tensors on ``device``."""
    targets = {name: target.to(device, non_blocking=True) for name, target in batch["targets"].items()}
    return Batch(input=batch["input"].to(device, non_blocking=True), targets=targets)


def make_closure(
    model: nn.Module, losses: Mapping[str, TaskLoss], batch: Batch, labelled: Sequence[str]
) -> Callable[[tuple[str, ...]], dict[str, tuple[Tensor, Tensor]]]:
    """The forward-only closure that `torchmto.MultiTask.step` calls.

    Args:
        model: ``model(x, names) -> {name: output}``.
        losses: Task -> loss.
        batch: On the model's device.
        labelled: The tasks that have a label in this batch; the others are left out.
    """

    def closure(names: tuple[str, ...]) -> dict[str, tuple[Tensor, Tensor]]:
        present = [name for name in names if name in labelled]
        if not present:
            return {}
        outputs = model(batch["input"], present)
        values = {name: losses[name](outputs[name], batch["targets"][name], labelled=True) for name in present}
        return {name: value for name, value in values.items() if value is not None}

    return closure


def train_step(run: Run, batch: Batch) -> StepInfo:
    """One step of the method on one batch, and one of the scheduler."""
    labelled = labelled_tasks(batch, run.tasks)
    closure = make_closure(run.model, run.losses, to_device(batch, run.config.device), labelled)
    info = run.multitask.step(closure)
    run.scheduler.step()
    return info


def train_epoch(run: Run, epoch: int, on_step: Callable[[StepInfo, float], None] | None = None) -> None:
    """One pass over the training split; at its end the method is told that a window has ended.

    Args:
        run: Changed in place.
        epoch: Its number, which with the seed decides the batches.
        on_step: Called after every step with what was done and the seconds it took, data loading not included.
    """
    run.model.train()
    device = torch.device(run.config.device)
    for batch in run.loader.epoch(epoch):
        began = time.perf_counter()
        info = train_step(run, batch)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if on_step is not None:
            on_step(info, time.perf_counter() - began)
    run.multitask.end_window()


@torch.no_grad()
def measure(
    model: nn.Module,
    bundle: DataBundle,
    split: Split,
    *,
    tasks: Sequence[Task] | None = None,
    batch_size: int = 256,
    device: str | torch.device = "cpu",
    rank: int = 0,
    world_size: int = 1,
) -> Measured:
    """Metrics of every task that have seen a split, or this process' share of its batches.

    Whole batches are shared out, so a figure is made of the same batches whatever the number of processes.

    Args:
        model: ``model(x, names) -> {name: output}``; left in the mode it was in.
        bundle: The data.
        split: ``"train"``, ``"validation"`` or ``"test"``.
        tasks: The tasks to measure; all of the data set by default.
        batch_size: Samples per batch.
        device: Where the model is.
        rank: This process' number.
        world_size: Number of processes.

    Returns:
        Task -> metric's name -> metric, on the CPU. `merged_values` makes figures of them.
    """
    tasks = bundle.tasks if tasks is None else tasks
    names = [task.name for task in tasks]
    metrics = {task.name: {key: m.to(device) for key, m in task_metrics(task).items()} for task in tasks}
    passes = [[name] for name in names] if has_split_norms(model) else [names]
    training = model.training
    model.eval()
    try:
        for batch in bundle.loader(split, batch_size, augment=False).epoch(0, rank, world_size):
            placed = to_device(batch, device)
            for group in passes:
                with active_task(group[0]):  # only split norms look at it, and then a group is one task
                    outputs = model(placed["input"], group)
                for name in group:
                    for metric in metrics[name].values():
                        metric.update(outputs[name], placed["targets"][name])
    finally:
        model.train(training)
    return {name: {key: m.cpu() for key, m in entries.items()} for name, entries in metrics.items()}


def metric_states(measured: Measured) -> MetricStates:
    """What metrics have seen, to be sent to the process that calls `merged_values`."""
    return {name: {key: m.metric_state for key, m in entries.items()} for name, entries in measured.items()}


def merged_values(measured: Measured, others: Sequence[MetricStates] = ()) -> Metrics:
    """The figures of everything seen, by this process and by others.

    Args:
        measured: What this process' metrics have seen, from `measure`; they are changed.
        others: The other processes' `metric_states`.

    Returns:
        Task -> metric -> value.
    """
    values: Metrics = {}
    for name, entries in measured.items():
        for key, metric in entries.items():
            for states in others:
                metric.merge_state(states[name][key])
            # The states are here; torchmetrics would ask the other processes for them again.
            metric.distributed_available_fn = _never
            values.setdefault(name, {})[key] = float(metric.compute())
    return values


def _never() -> bool:
    return False


def evaluate(
    model: nn.Module,
    bundle: DataBundle,
    split: Split,
    *,
    tasks: Sequence[Task] | None = None,
    batch_size: int = 256,
    device: str | torch.device = "cpu",
) -> Metrics:
    """Every metric of every task on one split. Where norms are split, tasks run one after the other.

    Args:
        model: ``model(x, names) -> {name: output}``; left in the mode it was in.
        bundle: The data.
        split: ``"train"``, ``"validation"`` or ``"test"``.
        tasks: The tasks to measure; all of the data set by default.
        batch_size: Samples per batch.
        device: Where the model is.

    Returns:
        Task -> metric -> value.
    """
    return merged_values(measure(model, bundle, split, tasks=tasks, batch_size=batch_size, device=device))


def tell_method(multitask: MultiTask, values: Mapping[str, float], tasks: Sequence[Task]) -> None:
    """Report validation results to the method: each task's primary metric, finite ones only.

    A method that wants shares in [0, 1] (``wants_shares``: dtp) gets the metric itself where higher is better, cut to
    that range, and 1 / (1 + value) of an error.
    """
    known = {name: value for name, value in values.items() if math.isfinite(value)}
    if multitask.wants_shares:
        higher = {task.name: primary_metric(task)[1] for task in tasks}
        known = {n: min(max(v, 0.0), 1.0) if higher[n] else 1 / (1 + max(v, 0.0)) for n, v in known.items()}
    if known:
        multitask.report(known)


def primary_values(metrics: Metrics, tasks: Sequence[Task]) -> dict[str, float]:
    """Each task's one metric that stands for it in Δm, out of what `evaluate` returns."""
    return {task.name: metrics[task.name][primary_metric(task)[0]] for task in tasks}
