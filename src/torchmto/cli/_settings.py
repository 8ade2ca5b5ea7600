"""The one option grammar: settings from YAML and flags, the same in every verb; and what an error means for the exit code."""

import contextlib
import re
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn

import yaml
from jsonargparse import ArgumentParser, Namespace, set_loader
from jsonargparse.typing import PositiveInt

from torchmto.checks import nearest
from torchmto.cli._errors import INTERRUPTED, UsageError, wrong_usage
from torchmto.lab.run.config import SECTIONS, SHORT, ConfigError, RunConfig, config_of
from torchmto.lab.run.folder import KeyTwiceError, Loader, read_yaml

_SHORT = {
    **{f"--{name.replace('_', '-')}": f"--{setting}" for name, setting in SHORT.items()},
    "--data": "--data.name",
    "--model": "--model.name",
    "--optimizer": "--optimizer.name",
    "--problem": "--data.name",
    "--problem.use": "--data.name",
}
_LISTS = {"--loggers", "--data.tasks"}
"""Flags whose value is a list, with or without brackets."""
_METHOD = {"--method": "--method.name"}
_YAML = "torchmto"


def _value(text: str) -> Any:
    """What a flag's text stands for.

    Raises:
        ConfigError: If it is a mapping that has a key twice.
    """
    try:
        return yaml.load(text, Loader=Loader)  # noqa: S506  a safe one
    except KeyTwiceError as error:
        raise ConfigError(f"In `{text}` {error.problem}.") from error


set_loader(_YAML, _value, (yaml.YAMLError,))


class Parser(ArgumentParser):
    """A verb's options, from flags and from a YAML file; errors are one line.

    Args:
        prog: The program and the verb.
        description: What the verb does.
        short: Flags that stand for longer ones.
    """

    def __init__(self, *arguments: Any, short: Mapping[str, str] | None = None, **options: Any) -> None:
        super().__init__(*arguments, allow_abbrev=False, parser_mode=_YAML, **options)
        self.short = short or {}
        self.add_argument("--config", type=str, metavar="FILE", help="A YAML file of options; flags go before it.")

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """One line, with what was probably meant."""
        raise UsageError(self._explained(message))

    def _explained(self, message: str) -> str:
        known = sorted({*self._option_string_actions, *self.short})
        if found := re.search(r"[Uu]nrecognized arguments?: (\S+)", message):
            given = found[1].partition("=")[0]
            return f"There is no option `{given}`.{nearest(given, known)}"
        if found := re.search(
            r"(?:Key|Option|option) ['\"]?([\w.]+)['\"]? is not (?:expected|accepted|valid)", message
        ):
            return f"There is no setting `{found[1]}`.{nearest(found[1], [name.strip('-') for name in known])}"
        if found := re.search(r'key "(\w+)": Unable to load config', message):
            given = f"--{found[1]}"
            return f"There is no option `{given}`.{nearest(given, [name for name in known if name != given])}"
        return explained(message) or one_line(message)

    def parse_args(self, args: Sequence[str] | None = None, *rest: Any, **options: Any) -> Namespace:  # type: ignore[override]
        """All arguments."""
        words, from_file = _without_files(_translated(sys.argv[1:] if args is None else args, self.short))
        try:
            return self._parsed(words, from_file)
        except (ValueError, RecursionError, OverflowError) as error:
            raise UsageError(self._explained(str(error))) from error

    def _parsed(self, words: list[str], from_file: dict[str, Any]) -> Namespace:
        return super().parse_args([*_as_flags(from_file), *words])


class SettingsParser(Parser):
    """A parser for the settings of a Run and a verb's own options, which also knows those that were actually given.

    Args:
        prog: The program and the verb.
        description: What the verb does.
        method: Whether the verb takes one method, so that ``--method NAME`` is short for ``--method.name NAME``.
    """

    def __init__(self, *arguments: Any, method: bool = True, **options: Any) -> None:
        super().__init__(*arguments, short={**_SHORT, **(_METHOD if method else {})}, **options)
        self.add_class_arguments(RunConfig, fail_untyped=True)

    def _parsed(self, words: list[str], from_file: dict[str, Any]) -> Namespace:
        """All arguments; in ``settings`` those of the Run that were given on the command line or in a file."""
        own = {name: value for name, value in from_file.items() if self._is_own(name)}
        from_file = {name: value for name, value in from_file.items() if name not in own}
        words = [*_as_flags(own), *words]
        parsed = super()._parsed(words, {})
        chosen = ArgumentParser.parse_args(self, words, defaults=False)
        flags = {name: value for name, value in chosen.as_dict().items() if name in _SETTINGS}
        parsed.settings = _merged(from_file, flags)
        return parsed

    def _is_own(self, name: str) -> bool:
        """Whether this names an option of the verb, not a setting of the Run, nor another file."""
        return name not in {*_SETTINGS, "config"} and _flag(name) in self._option_string_actions


def _as_flags(values: Mapping[str, Any]) -> list[str]:
    """A file's options as they would be typed; null is what isn't typed."""
    flags = []
    for name, value in values.items():
        text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
        flag = _flag(name)
        flags += [] if value is False or value is None else [flag if value is True else f"{flag}={text}"]
    return flags


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def one_line(message: str) -> str:
    """A message that fits on the terminal."""
    return " ".join(message.split())[:600]


def explained(message: str) -> str:
    """What jsonargparse says of a value of another type, as this package says it; empty for other messages.

    Example:
        >>> explained('Parser key "seeds": Not of type PositiveInt: 0 does not conform to restriction v>0')
        'Parameter `seeds` should be an int > 0. Found 0.'
    """
    key = re.search(r'[Pp]arser key "([^"]+)"', message)
    if key is None:
        return ""
    if restricted := re.search(r"Not of type (\w+):(.*) does not conform to restriction \w+([<>=]+)(\S+)", message):
        name, value, sign, bound = restricted.groups()
        given = re.search(r"Given value: (.+)", message)
        kind = "a float" if "Float" in name else "an int"
        return f"Parameter `{key[1]}` should be {kind} {sign} {bound}. Found {value.strip() or (given[1] if given else '')}."
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
    known = {
        "NoneType": "",
        "int": "an int",
        "float": "a float",
        "bool": "a bool",
        "str": "a text",
        "list": "a list",
        "dict": "a mapping",
    }
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
        if full in _LISTS and equals and not value.startswith("["):
            value = f"[{value}]"
        elif words and words[-1] in _LISTS and not word.startswith("["):
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
        with wrong_usage():
            settings = _merged(settings, _from_file(read_yaml(file)))
    return left, settings


def _from_file(values: dict[str, Any]) -> dict[str, Any]:
    """Settings with ``problem: {use: REF, name: value}`` as data."""
    problem = values.pop("problem", None)
    if isinstance(problem, str):
        problem = {"use": problem}
    if problem is not None and not (isinstance(problem, Mapping) and isinstance(problem.get("use"), str)):
        raise ConfigError(
            f"`problem` should be a reference, or `{{use: REFERENCE, ARGUMENT: VALUE}}`. Found {problem!r}."
        )
    if problem is not None and values.get("data") is not None and not isinstance(values["data"], Mapping):
        raise ConfigError(
            f"`problem` and `data` both say what is learnt. Found {problem['use']!r} and {values['data']!r}."
        )
    if problem is not None:
        arguments = {name: value for name, value in problem.items() if name != "use"}
        data = {"name": problem["use"], "options": arguments}
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
        raise ConfigError(explained(str(error)) or one_line(str(error))) from error


@contextlib.contextmanager
def reported(resume: str = "") -> Iterator[None]:
    """Errors inside the block end the verb with a message and the right exit code.

    Args:
        resume: The command that goes on with an interrupted or failed run; empty for verbs without one.

    Raises:
        UsageError: For settings, problems and folders that can't work.
        KeyboardInterrupt: For an interrupt, with what is said of it.
        SystemExit: For a file that can't be read or written, and where another process ended the run.
    """
    from torchmto import NonFiniteError  # noqa: PLC0415 - `--help` should be quick
    from torchmto.lab.grid.runner import FailedRunsError  # noqa: PLC0415
    from torchmto.lab.run.checkpoint import CheckpointError  # noqa: PLC0415
    from torchmto.lab.run.loop import Interrupted  # noqa: PLC0415
    from torchmto.lab.run.processes import is_follower, speaks  # noqa: PLC0415
    from torchmto.lab.user_code import from_here, user_frames  # noqa: PLC0415
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
        kept = f"Interrupted; what is finished is kept.{again}" if again else ""
        raise KeyboardInterrupt(str(error) or kept) from error
    except FailedRunsError as error:
        print(f"{error.frames}error: some runs failed; the others are kept.\n{error}", file=sys.stderr)
        raise SystemExit(1) from error
    except (CheckpointError, NonFiniteError, OSError) as error:
        if frames := user_frames(error):
            print(frames, end="", file=sys.stderr)
            raise SystemExit(1) from error
        if isinstance(error, BrokenPipeError) and not again:  # nothing is lost with whoever read
            raise
        if isinstance(error, FileNotFoundError) and from_here(error):
            raise UsageError(str(error)) from error
        print(f"error: {error}{again}", file=sys.stderr)
        raise SystemExit(1) from error
    except (ValueError, TypeError) as error:
        if not from_here(error):
            raise
        raise UsageError(str(error)) from error


def add_run(parser: Parser) -> None:
    """The options that name a run, its weights and a split."""
    parser.add_argument("--out", "--run", type=Path, required=True, metavar="DIR", help="The run's folder.")
    parser.add_argument(
        "--weights",
        type=str,
        default="best",
        help="best, last, untrained, a checkpoint, or exported weights (.safetensors).",
    )
    parser.add_argument("--split", type=Literal["train", "validation", "test"], default="test", help="Which samples.")
    add_changed_source(parser)


def add_changed_source(parser: Parser) -> None:
    """The option that lets something go on with another version of the problem's file."""
    parser.add_argument(
        "--changed-source", action="store_true", help="Go on though the file that defines the problem has changed."
    )


def add_executor(parser: Parser, usual: str) -> None:
    """The options that say where Runs go.

    Args:
        parser: To have them.
        usual: Says how many Runs at a time there are by default.
    """
    parser.add_argument(
        "--jobs",
        type=PositiveInt | None,
        metavar="J",
        help=f"Runs at a time ({usual}; as many as the cluster at --ray-address takes); 1 for undisturbed timings.",
    )
    parser.add_argument("--executor", type=str, default="local", help="Where runs go: local, ray or slurm.")
    parser.add_argument("--ray-address", type=str | None, metavar="A", help="Of a Ray cluster; a local one by default.")


def this_command() -> str:
    """What was typed."""
    return shlex.join(["torchmto", *sys.argv[1:]])
