"""Updates whose projections on all the gradients' directions are equal."""

import numpy as np
import numpy.typing as npt

from torchmto.solvers.solution import Array, Solution
from torchmto.solvers.unit import UnitGramian, positive_eigenvalues, uniform, unit_gramian


def imtl_g(gramian: npt.ArrayLike, *, precision: float | None = None, tolerance: float = 1e-5) -> Solution:
    r"""Weights with sum 1 whose update has equal projections on all unit gradients.

    With unit gradients U the update is along :math:`U^\top (U U^\top)^{+} \mathbb{1}`. As the sum of the
    weights fixes its sign, the common projection can be negative when gradients of unequal length conflict;
    that is the method.

    The rank is that of gradients in single precision, or in their own if that is coarser: eigenvalues of the
    cosines below K times 1e-6 of the largest one count as zero.

    Fallbacks, reported as not converged: where linearly dependent gradients allow no equal projections the
    weights are the least-squares solution; where that is zero, or its weights sum to zero, up to rounding in
    both cases, they are 1/K. Zero
    gradients take no part and get weight 0; if all are zero the weights are 1/K.

    Args:
        gramian: Inner products of the gradients, shape [K, K].
        precision: Machine precision of the gradients; by default that of the Gramian's type.
        tolerance: The residual up to which the solution counts as converged.

    Returns:
        The weights. The residual is the largest deviation of a projection from their mean, relative to the
        mean.

    Raises:
        ValueError: If the Gramian isn't a square matrix of finite numbers.

    Source:
        Liu et al., Towards impartial multi-task learning (IMTL), 2021, equation 5.

    >>> imtl_g([[1.0, 0.0], [0.0, 4.0]]).weights.round(4)
    array([0.6667, 0.3333])
    """
    unit = unit_gramian(gramian, precision)
    if len(unit.live) == 0 or unit.num_tasks == 1:
        return Solution(uniform(unit.num_tasks), converged=True, residual=0.0, iterations=0)
    inverse, coefficients, _, residual = _equalize(unit)
    norms = unit.norms[unit.live]
    weights = coefficients / norms
    total = weights.sum()
    # To first order, what rounding errors of the cosines make of the total.
    error = unit.rounding * np.abs(coefficients).sum() * np.abs(inverse @ (1.0 / norms)).sum()
    if abs(total) <= max(1e-12 * np.abs(weights).sum(), error):
        return Solution(uniform(unit.num_tasks), converged=False, residual=1.0, iterations=0)
    return Solution(unit.expand(weights / total), residual <= tolerance, residual, iterations=0)


def config(gramian: npt.ArrayLike, *, precision: float | None = None, tolerance: float = 1e-5) -> Solution:
    r"""Weights of the conflict-free direction with the length that the gradients agree on.

    The direction is that of :math:`U^{+} \mathbb{1} = U^\top (U U^\top)^{+} \mathbb{1}` for unit gradients U,
    on which all projections are equal; the length is :math:`\sum_i g_i \cdot \hat d`.

    The rank is that of gradients in single precision, or in their own if that is coarser: eigenvalues of the
    cosines below K times 1e-6 of the largest one count as zero.

    Fallbacks, reported as not converged: where linearly dependent gradients allow no equal projections the
    direction is the least-squares one; where that is zero, so are the weights. Zero gradients take no part
    and get weight 0; if all are zero the weights are 1/K.

    Args:
        gramian: Inner products of the gradients, shape [K, K].
        precision: Machine precision of the gradients; by default that of the Gramian's type.
        tolerance: The residual up to which the solution counts as converged.

    Returns:
        The weights. The residual is the largest deviation of a projection from their mean, relative to the
        mean.

    Raises:
        ValueError: If the Gramian isn't a square matrix of finite numbers.

    Source:
        Liu et al., ConFIG: towards conflict-free training of physics informed neural networks, 2024,
        equations 2-4.

    >>> config([[1.0, 0.0], [0.0, 4.0]]).weights
    array([1.5 , 0.75])
    """
    unit = unit_gramian(gramian, precision)
    if len(unit.live) == 0 or unit.num_tasks == 1:
        return Solution(uniform(unit.num_tasks), converged=True, residual=0.0, iterations=0)
    _, coefficients, projections, residual = _equalize(unit)
    norms = unit.norms[unit.live]
    squared_length = float(coefficients @ projections)
    if squared_length <= 0.0:
        return Solution(np.zeros(unit.num_tasks), converged=False, residual=residual, iterations=0)
    weights = coefficients * ((norms @ projections) / squared_length) / norms
    return Solution(unit.expand(weights), residual <= tolerance, residual, iterations=0)


def _equalize(unit: UnitGramian) -> tuple[Array, Array, Array, float]:
    """The pseudo-inverse of the live cosines; what it makes of equal projections, the projections, their deviation."""
    cosines = unit.live_cosines()
    size = len(cosines)
    eigenvalues, vectors = positive_eigenvalues(cosines, unit.rank_noise)
    inverse = (vectors / eigenvalues) @ vectors.T
    share = vectors.sum(axis=0)
    if float(share @ share) <= max(1e-12, unit.noise) * size:
        return inverse, np.zeros(size), np.zeros(size), 1.0
    coefficients = vectors @ (share / eigenvalues)
    projections = cosines @ coefficients
    mean = projections.mean()
    return inverse, coefficients, projections, float(np.abs(projections / mean - 1.0).max())
