"""The mean of gradients made orthogonal and equally long."""

from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from torchmto.checks import check_choice
from torchmto.solvers.solution import Solution
from torchmto.solvers.unit import check_weights, factor, unit_gramian

Scale = Literal["min", "median", "rmse"]


def aligned(
    gramian: npt.ArrayLike,
    *,
    scale: Scale = "min",
    preference: npt.ArrayLike | None = None,
    precision: float | None = None,
) -> Solution:
    r"""Weights :math:`\sqrt{\lambda} V \Lambda^{-1/2} V^\top u` over the numerical rank of the Gramian.

    The gradients are replaced by the nearest set of orthogonal vectors of one length, which has condition
    number 1. The eigenvectors V and eigenvalues :math:`\Lambda` come from a singular value decomposition of a
    factor of the Gramian, which keeps the small eigenvalues accurate when the gradients' lengths differ by
    orders of magnitude. The rank is that of gradients in single precision, or in
    their own if that is coarser: where what the others leave of a unit gradient has a squared length below K
    times 1e-6, it counts as dependent on them, as the "min" scale would otherwise be the length of rounding
    errors.

    Args:
        gramian: Inner products of the gradients, shape [K, K].
        scale: The common squared length: the smallest eigenvalue over the numerical rank (paper), the median
            one (of two middle ones the smaller), or the mean one.
        preference: The weights u of the tasks, shape [K]; 1 each by default, so the update is a sum (TorchJD
            takes the mean).
        precision: Machine precision of the gradients; by default that of the Gramian's type.

    Returns:
        The weights; the preference itself where all gradients are zero.

    Raises:
        ValueError: If the Gramian isn't a square matrix of finite numbers, the preference doesn't fit it, or
            the scale is unknown.

    Source:
        Senushkin et al., Independent component alignment for multi-task learning (Aligned-MTL), 2023,
        algorithm 1.

    >>> aligned([[1.0, 0.0], [0.0, 4.0]]).weights
    array([1. , 0.5])
    """
    check_choice("scale", scale, get_args(Scale))
    unit = unit_gramian(gramian, precision)
    preference = check_weights(preference, unit.num_tasks, 1.0)
    if len(unit.live) == 0 or unit.num_tasks == 1:
        return Solution(preference, converged=True, residual=0.0, iterations=0)
    rows = factor(unit.live_cosines(), unit.rank_noise) * unit.norms[unit.live]
    _, lengths, directions = np.linalg.svd(rows, full_matrices=False)
    if scale == "min":
        length = lengths[-1]
    elif scale == "median":
        length = lengths[len(lengths) // 2]
    else:
        length = np.sqrt((lengths**2).mean())
    weights = ((directions @ preference[unit.live]) * (length / lengths)) @ directions
    return Solution(unit.expand(weights), converged=True, residual=0.0, iterations=0)
