"""From settings to the parts of a Run: problem, network, method, optimizer, schedule."""

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

import torchmto
from torchmto.lab.data.base import labelled_tasks
from torchmto.lab.losses import OwnLoss, TaskLoss, task_loss
from torchmto.lab.methods import make
from torchmto.lab.models import MultiTaskModel
from torchmto.lab.problem import Loaders, Problem, ProblemError, part_error
from torchmto.lab.references import build_network, load_problem
from torchmto.lab.run.config import ConfigError, OptimizerConfig, RunConfig, settled
from torchmto.lab.run.evaluation import Network, placed
from torchmto.lab.specs import MethodSpec
from torchmto.lab.user_code import from_here
from torchmto.methods import method_class
from torchmto.step.losses import Closure
from torchmto.structure import split_norms


@contextlib.contextmanager
def as_settings() -> Iterator[None]:
    """What the package says of a wrong value inside the block is an error of the settings."""
    try:
        yield
    except (TypeError, ValueError, FileNotFoundError) as error:
        if isinstance(error, ConfigError | ProblemError) or not from_here(error):
            raise
        raise ConfigError(str(error)) from error


def optimizer_of(config: OptimizerConfig, model: nn.Module, method: str) -> torch.optim.Optimizer:
    """The optimizer of all parameters that require a gradient, the heads in a group of their own where their rate differs.

    Raises:
        ValueError: If the model has no ``heads`` to give another rate.
    """
    assert config.lr is not None
    groups: list[dict[str, Any]] = [{"params": [p for p in model.parameters() if p.requires_grad]}]
    if config.head_rate != 1:
        if not isinstance(getattr(model, "heads", None), nn.Module):
            raise ValueError("`optimizer.head_rate` needs a model whose tasks' own layers are its submodule `heads`.")
        heads = set(model.get_submodule("heads").parameters())
        groups = [
            {"params": [p for p in groups[0]["params"] if p not in heads]},
            {"params": [p for p in groups[0]["params"] if p in heads], "lr": config.lr * config.head_rate},
        ]
    common: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay}
    if method_class(method).adapts:  # step sizes, itself
        return torch.optim.SGD(groups, **common)
    if config.name == "sgd":
        return torch.optim.SGD(groups, momentum=config.momentum, **common)
    return (torch.optim.Adam if config.name == "adam" else torch.optim.AdamW)(groups, **common)


def scheduler_of(
    config: OptimizerConfig, optimizer: torch.optim.Optimizer, steps_per_epoch: int, total_steps: int
) -> lr_scheduler.LRScheduler:
    """The schedule: one step per batch, whatever the method does."""
    match config.schedule:
        case "poly":
            main: lr_scheduler.LRScheduler = lr_scheduler.PolynomialLR(optimizer, total_steps, config.power)
        case "cosine":
            main = lr_scheduler.CosineAnnealingLR(optimizer, total_steps)
        case "step":
            main = lr_scheduler.StepLR(optimizer, config.step_epochs * steps_per_epoch, config.gamma)
        case _:
            main = lr_scheduler.ConstantLR(optimizer, factor=1.0)
    if config.warmup_steps == 0:
        return main
    start = 1 / (config.warmup_steps + 1)
    warmup = lr_scheduler.LinearLR(optimizer, start, total_iters=config.warmup_steps)
    chained: lr_scheduler.LRScheduler = lr_scheduler.ChainedScheduler([main, warmup])
    return chained


@dataclass
class Computer:
    """Device and precision.

    Attributes:
        device: Where this process computes.
        precision: As in the settings.
        scaler: The gradient scaler of fp16.
    """

    device: torch.device
    precision: str
    scaler: torch.amp.GradScaler | None

    @classmethod
    def of(cls, config: RunConfig, device: torch.device | None = None) -> "Computer":
        """The device and precision of the settings.

        Args:
            config: The settings.
            device: This process' one of several.

        Raises:
            ConfigError: If the machine has no such device.
        """
        chosen = device or device_of(config.device)
        scaler = torch.amp.GradScaler(chosen.type) if config.precision == "16-mixed" else None
        return cls(chosen, config.precision, scaler)

    def autocast(self) -> AbstractContextManager[Any]:
        """The context that forwards run in."""
        if self.precision == "32":
            return nullcontext()
        dtype = torch.float16 if self.precision == "16-mixed" else torch.bfloat16
        return torch.autocast(self.device.type, dtype=dtype)


def device_of(name: str) -> torch.device:
    """The device called ``name``; for "auto" an accelerator if there is one.

    Raises:
        ConfigError: If the machine has no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"Parameter `device` should be a device of this machine. Found `device = {name!r}` ({reason})."
        ) from error


def losses_of(problem: Problem, settings: Mapping[str, Mapping[str, Any]]) -> dict[str, TaskLoss | OwnLoss]:
    """Each task's loss: the settings', the problem's own, or its kind's default.

    Own ones that are modules are copies, which share what they shared: what they keep belongs to the Run.

    Raises:
        ConfigError: If a task, a loss or an option is unknown, or an own loss can't be copied.
    """
    if problem.closure is not None:
        if settings:
            raise ConfigError("`losses` can't be used with a problem that brings its own `closure`.")
        return {}
    if unknown := [name for name in settings if name not in problem.task_names]:
        raise ConfigError(f"Unknown task `{unknown[0]}` in `losses`. The tasks are {', '.join(problem.task_names)}.")
    losses: dict[str, TaskLoss | OwnLoss] = {}
    modules = {name: loss for name, loss in problem.losses.items() if isinstance(loss, nn.Module)}
    try:
        functions: dict[str, Callable[..., Any]] = {**problem.losses, **copy.deepcopy(modules)}
    except (TypeError, RuntimeError) as error:
        raise part_error(
            f"losses ({', '.join(modules)})", "modules that can be copied, one for each Run", error
        ) from error
    with as_settings():
        for task in problem.task_list:
            own = functions.get(task.name)
            chosen = settings.get(task.name)
            losses[task.name] = (
                OwnLoss(task, own) if own is not None and chosen is None else task_loss(task, **(chosen or {}))
            )
    return losses


@dataclass
class Parts:
    """Everything a Run works with.

    Attributes:
        config: Its settings, with nothing left open.
        problem: What it learns; its tasks are those that are trained.
        model: The model, on its device.
        network: The same model, called for tasks and in the chosen precision.
        optimizer: The optimizer.
        scheduler: Stepped once per batch.
        multitask: The step.
        computer: Device and precision.
        losses: Each task's loss.
        loader: Training batches.
    """

    config: RunConfig
    problem: Problem
    model: nn.Module
    network: Network
    optimizer: torch.optim.Optimizer
    scheduler: lr_scheduler.LRScheduler
    multitask: torchmto.MultiTask
    computer: Computer
    losses: dict[str, TaskLoss | OwnLoss]
    loader: Loaders

    @property
    def steps_per_epoch(self) -> int:
        """Steps of one epoch."""
        return len(self.loader) // self.config.accumulate

    @property
    def loss_modules(self) -> nn.ModuleList:
        """Own losses that are modules, whose state is the Run's."""
        functions = (loss.function for loss in self.losses.values() if isinstance(loss, OwnLoss))
        return nn.ModuleList(function for function in functions if isinstance(function, nn.Module))

    def closure(self, step: Any) -> Closure:
        """The forward-only function of one micro-batch."""
        return closure_of(self.problem, self.network, self.losses, step, self.computer)


def closure_of(
    problem: Problem,
    network: Network,
    losses: Mapping[str, TaskLoss | OwnLoss],
    step: Any,
    computer: Computer,
) -> Closure:
    """The forward-only closure that `torchmto.MultiTask.step` calls.

    Args:
        problem: Its own closure goes first.
        network: Gives outputs by task.
        losses: Task -> loss.
        step: A step's batch, on any device.
        computer: Device and precision.
    """
    if problem.closure is not None:
        own, batch = problem.closure, placed(step, computer.device)

        def full(names: tuple[str, ...]) -> Mapping[str, Any]:
            with computer.autocast():
                return own(network.model, batch, names)

        return full
    # Which tasks have labels is asked before the batch goes to the device, to save waiting for it.
    tasks = {task.name: task for task in problem.task_list}
    parts = [
        (labelled_tasks(batch, [tasks[name] for name in names]), placed(batch, computer.device))
        for names, batch in problem.parts(step)
    ]

    def closure(names: tuple[str, ...]) -> dict[str, tuple[Tensor, Tensor]]:
        values: dict[str, tuple[Tensor, Tensor]] = {}
        for labelled, batch in parts:
            present = [name for name in names if name in labelled]
            outputs = network(batch["input"], present) if present else {}
            for name in present:
                value = losses[name](outputs[name], batch["targets"][name], labelled=True)
                if value is not None:
                    values[name] = value
        return values

    return closure


def problem_of(config: RunConfig, problem: Problem | None = None) -> tuple[Problem, RunConfig]:
    """The problem of some settings, with the tasks they name, and the settings with nothing left open.

    Args:
        config: The settings.
        problem: The problem, where it isn't to be found by its reference.

    Raises:
        ConfigError: If there is no such problem or task, or weights or a baseline name unknown tasks.
    """
    with as_settings():
        if problem is None:
            problem = load_problem(config.data.reference, config.data.options, config.data.split_seed)
        config = settled(config, problem)
        problem = problem.only(config.data.tasks or ())
    names = problem.task_names
    weights = config.method.weights
    for setting, given in (
        ("method.weights", weights if isinstance(weights, Mapping) else None),
        ("baseline", config.baseline),
    ):
        if unknown := [name for name in given or {} if name not in names]:
            raise ConfigError(f"Unknown task `{unknown[0]}` in `{setting}`. The tasks are {', '.join(names)}.")
    if config.baseline is not None and (missing := [name for name in names if name not in config.baseline]):
        raise ConfigError(f"`baseline` should have a value for each task. There is none for `{missing[0]}`.")
    return problem, config


def network_of(config: RunConfig, problem: Problem) -> nn.Module:
    """The model of the settings, from the current state of torch's random generator."""
    norms = config.model.task_norms
    own = not isinstance(problem.model, str) and config.model.name is None
    with as_settings():
        model = build_network(
            problem,
            None if own else config.model.name,
            config.model.options,
            checkpointing=config.model.gradient_checkpointing,
        )
        if method_class(config.method.name).norms == "per task" if norms is None else norms:
            split_norms(model.trunk if isinstance(model, MultiTaskModel) else model, problem.task_names)
    return model


def _check_own(config: RunConfig, problem: Problem) -> None:
    """Refuse settings of what a problem brings itself."""
    if problem.optimizer is not None:
        usual = settled(replace(config, optimizer=OptimizerConfig()), problem).optimizer
        for name in ("name", "lr", "weight_decay", "momentum", "head_rate"):
            if getattr(config.optimizer, name) != getattr(usual, name):
                raise ConfigError(f"`optimizer.{name}` can't be used with a problem that brings its own optimizer.")


def _check_metrics_merge(problem: Problem) -> None:
    from torchmetrics import Metric  # noqa: PLC0415  takes seconds to import

    for task in problem.task_list:
        for name, metric in task.extra.get("metrics", {}).items():
            own = type(metric).merge_state is not Metric.merge_state
            if not own and (metric.full_state_update is not False or metric.dist_sync_on_step):
                raise part_error(
                    f"metrics[{task.name!r}]",
                    "metrics that several processes can merge (`full_state_update = False`, or a `merge_state` of their own)",
                    f"`{name}`, a {type(metric).__name__} that can't be",
                )


def build(
    config: RunConfig,
    problem: Problem,
    computer: Computer | None = None,
    *,
    baseline: Mapping[str, float] | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> Parts:
    """All parts of a Run; torch's random generator should have been seeded.

    Args:
        config: The settings, with nothing left open (`problem_of`).
        problem: The problem.
        computer: Device and precision; by default those of the settings.
        baseline: Single-task value of every task's primary metric, for methods that ask for it.
        rank: This process' number.
        world_size: Number of processes that share a batch.

    Raises:
        ConfigError: If settings don't fit together or the problem.
        ProblemError: If several processes can't share the problem's data or metrics.
    """
    _check_own(config, problem)
    computer = computer or Computer.of(config)
    data, epochs = config.data, config.epochs
    assert data.batch_size is not None
    assert epochs is not None
    loader = problem.loader(
        "train",
        data.batch_size,
        seed=config.seed,
        augment=data.augment,
        workers=data.workers,
        rank=rank,
        world_size=world_size,
    )
    sets = problem.train.values() if isinstance(problem.train, Mapping) else [problem.train]
    samples = min([data.batch_size, *(len(entry) for entry in sets if hasattr(entry, "__len__"))])
    if samples < world_size:
        raise ConfigError(
            "Parameter `data.batch_size` should be at least the number of processes, which share each batch. "
            f"Found {samples} samples in a batch and {world_size} processes."
        )
    if world_size > 1 and problem.evaluate is None:
        _check_metrics_merge(problem)
    losses = losses_of(problem, config.losses)
    steps_per_epoch = len(loader) // config.accumulate
    if steps_per_epoch == 0:
        raise ConfigError(
            f"An epoch has {len(loader)} batches, fewer than the {config.accumulate} micro-batches of one step (`accumulate`)."
        )
    total_steps = epochs * steps_per_epoch
    model = network_of(config, problem).to(computer.device)
    if config.model.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if config.model.compile:
        model.compile(backend=config.model.compile_backend)
    with as_settings():
        if problem.optimizer is None:
            optimizer = optimizer_of(config.optimizer, model, config.method.name)
        else:
            optimizer = problem.optimizer(model)
            if not isinstance(optimizer, torch.optim.Optimizer):
                raise part_error(
                    "optimizer", "a function that returns one torch.optim.Optimizer", type(optimizer).__name__
                )
        method = make(
            MethodSpec(config.method.name, config.method.options),
            total_steps=total_steps,
            tasks=problem.task_list,
            baseline=config.baseline or baseline,
        )
        multitask = torchmto.MultiTask(
            model,
            optimizer,
            tasks=problem.task_names,
            method=method,
            weights=config.method.weights,
            scaler=computer.scaler,
            clip=config.optimizer.clip,
            seed=config.seed,
            on_nonfinite=config.method.on_nonfinite,
            same_noise=config.method.same_noise,
            stacked=config.method.stacked,
        )
    scheduler = scheduler_of(config.optimizer, optimizer, steps_per_epoch, total_steps)
    network = Network(model, computer.autocast)
    parts = Parts(config, problem, model, network, optimizer, scheduler, multitask, computer, losses, loader)
    parts.loss_modules.to(computer.device)
    return parts
