"""CelebA: 40 yes/no attributes of faces, from the official files."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from torchmto.lab.data.augment import JointAugment
from torchmto.lab.data.base import Batch, MultiTaskDataset, Task
from torchmto.lab.data.dense import image_bundle, resize_image
from torchmto.lab.data.files import FileData, Sample, check_names, load_rgb, read_lines
from torchmto.lab.data.registry import register, require
from torchmto.lab.problem import Problem

CITATION = "Liu, Luo, Wang and Tang, Deep learning face attributes in the wild, ICCV 2015"


class Faces(MultiTaskDataset):
    """Pictures read from files, with all attributes in memory.

    Args:
        tasks: One binary task per attribute.
        images: The pictures, without targets.
        attributes: uint8 ``[N, K]``, 0 or 1.
    """

    def __init__(self, tasks: tuple[Task, ...], images: FileData, attributes: Tensor) -> None:
        super().__init__(tasks)
        self.images = images
        self.attributes = attributes

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices: Tensor) -> Batch:
        """The faces ``indices``."""
        columns = torch.split(self.attributes[indices].float(), 1, dim=1)
        targets = {task.name: column for task, column in zip(self.tasks, columns, strict=True)}
        return Batch(input=self.images.batch(indices)["input"], targets=targets)


@register(
    "celeba",
    "202,599 faces with 40 yes/no attributes as 40 tasks",
    source="https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html",
    layouts=(
        "a folder with img_align_celeba/, list_attr_celeba.txt and list_eval_partition.txt",
        "the same with .csv tables (Kaggle)",
    ),
)
def load(path: Path, _seed: int = 0, *, size: tuple[int, int] = (64, 64)) -> Problem:
    """CelebA with its official training, validation and test partition.

    Layouts: ``img_align_celeba/*.jpg`` (also under ``Img/``), ``list_attr_celeba.txt`` (also under ``Anno/``) and
    ``list_eval_partition.txt`` (also under ``Eval/``); or as on Kaggle, the two tables as comma-separated files with a header
    and the pictures in ``img_align_celeba/img_align_celeba/``.

    Args:
        path: Folder.
        _seed: Not used: everything is official.
        size: Height and width the 218 x 178 pictures are resized to.

    Returns:
        The data set, one binary task per attribute.

    Source: 64 x 64 as in Sener and Koltun, "Multi-task learning as multi-objective optimization", NeurIPS 2018.
    """
    folder = _find(path, "Img/img_align_celeba", "img_align_celeba/img_align_celeba", "img_align_celeba")
    table, partition = (
        _find(path, f"{place}/{name}.txt", f"{name}.csv", f"{name}.txt")
        for place, name in (("Anno", "list_attr_celeba"), ("Eval", "list_eval_partition"))
    )
    try:
        count, names, rows = _attribute_rows(table)
        files = check_names([row[0] for row in rows], table)
        signs = np.array([row[1:] for row in rows], dtype=np.int8)
        parts = dict(_cells(partition)[1:] if partition.suffix == ".csv" else _cells(partition))
        part_of = np.array([int(parts[file]) for file in files])
    except (ValueError, IndexError, KeyError) as error:
        raise ValueError(f"`{table}` and `{partition}` aren't the official CelebA files: {error!r}") from error
    if signs.shape != (count, len(names)) or not np.isin(signs, (-1, 1)).all():
        raise ValueError(f"`{table}` should have {count} rows of {len(names)} numbers, each 1 or -1.")
    tasks = tuple(Task(name, "binary", 1) for name in names)
    attributes = torch.from_numpy((signs > 0).astype(np.uint8))

    def read(file: str) -> Sample:
        return resize_image(load_rgb(folder / file, "celeba"), size), {}

    def split(number: int) -> Faces:
        members = np.flatnonzero(part_of == number)
        if not len(members):
            raise ValueError(f"`{partition}` should have files in partition {number}. Found none.")
        images = FileData((), [files[i] for i in members], read)
        return Faces(tasks, images, attributes[torch.from_numpy(members)])

    data = split(0), split(1), split(2)
    return image_bundle(data, augment=JointAugment(), citation=CITATION, model="convnet")


def _find(root: Path, *names: str) -> Path:
    """The first of some places that is there; an error names the last."""
    return next((root / name for name in names if (root / name).exists()), None) or require(root / names[-1], "celeba")


def _cells(table: Path) -> list[list[str]]:
    """A table's lines, split at commas or spaces."""
    return [line.replace(",", " ").split() for line in read_lines(table, "celeba")]


def _attribute_rows(table: Path) -> tuple[int, list[str], list[list[str]]]:
    """How many rows there should be, the attributes' names, and the rows: a file's name, then its signs."""
    lines = _cells(table)
    if table.suffix == ".csv":
        return len(lines) - 1, lines[0][1:], lines[1:]
    return int(lines[0][0]), lines[1], lines[2:]
