"""Statistics of comparisons with paired seeds: intervals, tests corrected for their number, ranks.

scipy is imported where it is used, since its statistics take a second to load.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


def confidence95(values: Sequence[float]) -> float | None:
    """Half the width of the 95 % confidence interval of the mean, by Student's t; None for one value.

    Example:
        >>> round(confidence95([1.0, 2.0, 3.0]), 4)
        2.4841
    """
    if len(values) < 2:
        return None
    from scipy.special import stdtrit  # noqa: PLC0415  what scipy.stats uses, without its second of import

    return float(stdtrit(len(values) - 1, 0.975)) * std(values) / math.sqrt(len(values))


def std(values: Sequence[float]) -> float:
    """Sample standard deviation; 0 for one value."""
    if len(values) < 2:
        return 0.0
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))


@dataclass(frozen=True)
class Paired:
    """The mean of paired differences.

    Attributes:
        mean: Mean of first minus second.
        ci95: Half the width of its 95 % confidence interval; None for one pair.
        p: Two-sided p value of the paired t test; None for one pair or equal differences.
        pairs: How many.
    """

    mean: float
    ci95: float | None
    p: float | None
    pairs: int


def paired(first: Sequence[float], second: Sequence[float]) -> Paired:
    """First minus second, pair by pair, by Student's t.

    Args:
        first: One value per seed.
        second: The other's, in the same order of seeds.

    Raises:
        ValueError: If there are no pairs, or the lengths differ.

    Example:
        >>> paired([1.0, 2.0, 4.0], [0.0, 1.0, 2.0]).mean.__round__(3)
        1.333
    """
    differences = [a - b for a, b in zip(first, second, strict=True)]
    if not differences:
        raise ValueError("Parameter `first` should hold at least one value. Found none.")
    mean = sum(differences) / len(differences)
    interval = confidence95(differences)
    p = None
    spread = std(differences)
    if interval is not None and spread <= 1e-12 * max(map(abs, (*first, *second))):
        # Differences that are equal but for rounding, as of accuracies on a small test split.
        interval = spread = 0.0
    if spread > 0:
        from scipy.special import stdtr  # noqa: PLC0415

        t = mean / (spread / math.sqrt(len(differences)))
        p = float(2 * stdtr(len(differences) - 1, -abs(t)))
    return Paired(mean, interval, p, len(differences))


def holm(p: Mapping[str, float | None]) -> dict[str, float | None]:
    """P values corrected for their number by Holm's step-down procedure; None stays None and doesn't count.

    Example:
        >>> holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": None})
        {'a': 0.03, 'b': 0.06, 'c': 0.06, 'd': None}
    """
    known = sorted((value, name) for name, value in p.items() if value is not None)
    corrected: dict[str, float | None] = dict.fromkeys(p)
    largest = 0.0
    for place, (value, name) in enumerate(known):
        largest = max(largest, min(1.0, value * (len(known) - place)))
        corrected[name] = largest
    return corrected


def wins(first: Sequence[float], second: Sequence[float], *, higher_is_better: bool) -> tuple[int, int, int]:
    """How often the first is better, equal, worse.

    Example:
        >>> wins([1.0, 2.0, 3.0], [2.0, 2.0, 2.0], higher_is_better=True)
        (1, 1, 1)
    """
    sign = 1 if higher_is_better else -1
    signs = [sign * ((a > b) - (a < b)) for a, b in zip(first, second, strict=True)]
    return signs.count(1), signs.count(0), signs.count(-1)


def average_ranks(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean rank of each method, 1 for the best; ties share their mean rank.

    Args:
        scores: ``[blocks, methods]``, higher is better.

    Returns:
        ``[methods]``.

    Example:
        >>> average_ranks(np.array([[3.0, 2.0, 1.0], [3.0, 3.0, 1.0]])).tolist()
        [1.25, 1.75, 3.0]
    """
    from scipy.stats import rankdata  # noqa: PLC0415

    ranks: NDArray[np.float64] = rankdata(-scores, axis=1).mean(axis=0)
    return ranks


@dataclass(frozen=True)
class Friedman:
    """Friedman's test of the hypothesis that all methods are equally good.

    Attributes:
        statistic: Chi-squared, corrected for ties, with one degree of freedom less than there are methods.
        p: Its p value, which is rough for fewer than about ten blocks.
    """

    statistic: float
    p: float


def friedman(scores: NDArray[np.float64]) -> Friedman | None:
    """Friedman's test; None for fewer than three methods or two blocks, or where all methods always tie.

    Args:
        scores: ``[blocks, methods]``, higher is better.

    Source: Friedman, The use of ranks to avoid the assumption of normality, JASA 1937; scipy's implementation.

    Example:
        >>> friedman(np.array([[3.0, 2.0, 1.0]] * 4)).statistic
        8.0
    """
    if scores.shape[0] < 2 or scores.shape[1] < 3 or (scores == scores[:, :1]).all():
        return None
    from scipy.stats import friedmanchisquare  # noqa: PLC0415

    found = friedmanchisquare(*scores.T)
    return Friedman(float(found.statistic), float(found.pvalue))


def critical_difference(methods: int, blocks: int) -> float:
    """The least difference of average ranks that is significant at 5 % by Nemenyi's test.

    Source: Demšar, Statistical Comparisons of Classifiers over Multiple Data Sets, JMLR 2006.

    Args:
        methods: How many are compared, at least two.
        blocks: Over how many independent blocks.
    """
    from scipy.stats import studentized_range  # noqa: PLC0415

    q = float(studentized_range.ppf(0.95, methods, np.inf)) / math.sqrt(2)
    return q * math.sqrt(methods * (methods + 1) / (6 * blocks))


def spearman(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Rank correlation; None where one side is constant.

    Example:
        >>> spearman([1, 2, 3, 4], [10, 20, 40, 30])
        0.8
    """
    if len(set(first)) == 1 or len(set(second)) == 1:
        return None
    from scipy.stats import spearmanr  # noqa: PLC0415

    return round(float(spearmanr(first, second).statistic), 12)
