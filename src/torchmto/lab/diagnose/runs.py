"""Probing what a config would train, with the lab's data sets and models."""

import dataclasses
from collections.abc import Callable, Iterator

import torch

from torchmto.lab.diagnose.advice import Plan
from torchmto.lab.diagnose.measurements import Measurements
from torchmto.lab.diagnose.probe import Closure, probe, probe_priorities
from torchmto.lab.trainer.build import Parts, build
from torchmto.lab.trainer.config import MethodConfig, TrainConfig
from torchmto.structure import has_split_norms

__all__ = ["probe_config"]


class _Batches:
    """Closures of the training batches, epoch after epoch."""

    def __init__(self, parts: Parts, config: TrainConfig) -> None:
        self._parts = parts
        self._loader = parts.bundle.loader(
            "train", config.data.batch_size, seed=config.seed, augment=config.data.augment
        )
        self._epoch = 0

    def __iter__(self) -> Iterator[Closure]:
        epoch, self._epoch = self._epoch, self._epoch + 1
        for batch in self._loader.epoch(epoch):
            yield self._parts.closure(batch)


def probe_config(
    config: TrainConfig, *, num_batches: int = 20, say: Callable[[str], None] = print
) -> tuple[Measurements, Plan]:
    """Measure on the data, model and optimizer of a config; nothing is saved.

    Args:
        config: The settings of a training run.
        num_batches: Batches per part of the probing.
        say: Is told what happens.

    Returns:
        The measurements, and what the config plans.

    Raises:
        ConfigError: If settings make no sense.
    """
    config.validate()
    method, model = config.method, config.model
    # fp16 would need a gradient scaler, which adds nothing to what is measured; compiling takes longer than probing.
    precision = "32" if config.precision == "16-mixed" else config.precision
    plain = dataclasses.replace(
        config,
        method=MethodConfig(weights=method.weights, on_nonfinite=method.on_nonfinite, same_noise=method.same_noise),
        model=dataclasses.replace(model, compile=False, task_norms=bool(model.task_norms)),
        precision=precision,
    )
    torch.manual_seed(config.seed)
    parts = build(plain)
    parts.model.train()
    tasks = [task.name for task in parts.bundle.tasks]
    say(f"Probing {len(tasks)} tasks of {config.data.name} on {num_batches} batches of {config.data.batch_size} ...")
    measured = probe(
        parts.model,
        parts.optimizer,
        tasks,
        _Batches(parts, config),
        num_batches=num_batches,
        seed=config.seed,
        weights=method.weights,
        same_noise=method.same_noise,
    )
    has_norms = None
    if len(tasks) > 1:
        torch.manual_seed(config.seed)
        split = build(dataclasses.replace(plain, model=dataclasses.replace(plain.model, task_norms=True)))
        split.model.train()
        has_norms = has_split_norms(split.model)
        batches = _Batches(split, config)
        margins = probe_priorities(
            split.model, split.optimizer, tasks, batches, num_batches=max(2, num_batches), seed=config.seed
        )
        measured = dataclasses.replace(measured, margins=margins)
    total_steps = config.epochs * parts.steps_per_epoch
    return measured, Plan(method.name, dict(method.options), total_steps, has_norms)
