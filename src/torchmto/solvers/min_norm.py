"""The shortest convex combination of the gradients."""

import numpy as np
import numpy.typing as npt

from torchmto.solvers.nonnegative import least_distance
from torchmto.solvers.solution import Array, Solution
from torchmto.solvers.unit import check_gramian, factor, uniform, unit_gramian


def min_norm(gramian: npt.ArrayLike, *, precision: float | None = None, tolerance: float = 1e-9) -> Solution:
    r"""Weights on the simplex that minimise :math:`w^\top G w`.

    Exact: a closed form for two tasks, an active-set method otherwise. The shortest point ``x`` of the hull of
    the gradients is, up to its length, the shortest vector with :math:`g_i \cdot x \ge 1` for all tasks, and
    that is a non-negative least-squares problem (Lawson and Hanson, Solving Least Squares Problems, chapter
    23).

    Where a gradient is zero the minimum is 0 and the zero gradients share the weight equally.

    Args:
        gramian: Inner products of the gradients, shape [K, K].
        precision: Machine precision of the gradients; by default that of the Gramian's type.
        tolerance: The residual up to which the solution counts as converged, where the precision allows as much.

    Returns:
        The weights, with sum 1. The residual is the largest violation of :math:`g_i \cdot x \ge \|x\|^2`, per
        unit of :math:`\|g_i\|` and of the shortest gradient's length.

    Raises:
        ValueError: If the Gramian isn't a square matrix of finite numbers.

    Source:
        Désidéri, Multiple-gradient descent algorithm (MGDA), 2012, section 2; Sener and Koltun, 2018,
        equation 4.

    >>> min_norm([[1.0, 0.0], [0.0, 3.0]]).weights
    array([0.75, 0.25])
    """
    unit = unit_gramian(gramian, precision)
    num_tasks = unit.num_tasks
    if len(unit.live) < num_tasks:
        zero = unit.norms == 0
        return Solution(zero / zero.sum(), converged=True, residual=0.0, iterations=0)
    if num_tasks == 1:
        return Solution(np.ones(1), converged=True, residual=0.0, iterations=0)
    columns, shares, iterations = factor(unit.cosines), unit.norms.min() / unit.norms, 0
    if num_tasks == 2:
        weights = _two_tasks(check_gramian(gramian))
    else:
        multipliers = least_distance(columns, shares)
        if multipliers is None:
            # The iteration limit: the shortest gradient.
            multipliers = (shares == 1.0).astype(np.float64)
        weights, iterations = multipliers * shares, int(np.count_nonzero(multipliers))
        weights = weights / weights.sum()
    point = columns @ (weights / shares)
    residual = float(max(0.0, ((point @ point) * shares - point @ columns).max()))
    return Solution(weights, converged=residual <= max(tolerance, unit.noise), residual=residual, iterations=iterations)


def _two_tasks(gramian: Array) -> Array:
    """The closed form; equal weights where the two gradients are the same."""
    weights = (gramian.diagonal()[::-1] - gramian[0, 1]).clip(min=0.0)
    total = weights.sum()
    return weights / total if total > 1e-15 * np.trace(gramian) else uniform(2)
