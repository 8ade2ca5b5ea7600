"""One Run, from Python."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from torchmto.lab.problem import Problem
from torchmto.lab.run.config import RunConfig, config_for
from torchmto.lab.run.evaluation import Metrics
from torchmto.lab.run.single import train
from torchmto.lab.specs import parse_method

if TYPE_CHECKING:
    from pandas import DataFrame


@dataclass(frozen=True)
class FittedRun:
    """A finished Run.

    Attributes:
        model: The network, with the best weights by validation.
        metrics: Task -> metric -> value on the test split; of the validation split without it.
        history: One entry per validated epoch: mean losses, validation metrics, score, batches, optimizer steps, seconds.
        result: Everything that is known.
        path: Its folder, if it has one.
    """

    model: nn.Module
    metrics: Metrics
    history: list[dict[str, Any]]
    result: Mapping[str, Any]
    path: Path | None

    def table(self) -> "DataFrame":
        """The history as a frame: a row per epoch, ``loss.<task>`` and ``<task>.<metric>`` of the validation split."""
        from pandas import DataFrame  # noqa: PLC0415  half a second

        rows = []
        for entry in self.history:
            row = {"epoch": entry["epoch"], "score": entry["score"]}
            row |= {f"loss.{task}": loss for task, loss in entry["losses"].items()}
            row |= {f"{task}.{m}": value for task, own in entry["validation"].items() for m, value in own.items()}
            rows.append(row)
        return DataFrame(rows)


def fit(
    problem: Problem | str,
    method: str = "gd",
    *,
    out: Path | str | None = None,
    resume: bool = False,
    changed_source: bool = False,
    say: Callable[[str], None] | None = None,
    config: RunConfig | Mapping[str, Any] | None = None,
    **settings: Any,
) -> FittedRun:
    """Train one model by one method.

    Args:
        problem: What is learnt, or its reference (``"digits"``, ``"farm.py:farm"``).
        method: The method as text, such as ``"wpcgrad(mode=pairwise)"``.
        out: A folder for checkpoints, logs and results; None to keep nothing.
        resume: Go on from the folder's last checkpoint.
        changed_source: Go on though the file that defines the problem has changed.
        say: Told how it goes; prints by default.
        config: Settings of the Run.
        **settings: Some of them, as `torchmto.lab.run.config.config_of` takes them.

    Returns:
        The Run: ``run.model``, ``run.metrics``, ``run.history``.

    Raises:
        ConfigError: If a setting makes no sense, or the folder holds something else.
        ProblemError: If a part of the problem isn't what it should be.
    """
    spec = parse_method(method)
    chosen = {"method.name": spec.name, "method.options": dict(spec.hyperparameters)}
    wanted, own = config_for(problem, config, {**chosen, **settings})
    result, trainer = train(wanted, out, resume=resume, problem=own, changed_source=changed_source, say=say or print)
    metrics = result["test"] or result["validation"]
    return FittedRun(trainer.parts.model, metrics, result["history"], result, None if out is None else Path(out))
