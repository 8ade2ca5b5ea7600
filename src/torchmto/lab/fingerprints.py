"""What files hold, in a word: data are known again wherever they are, and others of their name aren't taken for them."""

import contextlib
import functools
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torchmto.lab.atomic import canonical
from torchmto.lab.data.registry import datasets


def by_content(value: Any) -> Any:
    """A value with each path of something that is there replaced by its last name and, of a file, what it holds.

    Of a folder not what is in it: that is told apart (`listed`), and may change on purpose.
    """
    if isinstance(value, Mapping):
        return {key: by_content(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [by_content(entry) for entry in value]
    if isinstance(value, str) and _looks_like_path(Path(value)):
        held = _held(value)
        return value if held is None else Path(value).name if _is_folder(value) else f"{Path(value).name} {held}"
    return value


def listed(value: Any) -> str | None:
    """The files of the folders that a value names, by their names and sizes, not their folders; None where it names none."""
    if isinstance(value, Mapping | list):
        entries = value.values() if isinstance(value, Mapping) else value
        return "+".join(filter(None, map(listed, entries))) or None
    named = isinstance(value, str) and _looks_like_path(Path(value)) and _is_folder(value)
    return _held(value, folders=False) if named else None


def content_of(reference: str) -> str | None:
    """What the file or folder of a built-in data set holds, such as that of ``rf1:/data/rf1.arff``; None without one."""
    head, _, place = reference.partition(":")
    return _held(place) if place and head in datasets() else None


def _held(place: str, *, folders: bool = True) -> str | None:
    """What the file or folder at a place holds; None if nothing is there."""
    with contextlib.suppress(OSError, ValueError, RuntimeError):  # nothing there, no such home
        path = Path(place).expanduser()
        return _fingerprint(path, path.stat().st_mtime_ns, folders=folders)
    return None


def _is_folder(place: str) -> bool:
    with contextlib.suppress(OSError, ValueError, RuntimeError):
        return Path(place).expanduser().is_dir()
    return False


def _looks_like_path(path: Path) -> bool:
    """Whether a text may name a file: a word like "train" doesn't, though there may be such a folder, nor a sign like "/"."""
    return bool(path.name.strip(".")) and (len(path.parts) > 1 or bool(path.suffix))


@functools.lru_cache(maxsize=256)
def _fingerprint(path: Path, _changed: int, *, folders: bool) -> str:
    """A hash of a file's content, of a large one its size; of a folder its names and sizes, with or without folders in it."""
    if path.is_dir():
        entries = [(entry.name, entry.stat().st_size if entry.is_file() else None) for entry in path.iterdir()]
        told: Any = sorted(entry for entry in entries if folders or entry[1] is not None)
        return hashlib.sha256(canonical(told).encode()).hexdigest()[:16]
    size = path.stat().st_size
    return f"{size} bytes" if size > _LARGE else hashlib.sha256(path.read_bytes()).hexdigest()[:16]


_LARGE = 2**28
