"""What a run is made of: typed settings, checked before anything is loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from torchmto.checks import check_choice, check_integer, check_number, found, nearest

Precision = Literal["32", "bf16-mixed", "16-mixed"]
Schedule = Literal["constant", "poly", "cosine", "step"]
SECTIONS = ("data", "model", "method", "optimizer")
LoggerName = Literal["csv", "tensorboard", "wandb", "mlflow"]


class ConfigError(ValueError):
    """Settings that can't work, or that don't belong to the run they should continue."""


@dataclass
class DataConfig:
    """Which data, and in which batches.

    Attributes:
        name: `NAME` or `NAME:PATH`, as `torchmto datasets` lists them.
        options: Options of the data set, such as `{size: [48, 64]}`.
        tasks: Names of the tasks to train, all by default; one makes a single-task baseline.
        batch_size: Samples per micro-batch, over all processes: each takes its part.
        split_seed: Decides splits and generated samples; the same for all runs that are to be compared.
        augment: Whether training samples are augmented, where the data set has an augmentation.
        workers: Threads that prepare batches ahead, which never changes a batch. By default 2 for images and none for
            vectors, whose batches are ready sooner than another thread could take over.
    """

    name: str = "digits"
    options: dict[str, Any] = field(default_factory=dict)
    tasks: list[str] | None = None
    batch_size: int = 32
    split_seed: int = 0
    augment: bool = True
    workers: int | None = None


@dataclass
class ModelConfig:
    """Which model.

    Attributes:
        name: A model's name; by default one that suits the data.
        options: Options of the model, such as `{width: 16}`.
        task_norms: Whether the trunk's norms get one copy per task; by default where the method needs it.
        gradient_checkpointing: Run the trunk's blocks again in the backward pass, to save memory.
        compile: Whether to run the model through `torch.compile`.
        compile_backend: Its backend.
    """

    name: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    task_norms: bool | None = None
    gradient_checkpointing: bool = False
    compile: bool = False
    compile_backend: str = "inductor"


@dataclass
class MethodConfig:
    """How the tasks' losses update the model.

    Attributes:
        name: A method's name, as `torchmto methods` lists them.
        options: Its hyper-parameters.
        weights: Factors of the losses before the method sees them, by task.
        same_noise: Give all forwards of one batch the same random state.
        stacked: Run the tasks of a model with task-specific norms in one stacked pass, not one after the other.
        on_nonfinite: What to do about a loss that isn't finite: stop ("raise") or leave the step out ("skip").
    """

    name: str = "gd"
    options: dict[str, Any] = field(default_factory=dict)
    weights: dict[str, float] | None = None
    same_noise: bool = False
    stacked: bool = False
    on_nonfinite: Literal["raise", "skip"] = "raise"


@dataclass
class OptimizerConfig:
    """The optimizer and its schedule: one scheduler step per batch, however many optimizer steps the method takes.

    Attributes:
        name: Which optimizer.
        lr: Learning rate at its highest.
        weight_decay: Weight decay; decoupled in adamw.
        momentum: Of sgd.
        schedule: "poly": (1 - progress) to the `power`; "cosine" to 0; "step": times `gamma` every `step_epochs`.
        power: Of "poly".
        step_epochs: Epochs between two falls of "step".
        gamma: Factor of such a fall.
        warmup_steps: Batches in which the learning rate rises linearly.
        clip: Largest global norm of the combined gradient.
    """

    name: Literal["sgd", "adam", "adamw"] = "adam"
    lr: float = 1e-3
    weight_decay: float = 0.0
    momentum: float = 0.9
    schedule: Schedule = "constant"
    power: float = 0.9
    step_epochs: int = 10
    gamma: float = 0.5
    warmup_steps: int = 0
    clip: float | None = None


@dataclass
class TrainConfig:
    """One training run.

    Attributes:
        data: The data set.
        model: The model.
        method: The multi-task method.
        optimizer: Optimizer and schedule.
        losses: Losses other than the kinds' defaults, by task: `{normals: {loss: cosine}}`; other keys are its options.
        epochs: Passes over the training split.
        accumulate: Micro-batches per step; a last incomplete group of an epoch is left out.
        precision: "32", "bf16-mixed", or "16-mixed" with a gradient scaler.
        device: "auto", "cpu", "cuda" or "mps".
        devices: Processes on this machine, one per device, started by Lightning Fabric. torchrun's own numbers go first.
        nodes: Machines that train together; the command has to be started on each.
        seed: Of weights, order, augmentation and the method.
        ema: Decay of a moving average of the weights, which is then what is evaluated and exported; off by default.
        deterministic: Ask torch for deterministic kernels, where they cost speed (on the CPU they are anyway).
        baseline: Single-task values of the tasks' primary metrics, by task. With them the best epoch is the one of the
            highest Δm on the validation split, without them that of the highest mean validation score.
        evaluate_every: Epochs between validations; the last epoch is always validated.
        evaluate_test: Whether to evaluate the best weights on the test split, once, at the end.
        checkpoint_every: Steps between checkpoints inside an epoch; there is one after each epoch anyway.
        keep: How many of the latest checkpoints to keep, besides the best.
        loggers: Where figures go: csv, tensorboard, wandb, mlflow.
        log_every: Steps between logged steps.
    """

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    losses: dict[str, dict[str, Any]] = field(default_factory=dict)
    epochs: int = 10
    accumulate: int = 1
    precision: Precision = "32"
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    devices: int = 1
    nodes: int = 1
    seed: int = 0
    ema: float | None = None
    deterministic: bool = False
    baseline: dict[str, float] | None = None
    evaluate_every: int = 1
    evaluate_test: bool = True
    checkpoint_every: int = 200
    keep: int = 2
    loggers: list[LoggerName] = field(default_factory=lambda: ["csv", "tensorboard"])
    log_every: int = 10

    def validate(self) -> None:
        """Check everything that can be checked without loading data.

        Raises:
            ConfigError: If a value makes no sense, or a name or option is unknown.
        """
        try:
            self._check_numbers()
            _check_data(self.data)
            _check_model(self.model)
            _check_method(self.method)
        except (ValueError, TypeError) as error:
            raise ConfigError(str(error)) from error

    def _check_numbers(self) -> None:
        optimizer = self.optimizer
        for name, value, minimum in (
            ("epochs", self.epochs, 1),
            ("accumulate", self.accumulate, 1),
            ("evaluate_every", self.evaluate_every, 1),
            ("checkpoint_every", self.checkpoint_every, 1),
            ("keep", self.keep, 1),
            ("devices", self.devices, 1),
            ("nodes", self.nodes, 1),
            ("log_every", self.log_every, 1),
            ("seed", self.seed, 0),
            ("data.batch_size", self.data.batch_size, 1),
            ("data.workers", self.data.workers or 0, 0),
            ("optimizer.step_epochs", optimizer.step_epochs, 1),
            ("optimizer.warmup_steps", optimizer.warmup_steps, 0),
        ):
            check_integer(name, value, minimum=minimum)
        check_choice("precision", self.precision, ("32", "bf16-mixed", "16-mixed"))
        check_choice("device", self.device, ("auto", "cpu", "cuda", "mps"))
        check_choice("optimizer.name", optimizer.name, ("sgd", "adam", "adamw"))
        check_choice("optimizer.schedule", optimizer.schedule, ("constant", "poly", "cosine", "step"))
        check_number("optimizer.lr", optimizer.lr, above=0)
        check_number("optimizer.weight_decay", optimizer.weight_decay, minimum=0)
        check_number("optimizer.momentum", optimizer.momentum, minimum=0, below=1)
        check_number("optimizer.power", optimizer.power, above=0)
        check_number("optimizer.gamma", optimizer.gamma, above=0)
        if optimizer.clip is not None:
            check_number("optimizer.clip", optimizer.clip, above=0)
        if self.ema is not None:
            check_number("ema", self.ema, above=0, below=1)
        for logger in self.loggers:
            check_choice("loggers", logger, ("csv", "tensorboard", "wandb", "mlflow"))
        for task, single in (self.baseline or {}).items():
            if check_number(f"baseline.{task}", single) == 0:
                raise ValueError(found(f"baseline.{task}", "other than 0, as changes are relative to it", single))

    def as_dict(self) -> dict[str, Any]:
        """The settings as plain values."""
        result: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return result

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """The inverse of :meth:`as_dict`.

        Example:
            >>> TrainConfig.from_dict(TrainConfig(epochs=3).as_dict()).epochs
            3
        """
        parts = dict(zip(SECTIONS, (DataConfig, ModelConfig, MethodConfig, OptimizerConfig), strict=True))
        try:
            return cls(**{name: parts[name](**value) if name in parts else value for name, value in values.items()})
        except TypeError as error:
            raise ConfigError(f"These aren't settings of a training run: {error}") from error


FREE = frozenset(
    {
        "data.workers",
        "device",
        "devices",
        "nodes",
        "evaluate_test",
        "checkpoint_every",
        "keep",
        "loggers",
        "log_every",
        "model.compile",
    }
)
"""Settings that may change when a run is resumed: they don't enter the computation's definition."""


def changed_settings(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Names of the settings, outside `FREE`, that differ between two runs' plain values.

    Example:
        >>> changed_settings(TrainConfig().as_dict(), TrainConfig(epochs=3, log_every=1).as_dict())
        ['epochs']
    """
    first, second = _flat(before), _flat(after)
    names = list(dict.fromkeys((*first, *second)))
    return [name for name in names if name not in FREE and first.get(name) != second.get(name)]


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if name in SECTIONS:
            flat |= {f"{name}.{key}": entry for key, entry in value.items()}
        else:
            flat[name] = value
    return flat


def _check_data(config: DataConfig) -> None:
    from torchmto.lab.data import dataset_info  # noqa: PLC0415 - reading settings shouldn't import the lab

    name, _, path = config.name.partition(":")
    info = dataset_info(name)
    if path and not info.layouts:
        raise ValueError(f"The data set `{name}` is built in and takes no path. Found `data.name = {config.name!r}`.")
    if path and not Path(path).expanduser().exists():
        raise ValueError(f"There is no `{path}` (`data.name = {config.name!r}`). Where to get it: {info.source}.")
    if info.layouts and not path:
        raise ValueError(f"The data set `{name}` needs a path: `{name}:PATH`. Where to get it: {info.source}.")
    if unknown := sorted(set(config.options) - set(info.options)):
        taken = ", ".join(info.options) or "none"
        near = nearest(unknown[0], info.options)
        raise TypeError(f"The data set `{name}` has no option `{unknown[0]}`. It takes: {taken}.{near}")


def _check_model(config: ModelConfig) -> None:
    from torchmto.lab.models import model_options, models  # noqa: PLC0415

    if config.compile and config.gradient_checkpointing:
        # The compiler takes running statistics for inputs of a checkpointed block, and then finds them changed.
        raise ValueError("`model.compile` or `model.gradient_checkpointing` may be set, not both.")
    if config.name is None:
        return
    check_choice("model.name", config.name, models())
    known = model_options(config.name)
    if unknown := sorted(set(config.options) - set(known)):
        raise TypeError(
            f"The model `{config.name}` has the options {', '.join(known)}. Found {', '.join(unknown)}."
            + nearest(unknown[0], known)
        )


def _check_method(config: MethodConfig) -> None:
    from torchmto.lab.trainer.build import method_of  # noqa: PLC0415

    method_of(config, total_steps=1)
    for task, weight in (config.weights or {}).items():
        check_number(f"method.weights.{task}", weight, minimum=0)


__all__ = [
    "ConfigError",
    "DataConfig",
    "MethodConfig",
    "ModelConfig",
    "OptimizerConfig",
    "TrainConfig",
    "changed_settings",
]
