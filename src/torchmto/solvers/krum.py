"""The gradients that lie closest to the others."""

import numpy as np
import numpy.typing as npt

from torchmto.checks import check_integer
from torchmto.solvers.solution import Solution
from torchmto.solvers.unit import check_gramian, check_precision, rounding_error


def krum(
    gramian: npt.ArrayLike, *, num_outliers: int = 1, num_selected: int = 1, precision: float | None = None
) -> Solution:
    r"""Weights of the mean of the gradients whose nearest neighbours are closest (multi-Krum).

    The score of a task is the sum of the squared distances from its gradient to the nearest K - f - 2 others,
    with :math:`\|g_i - g_j\|^2 = G_{ii} + G_{jj} - 2 G_{ij}`. The m tasks with the lowest scores get 1/m
    each; ties, which are scores that rounding errors can't tell apart, go to the first.

    Args:
        gramian: Inner products of the gradients, shape [K, K].
        num_outliers: The number f of gradients not to be trusted. With fewer than f + 3 tasks one neighbour
            counts, where the paper's guarantee doesn't hold.
        num_selected: The number m of gradients to average, K at most.
        precision: Machine precision of the gradients; by default that of the Gramian's type.

    Raises:
        ValueError: If the Gramian isn't a square matrix of finite numbers or a count is out of range.

    Source:
        Blanchard et al., Machine learning with adversaries (Krum), 2017, sections 4 and 5.

    >>> J = np.array([[1.0, 0.0], [1.1, 0.0], [0.9, 0.1], [-50.0, 9.0]])
    >>> krum(J @ J.T, num_selected=3).weights.round(3)
    array([0.333, 0.333, 0.333, 0.   ])
    """
    check_integer("num_outliers", num_outliers, minimum=0)
    check_integer("num_selected", num_selected, minimum=1)
    rounding = rounding_error(check_precision(precision, gramian))
    gramian = check_gramian(gramian)
    size = len(gramian)
    squares = gramian.diagonal()
    distances = (squares + squares[:, None] - 2 * gramian).clip(min=0.0)
    np.fill_diagonal(distances, np.inf)
    neighbours = min(max(size - num_outliers - 2, 1), size - 1)
    nearest = np.argsort(distances, axis=1, kind="stable")[:, :neighbours]
    scores = np.take_along_axis(distances, nearest, axis=1).sum(axis=1)
    errors = 2 * rounding * (neighbours * squares + squares[nearest].sum(axis=1))
    weights = np.zeros(size)
    for _ in range(min(num_selected, size)):
        best = int(scores.argmin())
        first = int(np.flatnonzero(scores <= scores[best] + errors[best])[0])
        weights[first] = 1.0 / min(num_selected, size)
        scores[first] = np.inf
    return Solution(weights, converged=True, residual=0.0, iterations=0)
