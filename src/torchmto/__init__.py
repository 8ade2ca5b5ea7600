"""Multi-task optimisation for PyTorch: which task's gradient wins, decided at every step."""

from torchmto import metrics, structure
from torchmto._version import __version__
from torchmto.methods import (
    Cost,
    Domain,
    GradientCombiner,
    GramianWeighting,
    LossWeighting,
    Method,
    Procedure,
    Properties,
    make_method,
    method_class,
    methods,
    register_method,
)
from torchmto.multitask import MultiTask
from torchmto.step import Losses, NonFiniteError, RankFailedError, StepContext, StepInfo, TaskGradients
from torchmto.structure import ProximalAffinity

__all__ = [
    "Cost",
    "Domain",
    "GradientCombiner",
    "GramianWeighting",
    "LossWeighting",
    "Losses",
    "Method",
    "MultiTask",
    "NonFiniteError",
    "Procedure",
    "Properties",
    "ProximalAffinity",
    "RankFailedError",
    "StepContext",
    "StepInfo",
    "TaskGradients",
    "__version__",
    "make_method",
    "method_class",
    "methods",
    "metrics",
    "register_method",
    "structure",
]
