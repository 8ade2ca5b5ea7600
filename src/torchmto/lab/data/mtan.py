"""The folders of ``.npy`` files in which MTAN's authors publish NYUv2 and Cityscapes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchmto.lab.data.files import require


def mtan_names(folder: Path, kinds: Sequence[str], dataset: str) -> list[str]:
    """File names ``0.npy``, ``1.npy``, ... of a split, after a check that each kind has all of them.

    Args:
        folder: The split's folder.
        kinds: Its sub-folders; the first says how many samples there are.
        dataset: Registry name, for messages.

    Raises:
        FileNotFoundError: If a folder or file is missing.
    """
    count = sum(1 for _ in require(folder / kinds[0], dataset).glob("*.npy"))
    names = [f"{index}.npy" for index in range(count)]
    for kind in kinds:
        present = {path.name for path in require(folder / kind, dataset).iterdir()}
        for name in names:
            if name not in present:
                require(folder / kind / name, dataset)
    if not names:
        require(folder / kinds[0] / "0.npy", dataset)
    return names


def mtan_image(array: NDArray[Any]) -> Tensor:
    """A float image ``[H, W, 3]`` in ``[0, 1]`` as uint8 ``[1, 3, H, W]``."""
    pixels = np.round(np.clip(array, 0, 1) * 255).astype(np.uint8)
    return torch.from_numpy(pixels).permute(2, 0, 1)[None]


def mtan_labels(array: NDArray[Any]) -> Tensor:
    """Labels ``[H, W]``, -1 for void, as uint8 ``[1, H, W]`` with 255 for void."""
    return torch.from_numpy(np.where(array < 0, 255, array).astype(np.uint8))[None]


def mtan_map(array: NDArray[Any]) -> Tensor:
    """A float map ``[H, W]`` or ``[H, W, C]`` as float16 ``[1, C, H, W]``."""
    return torch.from_numpy(array.reshape(*array.shape[:2], -1).astype(np.float16)).permute(2, 0, 1)[None]
