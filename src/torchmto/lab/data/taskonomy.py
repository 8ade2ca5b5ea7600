"""Taskonomy's tiny split: indoor images with 11 dense tasks."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchmto.lab.data.augment import JointAugment
from torchmto.lab.data.base import Task
from torchmto.lab.data.dense import image_bundle, resize_image, resize_target
from torchmto.lab.data.files import FileData, Sample, load_picture, load_rgb, require, unknown_layout
from torchmto.lab.data.registry import register
from torchmto.lab.problem import Problem

TASKS = (
    Task("depth_euclidean", "depth", 1, unit="m"),
    Task("depth_zbuffer", "depth", 1, unit="m"),
    Task("edge_occlusion", "map", 1),
    Task("edge_texture", "map", 1),
    Task("keypoints2d", "map", 1),
    Task("keypoints3d", "map", 1),
    Task("normal", "normals", 3),
    Task("principal_curvature", "map", 2),
    Task("reshading", "map", 1),
    Task("segment_unsup2d", "map", 1),
    Task("segment_unsup25d", "map", 1),
)
BUILDINGS = {
    "train": "allensville beechwood benevolence coffeen cosmos forkland hanson hiteman klickitat lakeville leonardo"
    " lindenwood marstons merom mifflinburg newfields onaga pinesdale pomaria ranchester shelbyville stockman tolstoy"
    " wainscott woodbine",
    "val": "collierville corozal darden markleeville wiconisco",
    "test": "ihlen mcdade muleshoe noxapater uvalda",
}
"""The buildings of the official tiny split."""
CITATION = "Zamir et al., Taskonomy: disentangling task transfer learning, CVPR 2018"
_METRES = 1 / 512
_FAR = 65535  # depth where the ray met nothing


@register(
    "taskonomy",
    "indoor scenes, tiny split, 11 dense tasks: 2 depths, 2 edges, 2 keypoints, normals, curvature, shading, 2 segments",
    source="https://github.com/StanfordVL/taskonomy/tree/master/data (omnitools.download)",
    layouts=("a folder DOMAIN/taskonomy/BUILDING/*.png", "a folder DOMAIN/BUILDING/*.png or BUILDING/DOMAIN/*.png"),
)
def load(path: Path | None, seed: int = 0, *, size: tuple[int, int] = (256, 256), limit: int | None = None) -> Problem:
    """Taskonomy's tiny split with its official training, validation and test buildings.

    Buildings that aren't on the disk are left out, as long as each split has one. Depth becomes metres; edges,
    keypoints, shading and the two segmentations become maps in ``[0, 1]``, curvatures in ``[-1, 1]``.

    Args:
        path: Folder.
        seed: Decides which images a ``limit`` leaves.
        size: Height and width.
        limit: How many images of a building to use; all by default.

    Returns:
        The data set, with the 11 tasks in `TASKS`.

    Raises:
        FileNotFoundError: If a split has no building, or an image lacks one of the tasks (when it is first read).
    """
    root = require(path, "taskonomy")
    if limit is not None and limit < 1:
        raise ValueError(f"Parameter `limit` should be positive. Found `limit = {limit}`.")
    if not any(_folder(root, "rgb", name) for names in BUILDINGS.values() for name in names.split()):
        raise unknown_layout(root, "taskonomy")

    def read(name: str) -> Sample:
        building, _, view = name.partition("/")
        targets = {task.name: _read(_file(root, task.name, building, view), task) for task in TASKS}
        resized = {task.name: resize_target(task, targets[task.name], size) for task in TASKS}
        return resize_image(load_rgb(_file(root, "rgb", building, view), "taskonomy"), size), resized

    def split(name: str) -> FileData:
        views = [view for building in BUILDINGS[name].split() for view in _views(root, building, seed, limit)]
        if not views:
            require(root / "rgb" / BUILDINGS[name].split()[0], "taskonomy")
        return FileData(TASKS, views, read)

    return image_bundle(
        "taskonomy", split("train"), split("val"), split("test"), augment=JointAugment(), citation=CITATION
    )


def _folder(root: Path, domain: str, building: str) -> Path | None:
    candidates = (root / domain / "taskonomy" / building, root / domain / building, root / building / domain)
    return next((folder for folder in candidates if folder.is_dir()), None)


def _file(root: Path, domain: str, building: str, view: str) -> Path:
    folder = _folder(root, domain, building) or root / domain / building
    return folder / f"{view}_domain_{domain}.png"


def _views(root: Path, building: str, seed: int, limit: int | None) -> Sequence[str]:
    """``building/point_0_view_0`` for every colour image, or for ``limit`` of them."""
    folder = _folder(root, "rgb", building)
    if folder is None:
        return ()
    ending = "_domain_rgb.png"
    views = sorted(f"{building}/{file.name.removesuffix(ending)}" for file in folder.glob(f"*{ending}"))
    if limit is None or limit >= len(views):
        return views
    return [views[i] for i in np.sort(np.random.default_rng(seed).permutation(len(views))[:limit])]


def _read(file: Path, task: Task) -> Tensor:
    """One target ``[1, C, H, W]``: float16, or float32 where depth needs it."""
    pixels = load_picture(file, "taskonomy")
    values: NDArray[np.floating[Any]] = pixels.reshape(*pixels.shape[:2], -1).astype(np.float32)
    if task.kind == "depth":
        values = np.where(values >= _FAR, 0, values * _METRES)[..., :1]
    elif task.kind == "normals":
        values = np.where(np.abs(values - 127) <= 1, 127, values)[..., :3] / 127 - 1
    elif task.name == "principal_curvature":
        values = (values[..., :2] - 127) / 128
    else:
        values = values[..., :1] / (255 if pixels.dtype == np.uint8 else 65535)
    dtype = np.float32 if task.kind == "depth" else np.float16
    return torch.from_numpy(values.astype(dtype)).permute(2, 0, 1)[None]
