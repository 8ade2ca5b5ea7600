"""What a run is made of: typed settings, checked before anything is loaded."""

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from functools import partial
from typing import Any, Literal, get_args, get_origin

import torch

from torchmto.checks import check_choice, check_integer, check_number, check_tasks, found, nearest
from torchmto.lab.fingerprints import content_of
from torchmto.lab.methods import check_weighting, make
from torchmto.lab.problem import Problem
from torchmto.lab.references import model_named, resolve, source_of
from torchmto.lab.specs import MethodSpec, parse_method
from torchmto.methods import methods

Precision = Literal["32", "bf16-mixed", "16-mixed"]
OptimizerName = Literal["sgd", "adam", "adamw"]
Schedule = Literal["constant", "poly", "cosine", "step"]
SECTIONS = ("data", "model", "method", "optimizer")
LARGEST = 2**63
"""No whole number of the settings reaches it."""
MOST = 1024
"""Processes, threads, seeds or trials that are asked for at once: with billions nothing would ever begin."""
LoggerName = Literal["csv", "tensorboard", "wandb", "mlflow"]


class ConfigError(ValueError):
    """Settings that can't work, or that don't belong to the run they should continue."""


def _whole(default: int | None, minimum: int = 1, most: int | None = None) -> Any:
    """A field for a whole number; None is only for one that is left open."""

    def check(name: str, value: Any) -> None:
        if check_integer(name, value, minimum=minimum) >= LARGEST:
            raise ValueError(found(name, f"below {LARGEST:.0e}", value))
        if most is not None and value > most:
            raise ValueError(found(name, f"at most {most}", value))

    return field(default=default, metadata={"check": check})


def _real(default: float | None, **bounds: Any) -> Any:
    """A field for a number within the bounds of `check_number`."""
    return field(default=default, metadata={"check": partial(check_number, **bounds)})


@dataclass
class DataConfig:
    """Which problem, and in which batches.

    Attributes:
        name: `NAME` or `NAME:PATH`, as `torchmto datasets` lists them; or an own problem: `FILE.py:FUNCTION`,
            `package.module:FUNCTION`, or a name of the entry-point group `torchmto.problems`. `--problem` is short for it; by
            default the built-in digits.
        options: Its arguments, such as `{size: [48, 64]}`. `--problem.NAME VALUE` is short for one.
        tasks: Names of the tasks to train, all by default; one makes a single-task baseline.
        batch_size: Samples per micro-batch, over all processes: each takes its part. By default one that suits the problem.
        split_seed: Decides splits and generated samples; the same for all runs that are to be compared.
        augment: Whether training samples are augmented, where the data set has an augmentation.
        workers: Processes that prepare batches ahead, which never changes a batch.
    """

    name: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    tasks: list[str] | None = None
    batch_size: int | None = _whole(None)
    split_seed: int = _whole(0, 0)
    augment: bool = True
    workers: int = _whole(0, 0, MOST)

    @property
    def reference(self) -> str:
        """The name, or that of the built-in digits."""
        return self.name or "digits"


@dataclass
class ModelConfig:
    """Which model.

    Attributes:
        name: A ready model's name, or a function of one's own, `FILE.py:FUNCTION` or `package.module:FUNCTION`, which is given
            `tasks` and `input_shape` if it takes them; by default the problem's own.
        options: Options of the model, such as `{width: 16}`.
        task_norms: Whether norms get one copy per task (in a ready model, the trunk's); by default where the method needs it.
        gradient_checkpointing: Run the trunk's blocks again in the backward pass, to save memory.
        channels_last: Keep weights and feature maps of convolutions with the channels last in memory: often faster, equal
            up to rounding.
        compile: Whether to run the model through `torch.compile`.
        compile_backend: Its backend.
    """

    name: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    task_norms: bool | None = None
    gradient_checkpointing: bool = False
    channels_last: bool = False
    compile: bool = False
    compile_backend: str = "inductor"


@dataclass
class MethodConfig:
    """How the tasks' losses update the model.

    Attributes:
        name: A method's name, as `torchmto methods` lists them.
        options: Its hyper-parameters.
        weights: Factors of the losses before the method sees them, by task, or the name of a loss weighting.
        same_noise: Give all forwards of one batch the same random state.
        stacked: Run the tasks of a model with task-specific norms in one stacked pass, not one after the other.
        on_nonfinite: What to do about a loss that isn't finite: stop ("raise") or leave the step out ("skip").
    """

    name: str = "gd"
    options: dict[str, Any] = field(default_factory=dict)
    weights: dict[str, float] | str | None = None
    same_noise: bool = False
    stacked: bool = False
    on_nonfinite: Literal["raise", "skip"] = "raise"


@dataclass
class OptimizerConfig:
    """The optimizer and its schedule: one scheduler step per batch, however many optimizer steps the method takes.

    Attributes:
        name: Which optimizer. A method that adapts step sizes itself (adatask) gets plain sgd.
        lr: Learning rate at its highest; by default one that suits the problem.
        weight_decay: Weight decay; decoupled in adamw.
        momentum: Of sgd.
        head_rate: Factor of the learning rate of parameters that only one task has, found as `heads` of the model.
        schedule: "poly": (1 - progress) to the `power`; "cosine" to 0; "step": times `gamma` every `step_epochs`.
        power: Of "poly".
        step_epochs: Epochs between two falls of "step".
        gamma: Factor of such a fall.
        warmup_steps: Batches in which the learning rate rises linearly.
        clip: Largest global norm of the combined gradient.
    """

    name: OptimizerName = "adamw"
    lr: float | None = _real(None, above=0)
    weight_decay: float = _real(0.0, minimum=0)
    momentum: float = _real(0.9, minimum=0, below=1)
    head_rate: float = _real(1.0, above=0)
    schedule: Schedule = "cosine"
    power: float = _real(0.9, above=0)
    step_epochs: int = _whole(10)
    gamma: float = _real(0.5, above=0)
    warmup_steps: int = _whole(0, 0)
    clip: float | None = _real(None, above=0)


@dataclass
class RunConfig:
    """One Run: one problem, one method, one seed.

    Attributes:
        data: The problem and its batches.
        model: The model.
        method: The multi-task method.
        optimizer: Optimizer and schedule.
        losses: Losses other than the kinds' defaults, by task: `{normals: {loss: cosine}}`; other keys are its options.
        epochs: Passes over the training split; by default as many as suit the problem.
        accumulate: Micro-batches per step; a last incomplete group of an epoch is left out.
        precision: "32", "bf16-mixed", or "16-mixed" with a gradient scaler.
        device: "auto", "cpu", "cuda", "cuda:1", "mps", ...
        devices: Processes on this machine, one per device, started by Lightning Fabric. torchrun's own numbers go first.
        nodes: Machines that train together; the command has to be started on each.
        seed: Of weights, order, augmentation and the method.
        threads: Threads of torch on the CPU, on which the last digits depend; by default 1 in a grid of Runs, else torch's own.
        ema: Decay of a moving average of the weights, which is then what is evaluated and exported; off by default.
        deterministic: Ask torch for deterministic kernels, where they cost speed (on the CPU they are anyway).
        baseline: Single-task values of the tasks' primary metrics, by task. With them the best epoch is the one of the
            highest Δm on the validation split, without them that of the highest mean validation score. A grid finds its own.
        evaluate_every: Epochs between validations; the last epoch is always validated.
        evaluate_test: Whether to evaluate the best weights on the test split, once, at the end.
        checkpoint_every: Steps between checkpoints inside an epoch; by default 200 in a single run, and none at all in a grid,
            whose Runs otherwise have one after each epoch, too, and go on from it.
        keep: How many of the latest checkpoints to keep, besides the best.
        loggers: Where figures go: csv, tensorboard, wandb, mlflow; by default csv, tensorboard in a single run, none in a grid.
        log_every: Steps between logged steps.
        source: Hash of the file that defines an own problem; found by itself.
        content: Hash of the file that a built-in data set is read from; found by itself.
    """

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    losses: dict[str, dict[str, Any]] = field(default_factory=dict)
    epochs: int | None = _whole(None)
    accumulate: int = _whole(1)
    precision: Precision = "32"
    device: str = "auto"
    devices: int = _whole(1, 1, MOST)
    nodes: int = _whole(1)
    seed: int = _whole(0, 0)
    threads: int | None = _whole(None, 1, MOST)
    ema: float | None = _real(None, above=0, below=1)
    deterministic: bool = False
    baseline: dict[str, float] | None = None
    evaluate_every: int = _whole(1)
    evaluate_test: bool = True
    checkpoint_every: int | None = _whole(None)
    keep: int = _whole(2)
    loggers: list[LoggerName] | None = None
    log_every: int = _whole(10)
    source: str | None = None
    content: str | None = None

    def validate(self) -> None:
        """Check everything that can be checked without loading data.

        Raises:
            ConfigError: If a value makes no sense, or a method's or model's name or option is unknown.
            UnknownReferenceError: If there is no such problem, whose file might register an unknown method.
        """
        named = {self.method.name, self.method.weights if isinstance(self.method.weights, str) else "gd"}
        if self.data.name and not named <= {*methods()}:
            resolve(self.data.name)  # a problem's file may register methods
        try:
            self._check_values()
            _check_model(self.model)
            _check_method(self.method, self.baseline)
        except (ValueError, TypeError) as error:
            raise ConfigError(str(error)) from error

    def _check_values(self) -> None:
        """What the fields say of themselves."""
        for section in ("", *SECTIONS):
            part = getattr(self, section) if section else self
            for entry in fields(part):
                name, value = f"{section}.{entry.name}".lstrip("."), getattr(part, entry.name)
                if get_origin(entry.type) is Literal:
                    check_choice(name, value, get_args(entry.type))
                elif "check" in entry.metadata and not (value is None and entry.default is None):
                    entry.metadata["check"](name, value)
        if self.data.tasks is not None:
            check_tasks(self.data.tasks)
        for logger in self.loggers or ():
            check_choice("loggers", logger, get_args(LoggerName))
        for task, single in (self.baseline or {}).items():
            if check_number(f"baseline.{task}", single) == 0:
                raise ValueError(found(f"baseline.{task}", "other than 0, as changes are relative to it", single))

    def as_dict(self) -> dict[str, Any]:
        """The settings as plain values."""
        result: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return result

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "RunConfig":
        """The inverse of :meth:`as_dict`.

        Example:
            >>> RunConfig.from_dict(RunConfig(epochs=3).as_dict()).epochs
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
        "source",
        "content",
    }
)
"""Settings that may change when a run is resumed: they don't enter the computation's definition."""


def config_for(
    problem: Problem | str, config: RunConfig | Mapping[str, Any] | None, settings: Mapping[str, Any]
) -> tuple[RunConfig, Problem | None]:
    """A Run's settings as a call gives them, and the problem where no reference among them leads to it.

    Args:
        problem: What is learnt, or its reference.
        config: Settings.
        settings: Some of them once more, which go over those.
    """
    if not isinstance(problem, str | Problem):
        should = "a lab.Problem (what a function that makes one returns), or its reference"
        raise ConfigError(found("problem", should, problem))
    base = config if isinstance(config, RunConfig) else config_of(config or {})
    if isinstance(problem, str):
        return config_of({"data.name": problem, **settings}, base), None
    return config_of(settings, base), problem


def changed_settings(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Names of the settings, outside `FREE`, that differ between two runs' plain values.

    Example:
        >>> changed_settings(RunConfig().as_dict(), RunConfig(epochs=3, log_every=1).as_dict())
        ['epochs']
    """
    first, second = _flat(before), _flat(after)
    names = list(dict.fromkeys((*first, *second)))
    return [name for name in names if name not in FREE and first.get(name) != second.get(name)]


_BELONGS: dict[str, tuple[str, Any]] = {
    "optimizer.momentum": ("optimizer.name", "sgd"),
    "optimizer.power": ("optimizer.schedule", "poly"),
    "optimizer.step_epochs": ("optimizer.schedule", "step"),
    "optimizer.gamma": ("optimizer.schedule", "step"),
    "model.compile_backend": ("model.compile", True),
}
"""Settings that mean something at one value of another only."""


def check_used(
    config: RunConfig, unused: Mapping[str, str], base: RunConfig | None = None, tuned: Collection[str] = ()
) -> None:
    """Whether every setting that was changed has an effect.

    Args:
        config: The settings.
        unused: Those without any, and why.
        base: What they were changed from; the defaults if there is none.
        tuned: Those that take several values.

    Raises:
        ConfigError: If one has none.

    Example:
        >>> check_used(RunConfig(seed=1), {"epochs": "nothing is trained"})
    """
    values, before = _flat(config.as_dict()), _flat((base or RunConfig()).as_dict())
    for name in [name for name, value in values.items() if value != before.get(name)]:
        if name in unused:
            raise ConfigError(f"The setting `{name}` has no effect here: {unused[name]}. Leave it out.")
        other, value = _BELONGS.get(name, (name, values[name]))
        if other not in tuned and values[other] != value:
            raise ConfigError(
                f"The setting `{name}` belongs to `{other} = {value!r}`. Found `{other} = {values[other]!r}`."
            )


def others_than(used: Collection[str], why: str) -> dict[str, str]:
    """All settings but these, without effect for one reason, as `check_used` takes them.

    Example:
        >>> "epochs" in others_than({"device"}, "nothing is trained")
        True
    """
    return {name: why for name in _flat(RunConfig().as_dict()) if name not in used}


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if name in SECTIONS:
            flat |= {f"{name}.{key}": entry for key, entry in value.items()}
        else:
            flat[name] = value
    return flat


def _check_model(config: ModelConfig) -> None:
    if config.compile and config.gradient_checkpointing:
        # The compiler takes running statistics for inputs of a checkpointed block, and then finds them changed.
        raise ValueError("`model.compile` or `model.gradient_checkpointing` may be set, not both.")
    if config.compile:
        known = torch.compiler.list_backends(exclude_tags=())
        if config.compile_backend not in known:
            some = ", ".join(torch.compiler.list_backends())
            hint = nearest(config.compile_backend, known)
            raise ValueError(
                f"{found('model.compile_backend', f'a backend, such as {some}', config.compile_backend)}{hint}"
            )
    if config.name is not None:
        model_named(config.name, config.options)


def _check_method(config: MethodConfig, baseline: Mapping[str, float] | None) -> None:
    spec = MethodSpec(config.name, config.options)
    if baseline is None or not spec.takes("baseline"):
        make(spec, total_steps=1)
    if isinstance(config.weights, str):
        check_weighting(config.weights)
    else:
        for task, weight in (config.weights or {}).items():
            check_number(f"method.weights.{task}", weight, minimum=0)


# --------------------------------------------------------------------------------------------- by any way of writing

SHORT = {
    "batch_size": "data.batch_size",
    "tasks": "data.tasks",
    "workers": "data.workers",
    "lr": "optimizer.lr",
    "learning_rate": "optimizer.lr",
    "weight_decay": "optimizer.weight_decay",
}
"""Settings that may be named without their section, in Python and in recipes; on the command line with dashes."""


def config_of(settings: Mapping[str, Any], base: RunConfig | None = None) -> RunConfig:
    """A Run's settings with some of them given, each by its section, its dotted name or a short one.

    Args:
        settings: Such as ``{"epochs": 3, "optimizer": {"name": "sgd"}, "optimizer.lr": 0.1, "batch_size": 8}``.
        base: All others; the defaults if there are none.

    Raises:
        ConfigError: If there is no such setting.
        ValueError: If the text of a method has another form.

    Example:
        >>> config_of({"optimizer": {"name": "sgd"}, "lr": 0.1}).optimizer.lr
        0.1
        >>> config_of({"method": "cagrad(c=0.3)"}).method.options
        {'c': 0.3}
    """
    values = (base or RunConfig()).as_dict()
    for key, value in settings.items():
        section, _, name = SHORT.get(key, key).partition(".")
        if section not in values or (name and section not in SECTIONS):
            raise ConfigError(f"There is no setting `{key}`.{nearest(key, [*_flat(values), *SHORT])}")
        if section not in SECTIONS:
            values[section] = value
            continue
        entries: Any = {name: value} if name else {"name": value} if isinstance(value, str) else value
        entries = asdict(entries) if is_dataclass(entries) and not isinstance(entries, type) else entries
        if not isinstance(entries, Mapping):
            raise ConfigError(f"The setting `{key}` should be a mapping. Found {value!r}.")
        if section == "method" and "(" in str(entries.get("name")):
            spec = parse_method(str(entries["name"]))
            options = {**spec.hyperparameters, **(entries.get("options") or {})}
            entries = {**entries, "name": spec.name, "options": options}
        for entry in entries:
            if entry not in values[section]:
                hint = nearest(entry, values[section])
                raise ConfigError(f"There is no setting `{section}.{entry}`.{hint}")
        values[section] = {**values[section], **entries}
    return RunConfig.from_dict(values)


# ------------------------------------------------------------------------------------------- what suits a problem

_SUITABLE: dict[str, tuple[int, int, float]] = {
    "mlp": (20, 64, 1e-3),
    "convnet": (10, 64, 1e-3),
    "segnet": (10, 8, 1e-3),
}
"""Epochs, batch size and learning rate by model; the last two of the others are those of segnet for images, else of mlp."""
_SUITABLE_OPTIONS: dict[str, dict[str, Any]] = {"segnet": {"width": 16}}


def settled(config: RunConfig, problem: Problem) -> RunConfig:
    """The settings with those left open filled in, as suits the problem.

    Args:
        config: The settings.
        problem: What is trained, with all tasks.
    """
    own = problem.model if isinstance(problem.model, str) else None
    model = config.model.name or own
    digits = problem.name == "digits" and own is not None and model == own
    if digits:
        epochs, batch_size, lr = 4, 64, 4e-3
    elif model is None or ":" in model:
        epochs, batch_size, lr = 10, 32, 1e-3
    else:
        epochs, batch_size, lr = _SUITABLE.get(model) or _SUITABLE["segnet" if problem.is_image else "mlp"]
    options = {"widths": [16, 32, 64]} if digits else _SUITABLE_OPTIONS.get(model or "", {})
    origin = problem.origin
    sources = (origin.source if origin else None, _model_source(config))
    data = replace(
        config.data,
        batch_size=batch_size if config.data.batch_size is None else config.data.batch_size,
        name=config.data.name or (origin.name if origin else None),
        options=config.data.options or dict(origin.arguments if origin else {}),
    )
    return replace(
        config,
        data=data,
        model=replace(config.model, name=model, options={**options, **config.model.options}),
        optimizer=replace(config.optimizer, lr=lr if config.optimizer.lr is None else config.optimizer.lr),
        epochs=epochs if config.epochs is None else config.epochs,
        source="+".join(filter(None, sources)) or None,
        content=content_of(data.reference),
    )


def _model_source(config: RunConfig) -> str | None:
    return source_of(config.model.name, config.model.options, "model") if config.model.name else None


def source_now(config: RunConfig) -> str | None:
    """The source of what settings name, as it is now, none of it called; the recorded one where there is nothing to read."""
    own = source_of(config.data.reference, config.data.options, "data")
    return "+".join(filter(None, (own, _model_source(config)))) or config.source


def check_source(recorded: str | None, now: str | None, what: str, defined: str = "its problem or model") -> None:
    """Whether the code that settings name is the code that something was begun with.

    Raises:
        ConfigError: If it is other code: anyone's settings could name anyone's function.
    """
    if recorded != now:
        raise ConfigError(
            f"{what} was begun with another version of the file that defines {defined}. Add --changed-source "
            "(`changed_source=True`) to go on all the same, or choose another folder."
        )


def check_content(recorded: str | None, now: str | None, what: str) -> None:
    """Whether the data are those that something was begun with, as far as that is known.

    Raises:
        ConfigError: If a file or folder of theirs holds something else.
    """
    if recorded and now and recorded != now:
        raise ConfigError(
            f"{what} was begun with other data: a file or folder of theirs holds something else. Add --changed-source "
            "(`changed_source=True`) to go on all the same, or choose another folder."
        )
