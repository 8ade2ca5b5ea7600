"""MultiMNIST and its relatives: two overlapping pictures on one canvas, from IDX files."""

import gzip
import math
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from torchmto.checks import found
from torchmto.lab.data.base import Task, TensorData
from torchmto.lab.data.digits import split_sources
from torchmto.lab.data.registry import register, require
from torchmto.lab.problem import Problem

CANVAS, PICTURE = 36, 28
DEBIAN = Path("/usr/share/datasets/fashion-mnist")
_MNIST = "https://huggingface.co/datasets/ylecun/mnist or a mirror of yann.lecun.com/exdb/mnist"
_FASHION = "https://github.com/zalandoresearch/fashion-mnist (Debian: apt install dataset-fashion-mnist)"
_FILES = "{split}-images-idx3-ubyte[.gz] and {split}-labels-idx1-ubyte[.gz], split being train and t10k"
CITATION = "Sabour et al., Dynamic routing between capsules, 2017; Lin et al., Pareto multi-task learning, 2019"
Pictures = tuple[NDArray[np.uint8], NDArray[np.int64]]


def read_idx(path: Path) -> NDArray[np.uint8]:
    """An IDX file of unsigned bytes, gzipped or not.

    Args:
        path: The file.

    Returns:
        uint8 array of the shape that the header says.

    Raises:
        ValueError: If the header isn't one of unsigned bytes, or doesn't fit the file's length.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"`{path}` isn't a readable gzip file: {error}") from error
    if len(content) < 4 or content[:3] != b"\x00\x00\x08" or len(content) < 4 + 4 * content[3]:
        raise ValueError(f"`{path}` isn't an IDX file of unsigned bytes.")
    shape = tuple(int(n) for n in np.frombuffer(content, dtype=">u4", count=content[3], offset=4))
    start = 4 + 4 * content[3]
    if len(content) - start != math.prod(shape):
        raise ValueError(f"`{path}` should hold {math.prod(shape)} values. Found {len(content) - start}.")
    return np.frombuffer(content, dtype=np.uint8, offset=start).reshape(shape)


def _pictures(folder: Path, split: str, dataset: str) -> Pictures:
    """Images ``[N, 28, 28]`` and labels of one official split."""

    def find(kind: str) -> NDArray[np.uint8]:
        stems = (f"{split}-{kind}-ubyte", f"{split}-{kind.replace('-', '.')}-ubyte")
        for name in (name for stem in stems for name in (stem, f"{stem}.gz")):
            if (folder / name).is_file():
                return read_idx(folder / name)
        return read_idx(require(folder / f"{stems[0]}.gz", dataset))

    images, labels = find("images-idx3"), find("labels-idx1")
    if images.shape[1:] != (PICTURE, PICTURE) or labels.shape != images.shape[:1]:
        raise ValueError(
            f"`{folder}` should hold {PICTURE} x {PICTURE} images with a label each. "
            f"Found images {images.shape} and labels {labels.shape}."
        )
    return images, labels.astype(np.int64)


def _compose(
    sources: Sequence[Pictures], tasks: Sequence[Task], size: int, generator: np.random.Generator
) -> TensorData:
    """``size`` canvases: a picture of the first source at the top left, one of the second at the bottom right."""
    canvas = np.zeros((size, CANVAS, CANVAS), dtype=np.uint8)
    targets: dict[str, torch.Tensor] = {}
    gap = CANVAS - PICTURE
    windows = (canvas[:, :PICTURE, :PICTURE], canvas[:, gap:, gap:])
    for task, window, (images, labels) in zip(tasks, windows, sources, strict=True):
        chosen = generator.integers(len(images), size=size)
        np.maximum(window, images[chosen], out=window)
        targets[task.name] = torch.from_numpy(labels[chosen])
    return TensorData(tasks, torch.from_numpy(canvas)[:, None], targets)


def _composed(
    name: str, summary: str, *, source: str, layout: str, folders: Callable[[Path | None], tuple[Path, Path]]
) -> None:
    """Enter a data set; ``folders`` says where the pictures at the top left and those at the bottom right are."""

    @register(name, summary, source=source, layouts=(layout,))
    def load(
        path: Path | None = None,
        seed: int = 0,
        *,
        train: int = 54000,
        validation: int = 6000,
        test: int = 10000,
        held_out: float = 0.1,
    ) -> Problem:
        """Two pictures, the first at the top left and the second at the bottom right of a 36 x 36 canvas.

        Where both have ink the brighter value stays. Test canvases are composed of official test pictures only; a share
        ``held_out`` of the official training pictures makes the validation canvases, so no picture is in two splits.

        Args:
            path: Folder with the IDX files.
            seed: Decides splits and compositions.
            train: Number of training canvases.
            validation: Number of validation canvases.
            test: Number of test canvases.
            held_out: Share of the training pictures kept for validation.

        Returns:
            The data set, tasks ``left`` and ``right``.

        Source: Sabour, Frosst and Hinton, "Dynamic routing between capsules", NeurIPS 2017; layout of Lin et al., "Pareto
        multi-task learning", NeurIPS 2019. Deviation: canvases stay 36 x 36.
        """
        if not 0 < held_out < 1:
            raise ValueError(found("held_out", "in (0, 1)", held_out))
        tasks = (Task("left", "classification", 10), Task("right", "classification", 10))
        sources: tuple[list[Pictures], ...] = ([], [], [])
        for folder in folders(path):
            images, labels = _pictures(folder, "train", name)
            for into, part in zip(sources, split_sources(labels, (1 - held_out, held_out), seed), strict=False):
                into.append((images[part], labels[part]))
            sources[2].append(_pictures(folder, "t10k", name))
        generator = np.random.default_rng((seed, 1))
        counts = (train, validation, test)
        first, second, third = (_compose(pair, tasks, n, generator) for pair, n in zip(sources, counts, strict=True))
        return Problem(
            tasks,
            first,
            second,
            third,
            "convnet",
            input_shape=(1, CANVAS, CANVAS),
            citation=CITATION,
            mean=(0.2,),
            std=(0.33,),
        )


def _both_fashion(path: Path | None) -> tuple[Path, Path]:
    """The folder, or that of Debian's ``dataset-fashion-mnist``."""
    folder = require(path or (DEBIAN if DEBIAN.is_dir() else None), "multifashion")
    return folder, folder


def _mnist_and_fashion(path: Path | None) -> tuple[Path, Path]:
    """The two folders inside; without that of Fashion-MNIST, Debian's."""
    name = "multi_fashion_mnist"
    folder = require(path, name)
    fashion = folder / "fashion"
    if not fashion.is_dir() and DEBIAN.is_dir():
        fashion = DEBIAN
    return require(folder / "mnist", name), require(fashion, name)


_composed(
    "multimnist",
    "two MNIST digits on one canvas: left class, right class",
    source=_MNIST,
    layout=f"a folder with {_FILES}",
    folders=lambda path: (require(path, "multimnist"),) * 2,
)
_composed(
    "multifashion",
    "two Fashion-MNIST pictures on one canvas: left class, right class",
    source=_FASHION,
    layout=f"a folder with {_FILES} (Debian's is found by itself)",
    folders=_both_fashion,
)
_composed(
    "multi_fashion_mnist",
    "an MNIST digit and a Fashion-MNIST picture on one canvas: left class, right class",
    source=f"{_MNIST} and {_FASHION}",
    layout=f"a folder with mnist/ and fashion/, each with {_FILES}",
    folders=_mnist_and_fashion,
)
