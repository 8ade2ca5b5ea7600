"""The one option grammar: settings from YAML and flags, the same in every verb; and what an error means for the exit code."""

import contextlib
import re
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, Namespace

from torchmto.checks import nearest
from torchmto.cli._errors import INTERRUPTED, UsageError
from torchmto.lab.run.config import SECTIONS, SHORT, ConfigError, RunConfig, config_of
from torchmto.lab.run.folder import read_yaml

_SHORT = {
    **{f"--{name.replace('_', '-')}": f"--{setting}" for name, setting in SHORT.items()},
    "--data": "--data.name",
    "--model": "--model.name",
    "--problem": "--data.name",
    "--problem.use": "--data.name",
}
_METHOD = {"--method": "--method.name"}


class SettingsParser(ArgumentParser):
    """A parser for the settings of a Run and a verb's own options, which also knows those that were actually given.

    Args:
        prog: The program and the verb.
        description: What the verb does.
        method: Whether the verb takes one method, so that ``--method NAME`` is short for ``--method.name NAME``.
    """

    def __init__(self, *arguments: Any, method: bool = True, **options: Any) -> None:
        super().__init__(*arguments, allow_abbrev=False, **options)
        self.short = {**_SHORT, **(_METHOD if method else {})}

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """One line, with what was probably meant."""
        raise UsageError(self._explained(message, ex))

    def _explained(self, message: str, error: Exception | None) -> str:
        lines = [line.strip() for line in message.strip().splitlines() if line.strip()]
        known = sorted({*self._option_string_actions, *self.short})
        names = [name.strip("-") for name in known]
        if found := re.search(r"[Uu]nrecognized arguments?: (\S+)", message):
            given = found[1].partition("=")[0]
            return f"There is no option `{given}`.{nearest(given, known)}"
        if found := re.search(
            r"(?:Key|Option|option) ['\"]?([\w.]+)['\"]? is not (?:expected|accepted|valid)", message
        ):
            return f"There is no setting `{found[1]}`.{nearest(found[1], names)}"
        return explained(message) or " ".join(lines)[:600]

    def parse_args(self, args: Sequence[str] | None = None, *rest: Any, **options: Any) -> Namespace:  # type: ignore[override]
        """All arguments; in ``settings`` those of the Run that were given on the command line or in a file."""
        given = list(sys.argv[1:] if args is None else args)
        words, from_file = _without_files(_translated(given, self.short))
        try:
            parsed = super().parse_args(words, *rest, **options)
            chosen = super().parse_args(words, defaults=False)
        except (ValueError, RecursionError, OverflowError) as error:
            raise UsageError(self._explained(str(error), error)) from error
        flags = {name: value for name, value in chosen.as_dict().items() if name in _SETTINGS}
        parsed.settings = _merged(from_file, flags)
        return parsed


def explained(message: str) -> str:
    """What jsonargparse says of a value of another type, as this package says it; empty for other messages.

    Example:
        >>> explained('Parser key "seeds": Not of type PositiveInt: 0 does not conform to restriction v>0')
        'Parameter `seeds` should be v > 0. Found 0.'
    """
    key = re.search(r'[Pp]arser key "([^"]+)"', message)
    if key is None:
        return ""
    if restricted := re.search(r"Not of type \w+: (.+) does not conform to restriction (\w+)([<>=]+)(.+)", message):
        value, name, sign, bound = restricted.groups()
        return f"Parameter `{key[1]}` should be {name} {sign} {bound}. Found {value}."
    types = [_type(found) for found in re.findall(r"Expected an? (.+)", message)]
    value = re.search(r"(?:Given value|Got value|but got|Found|value): (.+)", message)
    kinds = " or ".join(dict.fromkeys(kind for kind in types if kind))
    if not kinds or value is None:
        return ""
    return f"Parameter `{key[1]}` should be {kinds}. Found {value[1].strip()}."


def _type(text: str) -> str:
    text = re.sub(r"\. Got value.*|; got .*", "", text.strip())
    if choices := re.search(r"Literal\[(.+?)\]", text):
        return f"one of {choices[1]}"
    name = re.sub(r"<class '(\w+)'>", r"\1", text)
    known = {"NoneType": "", "int": "an int", "float": "a float", "bool": "a bool", "str": "a text"}
    return known.get(name, name)


_SETTINGS = frozenset(RunConfig().as_dict())


def _translated(args: Sequence[str], short: Mapping[str, str]) -> list[str]:
    """Short flags by their full names; ``--problem.NAME VALUE`` as an option of the data."""
    words: list[str] = []
    for word in args:
        flag, equals, value = word.partition("=")
        full = short.get(flag, flag)
        if flag.startswith("--problem.") and flag not in short:
            full = f"--data.options.{flag.removeprefix('--problem.')}"
        if flag == "--loggers" and equals and not value.startswith("["):
            value = f"[{value}]"
        elif words and words[-1] == "--loggers" and not word.startswith("["):
            full, equals, value = f"[{word}]", "", ""
        words.append(f"{full}{equals}{value}")
    return words


def _without_files(words: Sequence[str]) -> tuple[list[str], dict[str, Any]]:
    """The words without ``--config FILE``, and the settings of these files, one put over another."""
    left: list[str] = []
    settings: dict[str, Any] = {}
    rest = iter(words)
    for word in rest:
        flag, equals, value = word.partition("=")
        if flag != "--config":
            left.append(word)
            continue
        file = Path(value if equals else next(rest, ""))
        if not file.is_file():
            raise UsageError(f"There is no file {file} (--config).")
        settings = _merged(settings, _from_file(read_settings(file)))
    return left, settings


def read_settings(file: Path) -> dict[str, Any]:
    """The settings in a YAML file.

    Raises:
        UsageError: If it can't be read.
    """
    try:
        return read_yaml(file)
    except ConfigError as error:
        raise UsageError(str(error)) from error


def _from_file(values: dict[str, Any]) -> dict[str, Any]:
    """Settings with ``problem: {use: REF, name: value}`` as data."""
    problem = values.pop("problem", None)
    if isinstance(problem, str):
        problem = {"use": problem}
    if isinstance(problem, Mapping):
        arguments = {name: value for name, value in problem.items() if name != "use"}
        data = {"name": problem.get("use"), "options": arguments}
        values["data"] = {**(values.get("data") or {}), **data}
    return {
        name: {"name": value} if name in SECTIONS and isinstance(value, str) else value
        for name, value in values.items()
    }


def _merged(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(first)
    for name, value in second.items():
        both = name in SECTIONS and isinstance(value, Mapping) and isinstance(merged.get(name), Mapping)
        if both:
            options = {**(merged[name].get("options") or {}), **(value.get("options") or {})}
            merged[name] = {**merged[name], **value, **({"options": options} if "options" in value else {})}
        else:
            merged[name] = value
    return merged


def settings_parser(prog: str, description: str, *, method: bool = True) -> SettingsParser:
    """The parser of a verb that takes the settings of a Run.

    Args:
        prog: The program and the verb.
        description: What the verb does.
        method: Whether it takes one method.
    """
    parser = SettingsParser(prog=prog, description=description, method=method)
    parser.add_argument("--config", type=str, metavar="FILE", help="A YAML file of settings; flags go before it.")
    parser.add_class_arguments(RunConfig, fail_untyped=True)
    return parser


def chosen_config(args: Namespace, base: RunConfig | None = None) -> RunConfig:
    """The settings that were given, over others.

    Raises:
        ConfigError: If there is no such setting, or a value is of another type.
    """
    config = config_of(args.settings, base)
    _check_types(config)
    return config


def _check_types(config: RunConfig) -> None:
    """Values from a file as strictly as flags are.

    Raises:
        ConfigError: If one is of another type.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(RunConfig, fail_untyped=True)
    try:
        parser.parse_object(config.as_dict())
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise ConfigError(explained(str(error)) or " ".join(lines)[:400]) from error


@contextlib.contextmanager
def reported(resume: str = "") -> Iterator[None]:
    """Errors inside the block end the verb with a message and the right exit code.

    Args:
        resume: The command that goes on with an interrupted or failed run; empty for verbs without one.

    Raises:
        UsageError: For settings, problems and folders that can't work.
        KeyboardInterrupt: For a run that was interrupted and saved.
        SystemExit: For a file that can't be read or written, and where another process ended the run.
    """
    from torchmto import NonFiniteError  # noqa: PLC0415 - `--help` should be quick
    from torchmto.lab.grid.runner import FailedRunsError  # noqa: PLC0415
    from torchmto.lab.run import CheckpointError, Interrupted  # noqa: PLC0415
    from torchmto.lab.run.build import from_here  # noqa: PLC0415
    from torchmto.lab.run.processes import is_follower, speaks  # noqa: PLC0415
    from torchmto.lab.user_code import user_frames  # noqa: PLC0415
    from torchmto.step import RankFailedError  # noqa: PLC0415

    again = f"\nGo on with: {resume}" if resume else ""
    try:
        yield
    except (Interrupted, RankFailedError) as error:
        if not speaks():  # the first process, or the one that failed, says what there is to say
            code = INTERRUPTED if isinstance(error, Interrupted) else 1
            raise SystemExit(0 if is_follower() else code) from error
        if isinstance(error, Interrupted):
            raise KeyboardInterrupt(f"{error}{again}") from error
        print(f"error: {error}{again}", file=sys.stderr)
        raise SystemExit(1) from error
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(str(error) or f"Stopped at once; the last checkpoint stands.{again}") from error
    except FailedRunsError as error:
        print(f"{error.frames}error: some runs failed; the others are kept.\n{error}", file=sys.stderr)
        raise SystemExit(1) from error
    except (CheckpointError, NonFiniteError, OSError) as error:
        if frames := user_frames(error):
            print(frames, end="", file=sys.stderr)
            raise SystemExit(1) from error
        print(f"error: {error}{again}", file=sys.stderr)
        raise SystemExit(1) from error
    except (ValueError, TypeError) as error:
        if not from_here(error):
            raise
        raise UsageError(str(error)) from error


def this_command() -> str:
    """What was typed."""
    return shlex.join(["torchmto", *sys.argv[1:]])
