import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from torchmto.lab.statistics import average_ranks, critical_difference, friedman, holm, paired, spearman, wins

floats = st.floats(-10, 10).map(lambda x: round(x, 3))


@given(st.lists(st.tuples(floats, floats), min_size=2, max_size=8))
@settings(max_examples=30, deadline=None)
def test_paired_is_scipys_t_test(pairs):
    first, second = zip(*pairs, strict=True)
    ours = paired(first, second)
    differences = np.subtract(first, second)
    if np.std(differences) == 0:
        assert ours.p is None
        return
    theirs = stats.ttest_rel(first, second)
    assert ours.p == pytest.approx(theirs.pvalue, abs=1e-9)
    low, high = theirs.confidence_interval(0.95)
    assert ours.mean - ours.ci95 == pytest.approx(low)
    assert ours.mean + ours.ci95 == pytest.approx(high)


def test_one_pair_has_no_interval():
    ours = paired([3.0], [1.0])
    assert (ours.mean, ours.ci95, ours.p, ours.pairs) == (2.0, None, None, 1)
    with pytest.raises(ValueError, match="at least one value"):
        paired([], [])


def test_holm_by_hand():
    # 0.01 * 3, 0.02 * 2, 0.03 * 1, never below the one before
    assert holm({"c": 0.03, "a": 0.01, "b": 0.02}) == pytest.approx({"c": 0.04, "a": 0.03, "b": 0.04})
    assert holm({"a": 0.9, "b": 0.8}) == {"a": 1.0, "b": 1.0}
    assert holm({}) == {}


@given(st.lists(st.lists(floats, min_size=4, max_size=4), min_size=1, max_size=6))
@settings(max_examples=30, deadline=None)
def test_ranks_are_scipys(rows):
    scores = np.array(rows)
    assert average_ranks(scores) == pytest.approx(stats.rankdata(-scores, axis=1).mean(axis=0))


def test_critical_difference_of_the_literature():
    # Demšar 2006, table 5: q = 2.569 for four methods; section 3.2.2: 14 data sets give 1.25.
    assert critical_difference(4, 14) == pytest.approx(1.25, abs=0.005)


@given(st.lists(st.tuples(floats, floats), min_size=3, max_size=9))
@settings(max_examples=30, deadline=None)
def test_rank_correlation_is_scipys(pairs):
    first, second = zip(*pairs, strict=True)
    ours = spearman(first, second)
    if len(set(first)) == 1 or len(set(second)) == 1:
        assert ours is None
    else:
        assert ours == pytest.approx(stats.spearmanr(first, second).statistic, abs=1e-9)


def test_wins_follow_the_direction():
    assert wins([1.0, 5.0], [2.0, 3.0], higher_is_better=True) == (1, 0, 1)
    assert wins([1.0, 5.0, 4.0], [2.0, 6.0, 4.0], higher_is_better=False) == (2, 1, 0)


@given(st.lists(st.lists(floats, min_size=3, max_size=3), min_size=2, max_size=6))
@settings(max_examples=20, deadline=None)
def test_friedman(rows):
    scores = np.array(rows)
    found = friedman(scores)
    if (scores == scores[:, :1]).all():
        assert found is None
        return
    assert found.p == pytest.approx(stats.chi2.sf(found.statistic, 2))
    assert friedman(scores[:1]) is None
    assert friedman(scores[:, :2]) is None


def test_differences_equal_but_for_rounding_are_equal() -> None:
    found = paired([0.9, 0.8, 0.7], [0.8, 0.7, 0.6])
    assert (found.ci95, found.p) == (0.0, None)
    assert found.mean == pytest.approx(0.1)
