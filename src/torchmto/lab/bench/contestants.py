"""Everything that can be timed, by name: hand-written bounds, torchmto's methods, other libraries."""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import torchmto
from torchmto.checks import check_choice
from torchmto.lab.bench.bounds import BOUNDS, Step
from torchmto.lab.bench.cases import Case
from torchmto.lab.bench.peers import peer_names, peer_step
from torchmto.lab.specs import parse_method
from torchmto.methods import GramianWeighting, make_method, method_class, methods
from torchmto.structure import split_norms

_ENGINES = ("parameters", "layerwise", "representation")
_NEEDS_WEIGHTS = ("static", "constant")
_VARIANTS = (
    "pcgrad(gradients=parameters)",
    "pcgrad(gradients=layerwise)",
    "mgda(gradients=layerwise)",
    "mgda(gradients=representation)",
    "pcgrad(refresh_every=10)",
    "task_groups(warmup=0)",
)


@dataclass(frozen=True)
class Contestant:
    """Something that is timed.

    Attributes:
        run: Takes the steps and returns how many optimizer steps one of them had.
        num_steps: How many steps one call of ``run`` takes: a whole cycle of a method that computes weights now and then.
    """

    run: Callable[[], int]
    num_steps: int = 1


@dataclass(frozen=True)
class Bound:
    """The hand-written step that a contestant is measured against: a sum of multiples of hand-written steps.

    Attributes:
        name: As shown.
        parts: Hand-written step -> multiple.
        per_update: Whether the parts are one optimizer step's; times the contestant's number of optimizer steps then.
    """

    name: str
    parts: tuple[tuple[str, float], ...]
    per_update: bool = False


def contestant_names(*, peers: bool) -> list[str]:
    """All methods that need no arguments, some with other engines and options, and the peers that import."""
    names = [name for name in methods() if name not in _NEEDS_WEIGHTS]
    return [*names, *_VARIANTS, *(peer_names() if peers else [])]


def bound_of(name: str, num_tasks: int) -> Bound:
    """What a contestant is measured against.

    Raises:
        ValueError: If there is no such contestant.
    """
    if name in BOUNDS or "/" in name:
        return _bound("lb*")
    method, engine, options = _parts(name)
    if engine:
        return _bound("lbm*" if engine == "parameters" else "lb*")
    every = int(options.get("refresh_every", 1))
    if every > 1:
        return Bound(f"gd*+lb*/{every}", (("gd*", 1.0), ("lb*", 1 / every)))
    if method == "task_groups":
        return Bound("turns*/K", (("turns*", 1 / num_tasks),), per_update=True)
    own = {"sequential": "singles*", "connection_strength": "separate*"}.get(method)
    if issubclass(method_class(method), GramianWeighting):
        # The fastest engine for the case, which needn't be the rows.
        return _bound("lb*")
    one_backward = method_class(method).family == "loss weighting" and make_method(method).cost(7).num_backward == 1
    return _bound(own or ("gd*" if one_backward else "lbm*"))


def _bound(name: str) -> Bound:
    return Bound(name, ((name, 1.0),))


def make_contestant(name: str, case: Case) -> Contestant:
    """A contestant on a case. The optimizer is SGD with momentum, in the form that PyTorch picks for the device.

    Args:
        name: A hand-written step (with a star), a peer's ``library/method``, or a method's text, in which ``gradients`` forces
            an engine: ``cagrad(gradients=layerwise, c=0.2)``.
        case: What it steps.

    Raises:
        ValueError: If there is no such contestant.
    """
    if name in BOUNDS:
        return _once(BOUNDS[name](case, _optimizer(case)))
    if "/" in name:
        return _once(peer_step(name, case, _optimizer(case)))
    method, engine, options = _parts(name)
    if method == "connection_strength":
        # Its second phase, which has the time to lose; the first one is `sequential`.
        names = [f"task{task}" for task in range(case.num_tasks)]
        case = replace(case, trunk=split_norms(case.trunk, names))
        options = {"schedule": "phase2", **options}
    num_steps = int(options.get("refresh_every", 1))
    return Contestant(_ours(case, make_method(method, **options), engine, num_steps), num_steps)


def _optimizer(case: Case) -> torch.optim.Optimizer:
    return torch.optim.SGD(case.parameters(), lr=1e-4, momentum=0.9)


def _once(step: Step) -> Contestant:
    def run() -> int:
        step()
        return 1

    return Contestant(run)


def _parts(name: str) -> tuple[str, str, dict[str, Any]]:
    """Method, engine and hyper-parameters of a method's text."""
    spec = parse_method(name)
    options = dict(spec.hyperparameters)
    engine = options.pop("gradients", "")
    if engine:
        check_choice("gradients", engine, _ENGINES)
    return spec.name, engine, options


def split_names(text: str) -> list[str]:
    """Contestants from their texts, with commas in between.

    Example:
        >>> split_names("gd*, cagrad(gradients=layerwise, c=0.2),torchjd/upgrad")
        ['gd*', 'cagrad(gradients=layerwise, c=0.2)', 'torchjd/upgrad']
    """
    return [name.strip() for name in re.split(r",(?![^(]*\))", text)]


def _ours(case: Case, method: torchmto.Method, engine: str, num_steps: int) -> Callable[[], int]:
    model = nn.ModuleList([case.trunk, case.heads])
    names = [f"task{task}" for task in range(case.num_tasks)]
    index = {name: task for task, name in enumerate(names)}
    multi_task = torchmto.MultiTask(
        model,
        _optimizer(case),
        tasks=names,
        method=method,
        gradients=engine or "auto",
        features="0" if engine == "representation" else None,
    )

    def closure(tasks: tuple[str, ...]) -> dict[str, Tensor]:
        features = case.trunk(case.inputs)
        return {name: case.loss(index[name], features) for name in tasks}

    def run() -> int:
        updates = 0
        for _ in range(num_steps):
            updates = multi_task.step(closure).num_optimizer_steps
        return updates

    return run
