"""Everything that can be timed, by name: hand-written bounds, torchmto's methods, other libraries."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

import torchmto
from torchmto.lab.bench.bounds import BOUNDS, Step
from torchmto.lab.bench.cases import Case
from torchmto.lab.bench.peers import peer_names, peer_step
from torchmto.methods import make_method, method_class, methods
from torchmto.structure import split_norms

__all__ = ["bound_of", "contestant_names", "holds_rows", "make_step"]

_ENGINES = ("layerwise", "representation")
_NEEDS_WEIGHTS = ("static", "constant")


def contestant_names(*, peers: bool) -> list[str]:
    """All methods that need no arguments, pcgrad and mgda with the other gradient engines, and the peers that import."""
    names = [name for name in methods() if name not in _NEEDS_WEIGHTS]
    names += ["pcgrad@layerwise", "mgda@layerwise", "mgda@representation"]
    return names + (peer_names() if peers else [])


def bound_of(name: str) -> str:
    """The hand-written step that a contestant is measured against."""
    if name in BOUNDS or "/" in name or "@" in name:
        return "lb*"
    family = method_class(name).family
    own = {"sequential": "singles*", "task_groups": "turns*", "connection_strength": "separate*"}.get(name)
    return own or ("gd*" if family == "loss weighting" and make_method(name).cost(7).num_backward == 1 else "lbm*")


def holds_rows(name: str) -> bool:
    """Whether a step keeps K gradients of the trunk."""
    return name not in ("gd*", "lb*") and bound_of(name) != "gd*" and "@" not in name


def make_step(name: str, case: Case) -> Step:
    """A contestant's step on a case. The optimizer is SGD with momentum, in its fused-loop ("foreach") form.

    Raises:
        ValueError: If there is no such contestant.
    """
    if name == "connection_strength":
        return _split(case)
    optimizer = torch.optim.SGD(case.parameters(), lr=1e-4, momentum=0.9)
    if name in BOUNDS:
        return BOUNDS[name](case, optimizer)
    if "/" in name:
        return peer_step(name, case, optimizer)
    method, engine = _parts(name)
    options: Mapping[str, str] = (
        {"gradients": engine, "features": "0"}
        if engine == "representation"
        else ({"gradients": engine} if engine else {})
    )
    return _ours(case, optimizer, make_method(method), dict(options))


def _parts(name: str) -> tuple[str, str]:
    match = re.fullmatch(r"(\w+)(?:@(\w+))?", name)
    if match is None or match[1] not in methods() or match[2] not in (None, *_ENGINES):
        raise ValueError(f"There is no contestant `{name}`: a method, or METHOD@layerwise, METHOD@representation.")
    return match[1], match[2] or ""


def _ours(case: Case, optimizer: torch.optim.Optimizer, method: torchmto.Method, options: dict[str, str]) -> Step:
    model = nn.ModuleList([case.trunk, case.heads])
    names = [f"task{task}" for task in range(case.num_tasks)]
    index = {name: task for task, name in enumerate(names)}
    multi_task = torchmto.MultiTask(model, optimizer, tasks=names, method=method, **options)  # type: ignore[arg-type]

    def closure(tasks: tuple[str, ...]) -> dict[str, Tensor]:
        features = case.trunk(case.inputs)
        return {name: case.loss(index[name], features) for name in tasks}

    return lambda: multi_task.step(closure)


def _split(case: Case) -> Step:
    """Connection strength's second phase, on a trunk with task-specific norms."""
    names = [f"task{task}" for task in range(case.num_tasks)]
    trunk = split_norms(case.trunk, names)
    split = Case(trunk, case.heads, case.inputs, case.targets)
    optimizer = torch.optim.SGD(split.parameters(), lr=1e-4, momentum=0.9)
    return _ours(split, optimizer, make_method("connection_strength", schedule="phase2"), {})
