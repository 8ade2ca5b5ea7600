"""Furnished rooms rendered by a small ray caster: dense prediction with exact labels and no download.

Coordinates are metres. World and camera share the convention x right, y down, z forward; the world's floor is the plane
y = 0 and the camera looks roughly along +z. Rays are ``(u, v, 1)`` in the camera's frame, so the ray parameter at a hit
*is* the depth.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from torchmto.lab.data.augment import JointAugment
from torchmto.lab.data.base import Batch, Task, TensorData
from torchmto.lab.data.dense import label_edges
from torchmto.lab.data.loading import sample_keys, uniform
from torchmto.lab.data.registry import register
from torchmto.lab.problem import Problem

CLASSES = ("floor", "ceiling", "wall", "box", "ball", "rug", "picture", "lamp")
FLOOR, CEILING, WALL, BOX, BALL, RUG, PICTURE, LAMP = range(8)
TASKS = (
    Task("segmentation", "segmentation", len(CLASSES), {"classes": CLASSES}),
    Task("depth", "depth", 1, unit="m"),
    Task("normals", "normals", 3),
    Task("edges", "edges", 1),
)
FOCAL = 1.2
"""Focal length in units of half the image's width: a horizontal field of view of 80 degrees."""
_BOXES, _BALLS = 3, 2


@dataclass
class Rendering:
    """Pictures of ``B`` rooms and everything known about their pixels."""

    rgb: Tensor
    """uint8 ``[B, 3, H, W]``."""
    segmentation: Tensor
    """uint8 ``[B, H, W]``, indices into `CLASSES`."""
    depth: Tensor
    """float32 ``[B, 1, H, W]``: metres along the optical axis."""
    normals: Tensor
    """float32 ``[B, 3, H, W]``: unit vectors in the camera's frame, facing the camera."""
    edges: Tensor
    """uint8 ``[B, 1, H, W]``: 1 where the next pixel to the right or below shows another object."""


class _Draws:
    """Hands out one random number per room after the other."""

    def __init__(self, keys: Tensor) -> None:
        self.keys = keys
        self.count = 0

    def uniform(self, low: float, high: float) -> Tensor:
        """A number per room: ``[B, 1]``."""
        self.count += 1
        return uniform(self.keys, self.count, low, high)[:, None]

    def point(self, *ranges: tuple[float, float]) -> Tensor:
        """A vector per room: ``[3, B, 1]``."""
        return torch.stack([self.uniform(*ends) for ends in ranges])

    def color(self, low: float, high: float) -> Tensor:
        """A colour per room: ``[3, B, 1]``."""
        return self.point((low, high), (low, high), (low, high))


@dataclass
class _Solid:
    """A box turned about the vertical axis, or a ball. Numbers are ``[B, 1]``, vectors ``[3, B, 1]``."""

    kind: int
    centre: Tensor
    half: Tensor  # half the edge lengths; for a ball its radius, three times
    angle: Tensor
    color: Tensor
    present: Tensor

    def turn(self, vectors: Tensor, sign: float) -> Tensor:
        """World to box frame (``sign`` 1) or back (-1); vectors ``[3, B, P]``."""
        sine, cosine = self.angle.sin() * sign, self.angle.cos()
        x, y, z = vectors
        return torch.stack([cosine * x - sine * z, y, sine * x + cosine * z])

    def hit(self, origin: Tensor, direction: Tensor) -> Tensor:
        """Ray parameter ``[B, P]`` of the first hit, infinite without one."""
        start = origin - self.centre
        if self.kind == BOX:
            start, along = self.turn(start, 1), self.turn(direction, 1)
            inverse = 1 / along
            middle, reach = -start * inverse, self.half * inverse.abs()
            t = (middle - reach).amax(0)
            found = (t < (middle + reach).amin(0)) & (t > 1e-4)
        else:
            a = (direction * direction).sum(0)
            b = (start * direction).sum(0)
            c = (start * start).sum(0) - self.half[0].square()
            root = b * b - a * c
            t = (-b - root.clamp(min=0).sqrt()) / a
            found = (root > 0) & (t > 1e-4)
        return torch.where(found & self.present, t, torch.inf)

    def normal(self, point: Tensor) -> Tensor:
        """Outward unit normal ``[3, B, P]`` at surface points."""
        start = point - self.centre
        if self.kind != BOX:
            return start * (start * start).sum(0).rsqrt()
        local = self.turn(start, 1) / self.half
        axis = local.abs().argmax(0, keepdim=True)
        face = torch.zeros_like(local).scatter_(0, axis, torch.sign(local.gather(0, axis)))
        return self.turn(face, -1)


def render(keys: Tensor, size: tuple[int, int] = (48, 64)) -> Rendering:
    """Build a random room for each key and take a picture of it.

    A room has a checkered floor, striped walls, a rug, a picture on the far wall, up to three boxes and two balls on
    the floor, and mostly a visible lamp; its light falls off with the distance and casts hard shadows.

    Args:
        keys: int64 ``[B]``; equal keys give equal rooms.
        size: Height and width of the pictures.

    Returns:
        The pictures with exact labels.
    """
    draws = _Draws(keys)
    # The room, what stands in it, and the camera.
    width, depth, height = draws.uniform(3.5, 6), draws.uniform(4.5, 7.5), draws.uniform(2.4, 3.2)
    low = torch.stack([-width / 2, -height, torch.zeros_like(depth)])
    high = torch.stack([width / 2, torch.zeros_like(depth), depth])
    camera = draws.point((-0.8, 0.8), (-1.8, -1.1), (0.2, 0.6))
    rotation = _rotation(yaw=draws.uniform(-0.4, 0.4)[:, 0], pitch=draws.uniform(-0.05, 0.3)[:, 0])
    solids = [_solid(draws, kind, width, depth) for kind in (BOX,) * _BOXES + (BALL,) * _BALLS]
    lamp = _lamp(draws, width, depth, height)

    # What each ray meets first: a solid or the inside of the room.
    direction = torch.einsum("bij,jp->ibp", rotation, _camera_rays(size))
    direction[direction == 0] = 1e-9
    to_walls = (torch.where(direction > 0, high, low) - camera) / direction
    hits = torch.stack([to_walls.amin(0), *(solid.hit(camera, direction) for solid in (*solids, lamp))])
    t, nearest = hits.min(0)
    point = camera + t * direction

    # Class, colour and normal of what it meets.
    axis = to_walls.argmin(0)
    facing = torch.sign(direction.gather(0, axis[None]))[0]
    label, color = _room_surface(draws, point, axis, facing, (low, high))
    instance = torch.where(label == RUG, 6, torch.where(label == PICTURE, 7, 2 * axis + (facing > 0)))
    normal = torch.zeros_like(direction).scatter_(0, axis[None], -facing[None])
    for number, solid in enumerate((*solids, lamp), start=1):
        mine = nearest == number
        label = torch.where(mine, solid.kind, label)
        instance = torch.where(mine, 7 + number, instance)
        color = torch.where(mine, solid.color, color)
        normal = torch.where(mine, solid.normal(point), normal)

    # Lambertian light from the lamp, with shadows, and ambient light.
    to_lamp = lamp.centre - point
    squared = (to_lamp * to_lamp).sum(0)
    lambert = ((normal * to_lamp).sum(0) * squared.rsqrt()).clamp(min=0)
    above = point + 1e-3 * normal
    for solid in solids:
        lambert = torch.where(solid.hit(above, to_lamp) > 1, lambert, 0.0)
    light = draws.uniform(0.3, 0.5) + lambert * draws.uniform(2, 4) / (1 + squared)
    light = torch.where(label == LAMP, 1.3, light)
    noise = uniform(_pixel_keys(keys, t.shape[1]), 0, -0.02, 0.02).view_as(t)
    rgb = (color * light + noise).clamp(0, 1)

    def picture(values: Tensor) -> Tensor:
        return values.transpose(0, 1).reshape(len(keys), -1, *size).contiguous()

    return Rendering(
        rgb=picture((rgb * 255).round().to(torch.uint8)),
        segmentation=label.view(-1, *size).to(torch.uint8),
        depth=t.view(-1, 1, *size).contiguous(),
        normals=picture(torch.einsum("bij,ibp->jbp", rotation, normal)),
        edges=label_edges(instance.view(-1, *size)),
    )


def _camera_rays(size: tuple[int, int]) -> Tensor:
    """Directions ``[3, H * W]`` through the pixels' centres in the camera's frame, with z = 1."""
    height, width = size
    u = ((torch.arange(width) + 0.5) * 2 / width - 1) / FOCAL
    v = ((torch.arange(height) + 0.5) * 2 - height) / width / FOCAL
    v, u = torch.meshgrid(v, u, indexing="ij")
    return torch.stack([u, v, torch.ones_like(u)]).flatten(1)


def _rotation(yaw: Tensor, pitch: Tensor) -> Tensor:
    """Camera-to-world rotations ``[B, 3, 3]``: turned right by ``yaw``, after tilting down by ``pitch``."""
    zero, one = torch.zeros_like(yaw), torch.ones_like(yaw)
    turn = torch.stack([yaw.cos(), zero, yaw.sin(), zero, one, zero, -yaw.sin(), zero, yaw.cos()], dim=-1)
    tilt = torch.stack([one, zero, zero, zero, pitch.cos(), pitch.sin(), zero, -pitch.sin(), pitch.cos()], dim=-1)
    return turn.view(-1, 3, 3) @ tilt.view(-1, 3, 3)


def _solid(draws: _Draws, kind: int, width: Tensor, depth: Tensor) -> _Solid:
    """A box or ball on the floor, in front of the camera."""
    ball = kind == BALL
    half = draws.uniform(0.25, 0.55).expand(3, -1, -1) if ball else draws.point((0.2, 0.6), (0.15, 0.7), (0.2, 0.6))
    x = draws.uniform(-1, 1) * (width / 2 - 0.6)
    z = 1.8 + draws.uniform(0, 1) * (depth - 2.4)
    return _Solid(
        kind=kind,
        centre=torch.stack([x, -half[1], z]),
        half=half,
        angle=draws.uniform(0, torch.pi / 2),
        color=draws.color(0.1, 0.9),
        present=draws.uniform(0, 1) < 0.75,
    )


def _lamp(draws: _Draws, width: Tensor, depth: Tensor, height: Tensor) -> _Solid:
    """The source of light below the ceiling; where it isn't ``present`` it gives light but can't be seen."""
    x, z = draws.uniform(-0.25, 0.25) * width, draws.uniform(0.35, 0.8) * depth
    return _Solid(
        kind=LAMP,
        centre=torch.stack([x, 0.4 - height, z]),
        half=torch.full((3, len(x), 1), 0.2),
        angle=torch.zeros_like(x),
        color=torch.ones(3, len(x), 1),
        present=draws.uniform(0, 1) < 0.7,
    )


def _room_surface(
    draws: _Draws, point: Tensor, axis: Tensor, facing: Tensor, corners: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Class ``[B, P]`` and colour ``[3, B, P]`` of the room's surfaces where rays meet them."""
    low, high = corners
    x, y, z = point
    floor, ceiling = (axis == 1) & (facing > 0), (axis == 1) & (facing < 0)
    label = torch.where(floor, FLOOR, torch.where(ceiling, CEILING, WALL))

    def pattern(cells: Tensor, first: Tensor, second: Tensor) -> Tensor:
        return torch.where(torch.remainder(cells, 2) > 0, first, second)

    tile, period = draws.color(0.25, 0.75), draws.uniform(0.3, 0.7)
    cells = torch.floor(x / period) + torch.floor(z / period)
    color = pattern(cells, tile, tile * draws.uniform(0.5, 0.85))
    paint = draws.color(0.55, 0.95)
    cells = torch.floor(torch.where(axis == 0, z, x) / draws.uniform(0.2, 0.9))
    color = torch.where(label == WALL, pattern(cells, paint, paint * 0.88), color)
    color = torch.where(ceiling, 0.9, color)

    centre_x, centre_z = draws.uniform(-0.25, 0.25) * (high - low)[0], draws.uniform(0.4, 0.7) * high[2]
    rug = floor & ((x - centre_x).abs() < draws.uniform(0.5, 1.1)) & ((z - centre_z).abs() < draws.uniform(0.5, 1.1))
    cells = torch.floor(x / draws.uniform(0.1, 0.2))
    color = torch.where(rug, pattern(cells, draws.color(0.1, 0.9), draws.color(0.1, 0.9)), color)

    across, up = draws.uniform(-0.3, 0.3) * (high - low)[0], draws.uniform(0.5, 0.65) * low[1]
    picture = (axis == 2) & (facing > 0)
    picture &= ((x - across).abs() < draws.uniform(0.4, 0.9)) & ((y - up).abs() < draws.uniform(0.3, 0.6))
    period = draws.uniform(0.15, 0.3)
    cells = torch.floor(x / period) + torch.floor(y / period)
    color = torch.where(picture, pattern(cells, draws.color(0.0, 1.0), draws.color(0.0, 1.0)), color)
    return torch.where(rug, RUG, torch.where(picture, PICTURE, label)), color


def _pixel_keys(keys: Tensor, pixels: int) -> Tensor:
    return (keys[:, None] + torch.arange(1, pixels + 1) * 0x5851F42D4C957F2D).flatten()


class Rooms(TensorData):
    """Rooms rendered when they are first asked for, then kept in memory.

    Args:
        count: Number of rooms.
        seed: Decides the rooms, with ``stream``.
        stream: Number of the split: no two splits share a room.
        size: Height and width.
    """

    def __init__(self, count: int, seed: int, stream: int, size: tuple[int, int]) -> None:
        self.seed, self.stream, self.size = seed, stream, size
        self._rendered = torch.zeros(count, dtype=torch.bool)
        like = vars(render(torch.zeros(1, dtype=torch.int64), size))
        kept = {name: values.new_zeros(count, *values.shape[1:]) for name, values in like.items()}
        super().__init__(TASKS, kept.pop("rgb"), kept)

    def batch(self, indices: Tensor) -> Batch:
        """The rooms ``indices``."""
        missing = torch.unique(indices[~self._rendered[indices]])
        for part in torch.split(missing, 32) if len(missing) else ():
            new = vars(render(sample_keys(self.seed, self.stream, part), self.size))
            for name, kept in {"rgb": self.inputs, **self.targets}.items():
                kept[part] = new[name]
            self._rendered[part] = True
        return super().batch(indices)


@register("rooms", "rendered rooms: segmentation, depth in metres, normals, edges, all exact; built in")
def load(
    _path: Path | None = None,
    seed: int = 0,
    *,
    size: tuple[int, int] = (48, 64),
    train: int = 800,
    validation: int = 100,
    test: int = 200,
) -> Problem:
    """Rooms with exact labels; see `render` for what is in them and `CLASSES` for the classes.

    Args:
        _path: Not used.
        seed: Decides the rooms.
        size: Height and width.
        train: Number of training rooms.
        validation: Number of validation rooms.
        test: Number of test rooms.

    Returns:
        The data set, with tasks ``segmentation``, ``depth``, ``normals`` and ``edges``.
    """
    if min(size) < 8:
        raise ValueError(f"Parameter `size` should be at least 8 x 8. Found `size = {tuple(size)}`.")
    parts = Rooms(train, seed, 0, size), Rooms(validation, seed, 1, size), Rooms(test, seed, 2, size)
    return Problem(
        TASKS,
        *parts,
        "segnet",
        input_shape=(3, *size),
        citation="torchmto's own renderer",
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
        augment=JointAugment(),
    )
