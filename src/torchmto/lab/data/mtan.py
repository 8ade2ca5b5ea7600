"""The folders of ``.npy`` files in which MTAN's authors publish NYUv2 and Cityscapes."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from torchmto.lab.data.base import Task
from torchmto.lab.data.dense import label_edges, resize_image, resize_target
from torchmto.lab.data.files import FileData, Sample, load_array
from torchmto.lab.data.registry import require


def mtan_split(
    folder: Path, dataset: str, tasks: Sequence[Task], stored: Mapping[str, str], size: tuple[int, int]
) -> FileData:
    """A split's samples ``0.npy``, ``1.npy``, ..., after a check that each kind has all of them.

    Images are floats ``[H, W, 3]`` in ``[0, 1]``, labels ``[H, W]`` with -1 for void, other maps ``[H, W]`` or ``[H, W, C]``.

    Args:
        folder: The split's folder.
        dataset: Registry name, for messages.
        tasks: The tasks.
        stored: Task -> sub-folder of its targets; edges, which have none, are the boundaries of the labels.
        size: Height and width to resize to.

    Raises:
        FileNotFoundError: If a folder or file is missing.
    """

    def read(name: str) -> Sample:
        pixels = np.round(np.clip(load_array(folder / "image" / name, dataset), 0, 1) * 255).astype(np.uint8)
        targets: dict[str, Tensor] = {}
        for task in tasks:
            if task.name not in stored:
                targets[task.name] = label_edges(targets["segmentation"])
                continue
            array = load_array(folder / stored[task.name] / name, dataset)
            if task.kind == "segmentation":
                target = torch.from_numpy(np.where(array < 0, 255, array).astype(np.uint8))[None]
            else:
                channels = torch.from_numpy(array.reshape(*array.shape[:2], -1).astype(np.float16))
                target = channels.permute(2, 0, 1)[None]
            targets[task.name] = resize_target(task, target, size)
        return resize_image(torch.from_numpy(pixels).permute(2, 0, 1)[None], size), targets

    kinds = ("image", *stored.values())
    count = sum(1 for _ in require(folder / "image", dataset).glob("*.npy"))
    names = [f"{index}.npy" for index in range(max(count, 1))]
    for kind in kinds:
        present = {path.name for path in require(folder / kind, dataset).iterdir()}
        for name in names:
            if name not in present:
                require(folder / kind / name, dataset)
    return FileData(tasks, names, read)
