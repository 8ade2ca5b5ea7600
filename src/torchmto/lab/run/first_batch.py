"""What a problem's first batch shows before anything trains: keys, shapes, labels, outputs, losses, metrics."""

import contextlib
import copy
import itertools
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from torchmto.lab.data.base import Split, Task, labelled_tasks
from torchmto.lab.metrics import primary_metric
from torchmto.lab.problem import Problem, ProblemError, check_labels, part_error
from torchmto.lab.run.build import Computer, closure_of, losses_of, network_of
from torchmto.lab.run.config import RunConfig
from torchmto.lab.run.evaluation import Network, computed, measure, own_figures, placed
from torchmto.lab.run.loop import threads
from torchmto.lab.user_code import user_frames
from torchmto.structure import active_task, has_split_norms

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
            _check_validation(
                problem, size, network, ("validation", "test") if config.evaluate_test else ("validation",)
            )
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
        check_labels(task, target, part)


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
    for group in groups:
        # Backward, too, where a checkpointed forward runs again. Only split norms look at it, and then a group is one task.
        with active_task(group[0]):
            with _fitting():
                values = closure(group)
            _check_values(problem, values, names)
            losses = [value[0] if isinstance(value, tuple) else value for value in values.values()]
            with _fitting():
                torch.autograd.backward([loss.sum() for loss in losses if loss.requires_grad])


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


@contextlib.contextmanager
def _fitting() -> Iterator[None]:
    """What torch or this package says inside the block, none of it in the user's own code, is an error of the parts."""
    try:
        yield
    except Exception as error:
        if isinstance(error, ProblemError) or user_frames(error):
            raise
        said = " ".join(str(error).split()).rstrip(".")
        raise part_error("model` or `losses", "made for the inputs and targets", said) from error


def _check_metrics(problem: Problem, network: Network, split: Split, step: Any) -> None:
    """Measure a batch; of too few samples a metric may give nothing, but what it gives has to be one number."""
    with warnings.catch_warnings(action="ignore"):
        with _fitting():
            measured = measure(network, problem, split, steps=problem.parts(step, split))
        for task, measures in measured.items():
            for name, metric in measures.metrics.items():
                value: Any = 0
                with contextlib.suppress(Exception):
                    value = computed(metric)
                try:
                    float(value)
                except (TypeError, ValueError, RuntimeError) as error:
                    part = f"metrics[{task!r}][{name!r}]"
                    raise part_error(part, "a metric that gives one number", value) from error


def _check_validation(problem: Problem, size: int, network: Network, labelled: tuple[Split, ...]) -> None:
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
        _check_metrics(problem, network, split, step)
        if split in labelled:
            _check_all_are_labelled(problem, split, itertools.chain([step], loader.epoch(0, 1)))
