r"""The direction nearest to a primary gradient that gives every other task a share of its own progress."""

import numpy as np
import numpy.typing as npt

from torchmto.solvers.nonnegative import least_distance
from torchmto.solvers.solution import Array, Solution
from torchmto.solvers.unit import UnitGramian, factor, unit_gramian


def pcd(
    gramian: npt.ArrayLike,
    tau: float | npt.ArrayLike = 0.02,
    scales: npt.ArrayLike | None = None,
    *,
    precision: float | None = None,
    tolerance: float = 1e-8,
) -> Solution:
    r"""Weights of the priority-constrained direction; the first task is the primary one.

    With :math:`\tilde g_i = s_i g_i`, the :math:`\tilde d` nearest to :math:`\tilde g_1` with :math:`\tilde g_j \cdot
    \tilde d \ge \tau_j \|\tilde g_j\|^2` for all other tasks j, brought to the length of :math:`g_1`. A least-distance
    problem, solved exactly as a non-negative least-squares one on gradients of unit length.

    Fallback, reported as not converged: where no direction satisfies all constraints, or only one so much longer than
    they ask for that the gradients' rounding errors decide on it, they are dropped and the direction is :math:`g_1`. The
    weights are 0 where :math:`\tilde d` vanishes up to rounding. Zero gradients have no constraint; a zero primary
    gradient has weight 1 and all others 0, so that the update is zero.

    Args:
        gramian: Inner products of the gradients, shape [K, K].
        tau: The share of its own progress that each other task is given, in [0, 1]; one number or K - 1.
        scales: What each gradient is multiplied with before, shape [K]; 1 by default.
        precision: Machine precision of the gradients; by default that of the Gramian's type.
        tolerance: The residual up to which the solution counts as converged.

    Returns:
        The weights of the gradients as they are. The residual is the largest violation of a constraint, relative to the
        longest scaled gradient.

    Raises:
        ValueError: If the Gramian isn't a square matrix of finite numbers.

    Source:
        Varam and AlHajri, Not all objectives are born equal: priority-constrained descent, 2026, definition 4.1,
        algorithm 1.

    >>> pcd([[1.0, -1.0], [-1.0, 4.0]], tau=0.25).weights.round(4)
    array([1. , 0.5])
    """
    unit = unit_gramian(gramian, precision)
    primary = np.eye(unit.num_tasks)[0]
    if unit.norms[0] == 0.0 or unit.num_tasks == 1:
        return Solution(primary, converged=True, residual=0.0, iterations=0)
    scales = np.ones(unit.num_tasks) if scales is None else np.asarray(scales, dtype=np.float64)
    lengths = unit.norms * scales
    asked = np.broadcast_to(np.asarray(tau, dtype=np.float64), (unit.num_tasks - 1,))
    multipliers = _multipliers(unit, lengths, np.concatenate([[0.0], asked]))
    if multipliers is None:
        return Solution(primary, converged=False, residual=1.0, iterations=0)
    # The direction in unit gradients, and what is left of the constraints.
    direction = multipliers + lengths[0] * primary
    products = unit.cosines @ direction
    violated = (np.concatenate([[0.0], asked]) * lengths - products)[1:] * (lengths[1:] > 0)
    residual = float(violated.max(initial=0.0) / lengths.max())
    length = float(np.sqrt(max(0.0, direction @ products)))
    if length <= unit.resolution * np.abs(direction).sum():
        return Solution(np.zeros(unit.num_tasks), converged=True, residual=residual, iterations=0)
    weights = unit.expand(direction[unit.live] / unit.norms[unit.live]) * (unit.norms[0] / length)
    steps = int(np.count_nonzero(multipliers))
    weights = primary if steps == 0 else weights
    return Solution(weights, residual <= max(tolerance, unit.resolution), residual, steps)


def _multipliers(unit: UnitGramian, lengths: Array, tau: Array) -> Array | None:
    """What is added of every unit gradient to the primary one, shape [K]; None where the constraints can't be satisfied.

    The shortest x with ``columns.T @ x >= missing``.
    """
    missing = tau * lengths - lengths[0] * unit.cosines[0]
    others = unit.live[1:]
    size = missing[others].max(initial=0.0)
    multipliers = np.zeros(unit.num_tasks)
    if size <= 0.0:
        return multipliers
    columns = factor(unit.live_cosines())[:, 1:]
    demand = missing[others] / size
    solution = least_distance(columns, demand)
    if solution is None:
        return None
    # 1 / (1 + squared length of x).
    left = 1.0 - float(demand @ solution)
    if left <= 16 * unit.noise:
        return None
    multipliers[others] = solution * (size / left)
    return multipliers
