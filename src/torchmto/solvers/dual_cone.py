r"""Projections on the cone of directions that conflict with no task, :math:`\{d : J d \ge 0\}`."""

import numpy as np
import numpy.typing as npt

from torchmto.solvers.nonnegative import nonnegative_least_squares
from torchmto.solvers.solution import Array, Solution
from torchmto.solvers.unit import EPS, check_weights, factor, unit_gramian


def dual_cone(gramian: npt.ArrayLike, preference: npt.ArrayLike | None = None, *, tolerance: float = 1e-9) -> Solution:
    r"""Weights of the direction nearest to :math:`u^\top J` that conflicts with no gradient.

    The projection of :math:`u^\top J` on the dual cone :math:`\{d : J d \ge 0\}` is :math:`w^\top J` for the
    :math:`w \ge u` that minimises :math:`w^\top G w`: a non-negative least-squares problem in ``w - u``,
    solved exactly by an active-set method on gradients of unit length, so that short gradients are respected
    like long ones.

    Zero gradients keep their preference.

    Args:
        gramian: inner products of the gradients, shape [K, K].
        preference: the weights u, shape [K]; the mean, 1/K each, by default.
        tolerance: the residual up to which the solution counts as converged.

    Returns:
        The weights w. The residual is the largest projection of the update against a unit gradient, relative
        to the length of the direction before the projection.

    Raises:
        ValueError: if the Gramian isn't a square matrix of finite numbers or the preference doesn't fit it.

    Source:
        Lopez-Paz and Ranzato, Gradient episodic memory, 2017, equation 11 (DualProj).

    >>> dual_cone([[1.0, -1.0], [-1.0, 4.0]]).weights
    array([0.5, 0.5])
    """
    unit = unit_gramian(gramian)
    preference = check_weights(preference, unit.num_tasks, 1.0 / unit.num_tasks)
    norms = unit.norms[unit.live]
    lengths = preference[unit.live] * norms
    size = np.abs(lengths).max(initial=0.0)
    if size == 0.0:
        return Solution(preference, converged=True, residual=0.0, iterations=0)
    target = (lengths / size)[None]
    multipliers, residual = project_on_dual_cone(unit.live_cosines(), target)
    added = unit.expand(multipliers[0] * (size / norms))
    return Solution(preference + added, residual <= tolerance, residual, int(np.count_nonzero(multipliers)))


def upgrad(gramian: npt.ArrayLike, preference: npt.ArrayLike | None = None, *, tolerance: float = 1e-9) -> Solution:
    r"""Weights of the mean of the gradients' projections on the dual cone.

    Every gradient is projected on :math:`\{d : J d \ge 0\}` by itself, and the projections are combined with
    the preference. The projections depend only on the angles, and scale with the gradient, so lengths that
    span many orders of magnitude do no harm.

    Args:
        gramian: inner products of the gradients, shape [K, K].
        preference: how much each projection counts, shape [K]; 1/K each by default.
        tolerance: the residual up to which the solution counts as converged.

    Returns:
        The weights. The residual is the largest projection of any projected unit gradient against a unit
        gradient.

    Raises:
        ValueError: if the Gramian isn't a square matrix of finite numbers or the preference doesn't fit it.

    Source:
        Quinton and Rey, Jacobian descent for multi-objective optimization, 2024, section 2 (UPGrad).

    >>> upgrad([[1.0, -1.0], [-1.0, 4.0]]).weights
    array([1. , 0.625])
    """
    unit = unit_gramian(gramian)
    preference = check_weights(preference, unit.num_tasks, 1.0 / unit.num_tasks)
    norms = unit.norms[unit.live]
    multipliers, residual = project_on_dual_cone(unit.live_cosines(), np.eye(len(norms)))
    added = unit.expand(((preference[unit.live] * norms) @ multipliers) / norms)
    return Solution(preference + added, residual <= tolerance, residual, int(np.count_nonzero(multipliers)))


def project_on_dual_cone(cosines: Array, targets: Array) -> tuple[Array, float]:
    """What has to be added to combinations of unit gradients so that they conflict with none.

    Args:
        cosines: inner products of the unit gradients, shape [K, K].
        targets: combinations to project, one per row, shape [N, K].

    Returns:
        Non-negative multipliers, shape [N, K], and the largest remaining conflict relative to the target's
        length. A problem that reaches its iteration limit keeps multipliers of 0.
    """
    multipliers = np.zeros_like(targets)
    columns = factor(cosines)
    directions = targets @ columns.T
    for index in np.flatnonzero((directions @ columns < 0).any(axis=1)):
        solution = nonnegative_least_squares(columns, -directions[index])
        if solution is not None:
            multipliers[index] = solution
    lengths = np.linalg.norm(directions, axis=1)
    rounding = np.sqrt(EPS) * np.abs(targets).sum(axis=1)
    conflict = -((directions + multipliers @ columns.T) @ columns).min(axis=1, initial=0.0)
    return multipliers, float((conflict / np.maximum(lengths, rounding)).max(initial=0.0))
