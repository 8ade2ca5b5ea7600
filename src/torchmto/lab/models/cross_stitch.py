"""Cross-stitch networks: a column of layers per task, mixed after every layer."""

from collections.abc import Iterator, Sequence
from itertools import chain
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from torchmto.checks import check_number
from torchmto.lab.data.base import Task
from torchmto.lab.models.base import MultiTaskModel, Trunk
from torchmto.lab.models.convnet import ConvNetTrunk, small_heads
from torchmto.lab.models.mlp import MLPTrunk


class _CrossStitchTrunk(Trunk):
    """Columns of equal layers; after each, every column becomes a learnt mixture of all."""

    def __init__(self, columns: Sequence[MLPTrunk | ConvNetTrunk], own: float) -> None:
        super().__init__()
        rows = zip(*(column.layers for column in columns), strict=True)
        self.rows: Any = nn.ModuleList([nn.ModuleList(row) for row in rows])
        self.channels = columns[0].channels
        self.flat = isinstance(columns[0], MLPTrunk)
        count = len(columns)
        mixture = torch.full((count, count), (1 - own) / max(count - 1, 1))
        mixture.fill_diagonal_(own if count > 1 else 1.0)
        self.mixtures = nn.ParameterList([mixture.clone() for _ in self.rows])

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """The last features of each column."""
        maps = [x.flatten(1) if self.flat else x] * len(self.mixtures[0])
        for mixture, row in zip(self.mixtures, self.rows, strict=True):
            outputs = torch.stack([layer(y) for layer, y in zip(row, maps, strict=True)])
            maps = list(torch.einsum("ij,j...->i...", mixture, outputs))
        return tuple(maps)

    def blocks(self) -> Iterator[nn.Module]:
        """The layers of all columns."""
        yield from chain.from_iterable(self.rows)


class CrossStitch(MultiTaskModel):
    """A model whose trunk gives one set of features per task; each head takes its own.

    Source: Misra et al., Cross-stitch Networks for Multi-task Learning, CVPR 2016. Deviation: one coefficient per
    pair of tasks and layer, not per channel.
    """

    def features(self, x: Tensor, tasks: Sequence[str]) -> dict[str, Any]:
        """The features of each task's column."""
        columns = {task: index for index, task in enumerate(self.heads)}
        return {task: found[columns[task]] for task, found in super().features(x, tasks).items()}


def cross_stitch(
    tasks: Sequence[Task],
    input_shape: Sequence[int],
    *,
    widths: Sequence[int] = (32, 64, 128),
    own: float = 0.9,
) -> MultiTaskModel:
    """A small cross-stitch network: perceptrons for vectors, `convnet` columns for images.

    Args:
        tasks: The tasks.
        input_shape: ``(features,)`` or ``(channels, H, W)``.
        widths: Width of each layer of a column.
        own: What a column keeps of itself at first; the rest comes in equal parts from the others.

    Returns:
        The model.
    """
    heads: dict[str, nn.Module]
    columns: list[MLPTrunk] | list[ConvNetTrunk]
    check_number("own", own, minimum=0, maximum=1)
    if len(input_shape) == 3:
        channels, height, width = input_shape
        columns = [ConvNetTrunk(channels, (height, width), widths) for _ in tasks]
        heads = small_heads(tasks, columns[0].channels, grid=2)
    else:
        columns = [MLPTrunk(prod(input_shape), widths) for _ in tasks]
        heads = {task.name: nn.Linear(widths[-1], task.channels) for task in tasks}
    return CrossStitch(_CrossStitchTrunk(columns, own), heads, tasks)
