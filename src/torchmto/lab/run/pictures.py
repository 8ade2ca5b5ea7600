"""Input, label and prediction of each dense task side by side."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from torchmto.lab.atomic import write_bytes
from torchmto.lab.data.base import Batch, Task

Image = NDArray[np.float32]
GREY = 0.5
"""Shade of pixels without a label."""


def as_picture(task: Task, values: Tensor, valid: Tensor, limits: tuple[float, float]) -> Image:
    """One sample's dense target or prediction as RGB in ``[0, 1]``, ``[H, W, 3]``.

    Args:
        task: The task.
        values: A label as it is stored in a batch, or a prediction of the same form.
        valid: Where there is a label; all True for a prediction.
        limits: Values that are shown as the ends of the colour scale.
    """
    from matplotlib import colormaps  # noqa: PLC0415 - takes a second to import

    match task.kind:
        case "segmentation":
            colors = np.concatenate([colormaps[name](range(20)) for name in ("tab20", "tab20b", "tab20c")])
            picture = colors[values.clamp(0, task.channels - 1).long().numpy() % len(colors), :3]
        case "normals":
            unit = functional.normalize(values.float(), dim=0)
            picture = ((unit + 1) / 2).permute(1, 2, 0).numpy()
        case "edges" | "saliency":
            picture = values[0].float().clamp(0, 1).unsqueeze(-1).expand(-1, -1, 3).numpy()
        case _:
            low, high = limits
            scaled = (torch.nan_to_num(values[0].float()) - low) / max(high - low, 1e-6)
            picture = colormaps["viridis"](scaled.clamp(0, 1).numpy())[..., :3]
    mask = valid if valid.dim() == 2 else valid[0]
    result: Image = np.where(mask.numpy()[..., None], picture, GREY).astype(np.float32)
    return result


def _input_picture(image: Tensor) -> Image:
    channels = image[:3] if len(image) >= 3 else image[:1].expand(3, -1, -1)
    picture: Image = channels.clamp(0, 1).permute(1, 2, 0).numpy()
    return picture


def readable(output: Tensor, kind: str) -> Tensor:
    """A model's output as what it says: class numbers, probabilities of yes, or the regressed numbers.

    Example:
        >>> readable(torch.tensor([[0.1, 0.9]]), "classification").tolist()
        [1]
    """
    match kind:
        case "classification" | "segmentation":
            return output.argmax(dim=1)
        case "binary" | "edges" | "saliency":
            return output.sigmoid()
        case _:
            return output


def draw_predictions(path: Path, batch: Batch, outputs: Mapping[str, Tensor], tasks: Sequence[Task]) -> None:
    """Write a PNG with one row per sample: the input, then label and prediction of each dense task.

    What tasks that aren't dense predict is written above the input.

    Args:
        path: The file.
        batch: Samples as the data set gives them, images in ``[0, 1]``.
        outputs: Task -> the model's output for these samples, on the CPU.
        tasks: The tasks.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415 - takes a second to import
    from matplotlib.figure import Figure  # noqa: PLC0415

    dense = [task for task in tasks if task.dense]
    rows, columns = len(batch["input"]), 1 + 2 * len(dense)
    height, width = batch["input"].shape[-2:]
    figure = Figure(figsize=(2.2 * columns, (2.2 * height / width + 0.35) * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False)
    for row in range(rows):
        pictures = [(_caption(row, batch, outputs, tasks), _input_picture(batch["input"][row]))]
        for task in dense:
            pictures += _label_and_prediction(task, batch["targets"].get(task.name), outputs[task.name], row)
        for axis, (title, picture) in zip(axes[row], pictures, strict=True):
            axis.imshow(picture, interpolation="nearest")
            axis.set_title(literal(title), fontsize=8)
            axis.set_axis_off()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    write_bytes(path, buffer.getvalue())


def literal(text: str) -> str:
    r"""A text with the user's names as matplotlib draws it letter by letter: between two dollar signs it reads a formula.

    Example:
        >>> literal("cost ($), margin ($)")
        'cost (\\$), margin (\\$)'
    """
    return text.replace("$", r"\$")


def _label_and_prediction(task: Task, target: Tensor | None, output: Tensor, row: int) -> list[tuple[str, Image]]:
    prediction = readable(output, task.kind)[row]
    everywhere = torch.ones(prediction.shape[-2:], dtype=torch.bool)
    if target is None:
        label, valid = torch.zeros_like(prediction), ~everywhere
    else:
        label, valid = target[row], task.valid(target)[row]
    # One scale for both, so that they can be compared; the label's, where there is one.
    shown = label[valid] if task.kind in {"depth", "map"} and bool(valid.any()) else prediction.float()
    limits = float(shown.min()), float(shown.max())
    return [
        (f"{task.name}: label", as_picture(task, label, valid, limits)),
        (f"{task.name}: prediction", as_picture(task, prediction, everywhere, limits)),
    ]


def _caption(row: int, batch: Batch, outputs: Mapping[str, Tensor], tasks: Sequence[Task]) -> str:
    """What the other tasks say about a sample, as far as it has labels: "left 3 (5)"."""
    said = []
    for task in tasks:
        target = batch["targets"].get(task.name)
        output = outputs[task.name]
        if task.dense or target is None or not isinstance(output, Tensor) or not bool(task.valid(target)[row].all()):
            continue
        prediction = readable(output[row : row + 1], task.kind)
        said.append(f"{task.name} {_numbers(prediction)} ({_numbers(target[row])})")
    lines = said[:4] + (["..."] if len(said) > 4 else [])
    return "\n".join(["input: prediction (label)", *lines]) if said else "input"


def _numbers(values: Tensor) -> str:
    return " ".join(f"{value:.3g}" for value in values.flatten()[:4].tolist())
