"""Pure K x K maths: from the Gramian of the tasks' gradients to the weights of the update.

Every function takes the Gramian as a float64 array and returns a :class:`Solution` with a certificate. There
is no model, no autograd and no tensor here. Thresholds are relative to the size of the Gramian, never
absolute.
"""

from torchmto.solvers.aligned import aligned
from torchmto.solvers.bargaining import fair, nash
from torchmto.solvers.cagrad import cagrad
from torchmto.solvers.clustering import affinity_propagation_groups, correlation_groups
from torchmto.solvers.dual_cone import dual_cone, upgrad
from torchmto.solvers.equal_projection import config, imtl_g
from torchmto.solvers.krum import krum
from torchmto.solvers.min_norm import min_norm
from torchmto.solvers.priority_constrained import pcd
from torchmto.solvers.projection import (
    GradVacResult,
    gradvac,
    identity_orders,
    pcgrad,
    wpcgrad,
    wpcgrad_pairwise,
)
from torchmto.solvers.simplex import modo, sdmgrad, sdmgrad_simplex, simplex_projection
from torchmto.solvers.solution import Projection, Solution

__all__ = [
    "GradVacResult",
    "Projection",
    "Solution",
    "affinity_propagation_groups",
    "aligned",
    "cagrad",
    "config",
    "correlation_groups",
    "dual_cone",
    "fair",
    "gradvac",
    "identity_orders",
    "imtl_g",
    "krum",
    "min_norm",
    "modo",
    "nash",
    "pcd",
    "pcgrad",
    "sdmgrad",
    "sdmgrad_simplex",
    "simplex_projection",
    "upgrad",
    "wpcgrad",
    "wpcgrad_pairwise",
]
