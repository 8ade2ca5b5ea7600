"""From settings to the parts of a run: data, model, method, optimizer, schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins import MixedPrecision
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

import torchmto
from torchmto.checks import unknown_task
from torchmto.lab.data import Batch, DataBundle, Task, labelled_tasks, load_data
from torchmto.lab.losses import TaskLoss, task_loss
from torchmto.lab.models import MultiTaskModel, build_model
from torchmto.lab.specs import MethodSpec
from torchmto.lab.trainer.config import ConfigError, MethodConfig, OptimizerConfig, TrainConfig
from torchmto.lab.training import TASK_NORM_METHODS, chosen_tasks, make_closure, to_device
from torchmto.methods import Method


def method_of(config: MethodConfig, total_steps: int) -> Method:
    """The method; one that asks for the length of the training is told it.

    Args:
        config: Its settings.
        total_steps: Batches of the whole training.
    """
    spec = MethodSpec(config.name, config.options)
    return spec.make(total_steps=total_steps) if spec.takes("total_steps") else spec.make()


def optimizer_of(config: OptimizerConfig, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of all parameters that require a gradient."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if config.name == "sgd":
        return torch.optim.SGD(parameters, config.lr, momentum=config.momentum, weight_decay=config.weight_decay)
    kind = torch.optim.Adam if config.name == "adam" else torch.optim.AdamW
    return kind(parameters, config.lr, weight_decay=config.weight_decay)


def rate_factor(config: OptimizerConfig, steps_per_epoch: int, total_steps: int) -> Callable[[int], float]:
    """The learning rate after ``step`` batches, relative to its highest value.

    Example:
        >>> factor = rate_factor(OptimizerConfig(schedule="poly", power=1.0), steps_per_epoch=5, total_steps=10)
        >>> [factor(0), factor(5), factor(10)]
        [1.0, 0.5, 0.0]
    """

    def factor(step: int) -> float:
        progress = min(1.0, step / total_steps)
        value = 1.0
        match config.schedule:
            case "poly":
                value = float((1 - progress) ** config.power)
            case "cosine":
                value = 0.5 * (1 + math.cos(math.pi * progress))
            case "step":
                value = config.gamma ** (step // (config.step_epochs * steps_per_epoch))
        return value * min(1.0, (step + 1) / (config.warmup_steps + 1))

    return factor


@dataclass
class Computer:
    """Device and precision, by Lightning Fabric.

    Attributes:
        fabric: Fabric; not used for the optimizer, since `MultiTask` alone scales, combines and steps.
        scaler: The gradient scaler of fp16.
    """

    fabric: Fabric
    scaler: torch.amp.GradScaler | None

    @classmethod
    def of(cls, config: TrainConfig, devices: int = 1, nodes: int = 1) -> Computer:
        """The device and precision of the settings, on this process alone by default.

        Args:
            config: The settings.
            devices: Processes on this machine.
            nodes: Machines.

        Raises:
            ConfigError: If the machine has no such device, or not that many.
        """
        available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
        if not available.get(config.device, True):
            raise ConfigError(
                f"Parameter `device` should be a device of this machine. Found `device = {config.device!r}`."
            )
        placed: dict[str, Any] = {
            "accelerator": "gpu" if config.device == "cuda" else config.device,
            "devices": devices,
            "num_nodes": nodes,
            "strategy": "auto" if devices * nodes == 1 else "ddp",
        }
        try:
            if config.precision == "32":
                return cls(Fabric(**placed, precision="32-true"), None)
            kind = Fabric(**placed).device.type
            # A plugin of our own: asked by name, Fabric turns fp16 on a CPU into bf16 without a word in the settings.
            plugin = MixedPrecision(config.precision, kind)
            return cls(Fabric(**placed, plugins=plugin), plugin.scaler)
        except (MisconfigurationException, ValueError) as error:
            raise ConfigError(f"`devices = {devices}` on {nodes} node(s) can't be used here: {error}") from error

    @property
    def device(self) -> torch.device:
        """The device."""
        device: torch.device = self.fabric.device
        return device

    def autocast(self) -> AbstractContextManager[None]:
        """The context that forwards run in."""
        context: AbstractContextManager[None] = self.fabric.autocast()
        return context


class PreciseModel(nn.Module):
    """A model whose forwards run in the chosen precision.

    Args:
        model: The model.
        autocast: Gives the context for a forward.
    """

    def __init__(self, model: MultiTaskModel, autocast: Callable[[], AbstractContextManager[None]]) -> None:
        super().__init__()
        self.model = model
        self.autocast = autocast
        self.interrupt: Callable[[], None] | None = None
        """Called before each forward; may raise, to leave a long evaluation."""

    def forward(self, x: Tensor, tasks: Sequence[str]) -> dict[str, Tensor]:
        """Outputs of the asked tasks."""
        if self.interrupt is not None:
            self.interrupt()
        with self.autocast():
            outputs: dict[str, Tensor] = self.model(x, tasks)
        return outputs


def losses_of(tasks: Sequence[Task], settings: Mapping[str, Mapping[str, Any]]) -> dict[str, TaskLoss]:
    """Each task's loss, the kind's default where nothing else is set.

    Raises:
        ConfigError: If a task, a loss or an option is unknown.
    """
    names = [task.name for task in tasks]
    if unknown := [name for name in settings if name not in names]:
        raise ConfigError(unknown_task(unknown[0], names, "in `losses`"))
    try:
        return {task.name: task_loss(task, **settings.get(task.name, {})) for task in tasks}
    except (ValueError, TypeError) as error:
        raise ConfigError(str(error)) from error


@dataclass
class Parts:
    """Everything a run works with.

    Attributes:
        bundle: The data.
        model: The model, on its device.
        precise: The same model, in the chosen precision.
        optimizer: The optimizer.
        scheduler: Stepped once per batch.
        multitask: The step.
        computer: Device and precision.
        losses: Each task's loss.
        steps_per_epoch: Steps of one epoch.
    """

    bundle: DataBundle
    model: MultiTaskModel
    precise: PreciseModel
    optimizer: torch.optim.Optimizer
    scheduler: LambdaLR
    multitask: torchmto.MultiTask
    computer: Computer
    losses: dict[str, TaskLoss]
    steps_per_epoch: int

    def closure(self, batch: Batch) -> Callable[[tuple[str, ...]], dict[str, Any]]:
        """The forward-only function of one micro-batch."""
        labelled = labelled_tasks(batch, self.bundle.tasks)
        return make_closure(self.precise, self.losses, to_device(batch, self.computer.device), labelled)


def load_bundle(config: TrainConfig) -> DataBundle:
    """The data set of the settings.

    Raises:
        ConfigError: If an option has no sensible value, or weights or a baseline name unknown tasks.
    """
    try:
        bundle = load_data(config.data.name, config.data.split_seed, **config.data.options)
        bundle = replace(bundle, tasks=chosen_tasks(bundle, config.data.tasks or ()))
    except (TypeError, ValueError) as error:
        raise ConfigError(str(error)) from error
    names = [task.name for task in bundle.tasks]
    for setting, given in (("method.weights", config.method.weights), ("baseline", config.baseline)):
        if unknown := [name for name in given or {} if name not in names]:
            raise ConfigError(unknown_task(unknown[0], names, f"in `{setting}`"))
    if config.baseline is not None and set(config.baseline) != set(names):
        missing = next(name for name in names if name not in config.baseline)
        raise ConfigError(f"`baseline` should have a value for each task. There is none for `{missing}`.")
    return bundle


def build_network(config: TrainConfig, bundle: DataBundle) -> MultiTaskModel:
    """The model of the settings, from the current state of torch's random generator.

    Raises:
        ConfigError: If an option has no sensible value.
    """
    norms = config.model.task_norms
    try:
        return build_model(
            config.model.name or bundle.default_model,
            bundle.tasks,
            bundle.input_shape,
            task_norms=config.method.name in TASK_NORM_METHODS if norms is None else norms,
            gradient_checkpointing=config.model.gradient_checkpointing,
            **config.model.options,
        )
    except (TypeError, ValueError) as error:
        raise ConfigError(str(error)) from error


def build(config: TrainConfig, computer: Computer | None = None, world_size: int = 1) -> Parts:
    """All parts of a run; torch's random generator should have been seeded.

    Args:
        config: The settings.
        computer: Device and precision; by default those of the settings, on this process alone.
        world_size: Number of processes that share a batch.

    Raises:
        ConfigError: If settings don't fit together or the data.
    """
    computer = computer or Computer.of(config)
    bundle = load_bundle(config)
    samples = min(config.data.batch_size, len(bundle.train))
    if samples < world_size:
        raise ConfigError(
            "Parameter `data.batch_size` should be at least the number of processes, which share each batch. "
            f"Found {samples} samples in a batch and {world_size} processes."
        )
    losses = losses_of(bundle.tasks, config.losses)
    batches = len(bundle.loader("train", config.data.batch_size))
    steps_per_epoch = batches // config.accumulate
    if steps_per_epoch == 0:
        raise ConfigError(
            f"An epoch has {batches} batches, fewer than the {config.accumulate} micro-batches of one step (`accumulate`)."
        )
    total_steps = config.epochs * steps_per_epoch
    model = build_network(config, bundle).to(computer.device)
    if config.model.compile:
        model.compile(backend=config.model.compile_backend)
    optimizer = optimizer_of(config.optimizer, model)
    scheduler = LambdaLR(optimizer, rate_factor(config.optimizer, steps_per_epoch, total_steps))
    try:
        multitask = torchmto.MultiTask(
            model,
            optimizer,
            tasks=[task.name for task in bundle.tasks],
            method=method_of(config.method, total_steps),
            weights=config.method.weights,
            scaler=computer.scaler,
            clip=config.optimizer.clip,
            seed=config.seed,
            on_nonfinite=config.method.on_nonfinite,
            same_noise=config.method.same_noise,
            stacked=config.method.stacked,
        )
    except (TypeError, ValueError) as error:
        raise ConfigError(str(error)) from error
    precise = PreciseModel(model, computer.autocast)
    return Parts(bundle, model, precise, optimizer, scheduler, multitask, computer, losses, steps_per_epoch)


__all__ = ["Computer", "Parts", "build", "build_network", "load_bundle", "losses_of", "method_of", "rate_factor"]
