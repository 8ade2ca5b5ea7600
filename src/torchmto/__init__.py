"""Multi-task optimisation for PyTorch: which task's gradient wins, decided at every step."""

from torchmto import metrics, structure
from torchmto._version import __version__
from torchmto.methods import Method, make_method, methods
from torchmto.multitask import MultiTask
from torchmto.step import NonFiniteError, StepInfo
from torchmto.structure import ProximalAffinity

__all__ = [
    "Method",
    "MultiTask",
    "NonFiniteError",
    "ProximalAffinity",
    "StepInfo",
    "__version__",
    "make_method",
    "methods",
    "metrics",
    "structure",
]
