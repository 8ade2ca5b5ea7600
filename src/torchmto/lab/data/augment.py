"""Augmentation of an image together with all that is known about its pixels.

Every random number is drawn from the sample's key (see `loading.sample_keys`), so a sample's augmentation
depends on ``(seed, epoch, index)`` and on nothing else: not on its batch, the process or what was drawn
before.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from torchmto.checks import found, needed
from torchmto.lab.data.base import Batch, Task
from torchmto.lab.data.loading import uniform


def hflip(batch: Batch, tasks: Sequence[Task], chosen: Tensor) -> Batch:
    """Mirror the chosen samples left to right; the x component of their normals changes its sign.

    Args:
        batch: Images and targets; targets of tasks that aren't dense stay as they are.
        tasks: The tasks of the batch.
        chosen: bool ``[B]``.

    Returns:
        A new batch.
    """

    def mirror(values: Tensor) -> Tensor:
        return torch.where(chosen.view(-1, *[1] * (values.dim() - 1)), values.flip(-1), values)

    targets = dict(batch["targets"])
    for task in tasks:
        if task.dense and task.name in targets:
            targets[task.name] = mirror(targets[task.name])
            if task.kind == "normals":
                sign = torch.where(chosen, -1.0, 1.0)[:, None, None]
                normals = targets[task.name]
                targets[task.name] = torch.cat([normals[:, :1] * sign[:, None], normals[:, 1:]], dim=1)
    return Batch(input=mirror(batch["input"]), targets=targets)


def zoom(batch: Batch, tasks: Sequence[Task], factor: Tensor, corner: Tensor, fill: Sequence[float] = (0.0,)) -> Batch:
    """Enlarge a window of each sample to the full frame, or shrink a sample to the middle of the frame.

    An object that looks ``factor`` times larger is ``factor`` times nearer, so depth is divided by it
    (disparity, which a depth task declares by ``extra={"inverse": True}``, is multiplied). Images are
    interpolated linearly; targets take the nearest pixel, so nothing is blended across a boundary or with
    missing values.

    Args:
        batch: Images and targets, all ``[..., H, W]``.
        tasks: The tasks of the batch.
        factor: ``[B]``, positive.
        corner: ``[B, 2]`` place of the window (x, y), from 0 (left, top) to 1 (right, bottom).
        fill: Colour around a shrunk image; its targets are missing there.

    Returns:
        A new batch of the same shapes.
    """
    from kornia.geometry.transform import remap  # noqa: PLC0415 - half a second, and only needed here

    image = batch["input"]
    height, width = image.shape[-2:]
    corner = torch.where(factor[:, None] < 1, 0.5, corner)
    start, step = corner * (1 - 1 / factor)[:, None], (1 / factor)[:, None]
    columns = start[:, :1] * (width - 1) + step * torch.arange(width)
    rows = start[:, 1:] * (height - 1) + step * torch.arange(height)
    map_x, map_y = (m.expand(-1, height, width) for m in (columns[:, None, :], rows[:, :, None]))
    past = [(places < -0.5) | (places > size - 0.5) for places, size in ((columns, width), (rows, height))]
    outside = (past[0][:, None, :] | past[1][:, :, None])[:, None]

    def warp(values: Tensor, mode: str) -> Tensor:
        warped: Tensor = remap(values, map_x, map_y, mode, padding_mode="border", align_corners=True)
        return warped

    dense = [task for task in tasks if task.dense and task.name in batch["targets"]]
    targets = dict(batch["targets"])
    if dense:
        maps = [targets[t.name] if targets[t.name].dim() == 4 else targets[t.name][:, None] for t in dense]
        warped = warp(torch.cat([m.to(image.dtype) for m in maps], dim=1), "nearest")
        for task, new in zip(dense, torch.split(warped, [m.shape[1] for m in maps], dim=1), strict=True):
            old = targets[task.name]
            targets[task.name] = new.masked_fill(outside, task.missing).reshape(old.shape).to(old.dtype)
            if task.kind == "depth":
                scale = factor.view(-1, 1, 1, 1)
                inverse = bool(task.extra.get("inverse", False))
                targets[task.name] = targets[task.name] * scale if inverse else targets[task.name] / scale
    frame = image.new_tensor(fill).view(1, -1, 1, 1)
    return Batch(input=torch.where(outside, frame, warp(image, "bilinear")), targets=targets)


def shift(images: Tensor, offset: Tensor) -> Tensor:
    """Move images by whole pixels and fill with black.

    Args:
        images: ``[B, C, H, W]``.
        offset: int64 ``[B, 2]``: pixels to the right and down.

    Returns:
        The moved images, same shape.
    """
    height, width = images.shape[-2:]
    reach = int(offset.abs().max()) if len(offset) else 0
    padded = functional.pad(images, (reach, reach, reach, reach))
    rows = torch.arange(height) + (reach - offset[:, 1:])
    columns = torch.arange(width) + (reach - offset[:, :1])
    pixels = rows[:, :, None] * padded.shape[-1] + columns[:, None, :]
    index = pixels.flatten(1)[:, None].expand(-1, images.shape[1], -1)
    return padded.flatten(2).gather(2, index).view_as(images)


def color_jitter(images: Tensor, brightness: Tensor, contrast: Tensor, saturation: Tensor) -> Tensor:
    """Multiply brightness, contrast and, in colour, saturation of images in ``[0, 1]``; factors ``[B]``."""
    from kornia import enhance  # noqa: PLC0415 - half a second, and only needed here

    images = enhance.adjust_brightness_accumulative(images, brightness)
    images = enhance.adjust_contrast_with_mean_subtraction(images, contrast)
    if images.shape[1] == 3:
        images = enhance.adjust_saturation_with_gray_subtraction(images, saturation)
    return images.clamp(0, 1)


def photometric(images: Tensor, keys: Tensor) -> Tensor:
    """Distort colours as released code of dense multi-task learning does (ATRC, InvPT, TaskPrompter).

    Brightness moves by up to 32/255; contrast, the first or the last of all, is multiplied by .5 to 1.5, saturation, too; hue
    turns by up to 36 degrees. Each of the four happens with probability one half.

    Args:
        images: ``[B, 3, H, W]`` in ``[0, 1]``.
        keys: int64 ``[B]``, one per sample.

    Returns:
        The new images, same shape and range.
    """
    from kornia.color import hsv_to_rgb, rgb_to_hsv  # noqa: PLC0415 - half a second, and only needed here

    def draw(number: int, low: float, high: float, neutral: float) -> Tensor:
        value = torch.where(uniform(keys, number) < 0.5, uniform(keys, number + 1, low, high), neutral)
        return value.view(-1, 1, 1, 1)

    images = (images + draw(9, -32 / 255, 32 / 255, 0.0)).clamp(0, 1)
    contrast, first = draw(11, 0.5, 1.5, 1.0), (uniform(keys, 13) < 0.5).view(-1, 1, 1, 1)
    hue, saturation, value = torch.split(rgb_to_hsv((images * torch.where(first, contrast, 1.0)).clamp(0, 1)), 1, dim=1)
    hue = torch.remainder(hue + draw(16, -torch.pi / 5, torch.pi / 5, 0.0), 2 * torch.pi)
    images = hsv_to_rgb(torch.cat([hue, (saturation * draw(14, 0.5, 1.5, 1.0)).clamp(0, 1), value], dim=1))
    return (images * torch.where(first, 1.0, contrast)).clamp(0, 1)


@dataclass(frozen=True)
class JointAugment:
    """Random flip, zoom and colours for images with dense targets; random flip, shift and colours for others.

    Args:
        flip: Probability of a mirror image.
        zoom: Largest enlargement; the factor is uniform in ``[shrink, zoom]``. Dense targets are zoomed along.
        shrink: Smallest factor; a shrunk image has a frame of the colour ``fill`` and of missing targets.
        fill: That colour.
        shift: Largest shift in pixels; only for data sets without dense targets.
        color: Brightness, contrast and saturation change by at most this share.
        distort: Whether colours are distorted by `photometric`.

    Example:
        >>> task = Task("depth", "depth", 1)
        >>> batch = Batch(input=torch.rand(2, 3, 4, 4), targets={"depth": torch.ones(2, 1, 4, 4)})
        >>> JointAugment(zoom=2.0)(batch, [task], torch.arange(2))["input"].shape
        torch.Size([2, 3, 4, 4])
    """

    flip: float = 0.5
    zoom: float = 1.0
    shrink: float = 1.0
    fill: tuple[float, ...] = (0.0,)
    shift: int = 0
    color: float = 0.0
    distort: bool = False

    def __post_init__(self) -> None:
        if self.zoom > 1 or self.shrink < 1 or self.color or self.distort:
            needed("This data set", "kornia")

    def __call__(self, batch: Batch, tasks: Sequence[Task], keys: Tensor) -> Batch:
        """Augment a batch.

        Args:
            batch: Images in ``[0, 1]`` and targets.
            tasks: The tasks of the batch.
            keys: int64 ``[B]``, one per sample.

        Returns:
            A new batch.

        Raises:
            ValueError: If there is a shift, and a dense task, whose targets would stay where they are.
        """
        if self.flip:
            batch = hflip(batch, tasks, uniform(keys, 0) < self.flip)
        if self.zoom > 1 or self.shrink < 1:
            corner = torch.stack([uniform(keys, 2), uniform(keys, 3)], dim=1)
            batch = zoom(batch, tasks, uniform(keys, 1, self.shrink, self.zoom), corner, self.fill)
        image = batch["input"]
        if self.shift:
            if dense := [task.name for task in tasks if task.dense]:
                raise ValueError(found("shift", f"0 with dense tasks ({', '.join(dense)})", self.shift))
            draws = [uniform(keys, draw, -self.shift, self.shift + 1).floor().long() for draw in (4, 5)]
            image = shift(image, torch.stack(draws, dim=1))
        if self.color:
            factors = [uniform(keys, draw, 1 - self.color, 1 + self.color) for draw in (6, 7, 8)]
            image = color_jitter(image, *factors)
        if self.distort:
            image = photometric(image, keys)
        return Batch(input=image, targets=batch["targets"])
