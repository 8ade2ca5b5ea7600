"""The folder of a comparison: which settings it belongs to, and one file per finished run.

::

    DIR/config.json             the settings
    DIR/runs/<method>-seed<n>-<key>.json   a finished run; the key is a hash of its configuration
    DIR/runs/<method>-seed<n>-<key>/       checkpoints of one that isn't finished, where they are asked for
    DIR/results.json, results.csv, results.md, plots/*.png   written once all runs are finished

All files are written atomically and carry a checksum, so an interrupted comparison goes on where it stopped,
and a folder of something else is never written to. ``config.json`` and the finished runs are all that going on needs, on
whatever machine and wherever the data are there; methods and seeds may be added later.
"""

import contextlib
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torchmto.checks import shown
from torchmto.lab.atomic import BrokenFileError, plain, read_json, write_json
from torchmto.lab.folders import FolderError, check_folder, is_ignored, locked
from torchmto.lab.grid.experiment import Experiment, is_single_task, method_label
from torchmto.lab.grid.identity import contents, decided, identity, run_key
from torchmto.lab.problem import Problem
from torchmto.lab.run.config import ConfigError, RunConfig, check_content, check_source
from torchmto.lab.specs import MethodSpec
from torchmto.lab.versions import RESULTS_VERSION, results_version

SCHEMA_VERSION = 2
_OWNER = _EXPERIMENT = "torchmto compare"
_RUN = "torchmto compare run"
_LEFTOVER = re.compile(r"\..+\.tmp")


def run_files(path: Path, results: Mapping[str, Any]) -> list[tuple[str | None, Path]]:
    """The files of a comparison's finished runs, each with what its rows are called: a method's text, or ``single:<task>``.

    Args:
        path: The comparison's folder.
        results: Its results.json. Where that doesn't list the runs, as once it didn't, the names are None.
    """
    files = sorted((path / "runs").glob("*.json"))
    if "runs" not in results:
        return [(None, file) for file in files]
    by_key = {file.stem.rpartition("-")[2]: file for file in files}
    return [(name, by_key[key]) for name, keys in results["runs"].items() for key in keys if key in by_key]


def run_name(config: Mapping[str, Any]) -> str:
    """What the rows of a run are called, as far as its settings tell."""
    tasks = config["data"]["tasks"] or ()
    method = config["method"]
    label = MethodSpec(method["name"], method["options"]).label
    return f"single:{next(iter(tasks))}" if len(tasks) == 1 and label == "gd" else label


class GridFolder:
    """The folder of one comparison; see this module's docstring.

    Args:
        path: Where. Missing folders are created.
        settings: The settings of the comparison.
        changed_source: Whether the file that defines the problem may be another one than before.

    Raises:
        FolderError: If there is something else, a comparison with other settings, or a broken file.
    """

    def __init__(self, path: Path | str, settings: Mapping[str, Any], *, changed_source: bool = False) -> None:
        self.path = path = Path(path)
        self.changed_source = changed_source
        self._runs = path / "runs"
        settings = plain(settings)
        check_folder(path, _OWNER)  # before the lock, whose file has no place in somebody else's folder
        with self.locked():
            if check_folder(path, _OWNER):
                self._check_settings(settings)
            else:  # first of all: a folder with anything else in it would be taken for somebody else's
                write_json(path / "config.json", _EXPERIMENT, SCHEMA_VERSION, settings)
            self._runs.mkdir(exist_ok=True)

    @classmethod
    def of(
        cls, path: Path | str, experiment: Experiment, problem: Problem, *, tune: int = 0, changed_source: bool = False
    ) -> "GridFolder":
        """The folder of an experiment on a problem, whose data are known again by their contents.

        Args:
            path: Where.
            experiment: What is compared.
            problem: What is learnt.
            tune: Settings that each may try first.
            changed_source: Whether the file that defines the problem may be another one than before.

        Raises:
            FolderError: As the class does.
        """
        settings = {**experiment.settings, **contents(problem), **({"tune": tune} if tune else {})}
        return cls(path, settings, changed_source=changed_source)

    def _check_settings(self, settings: Mapping[str, Any]) -> None:
        try:
            saved = read_json(self.path / "config.json", _EXPERIMENT, SCHEMA_VERSION)
        except BrokenFileError as error:
            raise FolderError(f"{error} The folder was left as it is; choose another one (--out, `out=`).") from error
        more = {name: settings[name] for name in _GROWING if _is_more(saved.get(name), settings.get(name))}
        different = _differences(decided({**saved, **more}), decided(settings))
        if different:
            raise FolderError(
                f"The folder {self.path} belongs to a comparison with other settings: {'; '.join(different)}. "
                "It was left as it is; choose another one (--out, `out=`)."
            )
        there, here = (values.get("free", {}) for values in (saved, settings))
        known, methods = (values.get("methods", {}) for values in (there, here))
        if not self.changed_source:
            what = f"The comparison in {self.path}"
            try:
                for method in methods.keys() & known.keys():
                    check_source(known[method], methods[method], what, f"the method {method}")
                check_source(there.get("source"), here.get("source"), what)
                check_content(there.get("content"), here.get("content"), what)
            except ConfigError as error:
                raise FolderError(str(error)) from error
        if more:
            free = {**there, "methods": {**methods, **known}}
            write_json(self.path / "config.json", _EXPERIMENT, SCHEMA_VERSION, {**saved, **more, "free": free})

    def locked(self) -> contextlib.AbstractContextManager[None]:
        """Keep other processes from working in the folder.

        Raises:
            FolderError: If one does.
        """
        return locked(self.path)

    def file(self, config: RunConfig) -> Path:
        """Where a run is or will be."""
        name = f"single-{(config.data.tasks or [''])[0]}" if is_single_task(config) else method_label(config)
        slug = re.sub(r"[^A-Za-z0-9_]+", "-", name).strip("-")[:60]
        return self._runs / f"{slug}-seed{config.seed}-{run_key(config)}.json"

    def checkpoints(self, config: RunConfig) -> Path | None:
        """Where a run's checkpoints go, if it keeps any."""
        return self.file(config).with_suffix("") if config.checkpoint_every is not None else None

    def load(self, configs: Sequence[RunConfig]) -> dict[str, dict[str, Any]]:
        """The results of those runs that are finished.

        Raises:
            FolderError: If a run's file is broken or of another `RESULTS_VERSION`, or one isn't among ``configs``.
        """
        wanted = {self.file(config): config for config in configs}
        finished = {}
        for path in sorted(self._runs.iterdir()):
            if _LEFTOVER.fullmatch(path.name) and path.is_file():
                path.unlink()
                continue
            if is_ignored(path.name) or (path.is_dir() and path.with_name(f"{path.name}.json") in wanted):
                continue
            if path not in wanted:
                raise FolderError(
                    f"{path} doesn't belong to this comparison. Move it away, or choose another folder (--out, `out=`)."
                )
            try:
                content = read_json(path, _RUN, SCHEMA_VERSION)
            except BrokenFileError as error:
                raise FolderError(f"{error} Move it away to have this run done again.") from error
            if results_version(content) != RESULTS_VERSION:
                raise FolderError(
                    f"{path} was made by code whose results mean something else (version {results_version(content)!r}; this "
                    f"torchmto has {RESULTS_VERSION}). Move it away to have this run done again, or choose another folder "
                    "(--out, `out=`)."
                )
            if decided(content["config"]) != decided(identity(wanted[path])):
                raise FolderError(f"{path} is a run with another configuration. Move it away.")
            finished[run_key(wanted[path])] = content["result"]
        return finished

    def save(self, config: RunConfig, result: Mapping[str, Any]) -> None:
        """Keep a finished run; its checkpoints aren't needed any more."""
        content = {"results_version": RESULTS_VERSION, "config": identity(config), "result": result}
        write_json(self.file(config), _RUN, SCHEMA_VERSION, content)
        checkpoints = self.checkpoints(config)
        if checkpoints is not None:
            shutil.rmtree(checkpoints, ignore_errors=True)


_GROWING = ("methods", "seeds", "chosen")
"""What a comparison may have more of than before."""


def _is_more(there: Any, here: Any) -> bool:
    if isinstance(there, Mapping) and isinstance(here, Mapping):
        return there != here and all(key in here and here[key] == value for key, value in there.items())
    if isinstance(there, list) and isinstance(here, list):
        return there != here and set(there) <= set(here)
    return isinstance(there, int) and isinstance(here, int) and here > there


def _differences(saved: Mapping[str, Any], settings: Mapping[str, Any], prefix: str = "") -> list[str]:
    found = []
    for key in {**saved, **settings}:
        there, here = saved.get(key), settings.get(key)
        if there == here or (not prefix and key == "free"):
            continue
        if isinstance(there, Mapping) and isinstance(here, Mapping):
            found += _differences(there, here, f"{prefix}{key}.")
        else:
            found.append(f"{prefix}{key} is {shown(there)} there and {shown(here)} here")
    return found
