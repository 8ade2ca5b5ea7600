"""Names of the methods: a class registers itself where it is defined."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import typing
from collections.abc import Callable
from typing import Any, TypeVar

from torchmto.checks import nearest
from torchmto.methods.method import Method

_REGISTRY: dict[str, type[Method]] = {}
_M = TypeVar("_M", bound=type[Method])


def register(name: str) -> Callable[[_M], _M]:
    """Class decorator: make a method known under ``name``.

    Raises:
        ValueError: If the name is taken.
    """

    def decorate(cls: _M) -> _M:
        if name in _REGISTRY:
            raise ValueError(f"A method named `{name}` is already registered: {_REGISTRY[name].__qualname__}.")
        cls.name = name
        _REGISTRY[name] = cls
        return cls

    return decorate


def load_all(package: str) -> None:
    """Import every module of a package, so that its methods register themselves."""
    module = importlib.import_module(package)
    for entry in pkgutil.walk_packages(module.__path__, prefix=f"{package}."):
        importlib.import_module(entry.name)


def methods() -> list[str]:
    """The names of all registered methods, in alphabetical order.

    Example:
        >>> import torchmto
        >>> "wpcgrad" in torchmto.methods()
        True
    """
    return sorted(_REGISTRY)


def method_class(name: str) -> type[Method]:
    """The class registered under ``name``.

    Raises:
        ValueError: If there is none.
    """
    if name not in _REGISTRY:
        raise ValueError(f"Unknown method `{name}`. The methods are {', '.join(methods())}.{nearest(name, methods())}")
    return _REGISTRY[name]


def hyperparameters_of(cls: type[Method]) -> dict[str, bool] | None:
    """The hyper-parameters of a method: name -> whether it has to be given; None if it takes any name.

    Example:
        >>> hyperparameters_of(method_class("pcgrad"))
        {'shuffle': False, 'heads': False, 'refresh_every': False}
    """
    known: dict[str, bool] = {}
    for parameter in inspect.signature(cls).parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            options = typing.get_args(typing.get_type_hints(cls.__init__).get(parameter.name))
            if not options:
                return None
            known |= dict.fromkeys(typing.get_type_hints(options[0]), False)
        elif parameter.kind is not parameter.VAR_POSITIONAL:
            known[parameter.name] = parameter.default is parameter.empty
    return known


def make_method(name: str, /, **hyperparameters: Any) -> Method:
    """Construct a method by name.

    Args:
        name: One of :func:`methods`.
        **hyperparameters: The method's own; see its page.

    Raises:
        ValueError: If the name is unknown or a value is out of range.
        TypeError: If the method has no such hyper-parameter, or needs one that is missing.

    Example:
        >>> import torchmto
        >>> torchmto.make_method("wpcgrad", mode="pairwise").name
        'wpcgrad'
    """
    cls = method_class(name)
    known = hyperparameters_of(cls)
    if known is not None:
        listed = f"Its hyper-parameters are {', '.join(known)}." if known else "It has none."
        for given in hyperparameters:
            if given not in known:
                raise TypeError(f"Method `{name}` has no hyper-parameter `{given}`.{nearest(given, known)} {listed}")
        for needed, required in known.items():
            if required and needed not in hyperparameters:
                raise TypeError(f"Method `{name}` needs the hyper-parameter `{needed}`. {listed}")
    try:
        return cls(**hyperparameters)
    except TypeError as error:
        raise TypeError(f"Method `{name}`: {error}") from error
