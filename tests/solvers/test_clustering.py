"""Groups of tasks."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import AffinityPropagation

from torchmto import solvers


def affinities(num_tasks, seed):
    X = np.random.default_rng(seed).normal(size=(num_tasks, num_tasks))
    return (X + X.T) / 2


def value(X, groups):
    return sum(X[i, j] for group in groups for i, j in itertools.combinations(group, 2))


def partitions(tasks):
    if not tasks:
        yield []
        return
    first, *rest = tasks
    for size in range(len(rest) + 1):
        for others in itertools.combinations(rest, size):
            for remaining in partitions([task for task in rest if task not in others]):
                yield [[first, *others], *remaining]


@settings(max_examples=30)
@given(num_tasks=st.integers(1, 6), seed=st.integers(0, 1000))
def test_correlation_groups_are_the_best_partition(num_tasks, seed):
    X = affinities(num_tasks, seed)
    groups = solvers.correlation_groups(X)
    assert sorted(itertools.chain(*groups)) == list(range(num_tasks))
    assert value(X, groups) == pytest.approx(max(value(X, p) for p in partitions(list(range(num_tasks)))))


@pytest.mark.parametrize("num_tasks", [5, 10, 14])
@pytest.mark.parametrize("seed", range(5))
def test_correlation_groups_do_not_depend_on_the_order(num_tasks, seed):
    X = affinities(num_tasks, seed)
    order = np.random.default_rng(seed).permutation(num_tasks)
    groups = solvers.correlation_groups(X[np.ix_(order, order)])
    assert sorted(sorted(order[group].tolist()) for group in groups) == solvers.correlation_groups(X)


@pytest.mark.parametrize("seed", range(5))
def test_beyond_ten_tasks_no_single_move_gains(seed):
    X = affinities(20, seed)
    groups = solvers.correlation_groups(X)
    assert sorted(itertools.chain(*groups)) == list(range(20))
    best = value(X, groups)
    for task in range(20):
        rest = [[t for t in other if t != task] for other in groups]
        for target in range(len(rest) + 1):
            moved = [*[list(other) for other in rest], []]
            moved[target].append(task)
            assert value(X, moved) <= best + 1e-9
        assert value(X, [*rest, [task]]) <= best + 1e-9


@pytest.mark.parametrize("num_tasks", [9, 12])
def test_planted_groups_are_found(num_tasks):
    labels = np.arange(num_tasks) % 3
    X = np.where(labels[:, None] == labels, 1.0, -0.5)
    expected = [np.flatnonzero(labels == label).tolist() for label in range(3)]
    assert solvers.correlation_groups(X) == expected
    assert solvers.affinity_propagation_groups(X + affinities(num_tasks, 0) * 1e-3) == expected


def test_tasks_that_gain_nothing_stay_apart():
    assert solvers.correlation_groups(np.zeros((4, 4))) == [[0], [1], [2], [3]]
    assert solvers.correlation_groups(np.zeros((12, 12))) == [[i] for i in range(12)]


def test_affinity_propagation_is_deterministic():
    X = affinities(6, 1)
    assert solvers.affinity_propagation_groups(X) == solvers.affinity_propagation_groups(X.copy())
    assert solvers.affinity_propagation_groups([[1.0]]) == [[0]]


def test_affinity_propagation_without_convergence(monkeypatch):
    tries = []
    fit = AffinityPropagation.fit

    def short(self, X):
        tries.append(self.convergence_iter)
        self.max_iter = 1
        return fit(self, X)

    monkeypatch.setattr(AffinityPropagation, "fit", short)
    assert solvers.affinity_propagation_groups(affinities(6, 1)) is None
    assert tries == list(range(50, 1050, 100))


@pytest.mark.parametrize("solver", [solvers.correlation_groups, solvers.affinity_propagation_groups])
def test_wrong_affinity(solver):
    with pytest.raises(ValueError, match="Parameter `affinity` should be finite"):
        solver([[np.nan]])
