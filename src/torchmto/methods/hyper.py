"""Hyper-parameters, declared in the body of a method's class: type, default and check in one line each."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from torchmto.checks import check_choice, check_flag, check_integer, check_number
from torchmto.methods.per_task import Numbers, PerTask

Check = Callable[[str, Any], Any]
"""The name of a hyper-parameter and what is given -> its value; raises what is wrong with it."""

Search = tuple[Any, ...]
"""What a search draws a hyper-parameter from; see :class:`HyperParameter`."""

REQUIRED = inspect.Parameter.empty
"""The default of what has to be given."""


class HyperParameter:
    """One hyper-parameter of a class, which :class:`~torchmto.Method` takes by its name and makes an attribute of.

    Args:
        default: What is taken where nothing is given.
        check: What makes the attribute's value of that, too.
        kind: The type that signatures show; by default the attribute's.
        search: What a search draws it from: ("log", low, high), ("linear", low, high) or ("choice", ...); () if it isn't.
    """

    def __init__(self, default: Any, check: Check, kind: Any, search: Search) -> None:
        self.default = default
        self.check = check
        self.kind = kind
        self.search = search
        self.name = ""

    def __set_name__(self, owner: type, attribute: str) -> None:
        self.name = self.name or attribute
        self.kind = self.kind or inspect.get_annotations(owner).get(attribute, Any)

    def as_parameter(self) -> inspect.Parameter:
        """As signatures show it."""
        kind = inspect.Parameter.KEYWORD_ONLY
        return inspect.Parameter(self.name, kind, default=self.default, annotation=self.kind)


def given(default: Any, check: Check = lambda _, value: value, kind: Any = None, search: Search = ()) -> Any:
    """A hyper-parameter of any kind; see :class:`HyperParameter`."""
    return HyperParameter(default, check, kind, search)


def number(default: float, *, search: Search = (), **bounds: Any) -> Any:
    """A float within ``bounds``, those of :func:`~torchmto.checks.check_number`."""
    return given(default, partial(check_number, **bounds), search=search)


def integer(default: int | None, *, minimum: int, none: bool = False) -> Any:
    """An int of at least ``minimum``; or None, where that is the default or ``none`` is set."""
    return given(default, _optional(partial(check_integer, minimum=minimum), none or default is None))


def flag(default: bool) -> Any:
    """True or False."""
    return given(default, check_flag)


def choice(default: str, *others: str, search: Search = ()) -> Any:
    """One of some words, the first by default."""
    return given(default, partial(check_choice, choices=(default, *others)), search=search)


def per_task(default: Any, kind: Any = Numbers, *, search: Search = (), **bounds: Any) -> Any:
    """A float within ``bounds`` for all tasks, or one for each (:class:`~torchmto.methods.per_task.PerTask`)."""
    return given(default, _optional(partial(PerTask, **bounds), default is None), kind, search)


def called(name: str, hyperparameter: Any) -> Any:
    """A hyper-parameter that is taken by another name than its attribute's, which means something else."""
    hyperparameter.name = name
    return hyperparameter


def _optional(check: Check, none: bool) -> Check:
    """The check; with ``none`` of anything but None."""
    return (lambda name, value: None if value is None else check(name, value)) if none else check
