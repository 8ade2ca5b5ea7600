"""A camera-only network from above: images, lifted to a grid around the car, a shared trunk on it, heads for boxes and map."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from torchmto.lab.data.base import Task
from torchmto.lab.data.bev import REGRESSED, Grid
from torchmto.lab.data.dense import IMAGENET_MEAN, IMAGENET_STD
from torchmto.lab.models.base import MultiTaskModel, Trunk
from torchmto.lab.models.blocks import ConvNorm, DenseHead, resize
from torchmto.lab.models.efficientnet import EfficientNetTrunk

_NEAREST = 0.5  # metres in front of a camera; what is nearer isn't seen


def lift(features: Tensor, projections: Tensor, points: Tensor, size: tuple[int, int]) -> Tensor:
    """What cameras see at points around the car: features where a point falls in a picture, their mean over the cameras.

    Args:
        features: ``[B, cameras, C, h, w]``.
        projections: ``[B, cameras, 3, 4]``, from the car's frame to pixels.
        points: ``[M, 3]`` in the car's frame.
        size: Height and width of the pictures.

    Returns:
        ``[B, C, M]``; 0 where no camera sees a point.
    """
    batch, cameras = features.shape[:2]
    at = functional.pad(points, (0, 1), value=1.0) @ projections.flatten(0, 1).transpose(1, 2)
    depth = at[..., 2:]
    place = 2 * at[..., :2] / depth.clamp(min=_NEAREST) / at.new_tensor([size[1], size[0]]) - 1
    seen = ((depth > _NEAREST) & (place.abs() <= 1).all(-1, keepdim=True)).transpose(1, 2)
    values = functional.grid_sample(features.flatten(0, 1), place[:, None].to(features.dtype), align_corners=False)
    values, seen = (x.reshape(batch, cameras, *x.shape[1:]).sum(1) for x in (values[:, :, 0] * seen, seen))
    return values / seen.clamp(min=1)


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(ConvNorm(width, width), ConvNorm(width, width, relu=False))

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(x + self.branch(x))


class BEVTrunk(Trunk):
    """Pictures to features of the cells around the car.

    EfficientNet-Lite0's maps at strides 16 and 32 are joined and sampled, by the cameras' projections, at some heights above
    each cell; convolutions on the grid do the rest, the middle ones at half of its resolution.

    Args:
        grid: The cells.
        width: Channels of the grid's features.
        heights: Metres above the ground at which pictures are sampled.
        blocks: Residual blocks at half resolution.
        pretrained: Whether the pictures' network starts from ImageNet weights.

    Source: parameter-free lifting as in Harley et al., "Simple-BEV", arXiv 2206.07959.
    """

    points: Tensor
    mean: Tensor
    std: Tensor

    def __init__(self, grid: Grid, *, width: int, heights: Sequence[float], blocks: int, pretrained: bool) -> None:
        super().__init__()
        self.pictures = EfficientNetTrunk(3, pretrained=pretrained)
        self.join = ConvNorm(sum(self.pictures.channels[2:]), width, 1)
        self.ground = ConvNorm(width * len(heights), width)
        self.down = ConvNorm(width, width, stride=2)
        self.blocks_below = nn.Sequential(*(_Block(width) for _ in range(blocks)))
        self.up = ConvNorm(2 * width, width)
        self.channels = (width,)
        self.grid = grid
        cells = grid.centres().flatten(0, 1)
        points = torch.cat([functional.pad(cells, (0, 1), value=float(height)) for height in heights])
        self.register_buffer("points", points, persistent=False)
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD)[:, None, None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, cameras, 3, H + 1, W]``, as `torchmto.lab.data.nuscenes.Frames` gives it, to ``[B, width, cells, cells]``."""
        pictures, projections = x[..., :-1, :], x[..., -1, :4]
        maps = self.pictures(((pictures - self.mean) / self.std).flatten(0, 1))
        joined = self.join(torch.cat([maps[2], resize(maps[3], maps[2])], dim=1))
        features = joined.view(*x.shape[:2], *joined.shape[1:])
        with torch.autocast(x.device.type, enabled=False):  # places in pixels need more than 8 bits
            lifted = lift(features.float(), projections.float(), self.points, (pictures.shape[-2], pictures.shape[-1]))
        side = self.grid.cells
        ground = self.ground(lifted.reshape(len(x), -1, side, side))
        below = self.blocks_below(self.down(ground))
        return self.up(torch.cat([ground, resize(below, ground)], dim=1))  # type: ignore[no-any-return]

    def blocks(self) -> Iterator[nn.Module]:
        """The blocks of the pictures' network and of the grid."""
        yield from self.pictures.blocks()
        yield from self.blocks_below


class BEVNet(MultiTaskModel):
    """A model whose dense outputs have the grid's size, whatever the pictures'."""

    def resized(self, task: str, output: Tensor, x: Tensor) -> Tensor:
        """The output as it is."""
        return output


def bev(
    tasks: Sequence[Task],
    input_shape: Sequence[int],
    *,
    width: int = 64,
    heights: Sequence[float] = (0.0, 1.0, 2.0),
    blocks: int = 3,
    pretrained: bool = False,
) -> BEVNet:
    """A network for tasks seen from above, with their cells in ``extra["grid"]``: of the kind "own" for boxes, or dense.

    Args:
        tasks: The tasks.
        input_shape: ``(cameras, 3, H + 1, W)``.
        width: Channels on the grid.
        heights: Metres above the ground at which pictures are sampled.
        blocks: Residual blocks on the grid.
        pretrained: Whether the pictures' network starts from ImageNet weights.

    Raises:
        ValueError: If the input isn't that of cameras, or a task has no cells.
    """
    grids = [task.extra.get("grid") for task in tasks]
    if len(input_shape) != 4 or not isinstance(grids[0], Grid) or any(grid != grids[0] for grid in grids):
        raise ValueError("The model `bev` is for cameras around a car and tasks with one grid, such as `nuscenes`.")
    trunk = BEVTrunk(grids[0], width=width, heights=heights, blocks=blocks, pretrained=pretrained)
    heads = {task.name: DenseHead(width, task.channels + (0 if task.dense else REGRESSED)) for task in tasks}
    for task in tasks:
        last = heads[task.name][-1]
        if not task.dense and isinstance(last, nn.Conv2d) and last.bias is not None:
            nn.init.constant_(last.bias[: task.channels], -2.19)  # a probability of .1 at first, as in CenterNet
    return BEVNet(trunk, heads, tasks)
