r"""Fair shares of the update: :math:`G w = w^{-1/\alpha}` with positive w."""

import numpy as np
import numpy.typing as npt

from torchmto.checks import check_number
from torchmto.solvers.dual_cone import project_on_dual_cone
from torchmto.solvers.solution import Array, Solution
from torchmto.solvers.unit import EPS, factor, uniform, unit_gramian

MAX_STEPS = 60
"""Newton steps of one run."""

MAX_TOTAL = 300
"""Newton steps after which the way to alpha is given up."""

RIDGE = 1e-6
"""Added to the diagonal of the cosines where the equation has no solution; at least the noise of their eigenvalues."""

ROUNDED = 1e-3
"""The largest residual that is put down to rounding errors."""


def nash(gramian: npt.ArrayLike, *, precision: float | None = None, tolerance: float = 1e-8) -> Solution:
    r"""Weights of the Nash bargaining solution, :math:`G w = 1/w` with w > 0.

    The same as :func:`fair` with ``alpha=1``, the case in which the update's direction doesn't depend on the
    lengths of the gradients. See there for the algorithm and the fallbacks.

    Args:
        gramian: Inner products of the gradients, shape [K, K].
        precision: Machine precision of the gradients; by default that of the Gramian's type.
        tolerance: The residual up to which the solution counts as converged, where the precision allows as much.

    Returns:
        The weights; they scale with the inverse of the gradients. Residual as in :func:`fair`.

    Raises:
        ValueError: If the Gramian isn't a square matrix of finite numbers.

    Source:
        Navon et al., Multi-task learning as a bargaining game (Nash-MTL), 2022, equation 3 and claim 3.1.

    >>> nash([[1.0, 0.0], [0.0, 4.0]]).weights
    array([1. , 0.5])
    """
    return fair(gramian, alpha=1.0, precision=precision, tolerance=tolerance)


def fair(
    gramian: npt.ArrayLike, alpha: float = 2.0, *, precision: float | None = None, tolerance: float = 1e-8
) -> Solution:
    r"""Weights of the alpha-fair update, :math:`G w = w^{-1/\alpha}` with w > 0.

    The solution is the minimum of a strictly convex function, :math:`w^\top G w / 2` minus a concave utility
    of each weight, found by Newton steps with a line search on gradients of unit length. Where they don't
    reach it, as with a large alpha, whose weights span many orders of magnitude, the solution for alpha 1 is
    followed to the alpha asked for, in as many stages as it takes, by Newton steps on the logarithm of the
    equation that keep all projections positive.

    Two fallbacks are reported as not converged. There is no solution where a convex combination of the
    gradients vanishes: the weights grow without bound, or, where it vanishes up to rounding, the rounding
    errors decide on them. Then 1e-6, or the noise of the cosines' eigenvalues if that is more, is added to the
    squared length of every unit gradient, which bounds the weights, and conflicts that are left are projected
    away. And where the projections are too small to be told from rounding errors (alpha below 0.5 with lengths
    that span orders of magnitude), the solution is that for the last alpha that was reached on the way from 1,
    which conflicts with no task either. Zero gradients take no part and get weight 0; if all are zero the
    weights are 1/K.

    Args:
        gramian: Inner products of the gradients, shape [K, K].
        alpha: Positive; 1 is proportional fairness, large values favour the worst-off task.
        precision: Machine precision of the gradients; by default that of the Gramian's type.
        tolerance: The residual up to which the solution counts as converged, where the precision allows as much.

    Returns:
        The weights. The residual is the largest relative error of :math:`(G w)_i = w_i^{-1/\alpha}`.

    Raises:
        ValueError: If the Gramian isn't a square matrix of finite numbers or alpha isn't positive.

    Source:
        Ban and Ji, Fair resource allocation in multi-task learning (FairGrad), 2024, equation 8.

    >>> fair([[8.0]], alpha=2.0).weights
    array([0.25])
    """
    check_number("alpha", alpha, above=0)
    unit = unit_gramian(gramian, precision)
    if len(unit.live) == 0:
        return Solution(uniform(unit.num_tasks), converged=True, residual=0.0, iterations=0)
    norms = unit.norms[unit.live]
    columns = factor(unit.live_cosines())
    cosines = columns.T @ columns
    power = 1.0 / alpha
    scale = np.exp(np.log(norms).mean())
    demand = (norms / scale) ** (power - 1.0)
    lengths, residual, iterations = _solve(cosines, demand, power)
    # Where projections are what is left of gradients that nearly cancel, rounding errors keep the residual from being smaller.
    whole, left = np.abs(cosines) @ lengths, np.abs(cosines @ lengths)
    # The quotient that may overflow is turned round.
    rounding = 4 * len(lengths) * EPS / max(float((left / whole).min()), EPS)
    tolerance = max(tolerance, min(rounding, ROUNDED))
    if residual > tolerance or _is_noise(lengths, cosines, unit.noise):
        for matrix in (cosines, cosines + max(RIDGE, unit.noise) * np.eye(len(cosines))):
            bargain, error, steps = _solve(matrix, np.ones_like(demand), 1.0)
            iterations += steps
            if error <= tolerance and not _is_noise(bargain, cosines, unit.noise):
                break
        x, steps = _follow(matrix, np.log(bargain), np.log(norms / scale), power, tolerance)
        iterations += steps
        if matrix is not cosines:
            multipliers, _ = project_on_dual_cone(unit, np.exp(x)[None])
            with np.errstate(divide="ignore"):
                x = np.logaddexp(x, np.log(multipliers[0]))
        lengths = np.exp(x)
        residual = float(np.abs((cosines @ lengths) * np.exp(power * x) / demand - 1.0).max())
    weights = unit.expand(lengths * scale ** ((power - 1.0) / (power + 1.0)) / norms)
    return Solution(weights, residual <= tolerance, residual, iterations)


def _is_noise(lengths: Array, cosines: Array, noise: float) -> bool:
    """Whether rounding errors can change the squared length of a combination of unit gradients by a quarter."""
    return bool(lengths @ cosines @ lengths < 4 * noise * (lengths @ lengths))


def _solve(cosines: Array, demand: Array, power: float) -> tuple[Array, float, int]:
    """Positive x with ``cosines @ x = demand * x**-power``, its largest relative error, the steps taken."""
    size = np.arange(len(demand))
    x = demand ** (1.0 / (1.0 + power))
    pull = demand * x ** (1.0 - power)
    x = x * (pull.sum() / max(float(x @ cosines @ x), 1e-8 * float(x @ x))) ** (1.0 / (1.0 + power))
    limit = 1e8 * x.max()
    best, best_residual = x, np.inf
    for step in range(MAX_STEPS + 1):
        pull = demand * x ** (1.0 - power)
        given = x * (cosines @ x)
        residual = float(np.abs(given / pull - 1.0).max())
        if residual < best_residual:
            best, best_residual = x, residual
        elif best_residual < 1e-6:
            break
        if residual <= 1e-13 or step == MAX_STEPS or x.max() > limit:
            break
        hessian = cosines * x * x[:, None]
        hessian[size, size] += power * pull
        try:
            change = np.linalg.solve(hessian, pull - given)
        except np.linalg.LinAlgError:
            break
        x = x * (1.0 + _step_size(cosines, demand, power, x, change) * change)
    return best, best_residual, step


def _step_size(cosines: Array, demand: Array, power: float, x: Array, change: Array) -> float:
    """A step that keeps x positive and decreases the slope of the potential along the direction enough."""
    size = min(1.0, 0.95 / max(float(-change.min()), 0.95))
    direction = x * change
    start = float(direction @ (cosines @ x - demand * x**-power))
    for _ in range(20):
        moved = x + size * direction
        slope = float(direction @ (cosines @ moved - demand * moved**-power))
        if slope <= 0.5 * abs(start):
            break
        size /= 2
    return size


def _follow(cosines: Array, x: Array, logs: Array, power: float, tolerance: float) -> tuple[Array, int]:
    """From the solution for power 1 towards that for ``power``: the logarithms of the last one reached, the steps."""
    done, target, total = 0.0, float(np.log(power)), 0
    stage = target
    while done != target and abs(stage) > 1e-3 and total < MAX_TOTAL:
        ahead = target if abs(stage) >= abs(target - done) else done + stage
        tried = np.exp(ahead)
        found, error, steps = _newton(cosines, x, tried, (tried - 1.0) * logs)
        total += steps
        if error <= tolerance:
            x, done, stage = found, ahead, 2 * stage
        else:
            stage /= 4
    return x, total


def _newton(cosines: Array, x: Array, power: float, target: Array) -> tuple[Array, float, int]:
    """The x with ``log(cosines @ e**x) + power * x = target``, its largest error, the steps taken.

    With all projections positive the derivative is invertible and the squared error falls along a Newton step.
    """
    diagonal = np.arange(len(x))
    lengths = np.exp(x)
    given = cosines @ lengths
    if given.min() <= 0.0:
        return x, np.inf, 0
    error = np.log(given) + power * x - target
    step = 0
    while np.abs(error).max() > 1e-13 and step < MAX_STEPS:
        derivative = cosines * lengths / given[:, None]
        derivative[diagonal, diagonal] += power
        try:
            change = np.linalg.solve(derivative, -error)
        except np.linalg.LinAlgError:
            break
        size = min(1.0, 30.0 / float(np.abs(change).max()))
        while size > 1e-6:
            moved = x + size * change
            lengths = np.exp(moved)
            given = cosines @ lengths
            if given.min() > 0.0:
                left = np.log(given) + power * moved - target
                if left @ left <= (1.0 - size / 2) * (error @ error):
                    break
            size /= 2
        else:
            break
        x, error, step = moved, left, step + 1
    return x, float(np.abs(error).max()), step
