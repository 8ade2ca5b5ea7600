"""Maps over pixels: resizing each kind by its own rule, and edges from labels."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from torchmto.checks import check_choice
from torchmto.lab.data.augment import JointAugment
from torchmto.lab.data.base import Augment, MultiTaskDataset, Task
from torchmto.lab.problem import Problem

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
AUGMENTATIONS: dict[str, dict[str, Any]] = {
    "plain": {"zoom": 1.5, "color": 0.2},
    "atrc": {"zoom": 2.0, "shrink": 0.5, "fill": IMAGENET_MEAN, "distort": True},
}
Parts = tuple[MultiTaskDataset, MultiTaskDataset, MultiTaskDataset]
_CHUNK = 64  # images resized at once: bounds the memory of the float copies


def resize_image(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Antialiased bilinear resizing of uint8 images ``[N, C, H, W]`` to ``size`` (height, width)."""
    if tuple(images.shape[-2:]) == size:
        return images

    def resize(chunk: Tensor) -> Tensor:
        resized = functional.interpolate(chunk.float(), size, mode="bilinear", antialias=True, align_corners=False)
        return resized.round_().clamp_(0, 255).to(images.dtype)

    return _chunked(resize, images)


def resize_target(task: Task, target: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize a dense target without inventing labels.

    Labels, edges and saliency take the nearest pixel. Depth, normals and maps are averaged over the *valid*
    pixels a new pixel covers, and are missing where fewer than half of these are valid; normals keep their
    length in the stored scale.

    Args:
        task: Which kind of target it is.
        target: ``[N, H, W]`` or ``[N, C, H, W]`` in the type it is stored in.
        size: New height and width.

    Returns:
        The resized target in the same type.
    """
    if tuple(target.shape[-2:]) == size:
        return target
    if task.kind in {"segmentation", "edges", "saliency"}:
        maps = target if target.dim() == 4 else target[:, None]
        resized = functional.interpolate(maps, size, mode="nearest-exact")
        return resized if target.dim() == 4 else resized[:, 0]

    def average(chunk: Tensor) -> Tensor:
        values = chunk.float()
        valid = task.valid(values)
        covered = functional.adaptive_avg_pool2d(valid.float(), size)
        mean = functional.adaptive_avg_pool2d(torch.where(valid, values, 0.0), size) / covered.clamp(min=1e-6)
        if task.kind == "normals":
            squares = mean.square().sum(dim=1, keepdim=True).clamp(min=1e-12)
            length = values.square().sum(dim=1).amax().sqrt()
            if not chunk.is_floating_point():
                # Stored components were rounded, so the longest vector wouldn't fit into the type along an axis.
                length = length.clamp(max=torch.iinfo(chunk.dtype).max)
            mean = mean * (length / squares.sqrt())
        mean = torch.where(covered >= 0.5, mean, task.missing)
        return (mean if chunk.is_floating_point() else mean.round()).to(chunk.dtype)

    return _chunked(average, target)


def label_edges(labels: Tensor, ignore_index: int = 255) -> Tensor:
    """Boundaries between labels.

    Args:
        labels: ``[N, H, W]`` integers.
        ignore_index: Label of pixels nobody labelled.

    Returns:
        uint8 ``[N, 1, H, W]``: 1 where the right or lower neighbour has another label, 0 where not, 255 where
        the pixel itself isn't labelled. A border to unlabelled pixels is no edge.

    Example:
        >>> label_edges(torch.tensor([[[0, 0, 1, 255]]]))[0, 0].tolist()
        [[0, 1, 0, 255]]
    """
    edges = torch.zeros_like(labels, dtype=torch.bool)
    known = labels != ignore_index
    edges[:, :, :-1] |= (labels[:, :, :-1] != labels[:, :, 1:]) & known[:, :, 1:]
    edges[:, :-1] |= (labels[:, :-1] != labels[:, 1:]) & known[:, 1:]
    return torch.where(known, edges.to(torch.uint8), 255).to(torch.uint8)[:, None]


def pad_to(
    tasks: Sequence[Task], image: Tensor, targets: Mapping[str, Tensor], size: tuple[int, int]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Shrink samples into ``size`` where they are larger, keeping their proportions, and pad right and below.

    Args:
        tasks: The tasks of ``targets``.
        image: uint8 ``[N, C, H, W]``; padded with black.
        targets: Dense targets; padded with their kind's missing value.
        size: New height and width.

    Returns:
        The image and the targets, all of the new size.
    """
    height, width = image.shape[-2:]
    scale = min(size[0] / height, size[1] / width, 1.0)
    inner = max(1, min(size[0], round(height * scale))), max(1, min(size[1], round(width * scale)))
    padding = (0, size[1] - inner[1], 0, size[0] - inner[0])
    padded = {
        task.name: functional.pad(resize_target(task, targets[task.name], inner), padding, value=task.missing)
        for task in tasks
    }
    return functional.pad(resize_image(image, inner), padding), padded


def scene_augment(name: str) -> JointAugment:
    """The augmentation of scenes called ``name``.

    "plain": mirror, enlargement by up to 1.5, colours by up to 20 %. "atrc": that of ATRC, InvPT, TaskPrompter and the
    released code of arXiv 2502.11986: a scale of .5 to 2 and a random crop, or padding in ImageNet's mean colour; mirror;
    distorted colours.

    Raises:
        ValueError: If there is no such augmentation.
    """
    check_choice("augmentation", name, AUGMENTATIONS)
    return JointAugment(**AUGMENTATIONS[name])


def image_bundle(parts: Parts, *, augment: Augment, citation: str, model: str = "segnet") -> Problem:
    """A `Problem` of colour images for training, validation and test, normalised as ImageNet's; other arguments as there."""
    return Problem(
        parts[0].tasks,
        *parts,
        model,
        input_shape=tuple(parts[0][0]["input"].shape),
        citation=citation,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        augment=augment,
    )


def _chunked(function: Callable[[Tensor], Tensor], values: Tensor) -> Tensor:
    return torch.cat([function(chunk) for chunk in torch.split(values, _CHUNK)])
