"""What train, evaluate and predict share: settings from YAML and flags, and what an error means for the exit code."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from torchmto.lab.trainer.config import ConfigError, TrainConfig

DONE, FAILED, WRONG_USAGE, INTERRUPTED = 0, 1, 2, 130
_OWN = {"config", "out", "resume", "checkpoint", "weights", "split", "count", "batch_size", "file"}
SECTIONS = ("data", "model", "method", "optimizer")


def settings_parser(verb: str, description: str) -> ArgumentParser:
    """A parser for all settings of a training run and ``--out``."""
    parser = ArgumentParser(prog=f"torchmto {verb}", description=description)
    parser.add_argument("--config", action="config", help="A YAML file of settings.")
    parser.add_class_arguments(TrainConfig, fail_untyped=True)
    parser.add_argument("--out", type=str, required=True, metavar="DIR", help="The run's folder.")
    return parser


def settings_of(args: Namespace) -> dict[str, Any]:
    """The plain settings among parsed arguments."""
    values: dict[str, Any] = args.as_dict()
    return {name: value for name, value in values.items() if name not in _OWN}


def merged(settings: Mapping[str, Any], given: Mapping[str, Any]) -> TrainConfig:
    """A run's settings with those given on the command line put over them."""
    values = dict(settings)
    for name, value in given.items():
        values[name] = {**values[name], **value} if name in SECTIONS else value
    return TrainConfig.from_dict(values)


def guarded(action: Callable[[], int], resume: str) -> int:
    """Run a verb, turn what can go wrong into a message and an exit code.

    Args:
        action: Does the work, returns an exit code.
        resume: The command that goes on with an interrupted or failed run; empty for verbs without one.
    """
    from torchmto import NonFiniteError  # noqa: PLC0415 - `--help` needs no torch
    from torchmto.lab.trainer import CheckpointError, Interrupted  # noqa: PLC0415

    again = f"\nGo on with: {resume}" if resume else ""
    try:
        return action()
    except ConfigError as error:
        return _fail(str(error), WRONG_USAGE)
    except Interrupted as error:
        return _fail(f"{error}{again}", INTERRUPTED, kind="")
    except KeyboardInterrupt:
        return _fail(f"Stopped at once; the last checkpoint stands.{again}", INTERRUPTED, kind="")
    except CheckpointError as error:
        return _fail(f"{error}{again}", FAILED)
    except NonFiniteError as error:
        return _fail(f"{error} The last checkpoint stands.", FAILED)
    except (OSError, ImportError) as error:
        return _fail(str(error), FAILED)


def _fail(message: str, code: int, kind: str = "error: ") -> int:
    print(f"{kind}{message}", file=sys.stderr)
    return code


def command(verb: str, *arguments: str) -> str:
    """A command line as it would be typed."""
    return shlex.join(["torchmto", verb, *arguments])


def parse(parser: ArgumentParser, argv: Sequence[str]) -> tuple[Namespace, dict[str, Any]]:
    """Parse a command line.

    Returns:
        All arguments, and the settings that were actually given.
    """
    args = parser.parse_args(list(argv))
    given = parser.parse_args(list(argv), defaults=False)
    return args, settings_of(given)
