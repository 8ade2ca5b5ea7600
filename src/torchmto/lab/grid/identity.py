"""What makes a Run the same one on another machine, under another path, and for later versions of this package."""

import functools
import hashlib
from collections.abc import Mapping
from typing import Any

from torchmto.lab.atomic import canonical, plain
from torchmto.lab.fingerprints import by_content
from torchmto.lab.problem import Problem, ProblemError
from torchmto.lab.references import without_place
from torchmto.lab.run.config import FREE, RunConfig


def identity(config: RunConfig) -> dict[str, Any]:
    """The settings of a run that decide its outcome: without `FREE`, and without where files are on this machine.

    Example:
        >>> from torchmto.lab.run.config import config_of
        >>> identity(config_of({"data.name": "rf1:/data/rf1.arff"}))["data"]["name"]
        'rf1'
    """
    values: dict[str, Any] = plain(config.as_dict(), nonfinite=str)
    for name in FREE - _COUNTED:
        section, _, key = name.partition(".")
        if key:
            values[section].pop(key, None)
        else:
            values.pop(section, None)
    for section in ("data", "model"):
        if values[section]["name"] is not None:
            values[section]["name"] = without_place(values[section]["name"])
        values[section]["options"] = by_content(values[section]["options"])
    return values


_COUNTED = {"devices", "nodes"}
"""Free when a run is resumed; but each process has norm statistics and dropout of its own."""


@functools.cache
def _defaults() -> dict[str, Any]:
    return identity(RunConfig())


def decided(values: Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Of the settings those that aren't as by default, so that a setting that is new doesn't make finished runs others.

    A default that changes raises `torchmto.lab.versions.RESULTS_VERSION`.

    Example:
        >>> decided(identity(RunConfig(epochs=3)))
        {'epochs': 3}
    """
    defaults = _defaults() if defaults is None else defaults
    kept: dict[str, Any] = {}
    for key, value in values.items():
        default = defaults.get(key)
        if key in defaults and value == default:
            continue
        own = decided(value, default) if isinstance(value, Mapping) and isinstance(default, Mapping) else value
        if own != {} or key not in defaults:
            kept[key] = own
    return kept


def run_key(config: RunConfig) -> str:
    """A hash of everything that decides a run's outcome, save the data's content."""
    return hashlib.sha256(canonical(decided(identity(config))).encode()).hexdigest()[:16]


def contents(problem: Problem) -> dict[str, Any]:
    """What tells a problem's data from others of its name, wherever they are: how many samples, of which shape."""

    def size(data: Any) -> Any:
        if isinstance(data, Mapping):
            return {task: size(entry) for task, entry in data.items()}
        if data is None or isinstance(data, int):
            return data
        return len(data) if hasattr(data, "__len__") else None

    try:
        shape: tuple[int, ...] | None = problem.shape
    except ProblemError:  # not tensors
        shape = None
    samples = {split: size(getattr(problem, split)) for split in ("train", "validation", "test")}
    # Before that was so, a single-task model's epoch was its own set: such results aren't gone on with.
    epoch = {"epoch": "the longest set"} if isinstance(problem.train, Mapping) else {}
    return {"samples": samples, "input_shape": shape, **epoch}
