"""CIFAR-100 as 20 tasks: one task per superclass, with labels for the images of that superclass only."""

import io
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from torchmto.checks import needed
from torchmto.lab.data.augment import JointAugment
from torchmto.lab.data.base import Task, TensorData
from torchmto.lab.data.files import extract, read_npz, validation_split
from torchmto.lab.data.registry import register, require, unknown_layout
from torchmto.lab.problem import Problem

SUPERCLASSES = (
    "aquatic_mammals",
    "fish",
    "flowers",
    "food_containers",
    "fruit_and_vegetables",
    "household_electrical_devices",
    "household_furniture",
    "insects",
    "large_carnivores",
    "large_man-made_outdoor_things",
    "large_natural_outdoor_scenes",
    "large_omnivores_and_herbivores",
    "medium_mammals",
    "non-insect_invertebrates",
    "people",
    "reptiles",
    "small_mammals",
    "trees",
    "vehicles_1",
    "vehicles_2",
)
CITATION = "Krizhevsky, Learning multiple layers of features from tiny images, 2009"
Images = tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.int64]]


@register(
    "cifar100",
    "natural images, 20 superclasses as 20 disjoint tasks of 5 classes each",
    source="https://www.cs.toronto.edu/~kriz/cifar.html (cifar-100-python.tar.gz) or "
    "https://huggingface.co/datasets/uoft-cs/cifar100 (parquet)",
    layouts=(
        "cifar-100-python.tar.gz or its folder",
        "a folder with train-*.parquet and test-*.parquet",
        "a `.npz` with x, fine, coarse, is_test",
    ),
)
def load(path: Path, seed: int = 0, *, validation: float = 0.1) -> Problem:
    """CIFAR-100 as 20 tasks from any of three layouts.

    - The official Python version, a folder or the archive, which is unpacked beside itself: its pickles are read by an
      unpickler that knows NumPy arrays and nothing else.
    - Hugging Face: ``train-*.parquet`` and ``test-*.parquet`` with ``img``, ``fine_label`` and ``coarse_label``.
    - ``.npz``: ``x`` uint8 ``[N, 32, 32, 3]``, ``fine``, ``coarse``, ``is_test``.

    An image belongs to its superclass's task, with one of 5 labels there (in the order of the fine labels); its label
    is -1 in the other 19.

    Args:
        path: File or folder.
        seed: Decides the validation split, which has the same share of every class.
        validation: Share of the training images held out for validation.

    Returns:
        The data set; images ``[3, 32, 32]``.

    Source: the split into tasks is Rosenbaum, Klinger and Riemer, "Routing networks", ICLR 2018.
    """
    if path.suffix == ".npz":
        x, fine, coarse, is_test = read_npz(path, ("x", "fine", "coarse", "is_test"))
        labels = fine.astype(np.int64), coarse.astype(np.int64)
        train, test = ((x[part], labels[0][part], labels[1][part]) for part in (is_test == 0, is_test != 0))
    elif path.is_dir() or tarfile.is_tarfile(path):
        train, test = _read_folder(extract(path) if path.is_file() else path)
    else:
        raise unknown_layout(path, "cifar100")
    members = _members(train[1], train[2])
    tasks = tuple(
        Task(name, "classification", len(fine), {"fine": fine})
        for name, fine in zip(SUPERCLASSES, members, strict=True)
    )
    kept, held_out = validation_split_by_class(train[1], validation, seed)

    def part(images: Images, chosen: NDArray[np.int64]) -> TensorData:
        x, fine, coarse = (array[chosen] for array in images)
        targets = np.full((len(SUPERCLASSES), len(x)), -1, dtype=np.int8)
        for number, names in enumerate(members):
            mine = coarse == number
            targets[number, mine] = np.searchsorted(names, fine[mine])
        stored = torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))
        return TensorData(tasks, stored, dict(zip(SUPERCLASSES, torch.from_numpy(targets), strict=True)))

    parts = part(train, kept), part(train, held_out), part(test, np.arange(len(test[0])))
    return Problem(
        tasks,
        *parts,
        "convnet",
        input_shape=(3, 32, 32),
        citation=CITATION,
        mean=(0.507, 0.487, 0.441),
        std=(0.267, 0.256, 0.276),
        augment=JointAugment(shift=4),
    )


def validation_split_by_class(
    labels: NDArray[np.int64], fraction: float, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """As `files.validation_split`, with the same share of every class."""
    kept, held_out = [], []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        inside, outside = validation_split(len(members), fraction, seed + int(label))
        kept.append(members[inside])
        held_out.append(members[outside])
    return np.sort(np.concatenate(kept)), np.sort(np.concatenate(held_out))


def _members(fine: NDArray[np.int64], coarse: NDArray[np.int64]) -> list[tuple[int, ...]]:
    """The fine labels of each superclass, ascending."""
    members = [tuple(int(label) for label in np.unique(fine[coarse == number])) for number in range(len(SUPERCLASSES))]
    empty = [SUPERCLASSES[number] for number, names in enumerate(members) if not names]
    if empty:
        raise ValueError(f"CIFAR-100 should have images of all 20 superclasses. Found none of `{empty[0]}`.")
    return members


def _read_folder(path: Path) -> tuple[Images, Images]:
    for folder in (path, path / "cifar-100-python"):
        if (folder / "train").is_file():
            files = [require(folder / split, "cifar100") for split in ("train", "test")]
            return _from_pickle(files[0].read_bytes()), _from_pickle(files[1].read_bytes())
    for folder in (path, path / "data", path / "cifar100"):
        if any(folder.glob("train-*.parquet")) and any(folder.glob("test-*.parquet")):
            return _from_parquet(folder, "train"), _from_parquet(folder, "test")
    raise unknown_layout(path, "cifar100")


class _ArrayUnpickler(pickle.Unpickler):
    """Rebuilds NumPy arrays and plain Python values; every other global is refused, so no code can run."""

    def find_class(self, module: str, name: str) -> Any:
        match module, name:
            case ("numpy.core.multiarray" | "numpy._core.multiarray", "_reconstruct"):
                return _reconstruct
            case ("numpy", "ndarray"):
                return np.ndarray
            case ("numpy", "dtype"):
                return _plain_dtype
            case ("_codecs", "encode"):
                return _encode
            case _:
                raise pickle.UnpicklingError(f"it asks for `{module}.{name}`")


def _reconstruct(_kind: type, _shape: tuple[int, ...], _dtype: bytes) -> NDArray[Any]:
    return np.ndarray.__new__(np.ndarray, (0,), np.uint8)


def _plain_dtype(code: str, *_: object) -> np.dtype[Any]:
    dtype = np.dtype(code)
    if dtype.hasobject:
        raise pickle.UnpicklingError("it holds an array of objects")
    return dtype


def _encode(text: str, encoding: str) -> bytes:
    if encoding not in {"latin1", "latin-1"}:
        raise pickle.UnpicklingError(f"it asks for the codec `{encoding}`")
    return text.encode("latin1")


def _from_pickle(content: bytes) -> Images:
    """Images and labels out of an official pickle: a dict with ``data``, ``fine_labels`` and ``coarse_labels``."""
    try:
        stored = _ArrayUnpickler(io.BytesIO(content), encoding="bytes").load()
    except Exception as error:  # a broken pickle can raise anything
        raise ValueError(f"This isn't an official CIFAR-100 pickle: {error}") from error
    entries = stored if isinstance(stored, dict) else {}
    fields = [entries.get(key, entries.get(key.encode())) for key in ("data", "fine_labels", "coarse_labels")]
    if any(field is None for field in fields):
        raise ValueError("A CIFAR-100 pickle should be a dict with `data`, `fine_labels` and `coarse_labels`.")
    pixels = np.asarray(fields[0], dtype=np.uint8).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return pixels, np.asarray(fields[1], dtype=np.int64), np.asarray(fields[2], dtype=np.int64)


def _from_parquet(folder: Path, split: str) -> Images:
    parquet, image = (needed("This data set", name) for name in ("pyarrow.parquet", "PIL.Image"))
    pixels, fine, coarse = [], [], []
    for file in sorted(folder.glob(f"{split}-*.parquet")):
        table = parquet.read_table(file, columns=["img", "fine_label", "coarse_label"])
        for row in table.column("img").to_pylist():
            with image.open(io.BytesIO(row["bytes"]), formats=("PNG", "JPEG")) as picture:
                pixels.append(np.asarray(picture.convert("RGB")))
        fine += table.column("fine_label").to_pylist()
        coarse += table.column("coarse_label").to_pylist()
    return np.stack(pixels), np.asarray(fine, dtype=np.int64), np.asarray(coarse, dtype=np.int64)
