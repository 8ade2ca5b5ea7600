"""A problem: what is learnt. Tasks, data, model, losses and metrics of anyone's, or of a built-in data set.

A sample is ``(x, {task: target})``, or ``{"input": x, "targets": {task: target}}``; a key that a sample lacks is a missing
label. Targets and outputs by kind are listed in `torchmto.lab.data.base`. With ``closure`` and ``evaluate`` a problem may
have any shape: then nothing but these two looks at model and batches.
"""

import contextlib
import copy
import functools
import hashlib
import inspect
import json
import linecache
import math
import pickle
import re
import sys
import types
import uuid
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.data import DataLoader, IterableDataset, default_collate
from torch.utils.data import Dataset as TorchDataset

from torchmto.checks import shown, warn
from torchmto.lab.data.base import SPLITS, Augment, Batch, MultiTaskDataset, Split, Task, as_target
from torchmto.lab.data.loading import BatchPlan, JointLoader, Loader, StreamLoader, batch_key, own_random_state
from torchmto.lab.metrics import metric_names

Loaders: TypeAlias = Loader | StreamLoader | JointLoader
_HIGHER = frozenset({"accuracy", "f1", "auroc", "r2", "mIoU", "psnr", "ssim"})
"""Metrics known by name of which higher values are better."""


class ProblemError(ValueError):
    """A part of a problem isn't what it should be."""


def part_error(part: str, should: str, came: object) -> ProblemError:
    """The message of every error at this door: the problem's part, what was expected, what came."""
    return ProblemError(
        f"Part `{part}` of the problem should be {should}. Found {came if isinstance(came, str) else shown(came)}."
    )


@dataclass(frozen=True)
class Origin:
    """Where a problem comes from, by which a run's folder knows it again.

    Attributes:
        name: Its reference (``farm.py:farm``), or the module and function that built it.
        arguments: Those of that function, as far as they are plain values.
        source: Hash of the file that defines it; None for what is built in.
        loadable: Whether the name leads another process to it.
    """

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    source: str | None = None
    loadable: bool = False
    _taken: list[bool] = field(default_factory=list, init=False, repr=False, compare=False)

    def take(self) -> bool:
        """Whether a problem is the first one that comes from here; another has it from `dataclasses.replace`."""
        first = not self._taken
        self._taken[:] = [True]
        return first

    def replaced(self, caller: "Origin", parts: Mapping[str, Any]) -> "Origin":
        """Of a problem that a caller made by `dataclasses.replace` of the one from here: no name leads another process to it.

        Args:
            caller: Who changed it.
            parts: What it is made of now, without the data.
        """
        told = {part: _told(value) for part, value in parts.items()}
        of = {"name": self.name, "arguments": dict(self.arguments), "parts": told}
        source = "+".join(filter(None, (self.source, caller.source))) or None
        name = f"{caller.name.removesuffix(NO_CALL)}{NO_CALL}"
        return Origin(name, {**caller.arguments, "replaced": of}, source)

    @classmethod
    def of_caller(cls) -> "Origin":
        """The function outside of this package that builds a problem now."""
        frame = sys._getframe(1)  # noqa: SLF001  the only way to the caller
        inside = (str(Path(__file__).parent), "<string>")
        while frame.f_back is not None and (
            frame.f_code.co_filename.startswith(inside) or frame.f_globals.get("__name__") in {"dataclasses", "copy"}
        ):
            frame = frame.f_back
        code = frame.f_code
        starred = sum(bool(code.co_flags & flag) for flag in (inspect.CO_VARARGS, inspect.CO_VARKEYWORDS))
        names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount + starred]
        given = {name: frame.f_locals[name] for name in names if name in frame.f_locals}
        function = code.co_qualname.replace(".<locals>", "")
        # A file of settings can't hold other arguments, so its reference must lead nobody to a call with what stands for them.
        function += "" if not starred and all(map(_is_plain, given.values())) else NO_CALL
        source = source_hash(Path(code.co_filename))
        told = {name: _told(value) for name, value in given.items()}
        return cls(f"{frame.f_globals.get('__name__', '?')}:{function}", told, source)


NO_CALL = "()"
"""Ends the name of a function that was called with what only Python has, or has changed a problem that it got."""


def _is_plain(value: Any) -> bool:
    """Whether a file of settings can hold the value."""
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _is_plain(entry) for key, entry in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, str | int | float | Path)


def _told(value: Any) -> Any:
    """An argument as a file of settings holds it: what isn't plain in one short text that tells it from others."""
    try:
        told = _told_apart(value, {})
    except RecursionError:  # a long chain of objects: another one each time, as what can't be pickled
        told = f"{type(value).__qualname__} {uuid.uuid4().hex}"
    text = "" if _is_plain(value) else json.dumps(told)
    return told if len(text) <= _PRINTED else _cut(text)


def _cut(text: str) -> str:
    return f"{text[:_PRINTED]} {_hash(text.encode())}"


def _told_apart(value: Any, known: dict[int, tuple[int, Any]]) -> Any:
    """An argument as JSON knows it; of data a hash, of other objects what a pickle of them would hold.

    Args:
        value: The argument, or what is in it.
        known: The objects met so far, by ``id``: their numbers, and they themselves, so that nothing else gets that ``id``.
    """
    if isinstance(value, str | int | float | bool) or value is None:
        return value
    if isinstance(value, Path):
        return str(value)
    if id(value) in known:
        return f"object {known[id(value)][0]} again"
    known[id(value)] = len(known), value
    inner = functools.partial(_told_apart, known=known)
    if isinstance(value, Mapping):
        return {key if isinstance(key, str) else json.dumps(inner(key)): inner(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [inner(entry) for entry in value]
    if isinstance(value, set | frozenset):  # in another process in another order
        return sorted((_told_apart(entry, dict(known)) for entry in value), key=json.dumps)
    if (data := _told_data(value)) is not None:
        return data
    if isinstance(value, types.FunctionType):
        return _told_function(value, inner)
    text = repr(value)
    printed = re.sub(r" at 0x[0-9a-fA-F]+", "", text)
    if isinstance(value, nn.Module):
        own = [{n: v for n, v in vars(m).items() if n[0] != "_" and _is_plain(v)} for m in value.modules()]
        return inner([str(type(value)), printed, value.state_dict(), own])
    try:
        made = value.__reduce_ex__(2)
    except Exception:  # noqa: BLE001  what can't be pickled, a class for one, says so in many ways
        # Where it prints where it lies nothing tells it from others: it is another one each time.
        return printed if printed == text else f"{printed} {uuid.uuid4().hex}"
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    return inner([kind, made if isinstance(made, str) else [*made[1:3], *map(list, filter(None, made[3:5]))]])


def _told_data(value: Any) -> str | None:
    """A hash of an array's values or a frame's; None of anything else."""
    if isinstance(value, bytes | bytearray):
        return f"{len(value)} bytes {_hash(value)}"
    if isinstance(value, Tensor) and (value.is_meta or is_lazy(value)):
        return f"{value.dtype} without values" + (f" {list(value.shape)}" if not is_lazy(value) else "")
    if isinstance(value, Tensor) and value.layout is torch.strided and not value.is_nested:
        flat = value.detach().cpu().reshape(-1).view(torch.uint8).numpy()
        return f"{value.dtype} {list(value.shape)} {_hash(flat.data)}"
    if isinstance(value, np.ndarray) and not value.dtype.hasobject:
        data = np.ascontiguousarray(value).reshape(-1).view(np.uint8)  # a file that is mapped isn't copied into memory
        return f"{value.dtype} {list(value.shape)} {_hash(data.data)}"
    if isinstance(value, np.ndarray) or type(value).__module__.partition(".")[0] in {"pandas", "polars", "pyarrow"}:
        return f"{type(value).__name__} {_hash(pickle.dumps(value))}"
    return None


def _told_function(function: types.FunctionType, told: Callable[[Any], Any]) -> str:
    """A function as its text and the values it goes by, so that ``lambda: Net(4)`` isn't ``lambda: Net(width)``."""
    try:
        text = inspect.getsource(function)
    except (OSError, TypeError):  # typed into an interpreter
        text = ""
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    values: dict[str, Any] = {"defaults": [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]}
    for name, cell in cells.items():
        with contextlib.suppress(ValueError):  # not set yet
            values[name] = cell.cell_contents
    return f"{function.__qualname__} {_hash(json.dumps([text, told(values)]).encode())}"


_PRINTED = 1000
"""Characters of what an object prints that are kept to be read."""


def _hash(data: bytes | bytearray | memoryview) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def source_hash(path: Path) -> str | None:
    """A short hash of a source file, or of a notebook's cell; None where there is none."""
    source = path.read_bytes() if path.is_file() else "".join(linecache.getlines(str(path))).encode()
    return _hash(source) if source else None


@dataclass
class Problem:
    """What is learnt.

    Args:
        tasks: The tasks, in the order tables print them. With ``closure`` plain names will do.
        train: What to learn from: a map-style or iterable data set of samples, or ``{task: data set}`` for disjoint ones, of
            which each step takes a batch each. With ``closure``, anything else than a torch ``Dataset`` gives batches: a list
            of them, an iterable, or a number of steps per epoch whose batch is None.
        validation: Samples for choosing the epoch.
        test: Samples for the final figures only.
        model: Builds the network: ``model(x)`` or ``model(x, tasks)`` gives ``{task: output}``. A name takes a ready model of
            the lab.
        losses: Task -> ``loss(output, target)``, a scalar or ``(scalar, count)``, called with the labelled samples only; one
            that takes ``mask`` gets where values are valid. The kind's default otherwise.
        metrics: Task -> name -> a torchmetrics metric, updated with the labelled samples, in place of the kind's.
        primary: Task -> ``(metric, whether higher is better)``: the one that stands for it in Δm.
        collate: ``[sample, ...] -> (x, {task: targets})``; with ``closure`` the batch itself.
        optimizer: ``model -> torch.optim.Optimizer``, in place of the settings'.
        closure: ``(model, batch, tasks) -> {task: loss or (loss, count)}``, in place of model call and losses.
        evaluate: ``model -> {task: {metric: value}}``, in place of validation and test: the last epoch is what is reported.
            Where a method gives each task norms of its own it calls the model in `torchmto.structure.active_task`.
        name: What it is called.
        input_shape: Shape of one input, which ready models are built for; by default that of the first sample.
        mean: Per-channel mean in the inputs' own scale, which normalises them with ``std``.
        std: Per-channel standard deviation, likewise; given if ``mean`` is.
        augment: Augmentation of training batches, ``(batch, tasks, sample keys) -> batch``.
        citation: Whom to cite.
        origin: Where it comes from; found by itself.
        beside: Of disjoint data sets those of tasks that aren't trained, by which an epoch is as long as with them; set by
            `only`.

    Raises:
        ProblemError: If a part isn't what it should be.

    Example:
        >>> x, y = torch.randn(8, 3), torch.randn(8, 1)
        >>> data = [(x[i], {"sum": y[i]}) for i in range(8)]
        >>> problem = Problem([Task("sum", "regression", 1)], data, data, data, model="mlp")
        >>> next(problem.loader("train", 4).epoch(0))["targets"]["sum"].shape
        torch.Size([4, 1])
    """

    tasks: Sequence[Task | str]
    train: Any
    validation: Any = None
    test: Any = None
    model: Callable[[], nn.Module] | str | None = None
    losses: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    metrics: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    primary: Mapping[str, tuple[str, bool]] = field(default_factory=dict)
    collate: Callable[[list[Any]], Any] | None = None
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] | None = None
    closure: Callable[[nn.Module, Any, tuple[str, ...]], Mapping[str, Any]] | None = None
    evaluate: Callable[[nn.Module], Mapping[str, Mapping[str, float]]] | None = None
    name: str = "problem"
    input_shape: tuple[int, ...] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    augment: Augment | None = None
    citation: str = ""
    origin: Origin | None = field(default=None, compare=False)
    beside: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        self.tasks = self._checked_tasks()
        for part in ("losses", "metrics", "primary"):
            self._check_by_task(part, getattr(self, part))
        for part in ("train", "validation", "test"):
            data = getattr(self, part)
            if isinstance(data, Mapping):
                self._check_by_task(part, data, all_of_them=True)
                for task, entry in data.items():
                    self._check_data(f"{part}[{task!r}]", entry)
            elif data is not None or part == "train" or self.evaluate is None:
                self._check_data(part, data)
        self._check_functions()
        self._check_statistics()
        if self.origin is None:
            self.origin = Origin.of_caller()
        elif not self.origin.take():
            parts = {name: getattr(self, name) for name in _TOLD if getattr(self, name)}
            self.origin = self.origin.replaced(Origin.of_caller(), parts)
        self.origin.take()

    def _check_statistics(self) -> None:
        """Refuse what would be no normalisation, or none of each channel."""
        if (self.mean is None) != (self.std is None):
            alone, other = ("mean", "std") if self.std is None else ("std", "mean")
            raise part_error(other, f"given with `{alone}`, as inputs are normalised by both", "none")
        if self.mean is None or self.std is None:
            return
        self.mean, self.std = (self._numbers(part, getattr(self, part)) for part in ("mean", "std"))
        if len(self.mean) != len(self.std):
            raise part_error("std", f"as many numbers as `mean` ({len(self.mean)})", f"{len(self.std)}")

    @staticmethod
    def _numbers(part: str, values: Iterable[Any]) -> tuple[float, ...]:
        try:
            numbers = tuple(map(float, values))
        except (TypeError, ValueError):
            numbers = (math.nan,)
        if not all(math.isfinite(number) and (part == "mean" or number > 0) for number in numbers):
            raise part_error(part, f"{'' if part == 'mean' else 'positive '}numbers, one per channel", values)
        return numbers

    def _check_functions(self) -> None:
        for task, loss in self.losses.items():
            if not _is_function(loss):
                raise part_error(f"losses[{task!r}]", "a callable `loss(output, target)`", loss)
        for part in ("collate", "optimizer", "closure", "evaluate"):
            value = getattr(self, part)
            if value is not None and not _is_function(value):
                raise part_error(part, "a callable that isn't a class, or left out", value)
        if self.model is not None and not isinstance(self.model, str) and not callable(self.model):
            raise part_error("model", "a function that builds the network, or a ready model's name", self.model)
        if isinstance(self.model, nn.Module):
            raise part_error(
                "model", "a function that builds the network anew (`model=lambda: Net()`)", "one that is built already"
            )

    def _checked_tasks(self) -> tuple[Task, ...]:
        if isinstance(self.tasks, str | Task) or not isinstance(self.tasks, Iterable):
            raise part_error("tasks", "a list of tasks", self.tasks)
        tasks: list[Task] = []
        for entry in self.tasks:
            if isinstance(entry, str) and entry and self.closure is None and entry not in self.losses:
                raise part_error("tasks", "lab.Task objects (plain names need `closure`)", entry)
            if not isinstance(entry, Task) and not (isinstance(entry, str) and entry):
                raise part_error("tasks", "a list of lab.Task objects or names", entry)
            tasks.append(Task(entry, "own") if isinstance(entry, str) else entry)
        names = [task.name for task in tasks]
        if not names:
            raise part_error("tasks", "a list of at least one task", "none")
        if twice := [name for name in names if names.count(name) > 1]:
            raise part_error("tasks", "tasks of different names", f"two called `{twice[0]}`")
        return tuple(self._with_metrics(task) for task in tasks)

    def _with_metrics(self, task: Task) -> Task:
        """The task, which says of its own metrics which one stands for it and which way each is better."""
        own, primary = self.metrics.get(task.name), self.primary.get(task.name)
        if not own and not primary:
            return task
        extra = dict(task.extra)
        if own:
            entries = own.values() if isinstance(own, Mapping) else [own]
            wrong = [entry for entry in entries if isinstance(entry, type) or not hasattr(entry, "clone")]
            if wrong or not isinstance(own, Mapping):
                raise part_error(f"metrics[{task.name!r}]", "{name: a torchmetrics metric}", (wrong or [own])[0])
            directions = {name: getattr(metric, "higher_is_better", None) for name, metric in own.items()}
            ways = {name: name in _HIGHER if said is None else said for name, said in directions.items()}
            extra |= {"metrics": dict(own), "directions": ways}
            extra["primary_metric"] = first = next(iter(own))
            if not primary and directions[first] is None:
                _warn_of_direction(task.name, first)
        if primary:
            if not isinstance(primary, Sequence) or len(primary) != 2 or not isinstance(primary[1], bool):
                raise part_error(f"primary[{task.name!r}]", "(metric, whether higher is better)", primary)
            known = own or metric_names(task.kind)
            if self.evaluate is None and primary[0] not in known:
                raise part_error(f"primary[{task.name!r}]", f"one of {', '.join(known) or 'its metrics'}", primary[0])
            extra["primary_metric"] = primary[0]
            extra["directions"] = {**extra.get("directions", {}), primary[0]: primary[1]}
        return replace(task, extra=extra)

    def _check_by_task(self, part: str, entries: Any, *, all_of_them: bool = False) -> None:
        names = self.task_names
        if not isinstance(entries, Mapping):
            raise part_error(part, "a mapping by task", entries)
        if unknown := [name for name in entries if name not in names]:
            raise part_error(part, f"by task ({', '.join(names)})", f"an entry for {unknown[0]!r}")
        if all_of_them and (missing := [name for name in names if name not in entries]):
            raise part_error(part, f"by task ({', '.join(names)})", f"none for `{missing[0]}`")

    def _check_data(self, part: str, data: Any) -> None:
        if self.closure is not None and isinstance(data, int) and not isinstance(data, bool):
            if data < 1:
                raise part_error(part, "a positive number of steps per epoch", data)
            return
        if self.closure is None and isinstance(data, DataLoader):
            raise part_error(part, "a data set, as the lab makes batches itself", "a DataLoader; give its `dataset`")
        sized = hasattr(data, "__getitem__") and hasattr(data, "__len__")
        frame = type(data).__name__ == "DataFrame"  # by number it has columns, not samples
        if data is None or frame or isinstance(data, str | bytes) or not (sized or isinstance(data, Iterable)):
            hint = "" if part == "train" else " (it may be left out where `evaluate` is given)"
            raise part_error(part, f"a map-style or iterable data set{hint}", "a DataFrame" if frame else data)
        if not sized and iter(data) is iter(data):
            raise part_error(part, "something that can be gone through every epoch", "a one-shot generator")
        if sized and len(data) == 0:
            raise part_error(part, "a data set with samples", "an empty one")

    # ------------------------------------------------------------------------------------------------- what others ask

    @property
    def task_list(self) -> tuple[Task, ...]:
        """The tasks as `Task` objects."""
        return tuple(task for task in self.tasks if isinstance(task, Task))

    @property
    def task_names(self) -> tuple[str, ...]:
        """The tasks' names."""
        return tuple(task.name for task in self.task_list)

    def only(self, names: Sequence[str]) -> "Problem":
        """The same problem with some of its tasks, in its own order; all of them if there are no names.

        An epoch stays as long as it is: of disjoint data sets it is the longest one's, be its task among the names or not.

        Raises:
            ValueError: If there is no such task, or one is named twice.
        """
        for name in names:
            if name not in self.task_names:
                raise ValueError(
                    f"The data set `{self.name}` has the tasks {', '.join(self.task_names)}. Found {name!r}."
                )
            if list(names).count(name) > 1:
                raise ValueError(f"Each task should be named once. Found the task `{name}` twice.")
        if not names:
            return self

        def kept(entries: Any) -> Any:
            return {n: v for n, v in entries.items() if n in names} if isinstance(entries, Mapping) else entries

        parts = ("train", "validation", "test", "losses", "metrics", "primary")
        chosen = tuple(task for task in self.task_list if task.name in names)
        train = self.train if isinstance(self.train, Mapping) else {}
        beside = {**self.beside, **{name: data for name, data in train.items() if name not in names}}
        same = copy.copy(self)  # with its origin, and without checks of what has passed them
        vars(same).update({part: kept(getattr(self, part)) for part in parts}, tasks=chosen, beside=beside)
        return same

    def split(self, name: Split) -> Any:
        """The data of a split."""
        if name not in SPLITS:
            raise ValueError(f"Parameter `name` should be one of {', '.join(SPLITS)}. Found `name = {name!r}`.")
        return getattr(self, name)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one input.

        Raises:
            ProblemError: If an input isn't a tensor.
        """
        if self.input_shape is None:
            if self.closure is not None:
                raise part_error("model", "a function that builds the network, where `closure` is given", self.model)
            (_, batch), *_ = self.parts(next(iter(self.loader("train", 1).epoch(0))))
            if not isinstance(batch["input"], Tensor):
                raise part_error(
                    "train", "samples whose input is a tensor, for a ready model", type(batch["input"]).__name__
                )
            self.input_shape = tuple(batch["input"].shape[1:])
        return self.input_shape

    @property
    def ready_batches(self) -> bool:
        """Whether training batches come ready-made, so that no batch size is asked for."""
        return all(map(self._is_ready, self.train.values() if isinstance(self.train, Mapping) else [self.train]))

    def _is_ready(self, source: Any) -> bool:
        return self.closure is not None and not isinstance(source, TorchDataset)

    @property
    def is_image(self) -> bool:
        """Whether inputs are images."""
        return len(self.shape) == 3

    def normalize(self, inputs: Tensor) -> Tensor:
        """``[B, ...]`` inputs as a model should see them: ``(x - mean) / std`` per channel."""
        return _normalized(inputs, self.mean, self.std)

    def loader(
        self,
        split: Split,
        batch_size: int,
        *,
        seed: int = 0,
        augment: bool | None = None,
        workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
        whole: bool = False,
    ) -> Loaders:
        """Batches of one split; training is shuffled, augmented and drops a last short batch.

        Args:
            split: ``"train"``, ``"validation"`` or ``"test"``.
            batch_size: Samples per batch, over all ranks; each rank gets its piece.
            seed: With epoch and index it decides order and augmentation.
            augment: Whether to augment; by default the training split only, where there is an augmentation.
            workers: Processes that prepare batches ahead; 0 prepares each when it is asked for. Never changes a batch.
            rank: This process' number.
            world_size: Number of processes.
            whole: Every sample in the stored order, of the training split, too.

        Returns:
            A loader; ``loader.epoch(epoch, start)`` iterates.

        Raises:
            ProblemError: If batches that come ready-made would have to be divided among processes.
        """
        data, training = self.split(split), split == "train" and not whole
        transform = self.augment if (training if augment is None else augment) else None

        def one(source: Any, task: str | None) -> Loader | StreamLoader:
            # Sets of equal size shuffled alike would pair the same samples in every epoch.
            own = seed if task is None else zlib.crc32(task.encode(), seed % 2**32)
            ready = self._is_ready(source)
            if ready and world_size > 1:
                raise part_error(split, "a data set whose batches can be divided among processes", "ready-made batches")
            if isinstance(source, int):
                source = range(source)
                fetch = _Fetch(source, _nothing, None)
            elif ready:
                fetch = _Fetch(source, _first, None)
            else:
                fetch = _Fetch(source, self._collate(split, task, transform is not None), self._finish(transform))
            if isinstance(source, IterableDataset) or not (
                hasattr(source, "__getitem__") and hasattr(source, "__len__")
            ):
                size, whole = (None, _first) if ready else (batch_size, fetch.whole)
                return StreamLoader(source, size, whole, seed=own, drop_last=training, rank=rank, world_size=world_size)
            size = 1 if ready or isinstance(source, range) else batch_size
            plan = BatchPlan(
                len(source),
                size,
                seed=own,
                shuffle=training,
                drop_last=training,
                rank=rank,
                world_size=world_size,
            )
            return Loader(fetch, plan, workers=workers)

        if isinstance(data, Mapping):
            beside = self.beside if split == "train" else {}
            joint = {task: one(source, task) for task, source in data.items()}
            return JointLoader(joint, [one(source, task) for task, source in beside.items()])
        return one(data, None)

    def _collate(self, split: str, task: str | None, augmented: bool) -> Callable[[list[Any]], Any]:
        if self.closure is not None:
            return self.collate or default_collate
        tasks = self.task_list if task is None else tuple(t for t in self.task_list if t.name == task)
        return _Collate(split, tasks, task, self.collate)

    def _finish(self, transform: Augment | None) -> Callable[[Any, Tensor], Any] | None:
        if self.closure is not None or (transform is None and self.mean is None):
            return None
        return _Finish(self.task_list, transform, self.mean, self.std)

    def parts(self, batch: Any, split: Split = "train") -> list[tuple[tuple[str, ...], Any]]:
        """A step's batch as (tasks, batch) pairs: one of all tasks, or one per task for disjoint data sets."""
        if isinstance(self.split(split), Mapping):
            return [((task,), batch[task]) for task in self.task_names]
        return [(self.task_names, batch)]

    def once(
        self, split: Split, batch_size: int, *, workers: int = 0, rank: int = 0, world_size: int = 1
    ) -> Iterator[tuple[tuple[str, ...], Any]]:
        """Every sample of a split once, as (tasks, batch) pairs; of several processes each gets whole batches of its own.

        Args:
            split: ``"train"``, ``"validation"`` or ``"test"``; not augmented.
            batch_size: Samples per batch.
            workers: Processes that prepare batches ahead.
            rank: This process' number.
            world_size: Number of processes.
        """
        loader = self.loader(split, batch_size, augment=False, workers=workers, whole=True)
        if not isinstance(loader, JointLoader):
            yield from ((self.task_names, batch) for batch in loader.epoch(0, rank, world_size))
            return
        for task, own in loader.loaders.items():
            yield from (((task,), batch) for batch in own.epoch(0, rank, world_size))

    def settle(self, values: Mapping[str, Mapping[str, float]]) -> None:
        """Take each own task's first metric for its primary one, where nothing says which it is."""
        for task in self.task_list:
            if task.kind != "own" or "primary_metric" in task.extra or not values.get(task.name):
                continue
            metric = next(iter(values[task.name]))
            _warn_of_direction(task.name, metric)
            assert isinstance(task.extra, dict)
            task.extra.update({"primary_metric": metric, "directions": {metric: metric in _HIGHER}})


_TOLD = (
    *("model", "losses", "metrics", "primary", "collate", "optimizer", "closure", "evaluate"),
    *("input_shape", "mean", "std", "augment"),
)
"""Parts by which a problem that was changed is told from others of its caller; data are known by their number and shape."""


def _warn_of_direction(task: str, metric: str) -> None:
    """Of a metric nobody says it of, lower values are better unless its name is known."""
    if metric not in _HIGHER:
        warn(f"The task `{task}` is judged by `{metric}`, lower is better; `primary=` says otherwise.")


def _is_function(value: Any) -> bool:
    return callable(value) and not isinstance(value, type)


def _normalized(inputs: Tensor, mean: tuple[float, ...] | None, std: tuple[float, ...] | None) -> Tensor:
    if mean is None or std is None:
        return inputs
    if not isinstance(inputs, Tensor) or inputs.dim() < 2 or inputs.shape[1] != len(mean):
        should = "one number per channel of inputs [B, C, ...]"
        raise part_error("mean", should, f"{len(mean)} for {_described(inputs)}")
    if not inputs.is_floating_point():
        inputs = inputs.float()  # a byte holds neither a mean of .5 nor what is below it
    shift, scale = (inputs.new_tensor(values).view(1, -1, *[1] * (inputs.dim() - 2)) for values in (mean, std))
    return (inputs - shift) / scale


def _nothing(_: list[Any]) -> None:
    return None


def _first(items: list[Any], _: object = None) -> Any:
    return items[0]


class _Fetch:
    """Samples of a data set as a batch: each sample drawn with a random state of its own."""

    def __init__(
        self, data: Any, merge: Callable[[list[Any]], Any], finish: Callable[[Any, Tensor], Any] | None
    ) -> None:
        self.data, self.merge, self.finish = data, merge, finish

    def __call__(self, indices: Tensor, keys: Tensor) -> Any:
        if isinstance(self.data, MultiTaskDataset) and isinstance(self.merge, _Collate) and self.merge.own is None:
            with own_random_state(batch_key(keys)):
                batch: Any = self.data.batch(indices)
                return batch if self.finish is None else self.finish(batch, keys)
        samples = []
        for index, key in zip(indices.tolist(), keys.tolist(), strict=True):
            with own_random_state(key):
                samples.append(self.data[index])
        return self.whole(samples, keys)

    def whole(self, samples: list[Any], keys: Tensor) -> Any:
        """A batch of samples, with a random state of its own for what draws numbers for the batch as a whole."""
        with own_random_state(batch_key(keys)):
            batch = self.merge(samples)
            return batch if self.finish is None else self.finish(batch, keys)


class _Finish:
    """Augmentation and normalisation of a batch."""

    def __init__(
        self,
        tasks: tuple[Task, ...],
        transform: Augment | None,
        mean: tuple[float, ...] | None,
        std: tuple[float, ...] | None,
    ) -> None:
        self.tasks, self.transform, self.mean, self.std = tasks, transform, mean, std

    def __call__(self, batch: Batch, keys: Tensor) -> Batch:
        if self.transform is not None:
            batch = self.transform(batch, self.tasks, keys)
        return Batch(input=_normalized(batch["input"], self.mean, self.std), targets=batch["targets"])


class _Collate:
    """Samples as a batch with one target tensor per task, in the type its kind asks for."""

    def __init__(
        self, split: str, tasks: tuple[Task, ...], only: str | None, own: Callable[[list[Any]], Any] | None
    ) -> None:
        self.split, self.tasks, self.only, self.own = split, tasks, only, own

    def __call__(self, samples: list[Any]) -> Batch:
        if self.own is not None:
            x, given = self._pair(self.own(samples), "collate")
            targets = {t.name: self._target(t, given[t.name]) for t in self.tasks if t.name in given}
        else:
            pairs = [self._pair(sample, self.split) for sample in samples]
            x = _stacked([x for x, _ in pairs], self.split)
            targets = self._targets([targets for _, targets in pairs])
        for task in self.tasks:
            if task.name in targets:
                check_labels(task, targets[task.name], self.split)
        return Batch(input=x, targets=targets)

    def _pair(self, sample: Any, part: str) -> tuple[Any, Mapping[str, Any]]:
        should = "samples (x, {task: target})" if part != "collate" else "a function that gives (x, {task: targets})"
        if isinstance(sample, Mapping) and set(sample) == {"input", "targets"}:
            x, targets = sample["input"], sample["targets"]
        elif isinstance(sample, Sequence) and not isinstance(sample, str) and len(sample) == 2:
            x, targets = sample
        else:
            raise part_error(part, should, _described(sample))
        if self.only is not None and not isinstance(targets, Mapping):
            targets = {self.only: targets}
        if not isinstance(targets, Mapping):
            raise part_error(part, should, f"(x, {_described(targets)})")
        return x, targets

    def _targets(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        columns: dict[str, Tensor] = {}
        for task in self.tasks:
            # In the kind's type before anything is filled in: a bool or a byte holds no missing value.
            values = [None if (v := row.get(task.name)) is None else self._target(task, v, one=True)[0] for row in rows]
            example = next((value for value in values if value is not None), None)
            if example is None:
                continue
            if task.kind == "own" and any(value is None for value in values):
                raise part_error(
                    self.split,
                    f"samples with a target of `{task.name}`, as its kind has no missing value",
                    "one without",
                )
            shapes = {tuple(value.shape) for value in values if value is not None}
            if len(shapes) > 1:
                raise part_error(
                    f"{self.split}, task `{task.name}`", "targets of one shape", " and ".join(map(str, shapes))
                )
            columns[task.name] = torch.stack(
                [torch.full_like(example, task.missing) if v is None else v for v in values]
            )
        return columns

    def _target(self, task: Task, value: Any, *, one: bool = False) -> Tensor:
        """A batch of targets, or one, in the type the task's kind asks for."""
        where = f"{self.split}, task `{task.name}`"
        try:
            stored = torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise part_error(where, "targets that are numbers or tensors", _described(value)) from error
        target = as_target(task, stored[None] if one else stored)
        if stored.is_floating_point() and target.dtype == torch.int64 and (cut := target != stored).any():
            should = f"whole class numbers, or {int(task.missing)} where missing"
            raise part_error(where, should, f"{stored.expand_as(target)[cut][0]:g}")
        return target


def check_labels(task: Task, target: Tensor, split: str) -> None:
    """Raise a ProblemError if a batch of targets holds a class that isn't there, or an answer that is neither yes nor no."""
    classes = task.kind in {"classification", "segmentation"}
    if not classes and task.kind not in {"binary", "edges", "saliency"}:
        return
    labels = target[task.valid(target)]
    wrong = labels[(labels < 0) | (labels >= task.channels if classes else labels > 1)]
    if len(wrong):
        missing = "NaN" if task.kind == "binary" else int(task.missing)
        should = f"class numbers 0 to {task.channels - 1}" if classes else "numbers in [0, 1]"
        raise part_error(f"{split}, task `{task.name}`", f"{should}, or {missing} where missing", f"{wrong[0]:g}")


def _stacked(inputs: list[Any], split: str) -> Any:
    try:
        return default_collate(inputs)
    except (TypeError, RuntimeError) as error:
        first = str(error).splitlines()[0]
        raise part_error(split, "samples whose inputs can be put together (or give `collate`)", first) from error


def _described(value: Any) -> str:
    match value:
        case Tensor():
            return f"a tensor of shape {tuple(value.shape)}"
        case tuple() | list():
            return f"a {type(value).__name__} of {len(value)}"
        case Mapping():
            return f"a mapping with {', '.join(map(repr, list(value)[:5])) or 'no keys'}"
        case _:
            return f"{type(value).__name__} {value!r}"[:100]
