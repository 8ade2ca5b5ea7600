"""Another library from PyPI, where it imports: torchjd, both of its engines."""

import importlib
import importlib.metadata
import importlib.util

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


def missing_peers() -> dict[str, str]:
    """Peers that can't be timed here, with the reason."""
    if importlib.util.find_spec("torchjd") is None:
        return {"torchjd": "not installed"}
    try:
        importlib.import_module("torchjd")
    except Exception as error:  # noqa: BLE001  a peer may fail in any way
        return {"torchjd": f"{type(error).__name__}: {error}"}
    return {}


def peer_versions() -> dict[str, str]:
    """Versions of the peers that are timed."""
    return {} if missing_peers() else {"torchjd": importlib.metadata.version("torchjd")}


def peer_names() -> list[str]:
    """``library/method`` of all peers that import."""
    if missing_peers():
        return []
    aggregation = importlib.import_module("torchjd.aggregation")
    known = [method for method, cls in _TORCHJD.items() if hasattr(aggregation, cls)]
    return [f"torchjd/{method}" for method in known] + [f"torchjd-gramian/{method}" for method in known]


def peer_step(name: str, case: Case, optimizer: torch.optim.Optimizer) -> Step:
    """A step of a peer, as its documentation shows it."""
    engine, _, method = name.partition("/")
    return (_torchjd_jacobian if engine == "torchjd" else _torchjd_gramian)(method, case, optimizer)


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
