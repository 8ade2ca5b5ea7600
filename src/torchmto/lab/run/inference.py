"""A trained run's weights at work: metrics on a split, and predictions as pictures and numbers."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from torchmto.checks import check_integer
from torchmto.lab.data.base import Split, Task, labelled_tasks
from torchmto.lab.data.loading import Loader
from torchmto.lab.metrics import primary_metric
from torchmto.lab.models.weights import load_weights
from torchmto.lab.run.build import Parts, build, problem_of
from torchmto.lab.run.checkpoint import CheckpointError, CheckpointFolder, read_checkpoint
from torchmto.lab.run.config import ConfigError, RunConfig, check_used, others_than
from torchmto.lab.run.evaluation import evaluate, own_figures, placed
from torchmto.lab.run.folder import RunFolder
from torchmto.lab.run.loop import load_weights_of, threads
from torchmto.lab.run.pictures import draw_predictions, readable
from torchmto.lab.run.random_state import random_state_of_evaluation, seed_everything
from torchmto.structure import active_task


def load_run(config: RunConfig, folder: RunFolder, weights: str) -> tuple[Parts, str]:
    """The parts of a run with some of its weights.

    Args:
        config: Its settings.
        folder: Its folder.
        weights: "best", "last", "untrained" (as the run started), a checkpoint, or exported weights (``.safetensors``).

    Returns:
        The parts, and which weights they have.

    Raises:
        ConfigError: If settings make no sense.
        CheckpointError: If there is no such checkpoint, it is damaged, or its weights don't fit.
    """
    config.validate()
    state = None
    exported = weights.endswith(".safetensors")
    if weights != "untrained" and not exported:
        checkpoints = CheckpointFolder(folder.checkpoints)
        if weights == "last":
            path, state = checkpoints.read_last()
        else:
            path = checkpoints.best if weights == "best" else Path(weights)
            state = read_checkpoint(path)
    seed_everything(config.seed)
    problem, config = problem_of(config)
    parts = build(config, problem)
    if exported:
        try:
            load_weights(parts.model, weights)
        except (FileNotFoundError, ValueError) as error:
            raise CheckpointError(str(error)) from error
        return parts, weights
    if state is None:
        return parts, f"untrained weights of seed {config.seed}"
    load_weights_of(parts, state)
    return parts, f"{path}, step {state['progress']['step']}"


_USED = {
    *("data.name", "data.options", "data.tasks", "data.batch_size", "data.split_seed", "data.workers"),
    *("model.name", "model.options", "model.task_norms", "model.channels_last"),
    *("model.compile", "model.compile_backend", "precision", "device", "seed", "threads", "source"),
}
"""Settings that mean something to weights at work."""
_OF_BATCHES = ("data.batch_size", "data.workers")


def _check_used(config: RunConfig, folder: RunFolder, weights: str, more: Mapping[str, str]) -> None:
    """Whether what was changed of a run's settings has an effect on its weights at work.

    Raises:
        ConfigError: If something has none.
    """
    idle = {**others_than(_USED, "nothing is trained"), **more}
    if weights != "untrained":
        idle["seed"] = "only weights that are `untrained` are drawn"
    check_used(config, idle, folder.read_settings(changed_source=True))


def evaluate_run(config: RunConfig, folder: RunFolder, weights: str, split: Split) -> dict[str, Any]:
    """All metrics of a run's weights on one split.

    Args:
        config: The run's settings.
        folder: Its folder.
        weights: See :func:`load_run`.
        split: "train" (without augmentation), "validation" or "test".

    Returns:
        ``metrics``, task -> metric -> value; ``primary``, task -> the one that stands for it; ``weights`` and ``split``.

    Raises:
        ConfigError: If settings make no sense, or some that aren't the run's own have no effect.
    """
    _check_used(config, folder, weights, {})
    parts, description = load_run(config, folder, weights)
    problem = parts.problem
    data, device = parts.config.data, parts.computer.device
    with threads(config.threads), random_state_of_evaluation(parts.config.seed, 0, device):
        if problem.evaluate is not None:
            if split != "test":
                raise ConfigError("`split` has no effect here: the problem brings its own `evaluate`. Leave it out.")
            metrics = own_figures(parts.model, problem)
        else:
            assert data.batch_size is not None
            metrics = evaluate(
                parts.network, problem, split, batch_size=data.batch_size, device=device, workers=data.workers
            )
    primary = {task.name: primary_metric(task)[0] for task in problem.task_list}
    return {"weights": description, "split": split, "primary": primary, "metrics": metrics}


@torch.no_grad()
def predict_run(config: RunConfig, folder: RunFolder, weights: str, split: Split, count: int) -> list[Path]:
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
        ConfigError: If ``count`` isn't positive, settings make no sense, or some that aren't the run's own have no effect.
    """
    _check_used(config, folder, weights, dict.fromkeys(_OF_BATCHES, "the samples are one batch"))
    try:
        check_integer("count", count, minimum=1)
    except (TypeError, ValueError) as error:
        raise ConfigError(str(error)) from error
    parts, description = load_run(config, folder, weights)
    problem, network = parts.problem, parts.network.eval()
    plain = replace(problem, mean=None, std=None, augment=None)
    loader = plain.loader(split, 1) if problem.closure is None and problem.split(split) is not None else None
    if not isinstance(loader, Loader):
        raise ConfigError("Predictions are of map-style data sets of samples (x, {task: target}).")
    # In the stored order, as training batches come shuffled, and these should be the same ones after every run.
    numbers = torch.arange(min(count, loader.plan.size))
    batch = loader.fetch(numbers, numbers)
    x = placed(problem.normalize(batch["input"]), parts.computer.device)
    # One task after the other: with split norms each has features of its own.
    outputs = {}
    for task in problem.task_list:
        with threads(config.threads), active_task(task.name):
            output = placed(network(x, [task.name])[task.name], "cpu")
            outputs[task.name] = output.float() if isinstance(output, torch.Tensor) else output
    written = []
    if isinstance(x, torch.Tensor) and x.dim() == 4:
        path = folder.path / f"predictions-{split}.png"
        draw_predictions(path, batch, outputs, problem.task_list)
        written.append(path)
    flat = [task for task in problem.task_list if not task.dense]
    if flat:
        labelled = labelled_tasks(batch, flat)
        entries = {
            task.name: {
                "prediction": readable(outputs[task.name], task.kind),
                "label": _labels(task, batch["targets"][task.name]) if task.name in labelled else None,
            }
            for task in flat
        }
        content = {"weights": description, "split": split, "tasks": entries}
        written.append(folder.write_json(f"predictions-{split}.json", content))
    return written


def _labels(task: Task, target: Any) -> Any:
    """A task's labels; None for a class that isn't known, as numbers that aren't are written, too."""
    if task.kind != "classification":
        return target
    return [int(label) if known else None for label, known in zip(target, task.valid(target), strict=True)]
