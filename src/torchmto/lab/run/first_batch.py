"""What a problem's first batch shows before anything trains: keys, shapes, labels, outputs, losses, metrics."""

import copy
import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from torchmto.lab.data.base import Split, Task, labelled_tasks
from torchmto.lab.metrics import primary_metric
from torchmto.lab.problem import Problem, ProblemError, part_error
from torchmto.lab.run.build import Computer, closure_of, losses_of, network_of
from torchmto.lab.run.config import RunConfig
from torchmto.lab.run.evaluation import Network, own_figures, placed
from torchmto.lab.run.loop import threads
from torchmto.structure import has_split_norms

_CHANNELS = {"depth": 1, "edges": 1, "saliency": 1, "normals": 3}


def check_first_batch(problem: Problem, config: RunConfig) -> None:
    """Take a batch of a problem through its network, losses and metrics; nothing is changed by it.

    Args:
        problem: The problem, with the tasks that are trained.
        config: The settings, with nothing left open.

    Raises:
        ProblemError: If a part isn't what it should be.
    """
    size = config.data.batch_size or 1
    with torch.random.fork_rng(devices=[]), threads(config.threads):
        torch.manual_seed(config.seed)
        loader = problem.loader("train", size, seed=config.seed, augment=config.data.augment)
        step = next(iter(loader.epoch(0)), None)
        if step is None and problem.closure is None:
            raise part_error("train", "a data set with samples", "none")
        if problem.closure is None:
            for names, batch in problem.parts(step):
                _check_targets(problem, names, batch, "train")
            _check_all_are_labelled(problem, "train", itertools.chain([step], loader.epoch(0, 1)))
        network = Network(network_of(config, problem))
        few = problem.loader("train", min(size, 2), seed=config.seed, augment=config.data.augment)
        _check_losses(problem, config, network, next(iter(few.epoch(0))))
        if problem.evaluate is not None:
            own_figures(copy.deepcopy(network.model), problem)
        else:
            _check_validation(problem, size, ("validation", "test") if config.evaluate_test else ("validation",))
    for task in problem.task_list:
        try:
            primary_metric(task)
        except ValueError as error:
            raise part_error(f"primary[{task.name!r}]", "one of the task's metrics", str(error)) from error


def _check_targets(problem: Problem, names: tuple[str, ...], batch: Mapping[str, Any], part: str) -> None:
    for task in problem.task_list:
        if task.name not in names or task.name not in batch["targets"] or task.kind == "own":
            continue
        target, where = batch["targets"][task.name], f"{part}, task `{task.name}`"
        shape, should = tuple(target.shape), _shape(task)
        fits = [isinstance(n, str) or n == size for n, size in zip(should, shape, strict=False)]
        if len(shape) != len(should) or not all(fits):
            wanted = f"[{', '.join(map(str, should))}]"
            raise part_error(where, f"{task.kind} targets of shape {wanted}", f"targets of shape {shape}")
        labels = target[task.valid(target)] if task.kind != "normals" else target.new_empty(0)
        _check_labels(task, labels, where)


def _shape(task: Task) -> list[int | str]:
    """What a batch's target has along each dimension; a letter where it may be any number."""
    match task.kind:
        case "classification":
            return ["B"]
        case "segmentation":
            return ["B", "H", "W"]
        case "binary" | "regression":
            return ["B", task.channels]
        case _:
            return ["B", _CHANNELS.get(task.kind, task.channels), "H", "W"]


def _check_labels(task: Task, labels: Tensor, where: str) -> None:
    if not len(labels):
        return
    low, high = float(labels.min()), float(labels.max())
    if task.kind in {"classification", "segmentation"} and (low < 0 or high >= task.channels):
        wrong = int(low if low < 0 else high)
        raise part_error(
            where, f"class numbers 0 to {task.channels - 1}, or {int(task.missing)} where missing", str(wrong)
        )
    if task.kind in {"binary", "edges", "saliency"} and (low < 0 or high > 1):
        missing = "NaN" if task.kind == "binary" else "255"
        raise part_error(where, f"numbers in [0, 1], or {missing} where missing", f"{low if low < 0 else high:g}")


def _check_all_are_labelled(problem: Problem, split: Split, steps: Iterable[Any]) -> None:
    """Raise if no sample has a label of a task: batches are looked at until each task was seen."""
    missing = dict.fromkeys(problem.task_names)
    for step in steps:
        for names, batch in problem.parts(step, split):
            for name in labelled_tasks(batch, [t for t in problem.task_list if t.name in names]):
                missing.pop(name, None)
        if not missing:
            return
    should = f"samples of which some have a label of the task `{next(iter(missing))}`"
    raise part_error(split, should, _keys(problem.split(split)))


def _keys(data: Any) -> str:
    """What the first sample has instead."""
    try:
        targets = data[0][1]
        return f"none; the first sample has targets of {', '.join(map(str, targets)) or 'no task'}"
    except (TypeError, KeyError, IndexError):
        return "none"


def _check_losses(problem: Problem, config: RunConfig, network: Network, step: Any) -> None:
    """Call everything that gives losses once."""
    names = problem.task_names
    network.train()
    closure = closure_of(
        problem, network, losses_of(problem, config.losses), step, Computer(torch.device("cpu"), "32", None)
    )
    groups = [(name,) for name in names] if has_split_norms(network) else [names]
    network.eval()  # so that a batch of one passes through batch norms, too
    try:
        for group in groups:
            _check_values(problem, closure(group), group)
    except ValueError as error:
        if str(error).startswith("Parameter `prediction`"):
            message = f"Part `model` of the problem should be a network whose outputs fit the targets. {error}"
            raise ProblemError(message) from error
        raise


def _check_values(problem: Problem, values: Any, names: tuple[str, ...]) -> None:
    part = "closure" if problem.closure is not None else "losses"
    if not isinstance(values, Mapping):
        raise part_error(part, "a function that gives {task: loss}", type(values).__name__)
    for name, value in values.items():
        if name not in names:
            raise part_error(part, f"a function that gives losses of {', '.join(names)}", f"one of `{name}`")
        loss = value[0] if isinstance(value, tuple) and len(value) == 2 else value
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            came = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise part_error(f"{part}, task `{name}`", "a scalar tensor, or (scalar, count)", came)


def _check_validation(problem: Problem, size: int, labelled: tuple[Split, ...]) -> None:
    splits: tuple[Split, ...] = ("validation", "test")
    for split in splits:
        loader = problem.loader(split, min(size, 4), augment=False)
        step = next(iter(loader.epoch(0)), None)
        if step is None:
            raise part_error(split, "a data set with samples", "none")
        for names, batch in problem.parts(step, split):
            if not isinstance(batch, Mapping) or "targets" not in batch:
                raise part_error(split, "samples (x, {task: target}), or `evaluate` given", type(batch).__name__)
            _check_targets(problem, names, placed(batch, "cpu"), split)
        if split in labelled:
            _check_all_are_labelled(problem, split, itertools.chain([step], loader.epoch(0, 1)))
