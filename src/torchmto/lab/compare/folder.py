"""The folder of a comparison: which settings it belongs to, and one file per finished run.

::

    DIR/config.json             the settings
    DIR/runs/<method>-seed<n>-<key>.json   a finished run; the key is a hash of its configuration
    DIR/results.json, results.csv, results.md, plots/*.png   written once all runs are finished

All files are written atomically and carry a checksum, so an interrupted comparison goes on where it stopped,
and a folder of something else is never written to.
"""

import contextlib
import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torchmto.lab.atomic import BrokenFileError, canonical, plain, read_json, try_lock, write_json
from torchmto.lab.training import RunConfig
from torchmto.lab.versions import RESULTS_VERSION, results_version

__all__ = ["SCHEMA_VERSION", "FolderError", "RunFolder", "run_label"]

SCHEMA_VERSION = 1
_EXPERIMENT, _RUN = "torchmto compare", "torchmto compare run"
_LEFTOVER = re.compile(r"\..+\.tmp")


class FolderError(ValueError):
    """A folder can't be used for this comparison. Nothing in it was changed."""


def run_label(config: RunConfig) -> str:
    """A run in words: ``pcgrad, seed 1`` or ``single-task left, seed 0``."""
    name = f"single-task {config.tasks[0]}" if is_single_task(config) else config.method
    return f"{name}, seed {config.seed}"


def is_single_task(config: RunConfig) -> bool:
    """Whether this is a baseline."""
    return len(config.tasks) == 1


def run_key(config: RunConfig) -> str:
    """A hash of everything that decides a run's outcome."""
    return hashlib.sha256(canonical(asdict(config)).encode()).hexdigest()[:16]


class RunFolder:
    """The folder of one comparison; see this module's docstring.

    Args:
        path: Where. Missing folders are created.
        settings: The settings of the comparison.

    Raises:
        FolderError: If there is something else, a comparison with other settings, or a broken file.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        self._runs = path / "runs"
        settings = plain(settings)
        if path.exists() and not path.is_dir():
            raise FolderError(f"{path} is a file; choose another folder with --out.")
        present = sorted(p.name for p in path.iterdir() if not _LEFTOVER.fullmatch(p.name)) if path.exists() else []
        if "config.json" in present:
            self._check_settings(settings)
        elif present and present != [".lock"]:
            raise FolderError(
                f"The folder {path} isn't empty and isn't one of `torchmto compare` (it holds {', '.join(present[:3])}"
                f"{', ...' if len(present) > 3 else ''}). It was left as it is; choose another one with --out."
            )
        self._runs.mkdir(parents=True, exist_ok=True)
        if "config.json" not in present:
            write_json(path / "config.json", _EXPERIMENT, SCHEMA_VERSION, settings)

    def _check_settings(self, settings: Mapping[str, Any]) -> None:
        try:
            saved = read_json(self.path / "config.json", _EXPERIMENT, SCHEMA_VERSION)
        except BrokenFileError as error:
            raise FolderError(f"{error} The folder was left as it is; choose another one with --out.") from error
        different = [key for key in {**saved, **settings} if saved.get(key) != settings.get(key)]
        if different:
            changes = "; ".join(
                f"{key} is {saved.get(key)!r} there and {settings.get(key)!r} here" for key in different
            )
            raise FolderError(
                f"The folder {self.path} belongs to a comparison with other settings: {changes}. "
                "It was left as it is; choose another one with --out."
            )

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from working in the folder.

        Raises:
            FolderError: If one does.
        """
        with (self.path / ".lock").open("a") as file:
            if not try_lock(file):
                raise FolderError(f"Another process is working in the folder {self.path}.")
            yield

    def file(self, config: RunConfig) -> Path:
        """Where a run is or will be."""
        name = f"single-{config.tasks[0]}" if is_single_task(config) else config.method
        slug = re.sub(r"[^A-Za-z0-9_]+", "-", name).strip("-")[:60]
        return self._runs / f"{slug}-seed{config.seed}-{run_key(config)}.json"

    def load(self, configs: Sequence[RunConfig]) -> dict[str, dict[str, Any]]:
        """The results of those runs that are finished.

        Raises:
            FolderError: If a run's file is broken or of another `RESULTS_VERSION`, or one isn't among ``configs``.
        """
        wanted = {self.file(config): config for config in configs}
        finished = {}
        for path in sorted(self._runs.iterdir()):
            if _LEFTOVER.fullmatch(path.name):
                path.unlink()
                continue
            if path not in wanted:
                raise FolderError(f"{path} doesn't belong to this comparison. Move it away, or choose another --out.")
            try:
                content = read_json(path, _RUN, SCHEMA_VERSION)
            except BrokenFileError as error:
                raise FolderError(f"{error} Move it away to have this run done again.") from error
            if results_version(content) != RESULTS_VERSION:
                raise FolderError(
                    f"{path} was made by code whose results mean something else (version {results_version(content)!r}; this "
                    f"torchmto has {RESULTS_VERSION}). Move it away to have this run done again, or choose another --out."
                )
            if content["config"] != plain(asdict(wanted[path])):
                raise FolderError(f"{path} is a run with another configuration. Move it away.")
            finished[run_key(wanted[path])] = content["result"]
        return finished

    def save(self, config: RunConfig, result: Mapping[str, Any]) -> None:
        """Keep a finished run."""
        content = {"results_version": RESULTS_VERSION, "config": asdict(config), "result": result}
        write_json(self.file(config), _RUN, SCHEMA_VERSION, content)
