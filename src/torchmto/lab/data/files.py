"""Data sets in files: clear errors, archives that can't write elsewhere, samples read when needed."""

import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchmto.checks import needed
from torchmto.lab.data.base import Batch, MultiTaskDataset, Subset, Task, as_input, as_target
from torchmto.lab.data.registry import require

Sample = tuple[Tensor, dict[str, Tensor]]
KEPT_BYTES = 2 << 30
"""How much of the files of a split is kept in memory."""
_STAMP = ".unpacked_from"


def load_array(path: Path, dataset: str) -> NDArray[Any]:
    """A ``.npy`` file as an array; pickled objects are refused."""
    require(path, dataset)
    try:
        array: NDArray[Any] = np.load(path, allow_pickle=False)
    except Exception as error:  # a damaged header can raise anything, MemoryError included
        raise ValueError(f"`{path}` isn't a plain NumPy array: {error}") from error
    return array


def read_npz(path: Path, keys: Sequence[str]) -> list[NDArray[Any]]:
    """The arrays ``keys`` of a ``.npz`` file; pickled objects are refused."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            found = stored.files
            arrays = [stored[key] for key in keys if key in found]
    except Exception as error:  # a damaged header can raise anything, MemoryError included
        raise ValueError(f"`{path}` isn't a readable `.npz` file: {error}") from error
    if len(arrays) < len(keys):
        missing = next(key for key in keys if key not in found)
        raise ValueError(f"`{path}` should have an array `{missing}`. Found {', '.join(found) or 'none'}.")
    return arrays


def load_picture(path: Path, dataset: str, mode: str | None = None) -> NDArray[Any]:
    """A PNG or JPEG as its pixel values ``[H, W]`` or ``[H, W, C]``; palettes give their indices.

    Args:
        path: The file.
        dataset: Registry name, for messages.
        mode: Pillow's mode that the pixels are converted to; by default they stay as they are.

    Raises:
        ValueError: If it is damaged, too large, or something else; the message names it.
    """
    image = needed("This data set", "PIL.Image")
    require(path, dataset)
    try:
        with image.open(path, formats=("PNG", "JPEG")) as picture:
            return np.array(picture.convert(mode) if mode else picture)
    except (OSError, SyntaxError, ValueError, image.DecompressionBombError) as error:
        # Pillow says "broken PNG file" by a SyntaxError.
        raise ValueError(f"`{path}` isn't a readable picture: {str(error).splitlines()[0]}.") from error


def load_rgb(path: Path, dataset: str) -> Tensor:
    """A picture as uint8 ``[1, 3, H, W]``."""
    return torch.from_numpy(load_picture(path, dataset, "RGB")).permute(2, 0, 1)[None]


def read_lines(path: Path, dataset: str) -> list[str]:
    """The lines of a text file that aren't blank, stripped."""
    try:
        lines = require(path, dataset).read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"`{path}` isn't a text file: {error}.") from error
    return [line.strip() for line in lines if line.strip()]


def read_names(path: Path, dataset: str) -> list[str]:
    """The lines of a text file that names files inside a data set's folder; see `check_names`."""
    return check_names(read_lines(path, dataset), path)


def check_names(names: Sequence[str], source: Path) -> list[str]:
    """The names, none of which leads out of the folder they are looked up in.

    Raises:
        ValueError: If one is absolute or has a ``..`` in it.
    """
    for name in names:
        place = PureWindowsPath(name)  # knows both kinds of slash, and drives
        if place.drive or place.root or ".." in place.parts:
            raise ValueError(f"`{source}` should name files inside the data set's folder. Found `{name[:200]}`.")
    return list(names)


def extract(archive: Path) -> Path:
    """Unpack a tar archive beside itself, once, into ``NAME.extracted``, where its size and time are noted.

    Only plain files and folders inside the target are written: no links, devices, absolute paths or ``..``.
    The folder appears under its name only when everything is unpacked.

    Args:
        archive: A ``.tar``, ``.tar.gz`` or ``.tgz`` file.

    Returns:
        The folder with the contents.

    Raises:
        ValueError: If the archive is damaged or holds anything else, or more than the disk has room for; or if the folder
            isn't noted to be this archive's.
    """
    target = archive.with_name(f"{archive.name}.extracted")
    found = archive.stat()
    stamp = f"{found.st_size} bytes, {found.st_mtime_ns} ns\n"
    if target.is_dir():
        if not (target / _STAMP).is_file() or (target / _STAMP).read_text(encoding="utf-8") != stamp:
            raise ValueError(
                f"`{target}` isn't known to hold what `{archive}` does. Remove the folder, and it is unpacked anew."
            )
        return target
    with tempfile.TemporaryDirectory(dir=archive.parent, prefix=f".{archive.name}.") as scratch:
        room = shutil.disk_usage(scratch).free
        contents = Path(scratch) / "contents"
        contents.mkdir()
        try:
            with tarfile.open(archive) as tar:
                tar.extraction_filter = getattr(tarfile, "data_filter", None)  # Python 3.11.3 has none yet
                for member in tar:
                    room -= member.size
                    if room < 0:
                        raise ValueError(f"`{archive}` needs more room than there is on its disk.")
                    _check_member(member, archive)
                    tar.extract(member, contents)
        except (tarfile.TarError, zlib.error, EOFError, OSError) as error:
            raise ValueError(f"`{archive}` isn't a readable tar archive: {error}") from error
        (contents / _STAMP).write_text(stamp, encoding="utf-8")
        contents.rename(target)
    return target


def _check_member(member: tarfile.TarInfo, archive: Path) -> None:
    name = PurePosixPath(member.name)
    if name.is_absolute() or ".." in name.parts or "\\" in member.name or ":" in member.name:
        raise ValueError(f"`{archive}` wants to write outside its folder: `{member.name}`.")
    if not (member.isdir() or member.isreg()):
        raise ValueError(f"`{archive}` holds `{member.name}`, which is neither a file nor a folder.")


def find_root(folder: Path, marker: str) -> Path | None:
    """``folder``, or the first folder directly in it, that contains ``marker``."""
    for candidate in (folder, *sorted(path for path in folder.iterdir() if path.is_dir())):
        if (candidate / marker).exists():
            return candidate
    return None


def validation_split(
    size: int, fraction: float, seed: int, block: int = 1
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Training and validation samples out of an official training split.

    Args:
        size: Number of samples.
        fraction: Share of the validation part.
        seed: Decides which.
        block: Neighbouring samples that stay together, for sets stored scene by scene.

    Returns:
        Sorted indices of the training and of the validation part.

    Raises:
        ValueError: If a part would be empty.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"Parameter `validation` should be in (0, 1). Found `validation = {fraction}`.")
    starts = np.random.default_rng(seed).permutation(np.arange(0, size, block))
    held_out = np.zeros(size, dtype=bool)
    for start in starts:
        if held_out.sum() >= max(1, round(size * fraction)):
            break
        held_out[start : start + block] = True
    if held_out.all():
        raise ValueError(f"{size} samples are too few to carve a validation split out of them.")
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def carved(data: MultiTaskDataset, fraction: float, seed: int, block: int = 1) -> tuple[Subset, Subset]:
    """Official training samples as training and validation data; arguments as of `validation_split`."""
    kept, held_out = validation_split(len(data), fraction, seed, block)
    return Subset(data, torch.from_numpy(kept)), Subset(data, torch.from_numpy(held_out))


class FileData(MultiTaskDataset):
    """Samples read from files when they are first needed, and kept in memory while there is room.

    Args:
        tasks: The tasks of every sample.
        names: What identifies each sample, such as its file's stem; of names from a file see `check_names`.
        read: ``name -> (image, {task: target})``, each with a leading dimension of 1, in compact types and
            all of one size; called from several threads.
    """

    def __init__(self, tasks: Sequence[Task], names: Iterable[str], read: Callable[[str], Sample]) -> None:
        super().__init__(tasks)
        self.names = list(names)
        self.read = read
        self._kept: dict[int, Sample] = {}

    def __len__(self) -> int:
        return len(self.names)

    def _sample(self, index: int) -> Sample:
        sample = self._kept.get(index)
        if sample is None:
            sample = self.read(self.names[index])
            nbytes = sample[0].nbytes + sum(target.nbytes for target in sample[1].values())
            if len(self._kept) < KEPT_BYTES // max(1, nbytes):
                self._kept[index] = sample
        return sample

    def batch(self, indices: Tensor) -> Batch:
        """The samples ``indices``."""
        samples = [self._sample(int(index)) for index in indices]
        return Batch(
            input=as_input(torch.cat([image for image, _ in samples])),
            targets={
                task.name: as_target(task, torch.cat([targets[task.name] for _, targets in samples]))
                for task in self.tasks
            },
        )
