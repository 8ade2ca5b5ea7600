"""Boxes seen from above: a grid of cells around the car, centre heatmaps, their loss, boxes out of them.

A box is ten numbers: class, x, y, z in metres (x forward, y left, z up, from the car), width, length, height, yaw, and velocity
along x and y; NaN where unknown. A sample's boxes are ``[MOST, 10]``, with rows of NaN behind them. A map of
``[C, rows, columns]`` looks forward at its top and left at its left.

Source: Zhou, Wang and Krähenbühl, "Objects as points", arXiv 1904.07850; Yin, Zhou and Krähenbühl, CenterPoint, CVPR 2021.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

MOST = 256
"""Boxes of a sample; of more, those farthest from the car are left out."""
NUMBERS = 10
REGRESSED = 10
"""Place inside the cell (2), height of the centre, logarithms of the size (3), sine and cosine of the yaw, velocity (2)."""


@dataclass(frozen=True)
class Grid:
    """Square cells around the car.

    Args:
        reach: Metres from the car to each side.
        cells: Cells along a side.

    Example:
        >>> Grid(reach=10.0, cells=4).centres()[0, 0].tolist()
        [7.5, 7.5]
    """

    reach: float = 51.2
    cells: int = 128

    @property
    def metres(self) -> float:
        """The side of a cell."""
        return 2 * self.reach / self.cells

    def centres(self) -> Tensor:
        """Places (x, y) of the cells' centres, ``[cells, cells, 2]``."""
        along = self.reach - (torch.arange(self.cells) + 0.5) * self.metres
        return torch.stack(torch.meshgrid(along, along, indexing="ij"), dim=-1)

    def place(self, xy: Tensor) -> Tensor:
        """Row and column of points ``[..., 2]``; whole numbers at the cells' centres."""
        return (self.reach - xy) / self.metres - 0.5


def centre_heatmap(boxes: Tensor, grid: Grid, classes: int) -> Tensor:
    """Gaussian bumps at the boxes' centres, as wide as a sixth of the box, 1 at the cell itself.

    Args:
        boxes: ``[B, M, 10]``.
        grid: The cells; boxes outside leave what of their bump is inside.
        classes: Number of classes.

    Returns:
        ``[B, classes, cells, cells]`` in ``[0, 1]``.
    """
    known = boxes[..., 0].isfinite()
    cell = grid.place(boxes[..., 1:3]).round().nan_to_num()
    width = (boxes[..., 4:6].amax(-1) / (6 * grid.metres)).clamp(min=1.0).nan_to_num(1.0)
    numbers = torch.arange(grid.cells, device=boxes.device)
    rows, columns = (
        torch.exp(-(numbers - cell[..., axis, None]).square() / (2 * width.square())[..., None]) for axis in (0, 1)
    )
    bumps = torch.where(known[..., None, None], rows[..., :, None] * columns[..., None, :], 0.0).flatten(2)
    heat = bumps.new_zeros(len(boxes), classes, bumps.shape[-1])
    index = boxes[..., 0].nan_to_num().long()[..., None].expand_as(bumps)
    return heat.scatter_reduce(1, index, bumps, "amax").view(len(boxes), classes, grid.cells, grid.cells)


@dataclass(frozen=True)
class CentreLoss:
    """CenterNet's focal loss of the heatmap, and a quarter of the L1 loss of the boxes' numbers at their cells.

    Args:
        grid: The cells.
        classes: Number of classes.
    """

    grid: Grid
    classes: int

    def __call__(self, output: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """The loss per box of ``output [B, classes + 10, cells, cells]``, and the number of boxes."""
        output = output.float()
        boxes = boxes[:, : max(1, int(boxes[..., 0].isfinite().sum(1).amax()))]
        cell = self.grid.place(boxes[..., 1:3])
        nearest = cell.round()
        known = ((nearest >= 0) & (nearest < self.grid.cells)).all(-1)  # False where NaN
        count = known.sum()
        logits, heat = output[:, : self.classes], centre_heatmap(boxes, self.grid, self.classes)
        p = logits.sigmoid()
        at_centre = -(1 - p).square() * functional.logsigmoid(logits)
        elsewhere = -((1 - heat) ** 4) * p.square() * functional.logsigmoid(-logits)
        focal = torch.where(heat == 1, at_centre, elsewhere).sum()

        index = (nearest[..., 0] * self.grid.cells + nearest[..., 1]).masked_fill(~known, 0).long()
        numbers = output[:, self.classes :].flatten(2).transpose(1, 2)
        found = numbers.gather(1, index[..., None].expand(-1, -1, REGRESSED))
        yaw = boxes[..., 7:8]
        wanted = torch.cat(
            [cell - nearest, boxes[..., 3:4], boxes[..., 4:7].log(), yaw.sin(), yaw.cos(), boxes[..., 8:]], -1
        )
        counted = known[..., None] & wanted.isfinite()
        distance = torch.where(counted, (found - torch.where(counted, wanted, 0.0)).abs(), 0.0).sum()
        return (focal + 0.25 * distance) / count.clamp(min=1), count.clamp(min=1)


def decode(output: Tensor, grid: Grid, classes: int, count: int = 100) -> Tensor:
    """The boxes at the highest peaks of the heatmaps.

    Args:
        output: ``[B, classes + 10, cells, cells]``.
        grid: The cells.
        classes: Number of classes.
        count: Boxes of a sample.

    Returns:
        ``[B, count, 11]``: the score, then the box's ten numbers.
    """
    output = output.float()
    heat = output[:, :classes].sigmoid()
    peaks = torch.where(functional.max_pool2d(heat, 3, stride=1, padding=1) == heat, heat, 0.0).flatten(1)
    score, place = peaks.topk(min(count, peaks.shape[1]), dim=1)
    kind, index = place // grid.cells**2, place % grid.cells**2
    numbers = output[:, classes:].flatten(2).transpose(1, 2).gather(1, index[..., None].expand(-1, -1, REGRESSED))
    cell = torch.stack([index // grid.cells, index % grid.cells], dim=-1) + numbers[..., :2]
    xy = grid.reach - (cell + 0.5) * grid.metres
    yaw = torch.atan2(numbers[..., 6:7], numbers[..., 7:8])
    sizes = numbers[..., 3:6].clamp(-4, 4).exp()
    return torch.cat([score[..., None], kind[..., None], xy, numbers[..., 2:3], sizes, yaw, numbers[..., 8:]], dim=-1)
