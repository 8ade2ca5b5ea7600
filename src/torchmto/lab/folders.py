"""Whose folder it is: one rule for all verbs."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

from torchmto.lab.atomic import try_lock

MARKERS = {"config.yaml": "torchmto train", "config.json": "torchmto compare", "experiment.json": "torchmto reproduce"}
"""The file that says whose a folder is."""
_IGNORED = re.compile(r"\..*|Thumbs\.db|desktop\.ini", re.IGNORECASE)


class FolderError(ValueError):
    """A folder can't be used for this. Nothing in it was changed."""


def is_ignored(name: str) -> bool:
    """Whether a file is nobody's: hidden ones, file browsers' notes, and what an interrupted write left.

    Example:
        >>> is_ignored(".DS_Store"), is_ignored("notes.txt")
        (True, False)
    """
    return _IGNORED.fullmatch(name) is not None


def check_folder(path: Path, verb: str) -> bool:
    """Whether a folder holds something of this verb already; it may be new or empty otherwise.

    Args:
        path: The folder.
        verb: Who wants to write there: a value of `MARKERS`.

    Raises:
        FolderError: If it is a file, or holds something else.
    """
    if path.exists() and not path.is_dir():
        raise FolderError(f"`{path}` is a file; choose another folder (--out, `out=`).")
    present = sorted(entry.name for entry in path.iterdir() if not is_ignored(entry.name)) if path.is_dir() else []
    for marker, owner in MARKERS.items():
        if marker in present and owner != verb:
            raise FolderError(
                f"The folder {path} belongs to `{owner}`. It was left as it is; choose another folder (--out, `out=`)."
            )
    if any(MARKERS.get(name) == verb for name in present):
        return True
    if present:
        more = ", ..." if len(present) > 3 else ""
        raise FolderError(
            f"The folder {path} isn't empty and isn't one of `{verb}` (it holds {', '.join(present[:3])}{more}). "
            "It was left as it is; choose another one (--out, `out=`)."
        )
    return False


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep other processes from working in a folder, which is made; the lock goes with the process, however it ends.

    Raises:
        FolderError: If one does.
    """
    path.mkdir(parents=True, exist_ok=True)
    with (path / ".lock").open("a") as file:
        if not try_lock(file):
            raise FolderError(f"Another process is working in the folder {path}.")
        yield
