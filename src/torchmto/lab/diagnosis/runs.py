"""Probing a problem with the network, loss and optimizer that a Run of it would have."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from itertools import count
from typing import Any

from torchmto.lab.diagnosis.advice import Diagnosis, Plan, advise
from torchmto.lab.diagnosis.measurements import Measurements
from torchmto.lab.diagnosis.probe import probe, probe_priorities
from torchmto.lab.diagnosis.text import as_json, as_text
from torchmto.lab.problem import Problem
from torchmto.lab.run.build import Parts, build, problem_of
from torchmto.lab.run.config import MethodConfig, RunConfig, check_used, config_for, others_than
from torchmto.lab.run.first_batch import check_first_batch
from torchmto.lab.run.loop import threads
from torchmto.lab.run.random_state import seed_everything
from torchmto.step.losses import Closure
from torchmto.structure import has_split_norms


def _closures(parts: Parts) -> Iterator[Closure]:
    """Those of the training batches, epoch after epoch, without an end."""
    for epoch in count():
        for batch in parts.loader.epoch(epoch):
            yield parts.closure(batch)


_USED = {
    *("data.name", "data.options", "data.tasks", "data.batch_size", "data.split_seed", "data.augment", "data.workers"),
    *("model.name", "model.options", "model.task_norms", "model.gradient_checkpointing", "model.channels_last"),
    *("method.name", "method.options", "method.weights", "method.same_noise"),
    *("optimizer.name", "optimizer.lr", "optimizer.weight_decay", "optimizer.momentum", "optimizer.head_rate"),
    *("losses", "epochs", "accumulate", "precision", "device", "seed", "threads", "source"),
}
"""Settings that mean something to a probing."""


@dataclasses.dataclass(frozen=True)
class Report:
    """What `torchmto diagnose` prints, as an object; ``print`` shows the same text.

    Attributes:
        measurements: What was measured.
        plan: What was planned.
        diagnosis: What follows: findings, and methods that suit.
    """

    measurements: Measurements
    plan: Plan
    diagnosis: Diagnosis

    def __str__(self) -> str:
        return as_text(self.measurements, self.diagnosis)

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain values."""
        return as_json(self.measurements, self.plan, self.diagnosis)


def diagnose(
    problem: Problem | str,
    *,
    batches: int = 20,
    say: Callable[[str], None] = lambda _: None,
    config: RunConfig | Mapping[str, Any] | None = None,
    **settings: Any,
) -> Report:
    """Probe a problem for a minute: how its tasks get on, which methods suit, and why.

    Args:
        problem: What is learnt, or its reference.
        batches: Batches per measurement.
        say: Is told what happens.
        config: Settings of a Run; its method is the one that is planned.
        **settings: Some of them, as `torchmto.lab.run.config.config_of` takes them.

    Raises:
        ConfigError: If a setting makes no sense, or has no effect.
        ProblemError: If a part of the problem isn't what it should be.
    """
    config, own = config_for(problem, config, settings)
    config.validate()
    idle = others_than(_USED, "a probing is a few plain steps in one process, of which no state is kept")
    if config.precision == "16-mixed":
        idle["precision"] = "fp16 needs a gradient scaler, which adds nothing to what is measured"
    check_used(config, idle)
    problem, config = problem_of(config, own)
    check_first_batch(problem, dataclasses.replace(config, evaluate_test=False))
    method, model = config.method, config.model
    plain = dataclasses.replace(
        config,
        method=MethodConfig(weights=method.weights, same_noise=method.same_noise),
        model=dataclasses.replace(model, task_norms=bool(model.task_norms)),
    )
    seed_everything(config.seed)
    parts = build(plain, problem)
    parts.model.train()
    tasks = list(problem.task_names)
    say(f"Probing {len(tasks)} tasks of {config.data.name} on {batches} batches of {config.data.batch_size} ...")
    has_norms = None
    with threads(config.threads):
        measured = probe(
            parts.model,
            parts.optimizer,
            tasks,
            _closures(parts),
            num_batches=batches,
            seed=config.seed,
            weights=method.weights,
            same_noise=method.same_noise,
        )
        if len(tasks) > 1:
            seed_everything(config.seed)
            split = build(dataclasses.replace(plain, model=dataclasses.replace(plain.model, task_norms=True)), problem)
            split.model.train()
            has_norms = has_split_norms(split.model)
            number = max(2, batches)
            margins = probe_priorities(
                split.model, split.optimizer, tasks, _closures(split), num_batches=number, seed=config.seed
            )
            measured = dataclasses.replace(measured, margins=margins)
    total_steps = (config.epochs or 1) * parts.steps_per_epoch
    plan = Plan(method.name, dict(method.options), total_steps, has_norms)
    return Report(measured, plan, advise(measured, plan))
