"""The direction near the mean gradient that serves the worst-off task best."""

import numpy as np
import numpy.typing as npt

from torchmto.checks import check_number
from torchmto.solvers.dual_cone import project_on_dual_cone
from torchmto.solvers.nonnegative import least_distance
from torchmto.solvers.solution import Array, Solution
from torchmto.solvers.unit import EPS, factor, uniform, unit_gramian

MAX_STEPS = 60


def cagrad(
    gramian: npt.ArrayLike,
    c: float = 0.5,
    *,
    rescale: bool = False,
    precision: float | None = None,
    tolerance: float = 1e-8,
) -> Solution:
    r"""Weights of the conflict-averse direction around the mean gradient.

    With the mean gradient :math:`g_0`, the direction d maximises :math:`\min_i g_i \cdot d` over the ball
    :math:`\|d - g_0\| \le c \|g_0\|`. In the paper's dual form :math:`d = g_0 + c \|g_0\| g_w / \|g_w\|`,
    where w minimises :math:`w^\top G \mathbb{1}/K + c \|g_0\| \sqrt{w^\top G w}` over the simplex and
    :math:`g_w = w^\top J`.

    Solved exactly in the maximin form: for a given level :math:`\mu`, the nearest d to :math:`g_0` with
    :math:`g_i \cdot d \ge \mu` is a least-distance problem, whose distance is convex in :math:`\mu`; Newton
    steps find the level at which it equals the radius, and the last one is exact on its active set.

    Where :math:`g_w = 0` the paper's formula is undefined: a convex combination of the gradients vanishes and
    no direction improves all tasks. Every d in the ball that conflicts with no task is then optimal, and the
    nearest one to :math:`g_0`, its projection on the dual cone, is taken. Where :math:`g_0 = 0` the weights
    are 1/K.

    Args:
        gramian: Inner products of the gradients, shape [K, K].
        c: Radius of the ball relative to the length of the mean gradient.
        rescale: Divide the weights by :math:`1 + c^2`, as the paper's released code does by default.
        precision: Machine precision of the gradients; by default that of the Gramian's type.
        tolerance: The residual up to which the solution counts as converged, where the precision allows as much.

    Returns:
        The weights of d, whose scale is that of the mean gradient (some public codes multiply by K). The
        residual is the largest violation of the optimality conditions by a unit gradient, with what rounding
        errors can make of it, relative to the radius.

    Raises:
        ValueError: If the Gramian isn't a square matrix of finite numbers or c is negative.

    Source:
        Liu et al., Conflict-averse gradient descent (CAGrad), 2021, equation 4 and algorithm 1.

    >>> J = np.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
    >>> (cagrad(J @ J.T).weights @ J).round(4)
    array([0.1835, 1.2041, 1.2041])
    """
    check_number("c", c, minimum=0)
    unit = unit_gramian(gramian, precision)
    mean = uniform(unit.num_tasks)
    factor_of_rescale = 1.0 / (1.0 + c * c) if rescale else 1.0
    norms = unit.norms[unit.live] / unit.norms.max(initial=np.finfo(np.float64).tiny)
    columns = factor(unit.live_cosines())
    center = columns @ norms / unit.num_tasks
    radius = c * float(np.linalg.norm(center))
    if radius <= c * np.sqrt(len(norms) * EPS) * norms.sum() / unit.num_tasks:
        return Solution(mean * factor_of_rescale, converged=True, residual=0.0, iterations=0)
    nearest, _ = project_on_dual_cone(unit, norms[None] / unit.num_tasks)
    floor = c * unit.resolution * float(norms.sum()) / unit.num_tasks
    problem = _Ball(columns, center, norms.min() / norms, radius=radius, floor=floor, noise=unit.noise)
    multipliers, residual, iterations = problem.solve(nearest[0], bounded=len(norms) < unit.num_tasks)
    residual += float(unit.rounding * multipliers.sum() / max(radius, floor))
    weights = (mean + unit.expand(multipliers / norms)) * factor_of_rescale
    return Solution(weights, residual <= max(tolerance, unit.resolution), residual, iterations)


class _Ball:
    """Maximise the smallest ``columns.T @ d / margins`` in a ball; ``d = center + columns @ multipliers``."""

    def __init__(self, columns: Array, center: Array, margins: Array, *, radius: float, floor: float, noise: float):
        self.columns = columns
        self.center = center
        self.radius = radius
        self.margins = margins
        self.noise = noise
        self.size = max(radius, floor)
        self.projections = columns.T @ center

    def solve(self, multipliers: Array, *, bounded: bool) -> tuple[Array, float, int]:
        """Multipliers, residual and steps.

        Args:
            multipliers: Those of the nearest direction that conflicts with no task.
            bounded: Whether a zero gradient caps the level at 0.
        """
        level, nearest = 0.0, multipliers
        inside = np.linalg.norm(self.columns @ nearest) < self.radius
        if inside:
            upper = float(((self.projections + self.radius) / self.margins).min())
            above = None if bounded else self._reach(upper)
            if above is None:
                return multipliers, self._residual(multipliers, 0.0), 1
            multipliers, level = above, upper
        for step in range(1, MAX_STEPS + 1):
            exact = self._on_support(multipliers > 0)
            if exact is not None:
                return exact, self._residual(exact), step
            distance = float(np.linalg.norm(self.columns @ multipliers))
            slope = float(self.margins @ multipliers) / distance
            decrease = (distance - self.radius) / slope
            lower = self._reach(level - decrease) if decrease > EPS * abs(level) else None
            if lower is None:
                break
            multipliers, level = lower, level - decrease
        distance = float(np.linalg.norm(self.columns @ multipliers))
        multipliers = multipliers * (self.radius / distance)
        if inside and (self.projections + self.columns.T @ (self.columns @ multipliers)).min() < 0:
            # Rounding errors: a direction in the ball is known that conflicts with no task.
            return nearest, self._residual(nearest, 0.0), step
        return multipliers, self._residual(multipliers), step

    def _reach(self, level: float) -> Array | None:
        """The nearest direction with projections of at least ``level * margins``; None if there is none."""
        demand = level * self.margins - self.projections
        size = np.abs(demand).max()
        solution = least_distance(self.columns, demand / size)
        if solution is None:
            return None
        excess = 1.0 - demand @ solution / size
        if excess <= 0 or np.linalg.norm(self.columns @ solution) <= np.sqrt(2 * self.noise) * solution.sum():
            return None
        return np.asarray(solution * (size / excess))

    def _on_support(self, support: npt.NDArray[np.bool_]) -> Array | None:
        """The exact solution if these are its active tasks, None if they aren't."""
        active = self.columns[:, support]
        margins, projections = self.margins[support], self.projections[support]
        try:
            by_margin, by_projection = np.linalg.solve(active.T @ active, np.stack([margins, projections], axis=1)).T
        except np.linalg.LinAlgError:
            return None
        square, linear = margins @ by_margin, margins @ by_projection
        discriminant = linear**2 - square * (projections @ by_projection - self.radius**2)
        if square <= 0 or discriminant < 0:
            return None
        level = (linear + np.sqrt(discriminant)) / square
        values = level * by_margin - by_projection
        if values.min(initial=0.0) < 0:
            return None
        multipliers = np.zeros_like(self.projections)
        multipliers[support] = values
        slack = self.projections + self.columns.T @ (self.columns @ multipliers) - level * self.margins
        return multipliers if slack.min() >= -1e-12 * self.radius else None

    def _residual(self, multipliers: Array, level: float | None = None) -> float:
        """Largest violation: a task below the level, an active task above it, a step off the radius."""
        step = self.columns @ multipliers
        projections = self.projections + self.columns.T @ step
        length_error = 0.0
        if level is None:
            level = float(multipliers @ projections / (multipliers @ self.margins))
            length_error = abs(float(np.linalg.norm(step)) - self.radius)
        slack = projections - level * self.margins
        active = np.abs(slack) * (multipliers / max(multipliers.max(), EPS))
        return float(max(-slack.min(), active.max(), length_error)) / self.size
