"""PASCAL-Context with five tasks, in the layout of InvPT and MTI-Net (PASCAL_MT)."""

from pathlib import Path
from typing import Any

import numpy as np
import scipy.io
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchmto.lab.data.base import Task
from torchmto.lab.data.dense import image_bundle, label_edges, pad_to, scene_augment
from torchmto.lab.data.files import (
    FileData,
    Sample,
    carved,
    extract,
    find_root,
    load_picture,
    load_rgb,
    read_names,
)
from torchmto.lab.data.registry import register, require, unknown_layout
from torchmto.lab.problem import Problem

TASKS = (
    Task("segmentation", "segmentation", 21),
    Task("parts", "segmentation", 7),
    Task("normals", "normals", 3),
    Task("saliency", "saliency", 1, {"loss": "class_balanced"}),
    Task("edges", "edges", 1),
)
CITATION = "Mottaghi et al., The role of context, CVPR 2014; Maninis et al., Attentive single-tasking, CVPR 2019"
PERSON = 15
_PART_NAMES = (
    "head hair mouth nose lear rear lebrow rebrow leye reye",
    "neck torso",
    "luarm ruarm",
    "llarm rlarm lhand rhand",
    "luleg ruleg",
    "llleg rlleg lfoot rfoot",
)
PARTS = {name: number for number, names in enumerate(_PART_NAMES, start=1) for name in names.split()}
"""The 24 annotated parts of a person, merged to six; 0 is everything else."""
# Classes of PASCAL-Context that NYUv2 has too, and television: only there are the distilled normals trusted.
_NORMAL_CLASSES = """
3 4 6 9 10 11 13 15 17 18 22 23 29 30 33 34 36 37 38 39 41 43 46 49 50 51 53 55 56 59 61 62 65 66 68 69 72 73 78 83 84
85 87 88 95 96 101 104 105 107 111 113 115 122 124 135 141 142 143 146 150 154 157 158 159 165 172 174 181 183 184 191
193 195 197 199 202 213 215 216 219 220 223 225 228 230 232 233 238 239 242 243 246 250 251 252 255 260 261 263 269 272
273 275 281 283 284 285 286 287 288 290 291 292 293 295 304 307 309 310 314 315 319 323 329 330 331 336 342 345 349 350
351 352 355 357 368 370 371 374 379 380 383 384 397 401 403 405 407 408 411 412 413 414 417 419 421 423 427 429 430 432
440 441 442 443 444 446 454 457
"""
NORMAL_CLASSES = np.array(_NORMAL_CLASSES.split(), dtype=np.int64)


@register(
    "pascal_context",
    "everyday scenes: segmentation (21), person parts (7), normals, saliency, edges; 4,998 + 5,105 images",
    source="https://github.com/prismformore/Multi-Task-Transformer (PASCALContext.tar.gz) or "
    "https://data.vision.ee.ethz.ch/kmaninis/share/MTL/PASCAL_MT.tgz",
    layouts=("PASCALContext.tar.gz (InvPT, TaskPrompter), PASCAL_MT.tgz (MTI-Net) or the folder of one",),
)
def load(
    path: Path,
    seed: int = 0,
    *,
    size: tuple[int, int] = (512, 512),
    validation: float = 0.1,
    augmentation: str = "plain",
) -> Problem:
    """PASCAL-Context from a folder, or a tar archive that is unpacked beside itself.

    Layout: ``ImageSets/Context/{train,val}.txt``, ``JPEGImages/*.jpg``, ``semseg/{VOC12,pascal-context}/*.png`` (255 =
    void), ``human_parts/*.mat``, ``normals_distill/*.png``, ``sal_distill/*.png`` and
    ``pascal-context/trainval/*.mat`` (the 459 classes, whose boundaries are the edges).

    As in the multi-task literature, the official validation images are the test split, images without annotated
    person parts have no ``parts`` label, and distilled normals count only on classes that NYUv2 has too. Images larger
    than ``size`` are shrunk to fit, smaller ones padded with missing labels. Saliency's loss is ``class_balanced`` by
    default.

    Args:
        path: Folder or archive.
        seed: Decides the validation split, carved out of the training images.
        size: Height and width.
        validation: Share of the training images held out for validation.
        augmentation: "plain" or "atrc" (`torchmto.lab.data.dense.scene_augment`).

    Returns:
        The data set, with tasks ``segmentation``, ``parts``, ``normals``, ``saliency`` and ``edges``.

    Source: Maninis, Radosavovic and Kokkinos, "Attentive single-tasking of multiple tasks", CVPR 2019. Deviation: edges
    are one pixel wide to the left and above a boundary, instead of a thinned Laplacian.
    """
    folder = extract(path) if path.is_file() else path
    root = find_root(folder, "ImageSets/Context")
    if root is None:
        raise unknown_layout(path, "pascal_context")

    def read(name: str) -> Sample:
        image, targets = _read(root, name)
        return pad_to(TASKS, image, targets, size)

    train, test = (
        FileData(TASKS, read_names(root / "ImageSets" / "Context" / f"{split}.txt", "pascal_context"), read)
        for split in ("train", "val")
    )
    parts = *carved(train, validation, seed), test
    return image_bundle(parts, augment=scene_augment(augmentation), citation=CITATION)


def _read(root: Path, name: str) -> tuple[Tensor, dict[str, Tensor]]:
    image = load_rgb(root / "JPEGImages" / f"{name}.jpg", "pascal_context")
    semantic = root / "semseg" / "VOC12" / f"{name}.png"
    if not semantic.is_file():
        semantic = root / "semseg" / "pascal-context" / f"{name}.png"
    context = _load_mat(root / "pascal-context" / "trainval" / f"{name}.mat", "LabelMap").astype(np.int64)
    directions = load_picture(root / "normals_distill" / f"{name}.png", "pascal_context").astype(np.float16)
    normals = np.where(np.isin(context, NORMAL_CLASSES)[..., None], directions * (2 / 255) - 1, 0)
    saliency = load_picture(root / "sal_distill" / f"{name}.png", "pascal_context") > 127
    targets = {
        "segmentation": torch.from_numpy(load_picture(semantic, "pascal_context").astype(np.uint8))[None],
        "parts": torch.from_numpy(_person_parts(root / "human_parts" / f"{name}.mat", context.shape))[None],
        "normals": torch.from_numpy(normals.astype(np.float16)).permute(2, 0, 1)[None],
        "saliency": torch.from_numpy(saliency.astype(np.uint8))[None, None],
        "edges": label_edges(torch.from_numpy(context)[None], ignore_index=-1),
    }
    return image, targets


def _load_mat(path: Path, key: str) -> Any:
    require(path, "pascal_context")
    try:
        return scipy.io.loadmat(path, simplify_cells=True)[key]
    except Exception as error:  # a damaged file can raise anything in SciPy
        raise ValueError(f"`{path}` isn't a MAT file with `{key}`: {error}") from error


def _person_parts(path: Path, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """Part labels ``[H, W]``; 255 everywhere if no person's parts are annotated.

    SciPy makes a dict of a MATLAB struct array of one element.
    """
    labels = np.zeros(shape, dtype=np.uint8)
    annotated = False
    for item in np.atleast_1d(_load_mat(path, "anno")["objects"]):
        if int(item["class_ind"]) == PERSON:
            for part in np.atleast_1d(item["parts"]):
                labels[np.asarray(part["mask"], dtype=bool)] = PARTS[str(part["part_name"])]
                annotated = True
    return labels if annotated else np.full(shape, 255, dtype=np.uint8)
