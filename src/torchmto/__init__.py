"""Multi-task optimisation for PyTorch: which task's gradient wins, decided at every step."""

from torchmto import metrics, structure
from torchmto._version import __version__
from torchmto.methods import (
    Cost,
    GradientCombiner,
    GramianWeighting,
    LossWeighting,
    Method,
    Procedure,
    Properties,
    make_method,
    methods,
    register_method,
)
from torchmto.multitask import MultiTask
from torchmto.step import NonFiniteError, RankFailedError, StepInfo
from torchmto.structure import ProximalAffinity

__all__ = [
    "Cost",
    "GradientCombiner",
    "GramianWeighting",
    "LossWeighting",
    "Method",
    "MultiTask",
    "NonFiniteError",
    "Procedure",
    "Properties",
    "ProximalAffinity",
    "RankFailedError",
    "StepInfo",
    "__version__",
    "make_method",
    "methods",
    "metrics",
    "register_method",
    "structure",
]
