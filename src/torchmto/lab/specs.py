"""Methods written as text: ``pcgrad``, ``wpcgrad(mode=pairwise, priority=uw)``."""

import ast
import inspect
import keyword
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torchmto.checks import found
from torchmto.methods import Method, make_method, method_class


@dataclass(frozen=True)
class MethodSpec:
    """A method's name and its hyper-parameters, before it is constructed.

    Args:
        name: One of `torchmto.methods`.
        hyperparameters: What `torchmto.make_method` is given.

    Example:
        >>> MethodSpec("wpcgrad", {"mode": "pairwise", "gamma": 2.0}).label
        'wpcgrad(mode=pairwise, gamma=2.0)'
    """

    name: str
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The text that `parse_method` reads back."""
        if not self.hyperparameters:
            return self.name
        inner = ", ".join(f"{key}={_written(value)}" for key, value in self.hyperparameters.items())
        return f"{self.name}({inner})"

    def takes(self, hyperparameter: str) -> bool:
        """Whether the method has this hyper-parameter and the text leaves it open."""
        known = inspect.signature(method_class(self.name)).parameters
        return hyperparameter in known and hyperparameter not in self.hyperparameters

    def make(self, **more: Any) -> Method:
        """Construct the method.

        Args:
            **more: Hyper-parameters that the text leaves open.

        Raises:
            ValueError: If the name is unknown or a value is out of range.
            TypeError: If the method has no such hyper-parameter, or needs one that is missing.
        """
        return make_method(self.name, **{**self.hyperparameters, **more})


def parse_method(text: str) -> MethodSpec:
    """One method from its text; whether there is one of that name shows when it is made.

    Values are numbers, strings (without quotes where they are plain names), True, False, None, and lists and
    mappings of these. The text is parsed, never run.

    Args:
        text: Such as ``task_groups(groups=[[left, right], [offset]])``.

    Raises:
        ValueError: If the text has another form.

    Example:
        >>> parse_method("static(weights={left: 1, right: 0.5})").hyperparameters
        {'weights': {'left': 1, 'right': 0.5}}
    """
    specs = parse_methods(text)
    if len(specs) != 1:
        raise ValueError(f"Parameter `method` should name one method. Found {text!r}.")
    return specs[0]


def parse_methods(text: str) -> tuple[MethodSpec, ...]:
    """Several methods from their texts, with commas in between.

    Args:
        text: Such as ``gd,pcgrad,wpcgrad(priority=uw)``.

    Raises:
        TypeError: If it isn't text.
        ValueError: If the text has another form, or a method is there twice.

    Example:
        >>> [spec.label for spec in parse_methods("gd,wpcgrad(priority=[0.5, 0.25, 0.25])")]
        ['gd', 'wpcgrad(priority=[0.5, 0.25, 0.25])']
    """
    if not isinstance(text, str):
        raise TypeError(found("method", "a text such as `wpcgrad(mode=pairwise)`", text))
    try:
        body = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"Methods should look like `gd,wpcgrad(mode=pairwise)`. Found {text!r}.") from error
    specs = tuple(_spec(node) for node in (body.elts if isinstance(body, ast.Tuple) else [body]))
    labels = [spec.label for spec in specs]
    if not specs or len(set(labels)) < len(labels):
        raise ValueError(f"Methods should be named once each, at least one. Found {text!r}.")
    return specs


def _spec(node: ast.expr) -> MethodSpec:
    hyperparameters: dict[str, Any] = {}
    name = node
    if isinstance(node, ast.Call):
        name = node.func
        if node.args or any(entry.arg is None for entry in node.keywords):
            raise ValueError(f"Hyper-parameters should be given as `name=value`. Found `{ast.unparse(node)}`.")
        hyperparameters = {str(entry.arg): _value(entry.value) for entry in node.keywords}
    if not isinstance(name, ast.Name):
        raise ValueError(f"A method should look like `wpcgrad(mode=pairwise)`. Found `{ast.unparse(node)}`.")
    return MethodSpec(name.id, hyperparameters)


def _value(node: ast.expr) -> Any:
    match node:
        case ast.Constant(value=None | bool() | int() | float() | str()):
            return node.value
        case ast.Name():
            return node.id
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as number)):
            return -number
        case ast.List() | ast.Tuple():
            return [_value(entry) for entry in node.elts]
        case ast.Dict(keys=keys) if all(key is not None for key in keys):
            return {_value(key): _value(value) for key, value in zip(keys, node.values, strict=True) if key is not None}
    raise ValueError(
        "A hyper-parameter should be a number, a string, True, False, None, or a list or mapping of these. "
        f"Found `{ast.unparse(node)}`."
    )


def _written(value: Any) -> str:
    """``value`` as `_value` reads it: plain names without quotes."""
    if isinstance(value, str):
        return value if value.isidentifier() and not keyword.iskeyword(value) else repr(value)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_written(key)}: {_written(entry)}" for key, entry in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_written(entry) for entry in value) + "]"
    return repr(value)
