"""The coefficient-space projections against their definitions in the space of the gradients."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradient_matrices import full_rank, gradient_matrix, matrices
from torchmto import solvers
from torchmto.solvers.projection import FEW

few = settings(max_examples=40)


def random_orders(num_tasks, rng):
    return np.array([rng.permutation(np.delete(np.arange(num_tasks), i)) for i in range(num_tasks)]).reshape(
        num_tasks, num_tasks - 1
    )


def pcgrad_by_definition(J, orders):
    modified = J.copy()
    for i, order in enumerate(orders):
        for j in order:
            if modified[i] @ J[j] < 0:
                modified[i] = modified[i] - modified[i] @ J[j] / (J[j] @ J[j]) * J[j]
    return modified


def gradvac_by_definition(J, targets, orders, beta):
    modified, targets = J.copy(), targets.copy()
    for i, order in enumerate(orders):
        for j in order:
            a, b = np.linalg.norm(modified[i]), np.linalg.norm(J[j])
            c, rho = modified[i] @ J[j] / (a * b), targets[i, j]
            if c < rho:
                sine = np.sqrt(1 - rho**2)
                modified[i] = modified[i] + J[j] * a * (rho * np.sqrt(1 - c**2) - c * sine) / (b * sine)
            targets[i, j] = (1 - beta) * rho + beta * c
    return modified, targets


def wpcgrad_by_definition(J, order):
    modified = J.copy()
    for position, i in enumerate(order):
        for j in order[position + 1 :]:
            if modified[j] @ modified[i] < 0:
                modified[j] = modified[j] - modified[j] @ modified[i] / (modified[i] @ modified[i]) * modified[i]
    return modified


def assert_rows_close(actual, expected, J):
    np.testing.assert_allclose(
        actual / np.linalg.norm(J, axis=1, keepdims=True),
        expected / np.linalg.norm(J, axis=1, keepdims=True),
        atol=1e-9,
    )


@few
@given(J=full_rank(), seed=st.integers(0, 1000))
def test_pcgrad(J, seed):
    orders = random_orders(len(J), np.random.default_rng(seed))
    projection = solvers.pcgrad(J @ J.T, orders)
    expected = pcgrad_by_definition(J, orders)
    assert_rows_close(projection.coefficients @ J, expected, J)
    np.testing.assert_allclose(projection.weights, projection.coefficients.sum(axis=0))


@few
@given(J=full_rank(), seed=st.integers(0, 1000))
def test_gradvac(J, seed):
    rng = np.random.default_rng(seed)
    orders = random_orders(len(J), rng)
    targets = rng.uniform(-0.5, 0.5, size=(len(J), len(J)))
    projection, new_targets = solvers.gradvac(J @ J.T, targets, orders, beta=0.2)
    expected, expected_targets = gradvac_by_definition(J, targets, orders, beta=0.2)
    assert_rows_close(projection.coefficients @ J, expected, J)
    np.testing.assert_allclose(new_targets, expected_targets, atol=1e-9)


@few
@given(J=matrices(), seed=st.integers(0, 1000))
def test_gradvac_starts_as_pcgrad(J, seed):
    orders = random_orders(len(J), np.random.default_rng(seed))
    projection, targets = solvers.gradvac(J @ J.T, None, orders)
    expected = solvers.pcgrad(J @ J.T, orders)
    np.testing.assert_allclose(projection.coefficients, expected.coefficients, atol=1e-7, rtol=1e-7)
    assert np.abs(targets).max() <= 1


def test_gradvac_with_extreme_targets():
    J = np.array([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    projection, targets = solvers.gradvac(J @ J.T, np.ones((3, 3)), beta=1.0)
    assert np.isfinite(projection.weights).all()
    assert np.isfinite(targets).all()


def test_gradvac_leaves_the_targets_of_zero_gradients():
    J = np.array([[1.0, 0.0], [0.0, 0.0]])
    projection, targets = solvers.gradvac(J @ J.T, np.full((2, 2), 0.4), beta=0.5)
    np.testing.assert_array_equal(projection.weights, [1.0, 1.0])
    np.testing.assert_array_equal(targets, np.full((2, 2), 0.4))


@few
@given(J=full_rank(), seed=st.integers(0, 1000))
def test_wpcgrad(J, seed):
    order = np.random.default_rng(seed).permutation(len(J))
    projection = solvers.wpcgrad(J @ J.T, order)
    assert_rows_close(projection.coefficients @ J, wpcgrad_by_definition(J, order), J)
    np.testing.assert_allclose(projection.weights, projection.coefficients.sum(axis=0))


@few
@given(J=matrices(min_tasks=2), seed=st.integers(0, 1000))
def test_wpcgrad_leaves_the_first_and_ends_without_conflicts(J, seed):
    order = np.random.default_rng(seed).permutation(len(J))
    C = solvers.wpcgrad(J @ J.T, order).coefficients
    np.testing.assert_array_equal(C[order[0]], np.eye(len(J))[order[0]])
    modified = C @ J
    norms = np.linalg.norm(J, axis=1)
    assert (modified @ modified.T >= -1e-7 * norms * norms[:, None]).all()


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_wpcgrad_of_two_tasks(order):
    """Only the second of the order is projected: its part along the first goes."""
    J = gradient_matrix("conflicting", 2, 6, seed=0)
    first, second = J[order]
    assert first @ second < 0
    expected = first + second - first @ second / (first @ first) * first
    np.testing.assert_allclose(solvers.wpcgrad(J @ J.T, order).weights @ J, expected)


def test_wpcgrad_skips_an_annihilated_reference():
    """The second gradient is projected to nothing, and the rounding error left of it must not act."""
    J = np.array([[1.0, 0.3, 0.1], [-1.0, -0.3, -0.1], [0.2, -1.0, 0.7]]) * np.pi
    C = solvers.wpcgrad(J @ J.T, [0, 1, 2]).coefficients
    np.testing.assert_array_equal(C[1], np.zeros(3))
    expected = J[2] - min(J[2] @ J[0], 0) / (J[0] @ J[0]) * J[0]
    np.testing.assert_allclose(C[2] @ J, expected)


@few
@given(J=full_rank(), seed=st.integers(0, 1000))
def test_pairwise_projects_one_of_each_conflicting_pair(J, seed):
    rng = np.random.default_rng(seed)
    orders = random_orders(len(J), rng)
    keep = np.triu(rng.random((len(J), len(J))) < 0.5, 1)
    keep |= np.tril(~keep.T, -1)
    modified = J.copy()
    for i, order in enumerate(orders):
        for j in order:
            if keep[j, i] and J[i] @ J[j] < 0 and modified[i] @ J[j] < 0:
                modified[i] = modified[i] - modified[i] @ J[j] / (J[j] @ J[j]) * J[j]
    assert_rows_close(solvers.wpcgrad_pairwise(J @ J.T, keep, orders).coefficients @ J, modified, J)


@few
@given(J=full_rank(kinds=("aligned",)))
def test_without_conflicts_nothing_changes(J):
    G = np.abs(J) @ np.abs(J).T
    for projection in (solvers.pcgrad(G), solvers.wpcgrad(G, np.arange(len(G)))):
        np.testing.assert_array_equal(projection.coefficients, np.eye(len(G)))


def test_gradvac_a_gradient_that_vanished_on_the_way_has_no_cosine():
    J = np.array([[1.0, 0.0, 0.0], [-1.0, 0.0, 0.0], [1.0, 1.0, 0.0]])
    given = np.full((3, 3), 0.5)
    given[0, 1] = 0.0
    targets = solvers.gradvac(J @ J.T, given, beta=0.5).targets
    assert targets[0, 1] == -0.5  # opposite; projected off, nothing is left of task 0
    assert targets[0, 2] == 0.5


def test_few_tasks_are_projected_as_many_are(monkeypatch):
    """Plain numbers, which few tasks are faster with, give the same bits as arrays."""
    rng = np.random.default_rng(0)
    for trial in range(300):
        size = int(rng.integers(1, FEW + 1))
        rows = rng.standard_normal((size, int(rng.integers(1, 6)))) * 10.0 ** rng.integers(-8, 8, size=(size, 1))
        if trial % 5 == 0:
            rows[rng.integers(size)] = 0
        if trial % 7 == 0:
            rows[:] = rows[0] * rng.choice([-1, 1], size=(size, 1))
        orders = random_orders(size, rng)
        few = solvers.pcgrad(rows @ rows.T, orders)
        with monkeypatch.context() as patch:
            patch.setattr("torchmto.solvers.projection.FEW", 0)
            many = solvers.pcgrad(rows @ rows.T, orders)
        np.testing.assert_array_equal(few.weights, many.weights)
        np.testing.assert_array_equal(few.coefficients, many.coefficients)
