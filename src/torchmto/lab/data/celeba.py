"""CelebA: 40 yes/no attributes of faces, from the official files."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from torchmto.lab.data.augment import JointAugment
from torchmto.lab.data.base import Batch, MultiTaskDataset, Task
from torchmto.lab.data.dense import image_bundle, resize_image
from torchmto.lab.data.files import FileData, Sample, check_names, load_rgb, read_lines, require
from torchmto.lab.data.registry import register
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
    layouts=("a folder with img_align_celeba/, list_attr_celeba.txt and list_eval_partition.txt",),
)
def load(path: Path | None, _seed: int = 0, *, size: tuple[int, int] = (64, 64)) -> Problem:
    """CelebA with its official training, validation and test partition.

    Layout: ``img_align_celeba/*.jpg`` (also under ``Img/``), ``list_attr_celeba.txt`` (also under ``Anno/``) and
    ``list_eval_partition.txt`` (also under ``Eval/``).

    Args:
        path: Folder.
        _seed: Not used: everything is official.
        size: Height and width the 218 x 178 pictures are resized to.

    Returns:
        The data set, one binary task per attribute.

    Source: 64 x 64 as in Sener and Koltun, "Multi-task learning as multi-objective optimization", NeurIPS 2018.
    """
    root = require(path, "celeba")
    folder, table, partition = (
        _find(root, name)
        for name in ("Img/img_align_celeba", "Anno/list_attr_celeba.txt", "Eval/list_eval_partition.txt")
    )
    lines = read_lines(table, "celeba")
    try:
        count, names = int(lines[0]), lines[1].split()
        rows = [line.split() for line in lines[2:]]
        files = check_names([row[0] for row in rows], table)
        signs = np.array([row[1:] for row in rows], dtype=np.int8)
        parts = dict(line.split() for line in read_lines(partition, "celeba"))
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

    return image_bundle(
        "celeba",
        split(0),
        split(1),
        split(2),
        augment=JointAugment(),
        citation=CITATION,
        model="convnet",
    )


def _find(root: Path, name: str) -> Path:
    """``root/name``, or the same without its first folder, which is the path an error message names."""
    return root / name if (root / name).exists() else require(root / Path(name).name, "celeba")
