"""Taskonomy's tiny split: indoor images with 11 dense tasks."""

import os
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchmto.checks import check_choice, check_integer
from torchmto.lab.data.augment import JointAugment
from torchmto.lab.data.base import SPLITS, Split, Task
from torchmto.lab.data.dense import image_bundle, resize_image, resize_target
from torchmto.lab.data.files import FileData, Sample, load_picture, load_rgb
from torchmto.lab.data.registry import register, require, unknown_layout
from torchmto.lab.problem import Problem

TASKS = (
    Task("depth_euclidean", "depth", 1, unit="m"),
    Task("depth_zbuffer", "depth", 1, unit="m"),
    Task("edge_occlusion", "map", 1),
    Task("edge_texture", "map", 1),
    Task("keypoints2d", "map", 1),
    Task("keypoints3d", "map", 1),
    Task("normal", "normals", 3, {"loss": "cosine"}),
    Task("principal_curvature", "map", 2, {"loss": "mse"}),
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
_RANGES = {"keypoints2d": 0.005, "keypoints3d": 1.0, "edge_texture": 0.08, "edge_occlusion": 0.00625}
"""The share of 16 bits that a map's values use; they become [-1, 1]."""
_UNCLIPPED = {"edge_occlusion"}
_CURVATURE_MEAN, _CURVATURE_STD = (123.572, 120.1), (31.922, 21.658)


@register(
    "taskonomy",
    "indoor scenes, tiny split, 11 dense tasks: 2 depths, 2 edges, 2 keypoints, normals, curvature, shading, 2 segments",
    source="https://github.com/StanfordVL/taskonomy/tree/master/data (omnitools.download)",
    layouts=("a folder DOMAIN/taskonomy/BUILDING/*.png", "a folder DOMAIN/BUILDING/*.png or BUILDING/DOMAIN/*.png"),
)
def load(
    path: Path,
    seed: int = 0,
    *,
    size: tuple[int, int] = (256, 256),
    limit: int | Mapping[str, int] | None = None,
) -> Problem:
    """Taskonomy's tiny split with its official training, validation and test buildings.

    Buildings that aren't on the disk (woodbine can't be downloaded) and images that lack a file of a task (some of wiconisco)
    are left out with one warning that counts them, as long as each split keeps some. Keypoints, edges, shading and the
    two segmentations become maps in ``[-1, 1]``: 8 bits as they are, 16 bits after a division by the part of their range that
    the released code expects, and clipped but for ``edge_occlusion``. Curvatures are standardised. Depth becomes metres.
    By default normals have the loss ``cosine``, curvatures ``mse`` and all others ``l1``.

    Args:
        path: Folder.
        seed: Decides which images a ``limit`` leaves.
        size: Height and width.
        limit: How many images of each split to use, or ``{"train": 1000, "validation": 100, "test": 100}``; all by default.

    Returns:
        The data set, with the 11 tasks in `TASKS`.

    Raises:
        FileNotFoundError: If a split has no image with all of its files.

    Source: the released code of "Selective Task Group Updates" (arXiv 2502.11986). Deviations: there depth is the
    logarithm of its 16-bit values, ``edge_occlusion`` is blurred, validation buildings are trained on, and wiconisco is
    left out as a whole.
    """
    limits = limit if isinstance(limit, Mapping) else dict.fromkeys(SPLITS, limit)
    for name, most in limits.items():
        check_choice("limit", name, SPLITS)
        if most is not None:
            check_integer("limit", most, minimum=1)
    if not any(_folder(path, "rgb", name) for names in BUILDINGS.values() for name in names.split()):
        raise unknown_layout(path, "taskonomy")
    missing: list[str] = []
    incomplete: Counter[str] = Counter()

    def read(name: str) -> Sample:
        building, _, view = name.partition("/")
        targets = {task.name: _read(_file(path, task.name, building, view), task) for task in TASKS}
        resized = {task.name: resize_target(task, targets[task.name], size) for task in TASKS}
        return resize_image(load_rgb(_file(path, "rgb", building, view), "taskonomy"), size), resized

    def split(name: Split, official: str) -> FileData:
        views = []
        for building in BUILDINGS[official].split():
            by_domain = {domain: _views(path, domain, building) for domain in ("rgb", *(task.name for task in TASKS))}
            complete = set.intersection(*by_domain.values())
            views += [f"{building}/{view}" for view in sorted(complete)]
            if not any(by_domain.values()):
                missing.append(building)
            elif holes := len(set.union(*by_domain.values()) - complete):
                incomplete[building] = holes
        if not views:
            _no_images(path, BUILDINGS[official].split())
        most = limits.get(name)
        if most is not None and most < len(views):
            views = [views[i] for i in np.sort(np.random.default_rng(seed).permutation(len(views))[:most])]
        return FileData(TASKS, views, read)

    parts = split("train", "train"), split("validation", "val"), split("test", "test")
    if missing or incomplete:
        warnings.warn(
            f"Taskonomy: left out {sum(incomplete.values())} images that lack a file of a task (of "
            f"{', '.join(incomplete) or 'none'}) and buildings without files: {len(missing)} ({', '.join(missing) or 'none'}).",
            stacklevel=3,  # where `load_data` was called
        )
    return image_bundle(parts, augment=JointAugment(), citation=CITATION)


def _no_images(root: Path, buildings: Sequence[str]) -> None:
    """Say which file is missing first."""
    for building in buildings:
        for view in sorted(_views(root, "rgb", building)):
            for task in TASKS:
                require(_file(root, task.name, building, view), "taskonomy")
    require(root / "rgb" / buildings[0], "taskonomy")


def _folder(root: Path, domain: str, building: str) -> Path | None:
    candidates = (root / domain / "taskonomy" / building, root / domain / building, root / building / domain)
    return next((folder for folder in candidates if folder.is_dir()), None)


def _file(root: Path, domain: str, building: str, view: str) -> Path:
    folder = _folder(root, domain, building) or root / domain / building
    return folder / f"{view}_domain_{domain}.png"


def _views(root: Path, domain: str, building: str) -> set[str]:
    folder, ending = _folder(root, domain, building), f"_domain_{domain}.png"
    names = [] if folder is None else [entry.name for entry in os.scandir(folder)]  # 100,000s: no Path objects
    return {name.removesuffix(ending) for name in names if name.endswith(ending)}


def _read(file: Path, task: Task) -> Tensor:
    """One target ``[1, C, H, W]``: float16, or float32 where depth needs it."""
    pixels = load_picture(file, "taskonomy")
    values: NDArray[np.floating[Any]] = pixels.reshape(*pixels.shape[:2], -1).astype(np.float32)
    if task.kind == "depth":
        values = np.where(values >= _FAR, 0, values * _METRES)[..., :1]
    elif task.kind == "normals":
        values = np.where(np.abs(values - 127) <= 1, 127, values)[..., :3] / 127 - 1
    elif task.name == "principal_curvature":
        mean, deviation = np.array((_CURVATURE_MEAN, _CURVATURE_STD), np.float32)
        values = (values[..., :2] - mean) / deviation
    else:
        values = values[..., :1] / (255 if pixels.dtype == np.uint8 else _RANGES.get(task.name, 1.0) * 2**16)
        values = 2 * (values if task.name in _UNCLIPPED else values.clip(max=1)) - 1
    dtype = np.float32 if task.kind == "depth" else np.float16
    return torch.from_numpy(values.astype(dtype)).permute(2, 0, 1)[None]
