"""Problems and models by reference: a built-in name, ``FILE.py:FUNCTION``, ``package.module:FUNCTION`` or an entry point."""

import contextlib
import functools
import importlib
import importlib.machinery
import importlib.util
import inspect
import re
import sys
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import lru_cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from torch import nn

from torchmto.checks import nearest, warn
from torchmto.lab.arguments import fitted
from torchmto.lab.data.registry import dataset_info, datasets, load_data
from torchmto.lab.models import build_model, models
from torchmto.lab.models.registry import check_options
from torchmto.lab.problem import NO_CALL, Origin, Problem, part_error, source_hash
from torchmto.methods.registry import own_methods

GROUP = "torchmto.problems"


class UnknownReferenceError(ValueError):
    """A reference that leads nowhere."""


def problem_names() -> dict[str, Any]:
    """The entry points of the group ``torchmto.problems`` by name."""
    return {entry.name: entry for entry in entry_points(group=GROUP)}


def resolve(reference: str, what: str = "data", *, anew: bool = False) -> Callable[..., Any]:
    """The function that a reference names.

    Args:
        reference: ``NAME[:PATH]`` of a built-in data set, ``FILE.py:FUNCTION``, ``package.module:FUNCTION``, or the name of an
            entry point.
        what: ``"data"``, or ``"model"``, for which only the middle two are looked at.
        anew: Whether a file that was edited since it was run is run again; not in the middle of something.

    Raises:
        UnknownReferenceError: If it leads nowhere, or to what was never meant to make a problem or model: the standard
            library's functions, which a received file of settings could name to run a command.
    """
    head, _, tail = reference.partition(":")
    if tail.endswith(NO_CALL):
        raise UnknownReferenceError(
            f"`{reference}` was called from Python, with arguments that settings can't hold, or changed the problem it got "
            "(`dataclasses.replace`): they don't lead to it again."
        )
    if what == "data":
        if head in datasets():
            return dataset_info(head).load
        entries = problem_names()
        if reference in entries:
            return _meant(entries[reference].load(), reference, what)
    if head.endswith(".py"):
        path = Path(head).expanduser()
        if not path.is_file():
            raise UnknownReferenceError(f"There is no file `{head}` (in `{reference}`).")
        module = _as_it_is(_module_of_file(path.resolve()), anew=anew)
        return _meant(_attribute(module, tail, reference), reference, what)
    if head.partition(".")[0] in _STANDARD:
        raise _refused(reference, head)
    if tail and all(part.isidentifier() for part in head.split(".")):
        if not {"", str(Path.cwd())} & set(sys.path):
            sys.path.insert(0, str(Path.cwd()))  # as `python -m torchmto` has it
        there = head in sys.modules  # as __main__ is, which has no spec
        if not there:
            with contextlib.suppress(ImportError):  # of a parent package that isn't there
                there = importlib.util.find_spec(head) is not None
        if there:
            module = _as_it_is(importlib.import_module(head), anew=anew)
            return _meant(_attribute(module, tail, reference), reference, what)
    known = [*datasets(), *problem_names()] if what == "data" else list(models())
    raise UnknownReferenceError(
        f"Parameter `{what}` should be one of {', '.join(known)}, or FILE.py:FUNCTION, or package.module:FUNCTION. "
        f"Found `{reference}`.{nearest(head, known)}"
    )


def without_place(reference: str) -> str:
    """What a reference names, wherever that is on a machine: a data set without its path, a file without its folder.

    Example:
        >>> without_place("nyuv2:/data/nyuv2.npz"), without_place("/home/me/farm.py:farm")
        ('nyuv2', 'farm.py:farm')
    """
    head = reference.partition(":")[0]
    return head if head in datasets() else re.sub(r"^.*[/\\](?=[^/\\]+\.py:)", "", reference)


def source_of(reference: str, options: Mapping[str, Any], what: str) -> str | None:
    """A hash of the file that defines an own problem or model; None for what is built in, or isn't there.

    Nothing that the file defines is called.
    """
    if reference.startswith("torchmto."):  # this package has versions of its own, but may be given another's problem
        return source_of(options["of"], {}, what) if "of" in options else None
    head = reference.partition(":")[0]
    if head in datasets():
        return None
    try:
        file = Path(head).expanduser() if head.endswith(".py") else _file_of(resolve(reference, what))
    except UnknownReferenceError:
        return None
    return None if file is None else source_hash(file)


def method_sources(names: Iterable[str]) -> dict[str, str]:
    """The hash of the file that defines a method, by name, of those from outside this package."""
    own = own_methods()
    files = {name: _file_of(own[name]) for name in names if name in own}
    return {name: found for name, file in files.items() if file is not None and (found := source_hash(file))}


_STANDARD = sys.stdlib_module_names | {*sys.builtin_module_names}
_MADE = {"data": (Problem, "Problem"), "model": (nn.Module, "nn.Module", "MultiTaskModel")}
"""What this package's own functions may return, to be referred to."""


def _meant(function: Callable[..., Any], reference: str, what: str) -> Callable[..., Any]:
    """The function, unless it is the standard library's, by whatever name, or one of this package's that do something else."""
    inner: Any = function
    while isinstance(inner, functools.partial):
        inner = inner.func
    bound = getattr(inner, "__self__", inner)
    module = getattr(inner, "__module__", None) or getattr(bound, "__module__", None) or type(bound).__module__
    package = module.partition(".")[0]
    returned = getattr(inner, "__annotations__", {}).get("return")
    if package in _STANDARD or (package == "torchmto" and returned not in _MADE[what]):
        raise _refused(reference, module)
    return function


def _refused(reference: str, module: str) -> UnknownReferenceError:
    return UnknownReferenceError(
        f"`{reference}` should name a function that makes a problem or a model. Found one of `{module}`, which isn't run from "
        "settings; a file of your own is FILE.py:FUNCTION."
    )


def _file_of(function: Any) -> Path | None:
    try:
        return Path(inspect.getsourcefile(function) or "")
    except (TypeError, OSError):  # built in, typed into an interpreter
        return None


def _attribute(module: types.ModuleType, name: str, reference: str) -> Callable[..., Any]:
    function: Any = module
    for part in name.split("."):
        function = getattr(function, part, None)
    if not callable(function):
        own = [n for n, v in vars(module).items() if callable(v) and getattr(v, "__module__", None) == module.__name__]
        raise UnknownReferenceError(
            f"`{reference}` should name a function. `{module.__name__}` has {', '.join(own) or 'none'}.{nearest(name, own)}"
        )
    named: Callable[..., Any] = function
    return named


@lru_cache
def _module_of_file(path: Path) -> types.ModuleType:
    """The module in a file, run once, with the file's folder to import from, as a script has it."""
    loaded = sys.modules.get(path.stem)
    if loaded is not None and Path(getattr(loaded, "__file__", None) or "").resolve() == path:
        return loaded
    free = loaded is None and path.stem.isidentifier() and path.stem not in _STANDARD
    name = path.stem if free else f"_torchmto_{abs(hash(path)):x}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


_run: dict[str, str | None] = {}
"""The hash that a module's file had when it was run, by the module's name."""


def _as_it_is(module: types.ModuleType, *, anew: bool) -> types.ModuleType:
    """A module of one's own, run again if its file has been edited."""
    name, file = module.__name__, getattr(module, "__file__", None)
    loader = getattr(module.__spec__, "loader", None)
    if file is None or not isinstance(loader, importlib.machinery.SourceFileLoader):
        return module
    now = source_hash(Path(file))
    if _run.setdefault(name, now) != now and anew:
        code = loader.source_to_code(Path(file).read_bytes(), file)  # compiled code on the disk may be a second too old
        exec(code, module.__dict__)  # noqa: S102  the user's file, as import runs it
        _run[name] = now
    return module


def load_problem(reference: str, options: Mapping[str, Any], seed: int = 0) -> Problem:
    """The problem that a reference and its arguments make.

    Args:
        reference: See `resolve`.
        options: Arguments of the function.
        seed: Of splits and generated samples, for functions that take ``seed``.

    Raises:
        UnknownReferenceError: If the reference leads nowhere.
        TypeError: If the function has no such argument, or a value doesn't fit it.
        ProblemError: If the function gives something else than a problem.
    """
    head = reference.partition(":")[0]
    if head in datasets():
        problem: Any = load_data(reference, seed, **options)
        # What another module has registered, another process doesn't know.
        source, loadable = None, dataset_info(head).load.__module__.startswith("torchmto.")
    else:
        function = resolve(reference, anew=True)
        parameters = inspect.signature(function).parameters
        arguments = fitted(options, parameters, f"`{reference}`")
        given = {"seed": seed} if "seed" in parameters and "seed" not in arguments else {}
        for name, parameter in parameters.items():
            needed = parameter.default is parameter.empty and parameter.kind not in {2, 4}
            if needed and name not in {**arguments, **given}:
                raise TypeError(
                    f"`{reference}` needs the argument `{name}` (`--problem.{name} VALUE`, `data.options`)."
                )
        problem = function(**arguments, **given)
        source, loadable = source_of(reference, options, "data"), not head.startswith("__main__")
    if not isinstance(problem, Problem):
        raise part_error(reference, "a function that returns a lab.Problem", type(problem).__name__)
    return replace(problem, origin=Origin(reference, dict(options), source, loadable))


# ---------------------------------------------------------------------------------------------------------- models


def model_named(name: str, options: Mapping[str, Any]) -> None:
    """Check a model's name and options.

    Raises:
        UnknownReferenceError: If there is no such model.
        TypeError: If it has no such option.
    """
    if name in models():
        check_options(name, options)
    else:
        resolve(name, "model", anew=True)


def _warn_of_other_statistics(problem: Problem, stated: tuple[tuple[float, ...], tuple[float, ...]] | None) -> None:
    """Warn where inputs are normalised in another way than those that the weights were trained on."""
    if stated is None or problem.mean is None or problem.std is None:
        return
    theirs, ours = (*stated[0], *stated[1]), (*problem.mean, *problem.std)
    if len(theirs) != len(ours) or not all(abs(a - b) < 0.005 for a, b in zip(theirs, ours, strict=True)):
        warn(
            f"The model's weights are for inputs normalised by mean {stated[0]} and std {stated[1]}, as their folder says. "
            f"Those of `{problem.name}` are by mean {problem.mean} and std {problem.std}."
        )


def build_network(
    problem: Problem, name: str | None, options: Mapping[str, Any], *, checkpointing: bool = False
) -> nn.Module:
    """The network of a problem, from the current state of torch's random generator.

    Args:
        problem: Gives its own model, where no other is asked for.
        name: A ready model, or a reference to a function of one's own, which is given ``tasks`` and ``input_shape`` if it
            takes them.
        options: The model's options.
        checkpointing: Whether a ready model runs its trunk's blocks again in the backward pass.

    Raises:
        ProblemError: If there is no model, or it isn't a module.
        TypeError: If the model has no such option.
    """
    chosen = problem.model if name is None else name
    if chosen is None:
        raise part_error("model", "a function that builds the network, unless `model.name` names a ready one", "none")
    if isinstance(chosen, str) and chosen in models():
        model = build_model(chosen, problem.task_list, problem.shape, gradient_checkpointing=checkpointing, **options)
        _warn_of_other_statistics(problem, getattr(model.trunk, "statistics", None))
        return model
    if checkpointing:
        raise ValueError("`model.gradient_checkpointing` is for the lab's ready models.")
    if isinstance(chosen, str):
        function = resolve(chosen, "model")
        parameters = dict(inspect.signature(function).parameters)
        given: dict[str, Any] = {}
        if parameters.pop("tasks", None):
            given["tasks"] = problem.task_list
        if parameters.pop("input_shape", None):
            given["input_shape"] = problem.shape
        network = function(**given, **fitted(options, parameters, f"`{chosen}`"))
    else:
        if options:
            raise TypeError(f"The problem's own model has no options. Found {', '.join(options)}.")
        network = chosen()
    if not isinstance(network, nn.Module):
        raise part_error("model", "a function that returns a torch.nn.Module", type(network).__name__)
    return network
