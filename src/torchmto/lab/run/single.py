"""A single Run in a folder of its own: started, taken up again, guarded against another one's settings."""

import contextlib
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torchmto.lab.problem import Problem
from torchmto.lab.run.build import Computer, problem_of
from torchmto.lab.run.checkpoint import CheckpointError, CheckpointFolder, read_checkpoint
from torchmto.lab.run.config import (
    ConfigError,
    LoggerName,
    RunConfig,
    changed_settings,
    check_content,
    check_source,
    check_used,
)
from torchmto.lab.run.first_batch import check_first_batch
from torchmto.lab.run.folder import RunFolder
from torchmto.lab.run.logs import check_loggers
from torchmto.lab.run.loop import Trainer, is_state
from torchmto.lab.run.processes import elastic_job, launched, placement

Say = Callable[[str], None]


def train(
    config: RunConfig | None,
    out: Path | str | None,
    *,
    resume: bool = False,
    checkpoint: Path | None = None,
    problem: Problem | None = None,
    changed_source: bool = False,
    say: Say = lambda _: None,
) -> tuple[dict[str, Any], Trainer]:
    """Train from settings, or take up a run that was interrupted.

    Args:
        config: The settings; when resuming None takes those of the run.
        out: The run's folder; None for one process that keeps nothing.
        resume: Go on from the latest checkpoint in ``out``.
        checkpoint: Go on from this checkpoint instead.
        problem: What to learn, where the settings' reference doesn't lead to it.
        changed_source: Go on though the file that defines the problem has changed.
        say: Prints a line.

    Returns:
        What `Trainer.fit` gives, which is in ``out/results.json``, too; and the trainer, with the model.

    Raises:
        ConfigError: If settings make no sense, the folder holds another run, or a resumed run's settings changed.
        CheckpointError: If a checkpoint can't be written or mustn't be loaded.
        Interrupted: If a signal came; the state is saved.
    """
    if out is None:
        assert config is not None
        config.validate()
        check_used(
            config, dict.fromkeys(_OF_A_FOLDER, "a run without a folder (`out`) is one process that keeps nothing")
        )
        problem, config = problem_of(config, problem)
        check_first_batch(problem, config)
        trainer = Trainer(config, problem, computer=Computer.of(config), say=say)
        return trainer.fit(), trainer
    folder = RunFolder(out)
    settings = config or folder.read_settings(changed_source=changed_source)
    settings.validate()
    if not (resume or checkpoint):
        check_used(settings, {})
    loggers: list[LoggerName] = ["csv", "tensorboard"] if settings.loggers is None else settings.loggers
    settings = replace(settings, loggers=loggers)
    check_loggers(loggers)
    if settings.devices * settings.nodes == 1:
        Computer.of(settings)  # so that a device that isn't here is refused before anything is loaded
    placed = placement(settings.devices, settings.nodes)
    with contextlib.ExitStack() as stack:
        processes, device = stack.enter_context(launched(settings.device, *placed))
        say = say if processes.is_first else lambda _: None
        with processes.together():  # an error of one process, in loading say, ends all
            problem, settings = problem_of(settings, problem)
            if not (resume or checkpoint or folder.has_run):
                check_first_batch(problem, settings)  # before the folder is taken
        computer = Computer.of(settings, device)
        used, state = processes.first(
            lambda: _start(
                stack,
                folder,
                settings,
                checkpoint,
                resume=resume,
                changed_source=changed_source,
                processes=processes.size,
                say=say,
            )
        )
        trainer = Trainer(used, problem, folder, computer, processes, state=state, say=say)
        return trainer.fit(), trainer


_OF_A_FOLDER = ("devices", "nodes", "checkpoint_every", "keep", "loggers", "log_every")


def _start(
    stack: contextlib.ExitStack,
    folder: RunFolder,
    config: RunConfig,
    checkpoint: Path | None,
    *,
    resume: bool,
    changed_source: bool,
    processes: int,
    say: Say,
) -> tuple[RunConfig, dict[str, Any] | None]:
    """Take the folder; returns the settings, and the state to go on from."""
    resume = resume or checkpoint is not None
    stack.enter_context(folder.locked(must_exist=resume))
    job = elastic_job()
    if folder.claimed_by(job):
        say("Restarted by torchrun.")
        resume = True
        if CheckpointFolder(folder.checkpoints).steps():
            checkpoint = None
    state = None
    found = _state_to_resume(folder, checkpoint) if resume else None
    if found is not None:
        path, state = found
        check_same(json.loads(state["config"]), config, f"The run of `{path}`", changed_source=changed_source)
        for told in CheckpointFolder(folder.checkpoints).go_on_from(state["progress"]):
            say(told)
        say(f"Going on from {path}, {state['progress']['step']} steps.")
    elif resume:
        say("There is no checkpoint yet: starting anew.")
    elif folder.has_run:
        raise ConfigError(
            f"`{folder.path}` holds a run already. Add --resume (`resume=True`) to go on with it, or choose another folder."
        )
    # The claim first: a job killed between the two finds its own folder again, not one that holds a run.
    folder.write_claim(job)
    folder.write_settings(config, resumed=resume, processes=processes)
    return config, state


def _state_to_resume(folder: RunFolder, checkpoint: Path | None) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint to go on from; None for a run that was stopped before its first."""
    checkpoints = CheckpointFolder(folder.checkpoints)
    checkpoints.clean()
    if checkpoint is None and not checkpoints.steps() and not checkpoints.best.exists():
        return None
    if checkpoint is None:
        path, state = checkpoints.read_last()
    else:
        path, state = checkpoint, read_checkpoint(checkpoint)
    if not is_state(state):
        raise CheckpointError(f"`{path}` isn't a checkpoint of a training run of this version of torchmto.")
    return path, state


def check_same(saved: Mapping[str, Any], config: RunConfig, what: str, *, changed_source: bool) -> None:
    """Whether these are the settings that something was begun with.

    Raises:
        ConfigError: If others than `torchmto.lab.run.config.FREE` differ, or a file of the problem or of data does.
    """
    if changed := changed_settings(saved, config.as_dict()):
        raise ConfigError(
            f"{what} has other settings: {', '.join(changed)} changed. Leave them out to go on with the run's "
            "own, or start a new run in another folder."
        )
    if not changed_source:
        check_source(saved.get("source"), config.source, what)
        check_content(saved.get("content"), config.content, what)
