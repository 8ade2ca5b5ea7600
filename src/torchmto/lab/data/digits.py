"""Two real handwritten digits on one canvas: the embedded data set, which needs no download."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from torchmto.lab.data.base import Task, TensorData
from torchmto.lab.data.registry import register
from torchmto.lab.problem import Problem

HEIGHT, WIDTH, DIGIT = 12, 16, 8
_LEFT, _RIGHT, _DOWN = range(4), range(5, 9), range(5)
CITATION = "Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998"
TASKS = (
    Task("left", "classification", 10),
    Task("right", "classification", 10),
    Task("offset", "regression", 2, unit="pixels"),
)


def split_sources(labels: NDArray[Any], fractions: Sequence[float], seed: int) -> list[NDArray[np.int64]]:
    """Disjoint parts of ``range(len(labels))`` with the same share of every label in each.

    Args:
        labels: ``[N]`` class of every source image.
        fractions: Share of each part; they should sum to 1.
        seed: Decides which image goes where.

    Returns:
        One sorted index array per part.
    """
    generator = np.random.default_rng(seed)
    ends = np.cumsum(fractions)[:-1]
    parts: list[list[NDArray[np.int64]]] = [[] for _ in fractions]
    for label in np.unique(labels):
        members = generator.permutation(np.flatnonzero(labels == label))
        cuts = np.round(ends * len(members)).astype(int)
        for part, piece in zip(parts, np.split(members, cuts), strict=True):
            part.append(piece)
    return [np.sort(np.concatenate(part)) for part in parts]


def _compose(
    images: NDArray[np.uint8], labels: NDArray[np.int64], size: int, generator: np.random.Generator
) -> TensorData:
    """``size`` canvases with two digits of ``images`` ``[N, 8, 8]`` each, at random places."""
    pairs = generator.integers(len(images), size=(size, 2))
    rows = generator.integers(_DOWN.start, _DOWN.stop, size=(size, 2))
    left = generator.integers(_LEFT.start, _LEFT.stop, size=size)
    right = generator.integers(_RIGHT.start, _RIGHT.stop, size=size)
    canvas = np.zeros((size, HEIGHT, WIDTH), dtype=np.uint8)
    sample, row, column = np.ogrid[:size, :DIGIT, :DIGIT]
    for side, x in enumerate((left, right)):
        place = sample, rows[:, side, None, None] + row, x[:, None, None] + column
        canvas[place] = np.maximum(canvas[place], images[pairs[:, side]])
    offset = np.stack([rows[:, 1] - rows[:, 0], right - left], axis=1).astype(np.float32)
    targets = {
        "left": torch.from_numpy(labels[pairs[:, 0]]),
        "right": torch.from_numpy(labels[pairs[:, 1]]),
        "offset": torch.from_numpy(offset),
    }
    return TensorData(TASKS, torch.from_numpy(canvas)[:, None], targets)


@register("digits", "two overlapping handwritten digits: left class, right class, offset in pixels; built in")
def load(
    _path: Path | None = None, seed: int = 0, *, train: int = 4000, validation: int = 800, test: int = 1200
) -> Problem:
    """Scikit-learn's 1,797 real digits (8 x 8 pixels), two per 12 x 16 canvas.

    The left digit's corner is drawn from columns 0-3, the right one's from 5-8, both rows from 0-4, so the
    digits' frames overlap in nearly all samples; where both have ink the darker value stays, as in
    MultiMNIST. Tasks: the class of either digit, and the right digit's place relative to the left one's,
    (down, right) in pixels: a regression whose loss has another scale.

    The splits are made over the source digits (60/20/20 % of every class) before anything is composed, so no
    digit image is in two splits.

    Args:
        _path: Not used.
        seed: Decides the splits and the compositions.
        train: Number of training samples.
        validation: Number of validation samples.
        test: Number of test samples.

    Returns:
        The data set; images ``[1, 12, 16]``.

    Source: composition after Sabour, Frosst and Hinton, "Dynamic routing between capsules", NeurIPS 2017.
    Deviation: other digits, places and canvas.
    """
    from sklearn.datasets import load_digits  # noqa: PLC0415 - importing sklearn takes most of a second

    images, labels = load_digits(return_X_y=True)
    images = np.round(images.reshape(-1, DIGIT, DIGIT) * (255 / 16)).astype(np.uint8)
    labels = labels.astype(np.int64)
    generator = np.random.default_rng((seed, 1))
    first, second, third = split_sources(labels, (0.6, 0.2, 0.2), seed)

    def compose(part: NDArray[np.int64], size: int) -> TensorData:
        return _compose(images[part], labels[part], size, generator)

    parts = compose(first, train), compose(second, validation), compose(third, test)
    return Problem(
        TASKS,
        *parts,
        "convnet",
        input_shape=(1, HEIGHT, WIDTH),
        citation=CITATION,
        mean=(0.2,),
        std=(0.34,),
    )
