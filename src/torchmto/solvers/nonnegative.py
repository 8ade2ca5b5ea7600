"""Non-negative least squares, on which the exact solvers rest."""

import numpy as np

from torchmto.solvers.solution import Array


def nonnegative_least_squares(columns: Array, target: Array) -> Array | None:
    """The ``x >= 0`` with the smallest ``|columns @ x - target|``; None if the iteration limit is reached."""
    try:
        from scipy.optimize import nnls  # noqa: PLC0415 - slow to import

        return np.asarray(nnls(columns, target)[0])
    except RuntimeError:
        return None


def least_distance(columns: Array, demand: Array) -> Array | None:
    """The shortest vector whose products with the columns are at least ``demand``, as a combination of the columns.

    Returns:
        The ``x >= 0`` for which it is ``columns @ x / (1 - demand @ x)``; that is 0 / 0 where there is no such vector. None
        if the iteration limit is reached.

    Source: Lawson and Hanson, Solving least squares problems, chapter 23.
    """
    target = np.zeros(len(columns) + 1)
    target[-1] = 1.0
    return nonnegative_least_squares(np.vstack([columns, demand]), target)
