"""What a solver returns."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
"""A float64 array on the CPU: the only kind of number the solvers know."""


@dataclass(frozen=True)
class Solution:
    """Weights of the tasks and the certificate that goes with them.

    The update of the shared parameters is ``weights @ J``, where the rows of ``J`` are the tasks' gradients.

    Attributes:
        weights: One weight per task, shape [K]; always finite.
        converged: Whether the weights solve the stated problem. If not, they are the documented fallback of
            the solver or its best iterate, and are safe to use.
        residual: How far the weights are from the solution, relative (each solver says to what).
        iterations: Iterations taken; 0 for closed forms.
    """

    weights: Array
    converged: bool
    residual: float
    iterations: int


@dataclass(frozen=True)
class Projection(Solution):
    """Weights obtained by changing each gradient into a combination of all of them.

    Attributes:
        coefficients: Shape [K, K]; row ``i`` says of which combination of the original gradients the modified
            gradient ``i`` consists: ``coefficients @ J``. The weights are the sums of its columns.
    """

    coefficients: Array
