"""What train, evaluate and predict share: settings from YAML and flags, and what an error means for the exit code."""

import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from torchmto.cli._errors import INTERRUPTED, UsageError
from torchmto.lab.trainer.config import SECTIONS, ConfigError, TrainConfig

_NOT_SETTINGS = {"config", "out", "resume", "checkpoint", "weights", "split", "count"}


class SettingsParser(ArgumentParser):
    """A parser for all settings of a training run, which also knows those that were actually given."""

    def parse_args(self, args: Sequence[str] | None = None, *rest: Any, **options: Any) -> Namespace:  # type: ignore[override]
        """All arguments, and in the attribute ``given`` the settings among those on the command line and in its file."""
        parsed = super().parse_args(args, *rest, **options)
        parsed.given = _settings(super().parse_args(args, defaults=False))
        parsed.settings = _settings(parsed)
        return parsed


def make_settings_parser(prog: str, description: str) -> SettingsParser:
    """The parser of a verb.

    Args:
        prog: The program and the verb.
        description: What the verb does.
    """
    parser = SettingsParser(prog=prog, description=description)
    parser.add_argument("--config", action="config", help="A YAML file of settings.")
    parser.add_class_arguments(TrainConfig, fail_untyped=True)
    return parser


def _settings(args: Namespace) -> dict[str, Any]:
    values: dict[str, Any] = args.as_dict()
    return {name: value for name, value in values.items() if name not in _NOT_SETTINGS | {"given"}}


def merged(settings: TrainConfig, given: Mapping[str, Any]) -> TrainConfig:
    """A run's settings with given ones put over them."""
    values = settings.as_dict()
    for name, value in given.items():
        values[name] = {**values[name], **value} if name in SECTIONS else value
    return TrainConfig.from_dict(values)


@contextlib.contextmanager
def reported(resume: str = "") -> Iterator[None]:
    """Errors inside the block end the verb with a message and the right exit code.

    Args:
        resume: The command that goes on with an interrupted or failed run; empty for verbs without one.

    Raises:
        UsageError: For settings that can't work.
        KeyboardInterrupt: For a run that was interrupted and saved.
        SystemExit: For a file that can't be read or written, and where another process ended the run.
    """
    from torchmto import NonFiniteError  # noqa: PLC0415 - `--help` should be quick
    from torchmto.lab.trainer import CheckpointError, Interrupted  # noqa: PLC0415
    from torchmto.lab.trainer.processes import is_follower, speaks  # noqa: PLC0415
    from torchmto.step import RankFailedError  # noqa: PLC0415

    again = f"\nGo on with: {resume}" if resume else ""
    try:
        yield
    except ConfigError as error:
        raise UsageError(str(error)) from error
    except (Interrupted, RankFailedError) as error:
        if not speaks():  # the first process, or the one that failed, says what there is to say
            code = INTERRUPTED if isinstance(error, Interrupted) else 1
            raise SystemExit(0 if is_follower() else code) from error
        if isinstance(error, Interrupted):
            raise KeyboardInterrupt(f"{error}{again}") from error
        print(f"error: {error}{again}", file=sys.stderr)
        raise SystemExit(1) from error
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(f"Stopped at once; the last checkpoint stands.{again}") from error
    except (CheckpointError, NonFiniteError, OSError) as error:
        print(f"error: {error}{again}", file=sys.stderr)
        raise SystemExit(1) from error
