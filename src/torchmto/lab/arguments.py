"""Arguments that users write, in the type that a function asks for."""

import inspect
from collections.abc import Mapping
from typing import Any

from torchmto.checks import nearest


def fitted(options: Mapping[str, Any], parameters: Mapping[str, inspect.Parameter], who: str) -> dict[str, Any]:
    """Arguments as a function's annotations and defaults want them."""
    free = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    fitted = {}
    for name, value in options.items():
        if name not in parameters:
            if not free:
                taken = ", ".join(parameters) or "none"
                raise TypeError(f"{who} has no option `{name}`. It takes: {taken}.{nearest(name, parameters)}")
            fitted[name] = value
            continue
        fitted[name] = _fit(value, parameters[name], who)
    return fitted


def _fit(value: Any, parameter: inspect.Parameter, who: str) -> Any:
    kind = parameter.annotation if parameter.annotation is not parameter.empty else type(parameter.default)
    named = {"int": int, "float": float, "str": str, "bool": bool}
    kind = named.get(kind, kind) if isinstance(kind, str) else kind
    if kind is str and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)  # a file called 2024
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind in {int, float, bool} and not (isinstance(value, kind) and (kind is bool or not isinstance(value, bool))):
        raise TypeError(
            f"{who} takes {'an' if kind is int else 'a'} {kind.__name__} for `{parameter.name}`. Found {value!r}."
        )
    return value
