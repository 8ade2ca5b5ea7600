r"""Gramians split into the lengths of the gradients and the angles between them.

``G = diag(norms) @ cosines @ diag(norms)``. The split is exact to rounding whatever the lengths, so a solver
that works on ``cosines`` sees the same problem whether the gradients are of one size or span many orders of
magnitude; where the problem is scale-equivariant in the rows, only the final weights are divided by
``norms``.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from torchmto.solvers.solution import Array

EPS = float(np.finfo(np.float64).eps)

SINGLE = 1e-6
"""Rounding error of the cosines of gradients in single precision, per task and with some room.

A Gramian's products are taken in the gradients' own precision and handed on in float64, so their error can't be told
from its dtype. Measured: up to 4 machine precisions of float32 times K, 5e-7 K.
"""

ZERO_NORM = 1e-12
"""A gradient shorter than this share of the root of the trace counts as zero."""


@dataclass(frozen=True)
class UnitGramian:
    """A Gramian as lengths and cosines.

    Attributes:
        norms: lengths of the gradients, shape [K]; exactly 0 for a gradient that counts as zero.
        cosines: shape [K, K], unit diagonal; rows and columns of zero gradients are 0.
        live: indices of the gradients that aren't zero.
    """

    norms: Array
    cosines: Array
    live: npt.NDArray[np.intp]

    @property
    def num_tasks(self) -> int:
        """The number of tasks K, zero gradients included."""
        return len(self.norms)

    def live_cosines(self) -> Array:
        """Cosines between the gradients that aren't zero."""
        return self.cosines if len(self.live) == self.num_tasks else self.cosines[np.ix_(self.live, self.live)]

    def expand(self, live_values: Array, fill: float = 0.0) -> Array:
        """Values of the live tasks put in their places, ``fill`` at the zero gradients."""
        values = np.full(self.num_tasks, fill)
        values[self.live] = live_values
        return values


def check_square(matrix: npt.ArrayLike, name: str = "G") -> Array:
    """The matrix as float64, or a ValueError if it isn't square and finite."""
    array = np.asarray(matrix, dtype=np.float64)
    if array.ndim != 2 or array.shape[0] != array.shape[1] or array.shape[0] == 0:
        raise ValueError(f"Parameter `{name}` should be a square matrix. Found a shape of {array.shape}.")
    if not np.isfinite(array).all():
        raise ValueError(f"Parameter `{name}` should be finite. Found NaN or infinite entries.")
    return array


def check_gramian(gramian: npt.ArrayLike) -> Array:
    """The Gramian as a symmetric float64 array whose diagonal isn't negative.

    Raises:
        ValueError: if it isn't a square matrix of finite numbers.
    """
    array = check_square(gramian)
    array = (array + array.T) / 2
    np.fill_diagonal(array, array.diagonal().clip(min=0.0))
    return array


def check_weights(weights: npt.ArrayLike | None, num_tasks: int, default: float, name: str = "preference") -> Array:
    """One finite weight per task; ``default`` for each of them where ``weights`` is None."""
    if weights is None:
        return np.full(num_tasks, default)
    array = np.asarray(weights, dtype=np.float64)
    if array.shape != (num_tasks,) or not np.isfinite(array).all():
        raise ValueError(f"Parameter `{name}` should be {num_tasks} finite numbers. Found `{name} = {weights}`.")
    return array


def unit_gramian(gramian: npt.ArrayLike) -> UnitGramian:
    """Split a Gramian into lengths and cosines.

    Args:
        gramian: inner products of the gradients, shape [K, K], positive semi-definite up to rounding.

    Raises:
        ValueError: if it isn't a square matrix of finite numbers.
    """
    array = check_gramian(gramian)
    norms = np.sqrt(array.diagonal())
    norms[norms <= ZERO_NORM * np.sqrt(norms @ norms)] = 0.0
    inverse = np.divide(1.0, norms, out=np.zeros_like(norms), where=norms > 0)
    cosines = np.clip(array * inverse * inverse[:, None], -1.0, 1.0)
    live = np.flatnonzero(norms)
    cosines[live, live] = 1.0
    return UnitGramian(norms, cosines, live)


def factor(cosines: Array, rounding: float = EPS) -> Array:
    """Unit columns in the fewest dimensions that have these cosines, shape [rank, K].

    Cholesky with pivoting. It stops where what is left of every gradient is rounding error (squared length
    below K times ``rounding``), so the number of rows is the numerical rank. A matrix with negative
    eigenvalues, such as a Gramian taken in single precision, isn't one of cosines: the nearest that is takes
    its place, without the eigenvalues that are no larger than the negative ones.
    """
    size = len(cosines)
    if size == 0:
        return np.zeros((0, 0))
    from scipy.linalg.lapack import dpstrf  # noqa: PLC0415 - slow to import

    triangle, pivots, rank, _ = dpstrf(cosines, lower=0, tol=size * rounding)
    columns = np.empty((rank, size))
    columns[:, pivots - 1] = np.triu(triangle)[:rank]
    if np.abs(columns.T @ columns - cosines).max() <= 4 * size * rounding:
        return columns
    eigenvalues, vectors = positive_eigenvalues(cosines, rounding)
    columns = np.sqrt(eigenvalues)[:, None] * vectors.T
    return np.asarray(columns / np.linalg.norm(columns, axis=0))


def positive_eigenvalues(matrix: Array, rounding: float = EPS) -> tuple[Array, Array]:
    """Eigenvalues above the rounding error, of which negative ones tell the size, and their vectors as columns."""
    eigenvalues, vectors = np.linalg.eigh(matrix)
    kept = eigenvalues > max(len(matrix) * rounding * eigenvalues[-1], -eigenvalues[0])
    return eigenvalues[kept], vectors[:, kept]


def uniform(num_tasks: int) -> Array:
    """Equal weights with sum 1."""
    return np.full(num_tasks, 1.0 / num_tasks)
