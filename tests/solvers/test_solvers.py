"""What holds for every solver: finite, scale-invariant, independent of the order of the tasks."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradient_matrices import KINDS, full_rank, gradient_matrix, matrices
from torchmto import solvers

# name -> solver, degree of homogeneity of the weights in the gradients, weight of a single task (None: not 1)
SOLVERS = {
    "min_norm": (solvers.min_norm, 0, 1.0),
    "dual_cone": (solvers.dual_cone, 0, 1.0),
    "upgrad": (solvers.upgrad, 0, 1.0),
    "cagrad": (solvers.cagrad, 0, None),
    "cagrad_wide": (lambda G: solvers.cagrad(G, 1.5), 0, None),
    "nash": (solvers.nash, -1, None),
    "fair": (solvers.fair, -4 / 3, None),
    "fair_half": (lambda G: solvers.fair(G, 0.5), -2 / 3, None),
    "aligned": (solvers.aligned, 0, 1.0),
    "aligned_median": (lambda G: solvers.aligned(G, scale="median"), 0, 1.0),
    "aligned_rmse": (lambda G: solvers.aligned(G, scale="rmse"), 0, 1.0),
    "imtl_g": (solvers.imtl_g, 0, 1.0),
    "config": (solvers.config, 0, 1.0),
    "krum": (solvers.krum, 0, 1.0),
    "pcd": (solvers.pcd, 0, 1.0),
    "pcgrad": (solvers.pcgrad, 0, 1.0),
    "wpcgrad": (lambda G: solvers.wpcgrad(G, np.arange(len(G))), 0, 1.0),
    "wpcgrad_pairwise": (
        lambda G: solvers.wpcgrad_pairwise(G, np.triu(np.ones((len(G), len(G)), dtype=bool), 1)),
        0,
        1.0,
    ),
    "gradvac": (lambda G: solvers.gradvac(G, np.full_like(G, 0.3)).projection, 0, 1.0),
    "sdmgrad": (solvers.sdmgrad, 0, 1.0),
}
ORDER_FREE = [
    name for name in SOLVERS if name not in {"pcd", "pcgrad", "wpcgrad", "wpcgrad_pairwise", "gradvac", "krum"}
]
by_name = pytest.mark.parametrize("name", SOLVERS)


def close(vector, expected, size, tolerance=1e-6):
    return np.linalg.norm(vector - expected) <= tolerance * np.linalg.norm(expected) + 1e-9 * size


@by_name
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_tasks", [1, 2, 3, 6, 20, 40])
def test_finite_weights(name, kind, num_tasks):
    J = gradient_matrix(kind, num_tasks, 15, seed=num_tasks)
    solution = SOLVERS[name][0](J @ J.T)
    assert solution.weights.shape == (num_tasks,)
    assert solution.weights.dtype == np.float64
    assert np.isfinite(solution.weights).all()
    assert isinstance(solution.converged, bool)
    assert solution.residual >= 0


@by_name
@settings(max_examples=15)
@given(J=matrices(), seed=st.integers(0, 1000))
def test_rounding_errors_in_the_gramian_do_no_harm(name, J, seed):
    """A Gramian of single precision is neither symmetric nor positive semi-definite."""
    G = J @ J.T
    noise = np.random.default_rng(seed).normal(size=G.shape)
    solution = SOLVERS[name][0](G + 1e-7 * np.trace(G) * noise)
    assert np.isfinite(solution.weights).all()


@by_name
@settings(max_examples=15)
@given(J=full_rank(), exponent=st.sampled_from([-16, -8, -3, 3, 8, 16]))
def test_homogeneous(name, J, exponent):
    solver, degree, _ = SOLVERS[name]
    scale = 10.0 ** (exponent / 2)
    G = J @ J.T
    weights, scaled = solver(G).weights, solver(10.0**exponent * G).weights / scale**degree
    assert close(scaled @ J, weights @ J, np.abs(weights) @ np.linalg.norm(J, axis=1))


@pytest.mark.parametrize("name", ORDER_FREE)
@settings(max_examples=15)
@given(J=full_rank(), seed=st.integers(0, 1000))
def test_independent_of_the_order_of_the_tasks(name, J, seed):
    solver = SOLVERS[name][0]
    order = np.random.default_rng(seed).permutation(len(J))
    weights, permuted = solver(J @ J.T).weights, solver(J[order] @ J[order].T).weights
    assert close(permuted @ J[order], weights @ J, np.abs(weights) @ np.linalg.norm(J, axis=1))


@by_name
@pytest.mark.parametrize("norm", [1e-8, 0.3, 1.0, 1e8])
def test_single_task(name, norm):
    solver, _, weight = SOLVERS[name]
    solution = solver(np.array([[norm**2]]))
    assert solution.converged
    if weight is not None:
        assert solution.weights.tolist() == [weight]


@by_name
@pytest.mark.parametrize("num_tasks", [1, 2, 5])
def test_zero_gradients(name, num_tasks):
    weights = SOLVERS[name][0](np.zeros((num_tasks, num_tasks))).weights
    summed = {"aligned", "aligned_median", "aligned_rmse", "pcgrad", "wpcgrad", "wpcgrad_pairwise", "gradvac"}
    expected = np.ones(num_tasks) / (1 if name in summed else num_tasks)
    if name in ("krum", "pcd"):
        expected = np.eye(num_tasks)[0]
    np.testing.assert_allclose(weights, expected)


@by_name
@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (np.ones((2, 3)), "should be a square matrix"),
        (np.ones(3), "should be a square matrix"),
        (np.zeros((0, 0)), "should be a square matrix"),
        (np.array([[1.0, np.nan], [np.nan, 1.0]]), "should be finite"),
        (np.array([[np.inf]]), "should be finite"),
    ],
)
def test_wrong_gramian(name, matrix, message):
    with pytest.raises(ValueError, match=message):
        SOLVERS[name][0](matrix)


@by_name
def test_gramian_is_left_as_it_is(name):
    J = gradient_matrix("conflicting", 5, 9, seed=0)
    G = J @ J.T
    before = G.copy()
    SOLVERS[name][0](G)
    np.testing.assert_array_equal(G, before)
