"""Files that are either there as a whole or not at all, and tell whether they are still what was written."""

import contextlib
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from torch import Tensor

from torchmto.checks import shown


class BrokenFileError(ValueError):
    """A file isn't what was once written, or was never written by this package."""


@contextlib.contextmanager
def written_atomically(path: Path) -> Iterator[IO[bytes]]:
    """A file to write to (and read) that appears under ``path``, durably and as a whole, when the block ends without an error.

    Until then, and after an error or a crash, ``path`` is what it was.

    Example:
        >>> path = Path(tempfile.mkdtemp()) / "a"
        >>> with written_atomically(path) as file:
        ...     _ = file.write(b"whole")
        >>> path.read_bytes()
        b'whole'
    """
    temporary: Path | None = None
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        temporary = Path(name)
        with os.fdopen(handle, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)  # mkstemp's files are for the owner's eyes only
        temporary.replace(path)
    except BaseException as error:
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
        if (
            isinstance(error, OSError) and error.errno is not None
        ):  # a full disk, say: which file, not the temporary one
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable, on systems where a folder can be opened."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file so that a crash at any moment leaves the old one or the new one."""
    with written_atomically(path) as file:
        file.write(data)


def try_lock(file: IO[str]) -> bool:
    """Lock an open file against other processes, until it is closed or the process ends; False if one holds it.

    Windows has no such locks; there it is always True.
    """
    try:
        import fcntl  # noqa: PLC0415  POSIX only
    except ImportError:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def plain(value: Any, *, nonfinite: Callable[[float], Any] = lambda _: None) -> Any:
    """``value`` as JSON knows it: tensors and tuples become lists, numbers that aren't finite ``nonfinite`` of them.

    Example:
        >>> plain({"a": (1, float("nan")), 2: True})
        {'a': [1, None], '2': True}
    """
    if isinstance(value, Tensor | np.ndarray | np.generic):
        return plain(value.tolist(), nonfinite=nonfinite)
    if isinstance(value, Mapping):
        return {str(key): plain(entry, nonfinite=nonfinite) for key, entry in value.items()}
    if isinstance(value, str | bool | int) or value is None:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else nonfinite(value)
    if isinstance(value, Sequence):
        return [plain(entry, nonfinite=nonfinite) for entry in value]
    return str(value)


def canonical(value: Any) -> str:
    """The one JSON text of a value, whatever the order of its keys."""
    return json.dumps(plain(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def _checksum(content: Any) -> str:
    return hashlib.sha256(canonical(content).encode()).hexdigest()


def write_json(path: Path, kind: str, version: int, content: Mapping[str, Any]) -> None:
    """Write a JSON file that `read_json` can check.

    Args:
        path: Where to.
        kind: What the file is.
        version: Of its schema.
        content: What goes in.
    """
    content = plain(content)
    document = {"kind": kind, "schema_version": version, "sha256": _checksum(content), "content": content}
    write_bytes(path, (json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode())


def read_json(path: Path, kind: str, version: int) -> dict[str, Any]:
    """The content of a file of `write_json`.

    Raises:
        BrokenFileError: If it is damaged, or another kind of file, or of another version.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise BrokenFileError(f"{path} is broken: it isn't JSON ({error}).") from error
    if not isinstance(document, dict) or document.get("kind") != kind:
        raise BrokenFileError(f"{path} isn't a file of this program ({kind}).")
    if document.get("schema_version") != version:
        raise BrokenFileError(
            f"{path} has version {shown(document.get('schema_version'))} of its format; this torchmto reads version {version}."
        )
    content = document.get("content")
    if not isinstance(content, dict) or document.get("sha256") != _checksum(content):
        raise BrokenFileError(f"{path} is broken: its checksum doesn't match its content.")
    return content
