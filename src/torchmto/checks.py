"""Checks of arguments, all with one form of message: what the parameter should be, and what was found."""

import difflib
import importlib
import math
import sys
import warnings
from collections.abc import Collection, Iterable
from numbers import Integral, Real
from pathlib import Path
from types import FrameType
from typing import Any

_PACKAGE = str(Path(__file__).parent)


LONGEST = 300
"""Characters that a message shows of a value."""


def found(name: str, should: str, value: object) -> str:
    """The message of every argument error.

    Example:
        >>> found("c", "a non-negative float", -5)
        'Parameter `c` should be a non-negative float. Found `c = -5`.'
    """
    return f"Parameter `{name}` should be {should}. Found `{name} = {shown(value)}`."


def shown(value: object) -> str:
    """A value as a message shows it: on one line, its end left out where it is long."""
    text = " ".join(repr(value).split("\n"))
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def warn(message: str) -> None:
    """Warn, pointing at the first line outside this package: the user's own."""
    frame: FrameType | None = sys._getframe(1)  # noqa: SLF001 - how deep a call is has no public name
    level = 2
    while frame is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def nearest(name: object, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the known name that is most like it; empty if none is.

    Example:
        >>> nearest("PCGard", ["gd", "pcgrad"])
        ' Did you mean `pcgrad`?'
    """
    lowered = {entry.lower(): entry for entry in known}
    alike = difflib.get_close_matches(str(name).lower(), lowered, n=1, cutoff=0.5)
    return f" Did you mean `{lowered[alike[0]]}`?" if alike else ""


def needed(what: str, module: str, extra: str = "lab") -> Any:
    """A module of a package that only an extra brings.

    Args:
        what: What needs it, as the message's first words.
        module: The module.
        extra: The extra.

    Raises:
        ImportError: If it is missing; says what to type.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ImportError(f"{what} needs {package}: pip install 'torchmto[{extra}]'") from error


def unknown_task(name: object, tasks: Iterable[str], where: str = "") -> str:
    """The message about a name that is none of the tasks', found in ``where``.

    Example:
        >>> unknown_task("dept", ["seg", "depth"], "in `weights`")
        'Unknown task `dept` in `weights`. The tasks are seg, depth. Did you mean `depth`?'
    """
    known = list(tasks)
    place = f" {where}" if where else ""
    return f"Unknown task `{name}`{place}. The tasks are {', '.join(known) or 'not known yet'}.{nearest(name, known)}"


def check_number(
    name: str,
    value: Any,
    *,
    minimum: float = -math.inf,
    maximum: float = math.inf,
    above: float = -math.inf,
    below: float = math.inf,
) -> float:
    """Return ``value`` as a float if it is a finite number with minimum <= value <= maximum, above < value < below.

    Raises:
        TypeError: If ``value`` isn't a number.
        ValueError: If it is out of range or not finite.
    """
    given = {">=": minimum, ">": above, "<=": maximum, "<": below}
    bounds = " and ".join(f"{sign} {bound:g}" for sign, bound in given.items() if math.isfinite(bound))
    names = {"": "a finite float", ">= 0": "a non-negative float", "> 0": "a positive float"}
    should = names.get(bounds, f"a float {bounds}")
    # numpy's scalars are numbers of numbers.Real.
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(found(name, should, value))
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not (math.isfinite(number) and minimum <= number <= maximum and above < number < below):
        raise ValueError(found(name, should, value))
    return number


def check_integer(name: str, value: Any, *, minimum: int, maximum: float = math.inf) -> int:
    """Return ``value`` as an int if it is an integer from ``minimum`` to ``maximum``.

    Raises:
        TypeError: If ``value`` isn't an int.
        ValueError: If it is out of range.
    """
    wanted = f"an int >= {minimum}" if maximum == math.inf else f"an int from {minimum} to {maximum}"
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(found(name, wanted, value))
    number = int(value)
    if not minimum <= number <= maximum:
        raise ValueError(found(name, wanted, value))
    return number


def check_flag(name: str, value: Any) -> bool:
    """Return ``value`` if it is a bool: the truth of anything else (a string "false") may not be what was meant.

    Raises:
        TypeError: If it isn't a bool.
    """
    if not isinstance(value, bool):
        raise TypeError(found(name, "True or False", value))
    return value


def check_choice(name: str, value: Any, choices: Collection[str]) -> str:
    """Return ``value`` if it is one of ``choices``.

    Raises:
        ValueError: If it is something else.
    """
    if value not in choices:
        raise ValueError(
            found(name, f"one of {', '.join(repr(choice) for choice in choices)}", value) + nearest(value, choices)
        )
    return str(value)


def check_tasks(tasks: Iterable[str], parameter: str = "tasks") -> tuple[str, ...]:
    """Return the names of the tasks, the argument ``parameter``, as a tuple: at least one, no name twice.

    Names of other types of strings (numpy's, members of an enum) become plain ones, which saved states can hold.

    Raises:
        TypeError: If a name isn't a string, or ``tasks`` is a single string or a set, whose order differs between processes.
        ValueError: If there is no task, an empty name or a name twice.
    """
    if isinstance(tasks, str | set | frozenset) or not isinstance(tasks, Iterable):
        raise TypeError(found(parameter, "a sequence of task names", tasks))
    names = tuple(str.__str__(name) if isinstance(name, str) else name for name in tasks)
    if not names:
        raise ValueError(found(parameter, "a sequence of at least one task name", list(names)))
    for name in names:
        if not isinstance(name, str):
            raise TypeError(found(parameter, "a sequence of strings", list(names)))
        if not name:
            raise ValueError(found(parameter, "a sequence of non-empty names", list(names)))
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(
            f"{found(parameter, 'a sequence of different names', list(names))} Task `{twice}` is there twice."
        )
    return names
