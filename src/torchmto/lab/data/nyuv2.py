"""NYUv2: indoor scenes with segmentation, depth, surface normals and edges, in three layouts."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from torchmto.lab.data.base import MultiTaskDataset, Task, TensorData
from torchmto.lab.data.dense import image_bundle, label_edges, resize_image, resize_target, scene_augment
from torchmto.lab.data.files import (
    FileData,
    Sample,
    carved,
    extract,
    find_root,
    load_array,
    load_picture,
    load_rgb,
    read_names,
    read_npz,
)
from torchmto.lab.data.mtan import mtan_split
from torchmto.lab.data.registry import register, unknown_layout
from torchmto.lab.problem import Problem

CITATION = "Silberman, Hoiem, Kohli and Fergus, Indoor segmentation and support inference, ECCV 2012"
_MTAN = {"segmentation": "label", "depth": "depth", "normals": "normal"}
_BLOCK = 20  # neighbouring images of the official order often show one room


@register(
    "nyuv2",
    "indoor scenes: segmentation (13 or 40 classes), depth in metres, normals, edges; 795 + 654 images",
    source="https://github.com/lorenmt/mtan (folders of .npy), "
    "https://github.com/prismformore/Multi-Task-Transformer (NYUDv2.tar.gz) or "
    "https://github.com/SimonVandenhende/Multi-Task-Learning-PyTorch (NYUD_MT.tgz)",
    layouts=(
        "a `.npz` with rgb_train, seg13_train, ...",
        "a folder with train/ and val/ (MTAN)",
        "NYUDv2.tar.gz (InvPT, TaskPrompter), NYUD_MT.tgz (MTI-Net) or the folder of one",
    ),
)
def load(
    path: Path,
    seed: int = 0,
    *,
    classes: int | None = None,
    size: tuple[int, int] | None = None,
    validation: float = 0.1,
    augmentation: str = "plain",
) -> Problem:
    """NYUv2 from any of its usual layouts.

    - ``.npz``: ``rgb_* [N, H, W, 3]`` uint8, ``seg13_*`` and ``seg40_* [N, H, W]`` (0 = void), ``depth_m_*``
    metres,
      ``normal_* [N, H, W, 3]`` int8; ``*`` is ``train`` and ``test``. Edges are the boundaries of the 40
      classes.
    - MTAN: ``{train,val}/{image,label,depth,normal}/{0,1,...}.npy`` with 13 classes, -1 for void. Edges are
    the
      boundaries of these labels.
    - InvPT, TaskPrompter, MTI-Net: ``gt_sets/{train,val}.txt`` with ``images/*.{png,jpg}``,
      ``segmentation/*.png`` (40 classes, 0 = void), ``depth/*.npy`` in metres, ``normals/*.{png,npy}`` and
      ``edge/*.{png,npy}``, in a folder or a tar archive, which is unpacked beside itself. A png of normals holds
      127.5 (n + 1), one of edges 0 or 255.

    The official test images are the test split. The validation split is carved out of the official training
    images in runs of 20 neighbours, since neighbours often show the same room.

    Args:
        path: File or folder.
        seed: Decides the validation split.
        classes: 13 or 40, where the layout has both (``.npz``; 13 by default); else what the layout has.
        size: Height and width to resize to; the stored size by default (folders: 288 x 384 for MTAN's files,
            448 x 576 for InvPT's).
        validation: Share of the training images held out for validation.
        augmentation: "plain" or "atrc" (`torchmto.lab.data.dense.scene_augment`).

    Returns:
        The data set, with tasks ``segmentation``, ``depth``, ``normals`` and ``edges``.
    """
    train: MultiTaskDataset
    test: MultiTaskDataset
    if path.is_file() and path.suffix == ".npz":
        train, test = _load_npz(path, size, classes or 13)
    else:
        folder = extract(path) if path.is_file() else path
        if (folder / "train" / "image").is_dir():
            train, test = (
                mtan_split(folder / split, "nyuv2", _tasks(13), _MTAN, size or (288, 384)) for split in ("train", "val")
            )
        elif (root := find_root(folder, "gt_sets")) is not None:
            train, test = (_invpt(root, split, size or (448, 576)) for split in ("train", "val"))
        else:
            raise unknown_layout(path, "nyuv2")
    found = train.tasks[0].channels
    if classes not in {None, found}:
        raise ValueError(f"Parameter `classes` should be {found} for this layout. Found `classes = {classes}`.")
    parts = *carved(train, validation, seed, _BLOCK), test
    return image_bundle(parts, augment=scene_augment(augmentation), citation=CITATION)


def _tasks(classes: int) -> tuple[Task, ...]:
    return (
        Task("segmentation", "segmentation", classes),
        Task("depth", "depth", 1, unit="m"),
        Task("normals", "normals", 3),
        Task("edges", "edges", 1),
    )


def _load_npz(path: Path, size: tuple[int, int] | None, classes: int) -> tuple[TensorData, TensorData]:
    if classes not in {13, 40}:
        raise ValueError(f"Parameter `classes` should be 13 or 40. Found `classes = {classes}`.")
    tasks = _tasks(classes)
    wanted = ("rgb", f"seg{classes}", "seg40", "depth_m", "normal")

    def split(name: str) -> TensorData:
        arrays = read_npz(path, [f"{key}_{name}" for key in wanted])
        rgb, labels, all_labels, depth, normals = (torch.from_numpy(array) for array in arrays)
        image = rgb.permute(0, 3, 1, 2).contiguous()
        targets = {
            "segmentation": labels - 1,  # uint8: void wraps to 255
            "depth": depth[:, None],
            "normals": normals.permute(0, 3, 1, 2).contiguous(),
        }
        edges = all_labels - 1
        if size is not None:
            image = resize_image(image, size)
            edges = resize_target(tasks[0], edges, size)
            targets = {task.name: resize_target(task, targets[task.name], size) for task in tasks[:3]}
        return TensorData(tasks, image, {**targets, "edges": label_edges(edges)})

    return split("train"), split("test")


def _invpt(root: Path, split: str, size: tuple[int, int]) -> FileData:
    tasks = _tasks(40)

    def stored(kind: str, name: str, endings: tuple[str, str]) -> Path:
        """The file with the first of two endings that is there, or else the first, which an error then names."""
        paths = [root / kind / f"{name}{ending}" for ending in endings]
        return next((path for path in paths if path.is_file()), paths[0])

    def array(path: Path) -> Tensor:
        """``[1, C, H, W]`` in the file's units; pixels of a picture in ``[0, 1]``."""
        values = load_array(path, "nyuv2") if path.suffix == ".npy" else load_picture(path, "nyuv2")
        if values.dtype == np.uint8:
            values = values / np.float32(255)
        values = values.reshape(*values.shape[:2], -1).astype(np.float32)
        return torch.from_numpy(values).permute(2, 0, 1)[None]

    def normals(name: str) -> Tensor:
        path = stored("normals", name, (".png", ".npy"))
        values = array(path)
        if path.suffix == ".png":
            # Zero is 127 or 128 there: such a pixel has no normal.
            values = torch.where((values - 0.5).abs().amax(dim=1, keepdim=True) > 1 / 255, 2 * values - 1, 0)
        return values.half()

    def read(name: str) -> Sample:
        labels = load_picture(root / "segmentation" / f"{name}.png", "nyuv2").astype(np.uint8)
        targets = {
            "segmentation": torch.from_numpy(labels - np.uint8(1))[None],  # void wraps to 255
            "depth": array(root / "depth" / f"{name}.npy").half(),
            "normals": normals(name),
            "edges": (array(stored("edge", name, (".png", ".npy"))) >= 0.5).to(torch.uint8),
        }
        resized = {task.name: resize_target(task, targets[task.name], size) for task in tasks}
        return resize_image(load_rgb(stored("images", name, (".png", ".jpg")), "nyuv2"), size), resized

    return FileData(tasks, read_names(root / "gt_sets" / f"{split}.txt", "nyuv2"), read)
