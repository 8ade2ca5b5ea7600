"""Data sets by name: what there is, where to get it, and how to load it from ``NAME[:PATH]``."""

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchmto.checks import found, nearest
from torchmto.lab.data.base import DataBundle

_MODULES = (
    "digits",
    "rooms",
    "attributes",
    "nyuv2",
    "cityscapes",
    "pascal_context",
    "taskonomy",
    "cifar100",
    "celeba",
    "multimnist",
    "tabular",
)
_registry: dict[str, "DatasetInfo"] = {}


@dataclass(frozen=True)
class DatasetInfo:
    """One entry of the list that ``torchmto datasets`` prints.

    Args:
        name: What goes before the colon of ``NAME:PATH``.
        summary: One line on the data and its tasks.
        source: Where to get the files; empty for data sets that need none.
        load: ``(path, seed, **options) -> DataBundle``.
        layouts: What ``PATH`` may be.
    """

    name: str
    summary: str
    source: str
    load: Callable[..., DataBundle]
    layouts: tuple[str, ...] = ()

    @property
    def options(self) -> dict[str, Any]:
        """The options `load_data` takes for this data set, with their defaults."""
        parameters = list(inspect.signature(self.load).parameters.values())
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def register(
    name: str, summary: str, *, source: str = "", layouts: tuple[str, ...] = ()
) -> Callable[[Callable[..., DataBundle]], Callable[..., DataBundle]]:
    """Decorator that enters ``load(path, seed, *, options) -> DataBundle`` into the registry."""

    def enter(load: Callable[..., DataBundle]) -> Callable[..., DataBundle]:
        _registry[name] = DatasetInfo(name, summary, source, load, layouts)
        return load

    return enter


def _known() -> dict[str, DatasetInfo]:
    for module in _MODULES:
        importlib.import_module(f"torchmto.lab.data.{module}")

    def place(info: DatasetInfo) -> int:
        return _MODULES.index(info.load.__module__.rpartition(".")[2])

    return {info.name: info for info in sorted(_registry.values(), key=place)}


def datasets() -> tuple[str, ...]:
    """Names of all data sets.

    Example:
        >>> "digits" in datasets()
        True
    """
    return tuple(_known())


def dataset_info(name: str) -> DatasetInfo:
    """Summary, source, layouts and options of the data set ``name``."""
    known = _known()
    if name not in known:
        raise ValueError(found("name", f"one of {', '.join(known)}", name) + nearest(name, known))
    return known[name]


def load_data(spec: str, seed: int = 0, **options: Any) -> DataBundle:
    """Load a data set.

    Args:
        spec: ``"NAME"`` or ``"NAME:PATH"``, for example ``"digits"`` or ``"nyuv2:nyuv2.npz"``.
        seed: Decides splits and generated samples; keep it fixed where results are to be compared.
        **options: Options of the data set, such as ``size=(48, 64)``; see `dataset_info`.

    Returns:
        Train, validation and test data with their tasks.

    Raises:
        ValueError: If the name is unknown, or a path is missing or not wanted.
        TypeError: If the data set doesn't take an option.
        FileNotFoundError: If a file is missing; the message names it and where to get it.

    Example:
        >>> [task.name for task in load_data("digits", train=100, validation=10, test=10).tasks]
        ['left', 'right', 'offset']
    """
    name, _, path = spec.partition(":")
    info = dataset_info(name)
    if path and not info.layouts:
        raise ValueError(f"The data set `{name}` is built in and takes no path. Found `{spec}`.")
    unknown = sorted(set(options) - set(info.options))
    if unknown:
        taken = ", ".join(info.options) or "none"
        raise TypeError(f"The data set `{name}` has no option `{unknown[0]}`. It takes: {taken}.")
    return info.load(Path(path).expanduser() if path else None, seed, **options)
