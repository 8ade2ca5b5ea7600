"""Names of the methods: a class registers itself where it is defined."""

import functools
import importlib
import importlib.metadata
import inspect
import pkgutil
from collections.abc import Callable
from typing import Any, TypeVar

from torchmto.checks import found, nearest, warn
from torchmto.methods.method import GramianWeighting, Method

_REGISTRY: dict[str, type[Method]] = {}
_M = TypeVar("_M", bound=type[Method])

GROUP = "torchmto.methods"
"""The entry-point group of methods in other packages: the name of a method = its class."""


def register_method(name: str) -> Callable[[_M], _M]:
    """Class decorator: make a method known under ``name``, in every place where a name is taken.

    It works in any file, also of another package, which can name the class as an entry point of the group ``torchmto.methods``
    instead. A class that is defined again in the same place, as in a notebook, takes the place of the former one.

    Args:
        name: Letters, digits and underscores.

    Raises:
        ValueError: If the name is taken, or can't be one.
        TypeError: If what is decorated isn't a class of methods.

    Example::

        @torchmto.register_method("half")
        class Half(torchmto.LossWeighting):
            # half of the plain sum
            def objective(self, losses, indices=None):
                return losses.sum() / 2
    """
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(found("name", "letters, digits and underscores", name))

    def decorate(cls: _M) -> _M:
        if not (isinstance(cls, type) and issubclass(cls, Method)):
            raise TypeError(found(name, "a subclass of torchmto.Method", cls))
        known = _REGISTRY.get(name)
        if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(f"A method named `{name}` is already registered: {known.__module__}.{known.__qualname__}.")
        cls.name = name
        _REGISTRY[name] = cls
        return cls

    return decorate


@functools.cache
def _load_installed() -> None:
    """Register the methods of installed packages, once."""
    for entry in importlib.metadata.entry_points(group=GROUP):
        try:
            cls = entry.load()
            if _REGISTRY.get(entry.name) is not cls:
                register_method(entry.name)(cls)
        except Exception as error:  # noqa: BLE001 - another package's mistake is no reason to have no methods at all
            warn(f"The method `{entry.name}` of entry point `{entry.value}` can't be used: {error!r}")


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
    _load_installed()
    return sorted(_REGISTRY)


def own_methods() -> dict[str, type[Method]]:
    """The registered classes from outside this package, by name: another process has to be told of them."""
    return {name: _REGISTRY[name] for name in methods() if not _REGISTRY[name].__module__.startswith("torchmto.")}


def method_class(name: str) -> type[Method]:
    """The class registered under ``name``.

    Raises:
        ValueError: If there is none.
    """
    if name not in _REGISTRY:
        _load_installed()
    if name not in _REGISTRY:
        raise ValueError(f"Unknown method `{name}`. The methods are {', '.join(methods())}.{nearest(name, methods())}")
    return _REGISTRY[name]


def hyperparameters_of(cls: type[Method]) -> dict[str, bool] | None:
    """The hyper-parameters of a method: name -> whether it has to be given; None if it takes any name.

    Example:
        >>> hyperparameters_of(method_class("pcgrad"))
        {'shuffle': False, 'heads': False, 'refresh_every': False}
    """
    parameters = inspect.signature(cls).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None
    return {parameter.name: parameter.default is parameter.empty for parameter in parameters}


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


def gramian_method(parameter: str, given: object) -> GramianWeighting:
    """The Gramian method that the argument ``parameter`` names or is.

    Raises:
        TypeError: If it is none.
    """
    made = make_method(given) if isinstance(given, str) else given
    if not isinstance(made, GramianWeighting):
        raise TypeError(found(parameter, "a Gramian method", given))
    return made


def weighing_method(parameter: str, given: object) -> GramianWeighting:
    """The same for an argument whose weights alone are used.

    Raises:
        TypeError: If it is no Gramian method.
        ValueError: If it does more than weigh.
    """
    made = gramian_method(parameter, given)
    if not made.only_weighs:
        raise ValueError(found(parameter, "a Gramian method whose weights are all that it does", given))
    return made
