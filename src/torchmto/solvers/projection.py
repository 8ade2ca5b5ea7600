"""Gradients projected off each other, in the space of their coefficients.

Every modified gradient is a combination of the original ones, so only the K x K matrix of combinations is
kept, and all inner products come from the Gramian. The loops run over K tasks; each pass is vectorised over
the other K.
"""

import functools
import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from torchmto.checks import check_number
from torchmto.solvers.solution import Array, Projection
from torchmto.solvers.unit import ZERO_NORM, UnitGramian, check_square, unit_gramian

Order = npt.NDArray[np.intp]

FEW = 8
"""Tasks up to which PCGrad is computed in plain numbers."""

ANNIHILATED = 1e-10
"""wPCGrad, GradVac: a gradient whose squared length has fallen to this share of its original, or to that of rounding
errors if they are larger, counts as zero."""

CONFLICT = 1e-9
"""wPCGrad: a conflict is a cosine, of the original lengths, below minus this and minus its rounding error."""

POLE = 1e-12
"""GradVac: cosine targets, whose formula has a pole at 1, stay this far from it, or as far as cosines are uncertain."""


@functools.lru_cache(maxsize=64)
def identity_orders(num_tasks: int) -> Order:
    """For every task the others in ascending order, shape [K, K - 1]; not to be changed in place.

    >>> identity_orders(3)
    array([[1, 2],
           [0, 2],
           [0, 1]])
    """
    others = np.tile(np.arange(num_tasks), (num_tasks, 1))
    others = others[~np.eye(num_tasks, dtype=bool)].reshape(num_tasks, num_tasks - 1)
    others.setflags(write=False)
    return others


def pcgrad(gramian: npt.ArrayLike, orders: npt.ArrayLike | None = None) -> Projection:
    r"""Every gradient projected off the original gradients that it conflicts with; the weights of their sum.

    For each task i, going through the others j in its order: if :math:`g_i' \cdot g_j < 0`, then
    :math:`g_i' \leftarrow g_i' - (g_i' \cdot g_j) / \|g_j\|^2 \, g_j`, with :math:`g_j` as it was at first.

    Args:
        gramian: Inner products of the gradients, shape [K, K].
        orders: For each task the indices of the others in the order of their turn, shape [K, K - 1];
            ascending by default.

    Returns:
        The weights and coefficients. Ones where all gradients are zero.

    Raises:
        ValueError: If the Gramian isn't a square matrix of finite numbers or a row of orders isn't a
            permutation of the other tasks.

    Source:
        Yu et al., Gradient surgery for multi-task learning (PCGrad), 2020, algorithm 1.

    >>> pcgrad([[1.0, -1.0], [-1.0, 4.0]]).weights
    array([2.  , 1.25])
    """
    array = check_square(gramian)
    orders = _check_orders(orders, len(array))
    if len(array) <= FEW:
        return _project_few(array.tolist(), orders.tolist())
    return _project_off_originals(unit_gramian(array), orders, allowed=None)


def _project_few(gramian: list[list[float]], orders: list[list[int]]) -> Projection:
    """What :func:`_project_off_originals` does, to the bit, in plain numbers: calls of NumPy take several times as long."""
    tasks = range(len(gramian))
    norms = [math.sqrt(max(gramian[i][i], 0.0)) for i in tasks]
    least = ZERO_NORM * math.sqrt(sum(norm * norm for norm in norms))
    norms = [norm if norm > least else 0.0 for norm in norms]
    inverse = [1.0 / norm if norm else 0.0 for norm in norms]
    coefficients = [[float(i == j) for j in tasks] for i in tasks]
    # Of zero gradients the cosine with themselves is never looked at.
    cosines = [
        [min(max((a + b) / 2 * right * left, -1.0), 1.0) for a, b, right in zip(row, column, inverse, strict=True)]
        for row, column, left in zip(gramian, zip(*gramian, strict=True), inverse, strict=True)
    ]
    for i in tasks:
        cosines[i][i] = 1.0
    for i in tasks:
        products = cosines[i]
        for j in orders[i]:
            conflict = products[j]
            if conflict < 0:
                coefficients[i][j] = -conflict * norms[i] * inverse[j]
                products = [own - conflict * other for own, other in zip(products, cosines[j], strict=True)]
    result = np.array(coefficients)
    return Projection(result.sum(axis=0), converged=True, residual=0.0, iterations=0, coefficients=result)


def wpcgrad_pairwise(gramian: npt.ArrayLike, keep: npt.ArrayLike, orders: npt.ArrayLike | None = None) -> Projection:
    """In every conflicting pair one gradient stays and the other is projected off it.

    Pairs conflict by the original gradients; like in PCGrad the projections of one gradient follow each
    other, so one that is no longer needed when its turn comes is left out.

    Args:
        gramian: Inner products of the gradients, shape [K, K].
        keep: Shape [K, K], true at (i, j) where i stays when i and j conflict. Of (i, j) and (j, i) one
            should be true; the diagonal is ignored.
        orders: For each task the indices of the others in the order of their turn, shape [K, K - 1];
            ascending by default.

    Returns:
        The weights and coefficients. Ones where all gradients are zero.

    Raises:
        ValueError: If an argument's shape doesn't fit, the Gramian isn't finite, both or neither of a pair
            stay, or a row of orders isn't a permutation of the other tasks.

    Source:
        Our own reading of Task weighting through gradient projection (arXiv 2409.01793): the text has the
        sampled task of a pair stay intact.

    >>> wpcgrad_pairwise([[1.0, -1.0], [-1.0, 4.0]], keep=[[False, True], [False, False]]).weights
    array([2., 1.])
    """
    unit = unit_gramian(gramian)
    keep = np.array(keep, dtype=bool)
    if keep.shape != unit.cosines.shape:
        raise ValueError(f"Parameter `keep` should have the shape {unit.cosines.shape}. Found {keep.shape}.")
    np.fill_diagonal(keep, val=False)
    if not (keep ^ keep.T ^ np.eye(len(keep), dtype=bool)).all():
        raise ValueError("Parameter `keep` should name one of each pair. Found pairs of which both or neither stay.")
    orders = _check_orders(orders, unit.num_tasks)
    return _project_off_originals(unit, orders, allowed=keep.T & (unit.cosines < 0))


def _project_off_originals(unit: UnitGramian, orders: Order, allowed: npt.NDArray[np.bool_] | None) -> Projection:
    """The PCGrad loop on unit gradients; ``allowed[i, j]`` says whether i may be projected off j at all."""
    if not (unit.cosines < 0).any():
        return _projection(unit, np.eye(unit.num_tasks))
    others, places = _turns(orders)
    products, shifts = unit.cosines.copy(), np.zeros(others.shape)
    for turn, (met, place) in enumerate(zip(others, places, strict=True)):
        conflict = np.minimum(products.take(place), 0.0)
        if allowed is not None:
            conflict *= allowed.take(place)
        products -= conflict[:, None] * unit.cosines.take(met, axis=0)
        shifts[turn] = -conflict
    coefficients = np.eye(unit.num_tasks)
    coefficients.put(places, shifts)
    return _projection(unit, coefficients)


def _turns(orders: Order) -> tuple[Order, Order]:
    """Whom every task meets in each turn, [K - 1, K], and where in a K x K matrix the entries of these pairs are."""
    others = np.ascontiguousarray(orders.T)
    return others, others + len(orders) * np.arange(len(orders))


class GradVacResult(NamedTuple):
    """What GradVac returns: the projection, and the cosine targets for the next step, shape [K, K]."""

    projection: Projection
    targets: Array


def gradvac(
    gramian: npt.ArrayLike,
    targets: npt.ArrayLike | None = None,
    orders: npt.ArrayLike | None = None,
    *,
    beta: float = 0.01,
    precision: float | None = None,
) -> GradVacResult:
    r"""Gradients turned towards each other until their cosines reach targets; the weights of their sum.

    For each task i, going through the others j in its order, with c the cosine of :math:`g_i'` and the
    original :math:`g_j`: if c is below the target :math:`\rho_{ij}`, then

    .. math:: g_i' \leftarrow g_i' + g_j
        \frac{\|g_i'\| (\rho \sqrt{1 - c^2} - c \sqrt{1 - \rho^2})}{\|g_j\| \sqrt{1 - \rho^2}}

    and in any case :math:`\rho_{ij} \leftarrow (1 - \beta) \rho_{ij} + \beta c`. With targets of 0 it is
    PCGrad. The formula has a pole at targets of 1: they are bounded by 1 - 1e-12, or 1 minus what rounding
    errors hide of a cosine. A zero gradient has no cosine: it changes nothing, targets included; so has a
    :math:`g_i'` of which nothing but rounding errors is left.

    Args:
        gramian: Inner products of the gradients, shape [K, K].
        targets: Cosine targets, shape [K, K]; 0 by default, as on the first step.
        orders: For each task the indices of the others in the order of their turn, shape [K, K - 1];
            ascending by default.
        beta: Share of a new cosine in the target (paper: 0.01; public codes: 0.5).
        precision: Machine precision of the gradients; by default that of the Gramian's type.

    Returns:
        The projection and the new targets (a new array). Weights of one where all gradients are zero.

    Raises:
        ValueError: If the Gramian isn't a square matrix of finite numbers, targets or orders don't fit it, or
            beta isn't in [0, 1].

    Source:
        Wang et al., Gradient vaccine, 2021, equations 2 and 3, algorithm 1.

    >>> projection, targets = gradvac([[1.0, -1.0], [-1.0, 4.0]], beta=0.5)
    >>> projection.weights, targets[0, 1]
    (array([2.  , 1.25]), np.float64(-0.25))
    """
    check_number("beta", beta, minimum=0, maximum=1)
    unit = unit_gramian(gramian, precision)
    orders = _check_orders(orders, unit.num_tasks)
    shape = unit.cosines.shape
    targets = np.zeros(shape) if targets is None else np.array(targets, dtype=np.float64)
    if targets.shape != shape or not np.isfinite(targets).all():
        raise ValueError(f"Parameter `targets` should be finite, of shape {shape}. Found `{targets}`.")
    others, places = _turns(orders)
    largest = 1.0 - max(POLE, unit.noise)
    bounded = targets.clip(-largest, largest)
    bounded[unit.norms == 0] = bounded[:, unit.norms == 0] = 0.0
    cotangents = (bounded / np.sqrt(1.0 - bounded**2)).take(places)
    shifts, met_products, squares = (np.zeros(others.shape) for _ in range(3))
    products, coefficients = unit.cosines.copy(), np.eye(unit.num_tasks)
    square = np.ones(unit.num_tasks)
    for turn, (met, place) in enumerate(zip(others, places, strict=True)):
        # The formula above with the lengths multiplied out: it is positive exactly where c is below the target.
        product = products.take(place)
        met_products[turn], squares[turn] = product, square
        perpendicular = np.maximum(square - product * product, 0.0)
        shift = np.maximum(cotangents[turn] * np.sqrt(perpendicular) - product, 0.0)
        products += shift[:, None] * unit.cosines.take(met, axis=0)
        shifts[turn] = shift
        product = product + shift
        square = perpendicular + product * product
    coefficients.put(places, shifts)
    known = squares > max(ANNIHILATED, unit.noise)
    cosines = np.divide(met_products, np.sqrt(squares), out=targets.take(places), where=known)
    observed = targets.copy()
    observed.put(places, cosines.clip(-1.0, 1.0))
    observed[unit.norms == 0] = targets[unit.norms == 0]
    observed[:, unit.norms == 0] = targets[:, unit.norms == 0]
    return GradVacResult(_projection(unit, coefficients), (1.0 - beta) * targets + beta * observed)


def wpcgrad(gramian: npt.ArrayLike, order: npt.ArrayLike, *, precision: float | None = None) -> Projection:
    r"""Going down an order, every later gradient is projected off those before it; the weights of the sum.

    Each task i in turn is the reference: every later task j with :math:`g_j \cdot g_i < 0`, both as modified
    so far, is projected on the normal plane of :math:`g_i`. The first gradient stays as it is, and at the end
    no two conflict.

    The latter holds in floating point because of two guards: a reference whose squared length has fallen to
    1e-10 of its original is set to zero and skipped, and a conflict is
    :math:`g_j \cdot g_i < -10^{-9} \|g_j\| \|g_i\|` with the original lengths. Where rounding errors are larger
    than that, as in single precision, they take the place of both numbers.

    Args:
        gramian: Inner products of the gradients, shape [K, K].
        order: The tasks from first to last, a permutation of 0 ... K - 1, shape [K].
        precision: Machine precision of the gradients; by default that of the Gramian's type.

    Returns:
        The weights and coefficients. Ones where all gradients are zero.

    Raises:
        ValueError: If the Gramian isn't a square matrix of finite numbers or the order isn't a permutation.

    Source:
        Task weighting through gradient projection (wPCGrad), arXiv 2409.01793, algorithm 1, in our reading:
        the text says that the sampled task stays intact, the printed algorithm loops over a sampled order.

    >>> wpcgrad([[1.0, -1.0], [-1.0, 4.0]], order=[0, 1]).weights
    array([2., 1.])
    """
    unit = unit_gramian(gramian, precision)
    size = unit.num_tasks
    order = np.asarray(order)
    if order.shape != (size,) or not np.array_equal(np.sort(order), np.arange(size)):
        raise ValueError(f"Parameter `order` should be a permutation of {size} tasks. Found `order = {order}`.")
    cosines = unit.cosines[order][:, order]
    coefficients = np.eye(size)
    annihilated, conflict = max(ANNIHILATED, unit.noise), max(CONFLICT, unit.rounding)
    for position in np.flatnonzero(unit.norms[order]).tolist():
        reference = coefficients[position]
        products = cosines @ reference
        square = float(reference @ products)
        if square <= annihilated:
            reference[:] = 0.0
            continue
        later = coefficients[position + 1 :]
        dots = later @ products
        dots[dots >= -conflict] = 0.0
        dots /= square
        later -= dots[:, None] * reference
    back = np.argsort(order)
    return _projection(unit, coefficients[back][:, back])


def _projection(unit: UnitGramian, coefficients: Array) -> Projection:
    """From combinations of unit gradients to combinations of the gradients as they are."""
    scaled = coefficients * unit.norms[:, None] * unit.inverse
    scaled.flat[:: len(scaled) + 1] = coefficients.diagonal()
    # The sum of the modified gradients needs no iteration and has no error to certify.
    return Projection(scaled.sum(axis=0), converged=True, residual=0.0, iterations=0, coefficients=scaled)


def _check_orders(orders: npt.ArrayLike | None, size: int) -> Order:
    expected = identity_orders(size)
    if orders is None:
        return expected
    array = np.asarray(orders)
    if array.shape != expected.shape or not (np.sort(array, axis=1) == expected).all():
        raise ValueError(f"Each row of `orders` should be a permutation of the other {size - 1} tasks. Found {orders}.")
    return array.astype(np.intp, copy=False)
