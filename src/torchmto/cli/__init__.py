"""The command line. Each verb is one module here with ``make_parser(prog)`` and ``run(args) -> int``.

The first line of a verb's docstring is its help. Only the module of the verb that was asked for is imported.

Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted by Ctrl-C or SIGTERM; a verb that can go on says how.
"""

import argparse
import ast
import contextlib
import importlib
import io
import os
import pkgutil
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path

from torchmto._version import __version__
from torchmto.checks import nearest
from torchmto.cli._errors import INTERRUPTED, UsageError

__all__ = ["main"]

DONE, FAILED, WRONG_USAGE = 0, 1, 2


def verbs() -> list[str]:
    """Names of all verbs."""
    return sorted(entry.name for entry in pkgutil.iter_modules(__path__) if not entry.name.startswith("_"))


def _help(verb: str) -> str:
    """The first line of a verb's docstring, read without importing it."""
    source = (Path(__path__[0]) / f"{verb}.py").read_text(encoding="utf-8")
    return (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]


def _overview() -> str:
    width = max(map(len, verbs()))
    lines = [f"  {verb:<{width}}  {_help(verb)}" for verb in verbs()]
    return "\n".join(
        [
            "usage: torchmto VERB [options]        (torchmto VERB --help tells the options)",
            "",
            *lines,
            "",
            "exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted (a verb that can go on says how)",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb.

    Args:
        argv: The arguments after the program's name; those of the process by default.

    Returns:
        The exit code.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors != "backslashreplace":
            stream.reconfigure(errors="replace")  # a terminal that has no Δ is no reason to fail
    try:
        code = _dispatch(list(sys.argv[1:] if argv is None else argv))
    except OSError:  # of an output, which is told below
        code = FAILED
    return _written(code)


def _written(code: int) -> int:
    """Write out what is buffered, since at exit Python would complain; `FAILED` if that can't be done."""
    for stream in (sys.stdout, sys.stderr):
        try:
            print(end="", file=stream, flush=True)
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            if code == DONE and not isinstance(error, BrokenPipeError):  # a pipe's reader had seen enough
                print(f"torchmto: {error}", file=sys.stderr)
            code = FAILED
    return code


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in {"-h", "--help", "help"}:
        print(_overview())
        return DONE if arguments else WRONG_USAGE
    if arguments[0] in {"-V", "--version"}:
        print(f"torchmto {__version__}")
        return DONE
    verb = arguments[0]
    if verb not in verbs():
        near = nearest(verb, verbs())
        print(f"torchmto: unknown verb {verb!r}; there are {', '.join(verbs())}.{near}", file=sys.stderr)
        return WRONG_USAGE
    with _interruptible():
        return _run(verb, arguments[1:])


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C and SIGTERM raise KeyboardInterrupt, also where a shell that started us in the background blocked that."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    former = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in former:
        signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def _run(verb: str, arguments: list[str]) -> int:
    try:
        module = importlib.import_module(f"torchmto.cli.{verb}")
        parser: argparse.ArgumentParser = module.make_parser(f"torchmto {verb}")
        code: int = module.run(parser.parse_args(arguments))
    except SystemExit as stop:
        if isinstance(stop.code, int):
            return stop.code
        print(f"torchmto {verb}: {stop.code or '`sys.exit` was called.'}", file=sys.stderr)
        return FAILED
    except UsageError as error:
        print(f"torchmto {verb}: {error}", file=sys.stderr)
        return WRONG_USAGE
    except KeyboardInterrupt as interrupt:
        hint = str(interrupt) or "Interrupted."
        print(f"\ntorchmto {verb}: {hint}", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        raise
    except ImportError as error:
        if frames := _frames(error):
            print(frames, end="", file=sys.stderr)
            return FAILED
        own = error.name is None or error.name.partition(".")[0] == "torchmto"
        hint = "" if own else ". The lab needs more packages: pip install 'torchmto[lab]'"
        print(f"torchmto {verb}: {error}{hint}", file=sys.stderr)
        return FAILED
    except OSError as error:
        print(f"torchmto {verb}: {error}", file=sys.stderr)
        return FAILED
    except Exception as error:  # noqa: BLE001  the last stop: every other failure has one exit code, and shows where it was
        print(_frames(error) or traceback.format_exc(), end="", file=sys.stderr)
        return FAILED
    return code


def _frames(error: BaseException) -> str:
    """Where in a user's own code an error was, if it was there."""
    from torchmto.lab.user_code import user_frames  # noqa: PLC0415  only the lab runs other people's code

    return user_frames(error)
