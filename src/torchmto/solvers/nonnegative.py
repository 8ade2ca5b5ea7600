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
