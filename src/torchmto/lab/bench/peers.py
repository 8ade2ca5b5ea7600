"""Other libraries from PyPI, where they import: torchjd (both of its engines) and LibMTL."""

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable

import torch

from torchmto.lab.bench.bounds import Step
from torchmto.lab.bench.cases import Case

_TORCHJD = {
    "upgrad": "UPGrad",
    "pcgrad": "PCGrad",
    "mgda": "MGDA",
    "cagrad": "CAGrad",
    "aligned_mtl": "AlignedMTL",
    "imtl_g": "IMTLG",
    "config": "ConFIG",
    "dualproj": "DualProj",
}
_ARGUMENTS: dict[str, dict[str, float]] = {"cagrad": {"c": 0.4}}
_LIBMTL = {"pcgrad": "PCGrad", "mgda": "MGDA", "imtl_g": "IMTL", "gradvac": "GradVac", "aligned_mtl": "Aligned_MTL"}


def _imports(module: str) -> str | None:
    """Why a module doesn't import; None if it does."""
    if importlib.util.find_spec(module) is None:
        return "not installed"
    try:
        importlib.import_module(module)
    except Exception as error:  # noqa: BLE001  a peer may fail in any way
        return f"{type(error).__name__}: {error}"
    return None


def missing_peers() -> dict[str, str]:
    """Peers that can't be timed here, with the reason."""
    reasons = {module: _imports(module) for module in ("torchjd", "LibMTL")}
    return {module: reason for module, reason in reasons.items() if reason is not None}


def peer_versions() -> dict[str, str]:
    """Versions of the peers that are timed."""
    return {module: importlib.metadata.version(module) for module in ("torchjd", "LibMTL") if not _imports(module)}


def peer_names() -> list[str]:
    """``library/method`` of all peers that import."""
    names = []
    if _imports("torchjd") is None:
        aggregation = importlib.import_module("torchjd.aggregation")
        known = [method for method, cls in _TORCHJD.items() if hasattr(aggregation, cls)]
        names += [f"torchjd/{method}" for method in known] + [f"torchjd-gramian/{method}" for method in known]
    if _imports("LibMTL") is None:
        names += [f"LibMTL/{method}" for method in _LIBMTL]
    return names


def peer_step(name: str, case: Case, optimizer: torch.optim.Optimizer) -> Step:
    """A step of a peer, as its documentation shows it."""
    library, _, method = name.partition("/")
    makers: dict[str, Callable[[str, Case, torch.optim.Optimizer], Step]] = {
        "torchjd": _torchjd_jacobian,
        "torchjd-gramian": _torchjd_gramian,
        "LibMTL": _libmtl,
    }
    return makers[library](method, case, optimizer)


def _torchjd_jacobian(method: str, case: Case, optimizer: torch.optim.Optimizer) -> Step:
    autojac = importlib.import_module("torchjd.autojac")
    aggregation = importlib.import_module("torchjd.aggregation")
    aggregator = getattr(aggregation, _TORCHJD[method])(**_ARGUMENTS.get(method, {}))
    shared = list(case.trunk.parameters())

    def step() -> None:
        optimizer.zero_grad()
        features = case.trunk(case.inputs)
        losses = [case.loss(task, features) for task in range(case.num_tasks)]
        autojac.mtl_backward(losses, features=features)
        autojac.jac_to_grad(shared, aggregator)
        optimizer.step()

    return step


def _torchjd_gramian(method: str, case: Case, optimizer: torch.optim.Optimizer) -> Step:
    autogram = importlib.import_module("torchjd.autogram")
    aggregation = importlib.import_module("torchjd.aggregation")
    engine = autogram.Engine(case.trunk, batch_dim=None)
    weighting = getattr(aggregation, f"{_TORCHJD[method]}Weighting")(**_ARGUMENTS.get(method, {}))

    def step() -> None:
        optimizer.zero_grad()
        losses = torch.stack(case.losses())
        weights = weighting(engine.compute_gramian(losses))
        losses.backward(weights)  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def _libmtl(method: str, case: Case, optimizer: torch.optim.Optimizer) -> Step:
    weighting = getattr(importlib.import_module("LibMTL.weighting"), _LIBMTL[method])()
    weighting.task_num = case.num_tasks
    weighting.task_name = [str(task) for task in range(case.num_tasks)]
    weighting.device = case.inputs.device
    weighting.rep_grad = False
    weighting.get_share_params = case.trunk.parameters
    weighting.zero_grad_share_params = lambda: case.trunk.zero_grad(set_to_none=False)
    weighting.init_param()
    options = {"mgda_gn": "none", "GradVac_beta": 0.5, "GradVac_group_type": 0}

    def step() -> None:
        optimizer.zero_grad()
        losses = torch.stack(case.losses())
        weighting.backward(losses, **options)
        optimizer.step()

    return step
