"""nuScenes' average precision of boxes seen from above (Caesar et al., CVPR 2020)."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics import Metric

from torchmto.lab.data.bev import Grid, decode

DISTANCES = (0.5, 1.0, 2.0, 4.0)


class CentreAP(Metric):
    """nuScenes' mean average precision: a detection is right within .5, 1, 2 and 4 m of a box's centre that isn't taken yet.

    Args:
        grid: The cells of the outputs.
        ranges: Metres from the car within which each class counts, for boxes and detections.
    """

    higher_is_better = True
    full_state_update = False
    found: list[Tensor]
    boxes: list[Tensor]

    def __init__(self, grid: Grid, ranges: Sequence[float]) -> None:
        super().__init__()
        self.grid, self.ranges = grid, tuple(ranges)
        self.add_state("found", [], dist_reduce_fx="cat")
        self.add_state("boxes", [], dist_reduce_fx="cat")

    def update(self, output: Tensor, boxes: Tensor) -> None:
        """Take a batch's output and its boxes ``[B, MOST, 10]``."""
        self.found.append(decode(output, self.grid, len(self.ranges))[..., :4])
        self.boxes.append(boxes[..., :3])

    def compute(self) -> Tensor:
        """The mean over classes and distances; a class without boxes counts as 0, as it does there."""
        found, boxes = (
            (torch.cat(state) if isinstance(state, list) else state).cpu().double().numpy()
            for state in (self.found, self.boxes)
        )
        values = [
            _average_precision(found, boxes, number, most, distance)
            for number, most in enumerate(self.ranges)
            for distance in DISTANCES
        ]
        return torch.tensor(np.mean(values), dtype=torch.float32)


def _average_precision(
    found: NDArray[np.float64], boxes: NDArray[np.float64], number: int, most: float, distance: float
) -> float:
    """Of one class at one distance; ``found [N, K, 4]`` and ``boxes [N, M, 3]`` end in class, x and y, after the score."""

    def of_class(values: NDArray[np.float64]) -> NDArray[np.bool_]:
        counts: NDArray[np.bool_] = (values[..., -3] == number) & (np.hypot(values[..., -2], values[..., -1]) < most)
        return counts

    chosen, real = of_class(found), of_class(boxes)
    if not real.any():
        return 0.0
    right, score = [], []
    for sample in np.flatnonzero(chosen.any(1)):
        order = np.flatnonzero(chosen[sample])
        order = order[np.argsort(-found[sample, order, 0], kind="stable")]
        score.append(found[sample, order, 0])
        gaps = np.linalg.norm(found[sample, order, None, 2:] - boxes[sample, real[sample]][None, :, 1:], axis=-1)
        hits = np.zeros(len(order), dtype=bool)
        for i in range(len(order) if gaps.shape[1] else 0):
            nearest = int(gaps[i].argmin())
            if gaps[i, nearest] < distance:
                hits[i] = True
                gaps[:, nearest] = np.inf
        right.append(hits)
    if not any(hits.any() for hits in right):
        return 0.0
    hits = np.concatenate(right)[np.argsort(-np.concatenate(score), kind="stable")]
    precision, recall = hits.cumsum() / np.arange(1, len(hits) + 1), hits.cumsum() / real.sum()
    curve = np.interp(np.linspace(0, 1, 101), recall, precision, right=0)
    return float(np.clip(curve[11:] - 0.1, 0, None).mean() / 0.9)
