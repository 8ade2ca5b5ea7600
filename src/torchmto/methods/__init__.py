"""Every method, one file each: loss weightings, Gramian methods, combiners and procedures."""

from torchmto.methods import hyper, states
from torchmto.methods.method import (
    Cost,
    Domain,
    GradientCombiner,
    GramianWeighting,
    Indices,
    LossWeighting,
    Method,
    Procedure,
    Properties,
)
from torchmto.methods.registry import load_all, make_method, method_class, methods, register_method

load_all(__name__)

__all__ = [
    "Cost",
    "Domain",
    "GradientCombiner",
    "GramianWeighting",
    "Indices",
    "LossWeighting",
    "Method",
    "Procedure",
    "Properties",
    "hyper",
    "make_method",
    "method_class",
    "methods",
    "register_method",
    "states",
]
