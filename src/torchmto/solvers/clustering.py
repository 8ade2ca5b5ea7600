"""Tasks divided into groups by their affinities."""

import warnings

import numpy as np
import numpy.typing as npt

from torchmto.solvers.solution import Array
from torchmto.solvers.unit import check_square

MAX_EXACT = 10
"""Up to this number of tasks all partitions are searched."""


def affinity_propagation_groups(
    affinity: npt.ArrayLike, random_state: int = 0, *, converged: bool = True
) -> list[list[int]] | None:
    """Groups by affinity propagation on a symmetric affinity matrix.

    Scikit-learn's algorithm with its default preference (the median affinity). It counts as converged once
    its exemplars haven't changed for 50 iterations. Without convergence it tries again with 100 more, up to
    ten times in all; the iteration limit (200 at first) grows along. In the released code of the paper it stays
    at 200, and what is found by then counts, converged or not, as long as there are exemplars.

    With few tasks the result depends on the algorithm's own noise, so ``random_state`` is fixed by default.

    Args:
        affinity: Normalised affinities, shape [K, K].
        random_state: Seed of the noise that breaks ties.
        converged: False for what the released code does.

    Returns:
        The groups as ascending indices, sorted by their first; None if it never converges (or, then, finds no
        exemplars), so that the caller can keep the groups it has.

    Raises:
        ValueError: If the affinity isn't a square matrix of finite numbers.

    Source:
        Frey and Dueck, Clustering by passing messages between data points, 2007; settings of Selective task
        group updates (arXiv 2502.11986).

    >>> affinity_propagation_groups([[1, 0.9, -1], [0.9, 1, -1], [-1, -1, 1]])
    [[0, 1], [2]]
    """
    from sklearn.cluster import AffinityPropagation  # noqa: PLC0415 - slow to import, seldom used
    from sklearn.exceptions import ConvergenceWarning  # noqa: PLC0415

    matrix = check_square(affinity, "affinity")
    if len(matrix) == 1:
        return [[0]]
    for patience in range(50, 1050, 100):
        model = AffinityPropagation(
            affinity="precomputed",
            convergence_iter=patience,
            max_iter=patience + 150 if converged else 200,
            random_state=random_state,
        )
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            labels = model.fit(matrix).labels_
        failed = converged and any(issubclass(warning.category, ConvergenceWarning) for warning in caught)
        if not failed and labels.min() >= 0:
            return _groups(labels)
    return None


def correlation_groups(affinity: npt.ArrayLike) -> list[list[int]]:
    """The partition of the tasks that maximises the summed affinity inside its groups.

    The value of a partition is the sum of ``affinity[i, j]`` over the pairs i < j that share a group. Up to
    10 tasks it is exact over all partitions; beyond, groups are merged while that gains, and then single
    tasks move to where they gain most until none does. Deterministic, and independent of the order of the
    tasks except for exact ties. Tasks that gain nothing from each other stay apart.

    Args:
        affinity: Symmetric affinities, shape [K, K]; the diagonal is ignored.

    Returns:
        The groups as ascending indices, sorted by their first.

    Raises:
        ValueError: If the affinity isn't a square matrix of finite numbers.

    Source:
        Our own alternative to affinity propagation: correlation clustering, Bansal et al., 2004.

    >>> correlation_groups([[0, 2, -1, 0], [2, 0, -1, 0], [-1, -1, 0, 0.5], [0, 0, 0.5, 0]])
    [[0, 1], [2, 3]]
    """
    matrix = check_square(affinity, "affinity")
    matrix = (matrix + matrix.T) / 2
    np.fill_diagonal(matrix, 0.0)
    labels = _best_partition(matrix) if len(matrix) <= MAX_EXACT else _local_search(matrix)
    return _groups(labels)


def _groups(labels: npt.NDArray[np.intp]) -> list[list[int]]:
    return sorted(np.flatnonzero(labels == label).tolist() for label in np.unique(labels))


def _best_partition(affinity: Array) -> npt.NDArray[np.intp]:
    """Dynamic programme over subsets: the group of the highest member plus the best partition of the rest."""
    size = len(affinity)
    members = (np.arange(2**size)[:, None] >> np.arange(size)) & 1
    inside = np.einsum("si,ij,sj->s", members, affinity, members, optimize=True) / 2
    margin = 1e-12 * np.abs(affinity).sum()
    best = np.zeros(2**size)
    group = np.zeros(2**size, dtype=np.intp)
    for task in range(size):
        top = 1 << task
        for others in range(top):
            subsets = _subsets(others)
            values = inside[subsets | top] + best[others ^ subsets]
            choice = int(np.flatnonzero(values >= values.max() - margin)[0])
            best[top | others] = values[choice]
            group[top | others] = subsets[choice] | top
    labels = np.zeros(size, dtype=np.intp)
    rest = 2**size - 1
    while rest:
        labels[members[group[rest]] == 1] = group[rest]
        rest ^= int(group[rest])
    return labels


def _subsets(mask: int) -> npt.NDArray[np.intp]:
    """All subsets of a bit mask, the empty one first."""
    subsets = np.zeros(1, dtype=np.intp)
    bit = 1
    while bit <= mask:
        if mask & bit:
            subsets = np.concatenate([subsets, subsets | bit])
        bit <<= 1
    return subsets


def _local_search(affinity: Array) -> npt.NDArray[np.intp]:
    """Merge the two groups that gain most while that gains, then move single tasks likewise."""
    size = len(affinity)
    margin = 1e-12 * np.abs(affinity).sum()
    labels = np.arange(size)
    between = affinity.copy()
    while True:
        first, second = divmod(int(between.argmax()), size)
        if between[first, second] <= margin:
            break
        labels[labels == second] = first
        between[first] += between[second]
        between[:, first] += between[:, second]
        between[second] = between[:, second] = 0.0
        between[first, first] = 0.0
    while True:
        membership = np.zeros((size, size))
        membership[np.arange(size), labels] = 1.0
        gain = affinity @ membership
        gain -= gain[np.arange(size), labels][:, None]
        task, target = divmod(int(gain.argmax()), size)
        if gain[task, target] <= margin:
            return labels
        labels[task] = target
