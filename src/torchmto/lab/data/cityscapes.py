"""Cityscapes: street scenes with segmentation and disparity, in MTAN's layout."""

from functools import partial
from pathlib import Path

import torch

from torchmto.lab.data.augment import JointAugment
from torchmto.lab.data.base import Subset, Task
from torchmto.lab.data.dense import image_bundle, resize_image, resize_target
from torchmto.lab.data.files import FileData, Sample, load_array, require, unknown_layout, validation_split
from torchmto.lab.data.mtan import mtan_image, mtan_labels, mtan_map, mtan_names
from torchmto.lab.data.registry import register
from torchmto.lab.problem import Problem

CITATION = "Cordts et al., The Cityscapes dataset for semantic urban scene understanding, CVPR 2016"
_BLOCK = 20  # neighbouring images were taken in one city


@register(
    "cityscapes",
    "street scenes: segmentation (7 or 19 classes) and disparity; 2,975 + 500 images",
    source="https://github.com/lorenmt/mtan (pre-processed Cityscapes)",
    layouts=("a folder with train/ and val/ (MTAN)",),
)
def load(
    path: Path | None,
    seed: int = 0,
    *,
    classes: int = 7,
    size: tuple[int, int] = (128, 256),
    validation: float = 0.1,
) -> Problem:
    """Cityscapes from MTAN's folders ``{train,val}/{image,label_7,label_19,depth}/{0,1,...}.npy``.

    The official validation images are the test split, as in all papers that use this version. The "depth" there is
    disparity (the nearer, the larger; 0 = unknown), which the task declares by ``extra["inverse"]``.

    Args:
        path: Folder.
        seed: Decides the validation split, carved out of the training images in runs of 20 neighbours.
        classes: 7 or 19.
        size: Height and width.
        validation: Share of the training images held out for validation.

    Returns:
        The data set, with tasks ``segmentation`` and ``depth``.
    """
    if classes not in {7, 19}:
        raise ValueError(f"Parameter `classes` should be 7 or 19. Found `classes = {classes}`.")
    path = require(path, "cityscapes")
    if not (path / "train").is_dir():
        raise unknown_layout(path, "cityscapes")
    tasks = (
        Task("segmentation", "segmentation", classes),
        Task("depth", "depth", 1, {"inverse": True}, unit="disparity"),
    )
    load_file = partial(load_array, dataset="cityscapes")
    label = f"label_{classes}"

    def split(name: str) -> FileData:
        folder = path / name

        def read(file: str) -> Sample:
            targets = {
                "segmentation": mtan_labels(load_file(folder / label / file)),
                "depth": mtan_map(load_file(folder / "depth" / file)),
            }
            resized = {task.name: resize_target(task, targets[task.name], size) for task in tasks}
            return resize_image(mtan_image(load_file(folder / "image" / file)), size), resized

        return FileData(tasks, mtan_names(folder, ("image", label, "depth"), "cityscapes"), read)

    train, test = split("train"), split("val")
    kept, held_out = validation_split(len(train), validation, seed, _BLOCK)
    return image_bundle(
        "cityscapes",
        Subset(train, torch.from_numpy(kept)),
        Subset(train, torch.from_numpy(held_out)),
        test,
        augment=JointAugment(zoom=1.5),
        citation=CITATION,
    )
