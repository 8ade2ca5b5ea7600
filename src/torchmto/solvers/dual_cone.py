r"""Projections on the cone of directions that conflict with no task, :math:`\{d : J d \ge 0\}`."""

import numpy as np
import numpy.typing as npt

from torchmto.solvers.nonnegative import nonnegative_least_squares
from torchmto.solvers.solution import Array, Solution
from torchmto.solvers.unit import UnitGramian, check_weights, factor, unit_gramian


def dual_cone(
    gramian: npt.ArrayLike,
    preference: npt.ArrayLike | None = None,
    *,
    precision: float | None = None,
    tolerance: float = 1e-9,
) -> Solution:
    r"""Weights of the direction nearest to :math:`u^\top J` that conflicts with no gradient.

    The projection of :math:`u^\top J` on the dual cone :math:`\{d : J d \ge 0\}` is :math:`w^\top J` for the
    :math:`w \ge u` that minimises :math:`w^\top G w`: a non-negative least-squares problem in ``w - u``,
    solved exactly by an active-set method on gradients of unit length, so that short gradients are respected
    like long ones.

    Zero gradients keep their preference.

    Args:
        gramian: Inner products of the gradients, shape [K, K].
        preference: The weights u, shape [K]; the mean, 1/K each, by default.
        precision: Machine precision of the gradients; by default that of the Gramian's type.
        tolerance: The residual up to which the solution counts as converged, where the precision allows as much.

    Returns:
        The weights w. The residual is the largest projection of the update against a unit gradient, relative
        to the length of the direction before the projection.

    Raises:
        ValueError: If the Gramian isn't a square matrix of finite numbers or the preference doesn't fit it.

    Source:
        Lopez-Paz and Ranzato, Gradient episodic memory, 2017, equation 11 (DualProj).

    >>> dual_cone([[1.0, -1.0], [-1.0, 4.0]]).weights
    array([0.5, 0.5])
    """
    unit = unit_gramian(gramian, precision)
    preference = check_weights(preference, unit.num_tasks, 1.0 / unit.num_tasks)
    norms = unit.norms[unit.live]
    lengths = preference[unit.live] * norms
    size = np.abs(lengths).max(initial=0.0)
    if size == 0.0:
        return Solution(preference, converged=True, residual=0.0, iterations=0)
    target = (lengths / size)[None]
    multipliers, residual = project_on_dual_cone(unit, target)
    added = unit.expand(multipliers[0] * (size / norms))
    converged = residual <= max(tolerance, unit.resolution)
    return Solution(preference + added, converged, residual, int(np.count_nonzero(multipliers)))


def upgrad(
    gramian: npt.ArrayLike,
    preference: npt.ArrayLike | None = None,
    *,
    precision: float | None = None,
    tolerance: float = 1e-9,
) -> Solution:
    r"""Weights of the mean of the gradients' projections on the dual cone.

    Every gradient is projected on :math:`\{d : J d \ge 0\}` by itself, and the projections are combined with
    the preference. The projections depend only on the angles, and scale with the gradient, so lengths that
    span many orders of magnitude do no harm.

    Args:
        gramian: Inner products of the gradients, shape [K, K].
        preference: How much each projection counts, shape [K]; 1/K each by default.
        precision: Machine precision of the gradients; by default that of the Gramian's type.
        tolerance: The residual up to which the solution counts as converged, where the precision allows as much.

    Returns:
        The weights. The residual is the largest projection of any projected unit gradient against a unit
        gradient.

    Raises:
        ValueError: If the Gramian isn't a square matrix of finite numbers or the preference doesn't fit it.

    Source:
        Quinton and Rey, Jacobian descent for multi-objective optimization, 2024, section 2 (UPGrad).

    >>> upgrad([[1.0, -1.0], [-1.0, 4.0]]).weights
    array([1. , 0.625])
    """
    unit = unit_gramian(gramian, precision)
    preference = check_weights(preference, unit.num_tasks, 1.0 / unit.num_tasks)
    norms = unit.norms[unit.live]
    multipliers, residual = project_on_dual_cone(unit, np.eye(len(norms)))
    added = unit.expand(((preference[unit.live] * norms) @ multipliers) / norms)
    converged = residual <= max(tolerance, unit.resolution)
    return Solution(preference + added, converged, residual, int(np.count_nonzero(multipliers)))


def project_on_dual_cone(unit: UnitGramian, targets: Array) -> tuple[Array, float]:
    r"""What has to be added to combinations of unit gradients so that they conflict with none.

    A positive combination of the gradients that vanishes up to rounding leaves the multipliers at the mercy of the rounding
    errors. Where they grow beyond :math:`1 / (4 \sqrt{\nu})` times the target, :math:`\nu` being the noise of an eigenvalue,
    the problem is solved again with :math:`\nu` added to the squared length of every unit gradient, which bounds them by
    twice as much.

    Args:
        unit: The gradients; zero ones take no part.
        targets: Combinations to project, one per row, shape [N, number of live gradients].

    Returns:
        Non-negative multipliers, like targets, and the largest remaining conflict, with what rounding errors can make of it,
        relative to the target's length. A problem that reaches its iteration limit keeps multipliers of 0.
    """
    multipliers = np.zeros_like(targets)
    cosines = unit.live_cosines()
    columns = factor(cosines)
    directions = targets @ columns.T
    sizes = np.abs(targets).sum(axis=1)
    lengths = np.maximum(np.linalg.norm(directions, axis=1), unit.resolution * sizes)
    for index in np.flatnonzero((directions @ columns < 0).any(axis=1)):
        solution = nonnegative_least_squares(columns, -directions[index])
        if solution is not None and 16 * unit.noise * (solution @ solution) > lengths[index] ** 2:
            ridge = unit.resolution * np.eye(len(cosines))
            target = np.concatenate([-directions[index], np.zeros(len(cosines))])
            solution = nonnegative_least_squares(np.vstack([columns, ridge]), target)
        if solution is not None:
            multipliers[index] = solution
    weights = targets + multipliers
    conflict = -(weights @ cosines).min(axis=1, initial=0.0) + unit.rounding * np.abs(weights).sum(axis=1)
    return multipliers, float((conflict / lengths).max(initial=0.0))
