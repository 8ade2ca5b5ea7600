"""Data sets by name: what there is, where to get it, and how to load it from ``NAME[:PATH]``."""

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchmto.checks import found, nearest
from torchmto.lab.arguments import fitted

if TYPE_CHECKING:
    from torchmto.lab.problem import Problem

_MODULES = (
    "digits",
    "rooms",
    "attributes",
    "nyuv2",
    "cityscapes",
    "pascal_context",
    "taskonomy",
    "nuscenes",
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
        load: ``(path, seed, **options) -> Problem``; a path without default is one that is there.
        layouts: What ``PATH`` may be.
    """

    name: str
    summary: str
    source: str
    load: Callable[..., "Problem"]
    layouts: tuple[str, ...] = ()

    @property
    def options(self) -> dict[str, Any]:
        """The options `load_data` takes for this data set, with their defaults."""
        parameters = list(inspect.signature(self.load).parameters.values())
        return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def register(
    name: str, summary: str, *, source: str = "", layouts: tuple[str, ...] = ()
) -> Callable[[Callable[..., "Problem"]], Callable[..., "Problem"]]:
    """Decorator that enters ``load(path, seed, *, options) -> Problem`` into the registry."""

    def enter(load: Callable[..., "Problem"]) -> Callable[..., "Problem"]:
        _registry[name] = DatasetInfo(name, summary, source, load, layouts)
        return load

    return enter


def _known() -> dict[str, DatasetInfo]:
    """All data sets: the built-in ones first, in their order, then those registered elsewhere."""
    for module in _MODULES:
        importlib.import_module(f"torchmto.lab.data.{module}")

    def place(info: DatasetInfo) -> int:
        package, _, module = info.load.__module__.rpartition(".")
        return _MODULES.index(module) if package == __package__ and module in _MODULES else len(_MODULES)

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


def load_data(spec: str, seed: int = 0, **options: Any) -> "Problem":
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
    parameters = inspect.signature(info.load).parameters
    place = Path(path).expanduser() if path else None
    if place is not None or next(iter(parameters.values())).default is inspect.Parameter.empty:
        require(place, name)
    arguments = fitted(options, {option: parameters[option] for option in info.options}, f"The data set `{name}`")
    problem = info.load(place, seed, **arguments)
    problem.name = name
    return problem


def require(path: Path | None, dataset: str) -> Path:
    """``path`` itself if it exists.

    Args:
        path: A file or folder of the data set.
        dataset: Registry name, for the message.

    Raises:
        ValueError: If no path was given.
        FileNotFoundError: If there is nothing at the path; the message says where to get the data.
    """
    info = dataset_info(dataset)
    if path is None:
        raise ValueError(
            f"The data set `{dataset}` needs a path: `{dataset}:PATH`,"
            f" where PATH is {' or '.join(info.layouts)}."
            f" Get it from {info.source}."
        )
    if not path.exists():
        raise FileNotFoundError(
            f"The data set `{dataset}` needs `{path}`, which doesn't exist. Get it from {info.source}."
        )
    return path


def unknown_layout(path: Path, dataset: str) -> ValueError:
    """The error for a path that is there but isn't laid out in a known way."""
    info = dataset_info(dataset)
    return ValueError(
        f"The data set `{dataset}` should be {' or '.join(info.layouts)}."
        f" Found `{path}`, which is none of these."
        f" Get it from {info.source}."
    )
