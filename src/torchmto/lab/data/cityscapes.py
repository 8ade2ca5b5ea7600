"""Cityscapes: street scenes with segmentation and disparity, in MTAN's layout."""

from pathlib import Path

from torchmto.lab.data.augment import JointAugment
from torchmto.lab.data.base import Task
from torchmto.lab.data.dense import image_bundle
from torchmto.lab.data.files import carved
from torchmto.lab.data.mtan import mtan_split
from torchmto.lab.data.registry import register, unknown_layout
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
    path: Path,
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
    if not (path / "train").is_dir():
        raise unknown_layout(path, "cityscapes")
    tasks = (
        Task("segmentation", "segmentation", classes),
        Task("depth", "depth", 1, {"inverse": True}, unit="disparity"),
    )
    stored = {"segmentation": f"label_{classes}", "depth": "depth"}
    train, test = (mtan_split(path / split, "cityscapes", tasks, stored, size) for split in ("train", "val"))
    parts = *carved(train, validation, seed, _BLOCK), test
    return image_bundle(parts, augment=JointAugment(zoom=1.5), citation=CITATION)
