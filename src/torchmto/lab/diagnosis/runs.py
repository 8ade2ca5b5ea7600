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
from torchmto.lab.run.config import MethodConfig, RunConfig, config_of
from torchmto.lab.run.first_batch import check_first_batch
from torchmto.lab.run.random_state import seed_everything
from torchmto.step.losses import Closure
from torchmto.structure import has_split_norms


def _closures(parts: Parts) -> Iterator[Closure]:
    """Those of the training batches, epoch after epoch, without an end."""
    for epoch in count():
        for batch in parts.loader.epoch(epoch):
            yield parts.closure(batch)


def probe_config(
    config: RunConfig,
    problem: Problem | None = None,
    *,
    num_batches: int = 20,
    say: Callable[[str], None] = print,
) -> tuple[Measurements, Plan]:
    """Measure on the problem, model and optimizer of a config; nothing is saved.

    Args:
        config: The settings of a Run.
        problem: What is learnt, where the settings' reference doesn't lead to it.
        num_batches: Batches per part of the probing.
        say: Is told what happens.

    Returns:
        The measurements, and what the config plans.

    Raises:
        ConfigError: If settings make no sense.
    """
    config.validate()
    problem, config = problem_of(config, problem)
    check_first_batch(problem, config)
    method, model = config.method, config.model
    # fp16 would need a gradient scaler, which adds nothing to what is measured; compiling takes longer than probing.
    precision = "32" if config.precision == "16-mixed" else config.precision
    plain = dataclasses.replace(
        config,
        method=MethodConfig(weights=method.weights, on_nonfinite=method.on_nonfinite, same_noise=method.same_noise),
        model=dataclasses.replace(model, compile=False, task_norms=bool(model.task_norms)),
        precision=precision,
    )
    seed_everything(config.seed)
    parts = build(plain, problem)
    parts.model.train()
    tasks = list(problem.task_names)
    say(f"Probing {len(tasks)} tasks of {config.data.name} on {num_batches} batches of {config.data.batch_size} ...")
    measured = probe(
        parts.model,
        parts.optimizer,
        tasks,
        _closures(parts),
        num_batches=num_batches,
        seed=config.seed,
        weights=method.weights,
        same_noise=method.same_noise,
    )
    has_norms = None
    if len(tasks) > 1:
        seed_everything(config.seed)
        split = build(dataclasses.replace(plain, model=dataclasses.replace(plain.model, task_norms=True)), problem)
        split.model.train()
        has_norms = has_split_norms(split.model)
        number = max(2, num_batches)
        margins = probe_priorities(
            split.model, split.optimizer, tasks, _closures(split), num_batches=number, seed=config.seed
        )
        measured = dataclasses.replace(measured, margins=margins)
    total_steps = (config.epochs or 1) * parts.steps_per_epoch
    return measured, Plan(method.name, dict(method.options), total_steps, has_norms)


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
        ConfigError: If a setting makes no sense.
        ProblemError: If a part of the problem isn't what it should be.
    """
    base = config if isinstance(config, RunConfig) else config_of(config or {})
    wanted = config_of(({"data.name": problem} if isinstance(problem, str) else {}) | settings, base)
    own = None if isinstance(problem, str) else problem
    measured, plan = probe_config(wanted, own, num_batches=batches, say=say)
    return Report(measured, plan, advise(measured, plan))
