r"""Gramians split into the lengths of the gradients and the angles between them.

``G = diag(norms) @ cosines @ diag(norms)``. The split is exact to rounding whatever the lengths, so a solver
that works on ``cosines`` sees the same problem whether the gradients are of one size or span many orders of
magnitude; where the problem is scale-equivariant in the rows, only the final weights are divided by
``norms``.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from torchmto.checks import check_number
from torchmto.solvers.solution import Array

EPS = float(np.finfo(np.float64).eps)

SINGLE = float(np.finfo(np.float32).eps)

ROOM = 8
"""How many machine precisions a product of gradients may be off per task; measured: up to 4."""

ZERO_NORM = 1e-12
"""A gradient shorter than this share of the root of the trace counts as zero."""


@dataclass(frozen=True)
class UnitGramian:
    """A Gramian as lengths and cosines.

    Attributes:
        norms: Lengths of the gradients, shape [K]; exactly 0 for a gradient that counts as zero.
        inverse: One over these lengths, 0 for a gradient that counts as zero.
        cosines: Shape [K, K], unit diagonal; rows and columns of zero gradients are 0.
        live: Indices of the gradients that aren't zero.
        precision: Machine precision of the gradients.
    """

    norms: Array
    inverse: Array
    cosines: Array
    live: npt.NDArray[np.intp]
    precision: float

    @property
    def num_tasks(self) -> int:
        """The number of tasks K, zero gradients included."""
        return len(self.norms)

    @property
    def rounding(self) -> float:
        """The rounding error of a cosine."""
        return rounding_error(self.precision)

    @property
    def noise(self) -> float:
        """What rounding errors can add to an eigenvalue of the cosines, or take away.

        A combination of unit gradients whose squared length is no more than this, with squared weights that sum to 1, may
        vanish.
        """
        return eigenvalue_noise(self.precision, self.num_tasks)

    @property
    def resolution(self) -> float:
        """The length up to which a combination of unit gradients can't be told from zero: the root of the noise."""
        return float(self.noise**0.5)

    @property
    def rank_noise(self) -> float:
        """The noise below which a direction of the gradients is no reason for a large weight, single precision's at least."""
        return max(self.noise, ROOM * SINGLE * self.num_tasks)

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
    array.flat[:: len(array) + 1] = np.maximum(array.diagonal(), 0.0)
    return array


def check_weights(weights: npt.ArrayLike | None, num_tasks: int, default: float, name: str = "preference") -> Array:
    """One finite weight per task; ``default`` for each of them where ``weights`` is None."""
    if weights is None:
        return np.full(num_tasks, default)
    array = np.asarray(weights, dtype=np.float64)
    if array.shape != (num_tasks,) or not np.isfinite(array).all():
        raise ValueError(f"Parameter `{name}` should be {num_tasks} finite numbers. Found `{name} = {weights}`.")
    return array


def unit_gramian(gramian: npt.ArrayLike, precision: float | None = None) -> UnitGramian:
    """Split a Gramian into lengths and cosines.

    Two rounding errors are told apart. That of the products, which are taken in single precision at least, is in every
    cosine. That of the gradients' entries moves each gradient by a share of its length, so it adds only its square to the
    squared length of a combination that should vanish.

    Args:
        gramian: inner products of the gradients, shape [K, K], positive semi-definite up to rounding.
        precision: Machine precision of the gradients it was made from; by default that of the array's own type.

    Raises:
        ValueError: if it isn't a square matrix of finite numbers, or the precision isn't in (0, 1).
    """
    precision = check_precision(precision, gramian)
    array = check_gramian(gramian)
    norms = np.sqrt(array.diagonal())
    norms[norms <= ZERO_NORM * np.sqrt(norms @ norms)] = 0.0
    inverse = np.divide(1.0, norms, out=np.zeros_like(norms), where=norms > 0)
    # What `clip` does, in half the time for a few numbers.
    cosines = np.minimum(np.maximum(array * inverse * inverse[:, None], -1.0), 1.0)
    live = norms.nonzero()[0]
    if len(live) == len(norms):
        cosines.flat[:: len(norms) + 1] = 1.0
    else:
        cosines[live, live] = 1.0
    return UnitGramian(norms, inverse, cosines, live, precision)


def check_precision(precision: float | None, gramian: npt.ArrayLike) -> float:
    """The machine precision of gradients; where it isn't given, that of their Gramian's type, double at best."""
    if precision is None:
        dtype = getattr(gramian, "dtype", None)
        coarse = isinstance(dtype, np.dtype) and dtype.kind == "f" and dtype != np.float64
        return max(EPS, float(np.finfo(dtype).eps)) if coarse else EPS
    return max(EPS, check_number("precision", precision, above=0, below=1))


def rounding_error(precision: float) -> float:
    """The rounding error of a cosine of gradients: half-precision ones are multiplied in single precision."""
    return float(ROOM * min(precision, SINGLE))


def eigenvalue_noise(precision: float, num_tasks: int) -> float:
    """What rounding errors can make of an eigenvalue of the cosines: by the products' errors, and by the entries' squared."""
    return float(max(num_tasks**0.5 * rounding_error(precision), (2 * precision) ** 2))


def factor(cosines: Array, noise: float | None = None) -> Array:
    """Unit columns in the fewest dimensions that have these cosines, shape [rank, K].

    Cholesky with pivoting. It stops where what is left of every gradient is rounding error (squared length
    at most ``noise``, K machine precisions by default), so the number of rows is the numerical rank. A matrix with negative
    eigenvalues, such as a Gramian taken in single precision, isn't one of cosines: the nearest that is takes
    its place, without the eigenvalues that are no larger than the negative ones.
    """
    size = len(cosines)
    if size == 0:
        return np.zeros((0, 0))
    noise = size * EPS if noise is None else noise
    from scipy.linalg.lapack import dpstrf  # noqa: PLC0415 - slow to import

    triangle, pivots, rank, _ = dpstrf(cosines, lower=0, tol=noise)
    columns = np.empty((rank, size))
    columns[:, pivots - 1] = np.triu(triangle)[:rank]
    if np.abs(columns.T @ columns - cosines).max() <= 4 * noise:
        return columns
    eigenvalues, vectors = positive_eigenvalues(cosines, noise)
    columns = np.sqrt(eigenvalues)[:, None] * vectors.T
    return np.asarray(columns / np.linalg.norm(columns, axis=0))


def positive_eigenvalues(matrix: Array, noise: float) -> tuple[Array, Array]:
    """Eigenvalues above that share of the largest, and above the negative ones' size; their vectors as columns."""
    eigenvalues, vectors = np.linalg.eigh(matrix)
    kept = eigenvalues > max(noise * eigenvalues[-1], -eigenvalues[0])
    return eigenvalues[kept], vectors[:, kept]


def uniform(num_tasks: int) -> Array:
    """Equal weights with sum 1."""
    return np.full(num_tasks, 1.0 / num_tasks)
