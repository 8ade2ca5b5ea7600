"""A trained run's weights at work: metrics on a split, and predictions as pictures and numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from torchmto.checks import check_integer
from torchmto.lab.data import Split, labelled_tasks
from torchmto.lab.metrics import primary_metric
from torchmto.lab.trainer.build import Parts, build
from torchmto.lab.trainer.checkpoint import CheckpointFolder, read_checkpoint
from torchmto.lab.trainer.config import ConfigError, TrainConfig
from torchmto.lab.trainer.folder import RunFolder
from torchmto.lab.trainer.pictures import draw_predictions, readable
from torchmto.lab.trainer.random_state import seed_everything
from torchmto.lab.trainer.trainer import load_weights_of
from torchmto.lab.training import evaluate, to_device


def load_run(config: TrainConfig, folder: RunFolder, weights: str) -> tuple[Parts, str]:
    """The parts of a run with some of its weights.

    Args:
        config: Its settings.
        folder: Its folder.
        weights: "best", "last", "untrained" (as the run started), or a checkpoint.

    Returns:
        The parts, and which weights they have.

    Raises:
        ConfigError: If settings make no sense.
        CheckpointError: If there is no such checkpoint, it is damaged, or its weights don't fit.
    """
    config.validate()
    state = None
    if weights != "untrained":
        checkpoints = CheckpointFolder(folder.checkpoints)
        if weights == "last":
            path, state = checkpoints.read_last()
        else:
            path = checkpoints.best if weights == "best" else Path(weights)
            state = read_checkpoint(path)
    seed_everything(config.seed)
    parts = build(config)
    if state is None:
        return parts, f"untrained weights of seed {config.seed}"
    load_weights_of(parts, state)
    return parts, f"{path}, step {state['progress']['step']}"


def evaluate_run(config: TrainConfig, folder: RunFolder, weights: str, split: Split) -> dict[str, Any]:
    """All metrics of a run's weights on one split.

    Args:
        config: The run's settings.
        folder: Its folder.
        weights: See :func:`load_run`.
        split: "train" (without augmentation), "validation" or "test".

    Returns:
        ``metrics``, task -> metric -> value; ``primary``, task -> the one that stands for it; ``weights`` and ``split``.
    """
    parts, description = load_run(config, folder, weights)
    metrics = evaluate(
        parts.precise, parts.bundle, split, batch_size=config.data.batch_size, device=parts.computer.device
    )
    primary = {task.name: primary_metric(task)[0] for task in parts.bundle.tasks}
    return {"weights": description, "split": split, "primary": primary, "metrics": metrics}


@torch.no_grad()
def predict_run(config: TrainConfig, folder: RunFolder, weights: str, split: Split, count: int) -> list[Path]:
    """What a run predicts for the first samples of a split.

    Args:
        config: The run's settings.
        folder: Its folder; the files go there.
        weights: See :func:`load_run`.
        split: Which samples.
        count: How many.

    Returns:
        ``predictions-SPLIT.png`` for images, and ``predictions-SPLIT.json`` for tasks that aren't dense.

    Raises:
        ConfigError: If ``count`` isn't positive.
    """
    try:
        check_integer("count", count, minimum=1)
    except (TypeError, ValueError) as error:
        raise ConfigError(str(error)) from error
    parts, description = load_run(config, folder, weights)
    bundle, model = parts.bundle, parts.precise.eval()
    # Not the loader: training batches come shuffled, and these should be the same ones after every run.
    dataset = bundle.split(split)
    batch = dataset.batch(torch.arange(min(count, len(dataset))))
    placed = to_device({**batch, "input": bundle.normalize(batch["input"])}, parts.computer.device)
    # One task after the other: with split norms each has features of its own.
    outputs = {task.name: model(placed["input"], [task.name])[task.name].float().cpu() for task in bundle.tasks}
    written = []
    if bundle.input_kind == "image":
        path = folder.path / f"predictions-{split}.png"
        draw_predictions(path, batch, outputs, bundle.tasks)
        written.append(path)
    flat = [task for task in bundle.tasks if not task.dense]
    if flat:
        labelled = labelled_tasks(batch, flat)
        entries = {
            task.name: {
                "prediction": readable(outputs[task.name], task.kind),
                "label": batch["targets"][task.name] if task.name in labelled else None,
            }
            for task in flat
        }
        content = {"weights": description, "split": split, "tasks": entries}
        written.append(folder.write_json(f"predictions-{split}.json", content))
    return written


__all__ = ["evaluate_run", "load_run", "predict_run"]
