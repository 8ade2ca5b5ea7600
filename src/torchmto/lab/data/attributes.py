"""Forty imbalanced, correlated yes/no attributes of pictures: a set of CelebA's shape that needs no download."""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from torchmto.checks import check_integer
from torchmto.lab.data.base import Task, TensorData
from torchmto.lab.data.registry import register
from torchmto.lab.problem import Problem

SIZE, BLOBS, NOISE = 24, 8, 0.3
CAUSES = 2 * BLOBS
"""What a picture shows: the place and the strength of every blob."""
RAREST, COMMONEST = 0.03, 0.84
"""Shares of positive labels; CelebA's are from 2 to 84 %."""


@register("attributes", "40 imbalanced, correlated yes/no attributes of rendered pictures; built in")
def load(
    _path: Path | None = None,
    seed: int = 0,
    *,
    num_tasks: int = 40,
    train: int = 4000,
    validation: int = 800,
    test: int = 1200,
) -> Problem:
    """Pictures of eight coloured blobs, with attributes of how they are placed and how strong they are.

    Each picture has 16 hidden causes, standard normal: the shift and the strength of every blob. An attribute is a combination
    of three causes plus a little noise, above a threshold that makes it rare or common: 3 to 84 % positive labels, most of them
    below a third. Attributes that share causes are correlated. So it has the shape of CelebA's 40 tasks, not its content.

    Args:
        _path: Not used.
        seed: Decides the attributes and the pictures.
        num_tasks: Number of attributes, at least 1.
        train: Number of training samples.
        validation: Number of validation samples.
        test: Number of test samples.

    Returns:
        The data set; images ``[3, 24, 24]``, tasks ``attribute_00``, ``attribute_01``, ...

    Example:
        >>> from torchmto.lab.data import load_data
        >>> len(load_data("attributes", train=8, validation=4, test=4).tasks)
        40
    """
    check_integer("num_tasks", num_tasks, minimum=1)
    generator = np.random.default_rng((seed, 40))
    weights = np.zeros((CAUSES, num_tasks))
    for task in range(num_tasks):
        weights[generator.choice(CAUSES, 3, replace=False), task] = generator.choice((-1.0, 1.0), 3) / np.sqrt(3)
    rates = generator.permutation(RAREST + (COMMONEST - RAREST) * np.linspace(0, 1, num_tasks) ** 2)
    scores = generator.standard_normal((10_000, CAUSES)) @ weights + NOISE * generator.standard_normal(
        (10_000, num_tasks)
    )
    thresholds = np.array([np.quantile(column, 1 - rate) for column, rate in zip(scores.T, rates, strict=True)])
    colours = generator.uniform(0.3, 1.0, size=(BLOBS, 3))
    tasks = tuple(Task(f"attribute_{number:02d}", "binary", 1) for number in range(num_tasks))

    def part(size: int) -> TensorData:
        causes = generator.standard_normal((size, CAUSES))
        labels = causes @ weights + NOISE * generator.standard_normal((size, num_tasks)) > thresholds
        targets = torch.split(torch.from_numpy(labels).float(), 1, dim=1)
        images = torch.from_numpy(_render(causes, colours))
        return TensorData(tasks, images, {task.name: column for task, column in zip(tasks, targets, strict=True)})

    parts = part(train), part(validation), part(test)
    return Problem(
        tasks,
        *parts,
        "convnet",
        input_shape=(3, SIZE, SIZE),
        citation="made by torchmto; nothing in it is measured",
        mean=(0.06, 0.06, 0.06),
        std=(0.1, 0.1, 0.1),
    )


def _render(causes: NDArray[np.float64], colours: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Blobs around the middle, shifted outwards or inwards by one cause and made stronger by another, ``[N, 3, 24, 24]``."""
    shift, strength = 2.5 * np.tanh(causes[:, :BLOBS]), 1 / (1 + np.exp(-causes[:, BLOBS:]))
    angle = 2 * np.pi * np.arange(BLOBS) / BLOBS
    middle, pixels = (SIZE - 1) / 2, np.arange(SIZE)
    down = np.exp(-(((middle + (7 + shift) * np.sin(angle))[..., None] - pixels) ** 2) / 4)
    right = np.exp(-(((middle + (7 + shift) * np.cos(angle))[..., None] - pixels) ** 2) / 4)
    pictures: NDArray[np.float64] = np.einsum("nb,bc,nbh,nbw->nchw", strength, colours, down, right, optimize=True)
    return np.round(255 * np.clip(pictures, 0, 1)).astype(np.uint8)
