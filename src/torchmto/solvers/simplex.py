"""Weights on the simplex moved by projected gradient steps, from two independent mini-batches."""

import numpy as np
import numpy.typing as npt

from torchmto.checks import check_integer, check_number
from torchmto.solvers.solution import Array, Solution
from torchmto.solvers.unit import check_square, check_weights, uniform


def simplex_projection(values: npt.ArrayLike) -> Array:
    """The point of the simplex (non-negative, sum 1) nearest to a vector.

    Args:
        values: Finite numbers, shape [K].

    Raises:
        ValueError: If it isn't a vector of finite numbers.

    Source:
        Duchi et al., Efficient projections onto the l1-ball, 2008, figure 1.

    >>> simplex_projection([0.5, 1.5, -3.0])
    array([0., 1., 0.])
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or len(values) == 0 or not np.isfinite(values).all():
        raise ValueError(f"Parameter `values` should be a vector of finite numbers. Found `values = {values}`.")
    shifted = values - values.max()
    descending = np.sort(shifted)[::-1]
    thresholds = (np.cumsum(descending) - 1.0) / np.arange(1, len(values) + 1)
    support = np.flatnonzero(descending > thresholds)[-1]
    projected = (shifted - thresholds[support]).clip(min=0.0)
    return np.asarray(projected / projected.sum())


def sdmgrad(
    cross_gramian: npt.ArrayLike,
    weights: npt.ArrayLike | None = None,
    *,
    regularization: float = 0.3,
    steps: int = 20,
    learning_rate: float = 5.0,
    momentum: float = 0.5,
) -> Solution:
    r"""Weights from stochastic steps towards the shortest :math:`(w + \lambda u)^\top J` over the simplex.

    Each step follows :math:`G_{12} (w + \lambda u)` with u = 1/K, where :math:`G_{12} = J_1 J_2^\top` of two
    independent mini-batches makes it unbiased, with momentum, and projects on the simplex. As in the released
    code the matrix is first divided by the square of its diagonal's mean root (negative entries as 0), so the
    learning rate doesn't depend on the scale.

    The update is :math:`(w + \lambda u)^\top J / (1 + \lambda)`, on a third mini-batch in the paper; the
    weights returned are those of the rows, which have sum 1. :func:`sdmgrad_simplex` recovers w from them for
    the next step.

    Args:
        cross_gramian: Inner products between the two mini-batches' gradients, shape [K, K]; needs no
            symmetry.
        weights: The w to start from, shape [K]; 1/K by default.
        regularization: :math:`\lambda`, the pull towards the mean gradient.
        steps: Number of steps.
        learning_rate: Of a step.
        momentum: Of the steps, starting from rest.

    Returns:
        The weights of the rows. A fixed number of stochastic steps: the residual is the last change of w
        (largest entry), and it counts as converged whatever it is. Where the matrix is zero, w stays as it
        is.

    Raises:
        ValueError: If the matrix isn't square and finite, the weights don't fit it, or a parameter is
            negative.

    Source:
        Xiao et al., Direction-oriented multi-objective learning (SDMGrad), 2023, algorithm 1.

    >>> sdmgrad([[1.0, 0.0], [0.0, 1.0]]).weights
    array([0.5, 0.5])
    """
    check_number("regularization", regularization, minimum=0)
    check_integer("steps", steps, minimum=0)
    check_number("learning_rate", learning_rate, minimum=0)
    check_number("momentum", momentum, minimum=0)
    matrix = check_square(cross_gramian, "cross_gramian")
    mean = uniform(len(matrix))
    current = check_weights(weights, len(matrix), 1.0 / len(matrix), "weights")
    size = np.abs(matrix).max()
    change = 0.0
    if size > 0:
        matrix = matrix / size
        root = np.sqrt(matrix.diagonal().clip(min=0.0)).mean()
        matrix = matrix / root**2 if root > 0 else matrix
        velocity = np.zeros(len(matrix))
        for _ in range(steps):
            velocity = momentum * velocity + matrix @ (current + regularization * mean)
            moved = simplex_projection(current - learning_rate * velocity)
            change = float(np.abs(moved - current).max())
            current = moved
    rows = (current + regularization * mean) / (1.0 + regularization)
    return Solution(rows, converged=True, residual=change, iterations=steps)


def sdmgrad_simplex(rows: npt.ArrayLike, regularization: float) -> Array:
    """The simplex weights w to which :func:`sdmgrad` mixed the mean gradient.

    >>> sdmgrad_simplex([0.625, 0.375], regularization=1.0)
    array([0.75, 0.25])
    """
    rows = np.asarray(rows, dtype=np.float64)
    return np.asarray(rows * (1.0 + regularization) - regularization / len(rows))


def modo(
    cross_gramian: npt.ArrayLike,
    weights: npt.ArrayLike | None = None,
    *,
    regularization: float = 0.1,
    learning_rate: float = 1e-3,
) -> Solution:
    r"""One double-sampling step :math:`w \leftarrow \Pi_\Delta(w - \gamma (G_{12} + \rho I) w)`.

    Not scale-invariant: the learning rate is meant for the gradients as they are, as in the paper.

    Args:
        cross_gramian: :math:`G_{12} = J_1 J_2^\top` of two independent mini-batches, shape [K, K]; needs no
            symmetry.
        weights: The w to start from, shape [K]; 1/K by default.
        regularization: :math:`\rho`.
        learning_rate: :math:`\gamma`.

    Returns:
        The new weights, with sum 1; the residual is their largest change. One step counts as converged.

    Raises:
        ValueError: If the matrix isn't square and finite, the weights don't fit it, or a parameter is
            negative.

    Source:
        Chen et al., Three-way trade-off in multi-objective learning (MoDo), 2023, algorithm 1.

    >>> modo([[1.0, 0.0], [0.0, 3.0]], learning_rate=0.1, regularization=0.0).weights.round(12)
    array([0.55, 0.45])
    """
    check_number("regularization", regularization, minimum=0)
    check_number("learning_rate", learning_rate, minimum=0)
    matrix = check_square(cross_gramian, "cross_gramian")
    start = check_weights(weights, len(matrix), 1.0 / len(matrix), "weights")
    moved = simplex_projection(start - learning_rate * (matrix @ start + regularization * start))
    return Solution(moved, converged=True, residual=float(np.abs(moved - start).max()), iterations=1)
