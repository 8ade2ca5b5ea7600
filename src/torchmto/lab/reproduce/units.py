"""Resumable units of work that aren't training runs: one checked JSON file each."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torchmto.lab.atomic import BrokenFileError, canonical, plain, read_json, write_json
from torchmto.lab.grid.identity import decided, identity
from torchmto.lab.reproduce.budget import Budget, BudgetSpentError
from torchmto.lab.run.config import RunConfig
from torchmto.lab.versions import RESULTS_VERSION, results_version

__all__ = ["run_units"]

_KIND, _VERSION = "torchmto reproduce unit", 1
Parameters = Mapping[str, Any]


def run_units(
    folder: Path,
    units: Mapping[str, Parameters],
    work: Callable[[Parameters], Mapping[str, Any]],
    *,
    budget: Budget,
    say: Callable[[str], None],
) -> dict[str, dict[str, Any]]:
    """Do what isn't done yet, until the time is up. What code of another `RESULTS_VERSION` did is done again.

    Args:
        folder: Where the units' files are and go.
        units: What decides each unit's outcome, by its name.
        work: From parameters to a result of plain values.
        budget: The time.
        say: Prints a line.

    Returns:
        The results of finished units, in the order of ``units``. Fewer than ``units`` where the time was up.
    """
    folder.mkdir(parents=True, exist_ok=True)
    results: dict[str, dict[str, Any]] = {}
    for name, parameters in units.items():
        known = _known(parameters)
        path = folder / f"{_slug(name)}-{_key(known)}.json"
        try:
            content = read_json(path, _KIND, _VERSION) if path.exists() else None
        except BrokenFileError as error:
            say(f"  {error} It is done again.")
            content = None
        if content is not None and results_version(content) != RESULTS_VERSION:
            say(f"  {path.name} was made by code whose results mean something else. It is done again.")
            content = None
        if content is not None and content["parameters"] == plain(known):
            results[name] = content["result"]
            continue
        try:
            budget.check()
        except BudgetSpentError:
            continue
        result = plain(work(parameters))
        write_json(path, _KIND, _VERSION, {"results_version": RESULTS_VERSION, "parameters": known, "result": result})
        results[name] = result
        say(f"  {name}: done, {budget.used:.1f} min")
    return results


def _known(parameters: Parameters) -> Parameters:
    """What a unit is known by, wherever its data are."""
    if "config" not in parameters:
        return parameters
    return {**parameters, "config": decided(identity(RunConfig.from_dict(parameters["config"])))}


def _slug(name: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in name)[:60]


def _key(parameters: Parameters) -> str:
    return hashlib.sha256(canonical(parameters).encode()).hexdigest()[:16]


def complete(units: Sequence[str] | Mapping[str, Any], results: Mapping[str, Any]) -> bool:
    """Whether all units are finished."""
    return all(name in results for name in units)
