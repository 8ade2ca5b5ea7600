"""Checkpoints that are whole or absent: written aside, checksummed, renamed into place, read without running code."""

import contextlib
import errno
import hashlib
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import torch

from torchmto.lab.atomic import sync_folder, written_atomically

MAGIC = b"torchmto checkpoint 1\n"
HEADER_SIZE = len(MAGIC) + 64 + 1
"""The magic line, then the SHA-256 of everything after it in hexadecimal and a newline, then torch.save's bytes."""


class CheckpointError(RuntimeError):
    """A checkpoint that can't be written, or mustn't be loaded."""


def write_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Write a state that ``torch.load(weights_only=True)`` can read.

    Args:
        path: Where it goes; replaced as a whole.
        state: Tensors and plain values, nested.

    Raises:
        CheckpointError: If it can't be written, for lack of space or rights. What was under ``path`` is untouched.
    """
    try:
        with written_atomically(path) as file:
            file.write(MAGIC + b"0" * 64 + b"\n")
            torch.save(dict(state), file)
            digest = _digest(file)
            file.seek(len(MAGIC))
            file.write(digest)
    except (OSError, RuntimeError) as error:
        # torch's writer turns an OSError of the file into a RuntimeError.
        reason = _reason(error)
        if reason is None:
            raise
        raise CheckpointError(f"Can't write the checkpoint `{path}`: {reason}.") from error


def _reason(error: BaseException | None) -> str | None:
    """Why a write failed, if an OSError is behind it."""
    while error is not None:
        if isinstance(error, OSError):
            return "the disk is full" if error.errno in {errno.ENOSPC, errno.EDQUOT} else str(error.strerror or error)
        error = error.__cause__ or error.__context__
    return None


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read what :func:`write_checkpoint` wrote, once its checksum is right. Nothing in the file can run code.

    Args:
        path: The checkpoint.

    Raises:
        CheckpointError: If there is no such file, it is something else, or it is damaged.
    """
    if not path.is_file():
        raise CheckpointError(f"There is no checkpoint `{path}`.")
    with path.open("rb") as file:
        header = file.read(HEADER_SIZE)
        if not header.startswith(MAGIC):
            raise CheckpointError(f"`{path}` isn't a checkpoint of torchmto: it doesn't start as one.")
        if header[len(MAGIC) :] != _digest(file) + b"\n":
            raise CheckpointError(
                f"The checkpoint `{path}` is damaged: its checksum isn't the one it was written with."
            )
        file.seek(HEADER_SIZE)
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # what isn't a pickle of plain data can raise anything
            raise CheckpointError(f"The checkpoint `{path}` holds something other than plain data.") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"`{path}` isn't a checkpoint of a training run: it holds a {type(state).__name__}.")
    return state


def _digest(file: IO[bytes]) -> bytes:
    """The SHA-256 of what comes after the header."""
    file.seek(HEADER_SIZE)
    # All files have `readinto`; only `IO` doesn't say so.
    return hashlib.file_digest(file, "sha256").hexdigest().encode()  # type: ignore[arg-type]


def is_whole(path: Path) -> bool:
    """Whether a checkpoint can be loaded."""
    try:
        read_checkpoint(path)
    except CheckpointError:
        return False
    return True


def _set_aside(path: Path) -> Path:
    aside = path.replace(path.with_suffix(".ckpt.old"))
    path.unlink(missing_ok=True)  # which a rename between two names of one file leaves
    return aside


class CheckpointFolder:
    """The checkpoints of one run: the latest ones by step, and the best.

    ``step-00000120.ckpt`` is the state after 120 steps; ``best.ckpt`` is another name for one of them, or what is left of it
    once the newer ones have pushed it out.

    Args:
        folder: Where they are; made if need be.
        keep: How many of the latest to keep.
    """

    def __init__(self, folder: Path | str, keep: int = 2) -> None:
        self.folder = folder = Path(folder)
        self.keep = keep
        self.best = folder / "best.ckpt"

    def path(self, step: int) -> Path:
        """Where the state after ``step`` steps goes."""
        return self.folder / f"step-{step:08d}.ckpt"

    def steps(self) -> list[Path]:
        """The checkpoints by step, oldest first."""
        own = [path for path in self.folder.glob("step-*.ckpt") if path.stem.removeprefix("step-").isdecimal()]
        return sorted(own, key=lambda path: int(path.stem.removeprefix("step-")))

    def last(self) -> Path | None:
        """The latest checkpoint, or None."""
        return next(reversed(self.steps()), None)

    def save(self, step: int, state: Mapping[str, Any], *, best: bool = False) -> Path:
        """Write a checkpoint, then drop those that are too old.

        Raises:
            CheckpointError: If it can't be written. All others are untouched, and the message offers the latest.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.path(step)
        try:
            write_checkpoint(path, state)
            if best:
                self.mark_best(path)
        except CheckpointError as error:
            last = self.last()
            kept = "There is none before it." if last is None else f"The last one, `{last}`, is untouched."
            raise CheckpointError(f"{error} {kept}") from error
        for old in self.steps()[: -self.keep]:
            old.unlink()
        return path

    def mark_best(self, path: Path) -> None:
        """Let ``best.ckpt`` be this checkpoint."""
        temporary = self.folder / ".best.ckpt.tmp"
        temporary.unlink(missing_ok=True)
        try:
            temporary.hardlink_to(path)
        except OSError:  # a file system without hard links
            try:
                with path.open("rb") as source, written_atomically(self.best) as target:
                    shutil.copyfileobj(source, target)
            except OSError as error:
                raise CheckpointError(f"Can't write the checkpoint `{self.best}`: {_reason(error)}.") from error
            return
        temporary.replace(self.best)
        # A rename between two names of one file does nothing and leaves both.
        temporary.unlink(missing_ok=True)
        sync_folder(self.folder)

    def set_aside_after(self, step: int) -> list[Path]:
        """Rename checkpoints after ``step``, from which a run won't go on, so that they aren't taken for its own."""
        later = [path for path in self.steps() if int(path.stem.removeprefix("step-")) > step]
        return [_set_aside(path) for path in later]

    def newest(self, fits: Callable[[dict[str, Any]], bool]) -> dict[str, Any] | None:
        """The newest state that is whole and fits, or None; what comes before it is set aside."""
        for path in (*reversed(self.steps()), self.best):
            with contextlib.suppress(CheckpointError):
                state = read_checkpoint(path)
                if fits(state):
                    return state
            if path.exists():
                _set_aside(path)
        return None

    def go_on_from(self, progress: dict[str, Any]) -> list[str]:
        """Make the folder that of a run that goes on from a state.

        Later checkpoints are set aside, and ``best.ckpt`` is the one that the state's progress knows as the best. If that isn't
        there any more, the progress forgets it, and an epoch that comes is the best by the scores from then on.

        Args:
            progress: The state's; may be changed.

        Returns:
            What there is to say about it.
        """
        told = [f"Renamed a checkpoint of a later step: {old}" for old in self.set_aside_after(progress["step"])]
        best = progress["best_step"]
        if best >= 0 and is_whole(self.path(best)):
            self.mark_best(self.path(best))
            return told
        if self.best.exists():
            with contextlib.suppress(CheckpointError, KeyError):
                if read_checkpoint(self.best)["progress"]["step"] == best:
                    return told
            told.append(f"Renamed a best checkpoint of another step: {_set_aside(self.best)}")
        if best >= 0:
            progress |= {"best_step": -1, "best_score": None, "lost": len(progress["history"])}
            told.append("The best checkpoint so far isn't there any more; the best of the epochs to come will be kept.")
        return told

    def clean(self) -> None:
        """Remove what an interrupted write left behind."""
        for temporary in self.folder.glob(".*.tmp"):
            temporary.unlink()

    def read_last(self) -> tuple[Path, dict[str, Any]]:
        """The latest checkpoint.

        Raises:
            CheckpointError: If there is none, or it is damaged; the message then offers the latest one that isn't.
        """
        steps = self.steps()
        if not steps:
            raise CheckpointError(f"There is no checkpoint in `{self.folder}`.")
        try:
            return steps[-1], read_checkpoint(steps[-1])
        except CheckpointError as error:
            others = [*reversed(steps[:-1]), self.best]
            whole = next((path for path in others if is_whole(path)), None)
            offer = (
                "No other one is whole."
                if whole is None
                else f"Go on from an older one: --checkpoint {whole} (`checkpoint=`)."
            )
            raise CheckpointError(f"{error} {offer}") from error
