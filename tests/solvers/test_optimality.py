"""What each solver promises, on random Gramians: optimality conditions, no conflicts, equal projections."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from gradient_matrices import full_rank, gradient_matrix, matrices
from torchmto import solvers

few = settings(max_examples=40)
FINITE_ROWS = (
    "random",
    "aligned",
    "conflicting",
    "rank_deficient",
    "duplicate_rows",
    "opposite_rows",
    "norms",
    "identical",
)


def unit_rows(J):
    return J / np.linalg.norm(J, axis=1, keepdims=True)


@few
@given(J=matrices(min_tasks=2))
def test_min_norm_is_optimal(J):
    solution = solvers.min_norm(J @ J.T)
    w = solution.weights
    assert solution.converged
    assert w.min() >= 0
    assert w.sum() == pytest.approx(1)
    x = w @ J
    shortest = np.linalg.norm(J, axis=1).min()
    assert (J @ x - x @ x >= -1e-7 * shortest * (shortest + np.linalg.norm(J, axis=1))).all()


@pytest.mark.parametrize("cosine", [-1.0, -0.4, 0.3, 0.999999])
@pytest.mark.parametrize("length", [1e-6, 0.5, 1.0, 1e6])
def test_min_norm_of_two_tasks(cosine, length):
    J = np.array([[1.0, 0.0], [length * cosine, length * np.sqrt(1 - cosine**2)]])
    w = solvers.min_norm(J @ J.T).weights
    difference = J[0] - J[1]
    expected = np.clip(difference @ J[0] / (difference @ difference), 0, 1)
    assert w[1] == pytest.approx(expected, rel=1e-6, abs=1e-12)


@few
@given(J=matrices(min_tasks=2))
def test_upgrad_and_dualproj_conflict_with_no_task(J):
    norms = np.linalg.norm(J, axis=1)
    for solution in (solvers.upgrad(J @ J.T), solvers.dual_cone(J @ J.T)):
        assert solution.converged
        assert (solution.weights >= 1 / len(J)).all()
        update = solution.weights @ J
        size = solution.weights @ norms
        assert (J @ update >= -1e-9 * norms * size).all()


@few
@given(J=matrices(min_tasks=2), seed=st.integers(0, 1000))
def test_dual_cone_is_the_nearest(J, seed):
    """The projection, the direction and what separates them meet at a right angle."""
    preference = np.random.default_rng(seed).uniform(0.1, 2, size=len(J))
    solution = solvers.dual_cone(J @ J.T, preference)
    update, direction = solution.weights @ J, preference @ J
    size = solution.weights @ np.linalg.norm(J, axis=1)
    assert abs((update - direction) @ update) <= 1e-9 * size**2


@few
@given(J=matrices(kinds=FINITE_ROWS, min_tasks=2), seed=st.integers(0, 1000))
def test_upgrad_is_the_combination_of_projections(J, seed):
    preference = np.random.default_rng(seed).uniform(0.1, 2, size=len(J))
    G = J @ J.T
    update = sum(u * solvers.dual_cone(G, e).weights @ J for u, e in zip(preference, np.eye(len(J)), strict=True))
    weights = solvers.upgrad(G, preference).weights
    size = weights @ np.linalg.norm(J, axis=1)
    np.testing.assert_allclose(weights @ J, update, atol=1e-9 * size)


def test_upgrad_respects_short_gradients():
    """Lengths that span 1e6 give the same projections as unit ones."""
    J = gradient_matrix("conflicting", 6, 10, seed=3)
    scale = np.logspace(-3, 3, 6)
    plain = solvers.upgrad(J @ J.T, preference=np.ones(6)).weights
    scaled = solvers.upgrad((J * scale[:, None]) @ (J * scale[:, None]).T, preference=1 / scale).weights
    np.testing.assert_allclose(scaled * scale, plain, rtol=1e-9)


@few
@given(J=full_rank(), c=st.sampled_from([0.1, 0.5, 0.9, 1.0, 2.0]))
def test_cagrad_minimises_its_dual(J, c):
    """The smallest projection equals the value of the paper's problem at the weights behind it."""
    solution = solvers.cagrad(J @ J.T, c)
    assert solution.converged
    mean = J.mean(axis=0)
    update = solution.weights @ J
    radius = c * np.linalg.norm(mean)
    assert np.linalg.norm(update - mean) == pytest.approx(radius, rel=1e-9)
    added = solution.weights - 1 / len(J)
    assert added.min() >= -1e-12 * added.max()
    w = added / added.sum()
    value = w @ (J @ mean) + radius * np.linalg.norm(w @ J)
    assert (J @ update).min() == pytest.approx(value, rel=1e-6, abs=1e-9 * radius * np.linalg.norm(w @ J))


@few
@given(J=matrices(min_tasks=2), c=st.sampled_from([1.0, 1.5]))
def test_cagrad_with_a_wide_ball_conflicts_with_no_task(J, c):
    solution = solvers.cagrad(J @ J.T, c)
    assert solution.converged
    norms = np.linalg.norm(J, axis=1)
    assert (J @ (solution.weights @ J) >= -1e-7 * norms * norms.max()).all()


def test_cagrad_where_a_combination_vanishes():
    """Two opposite gradients and a third: the nearest direction to the mean that harms neither."""
    J = np.array([[1.0, 0.0], [-1.0, 0.0], [3.0, 3.0]])
    solution = solvers.cagrad(J @ J.T, 0.9)
    assert solution.converged
    np.testing.assert_allclose(solution.weights @ J, [0.0, 1.0], atol=1e-9)


def test_cagrad_without_a_ball_is_the_mean():
    J = gradient_matrix("conflicting", 4, 6, seed=0)
    np.testing.assert_array_equal(solvers.cagrad(J @ J.T, 0.0).weights, np.full(4, 0.25))


@few
@given(J=full_rank(), alpha=st.sampled_from([0.5, 1.0, 2.0, 5.0]))
def test_fair_solves_its_equation(J, alpha):
    solution = solvers.fair(J @ J.T, alpha)
    assert solution.converged
    w = solution.weights
    assert w.min() > 0
    np.testing.assert_allclose(J @ (w @ J), w ** (-1 / alpha), rtol=1e-6)


def spread_rows(seed, span):
    """Rows whose lengths span 10**±span."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(5, 50)) * 10 ** rng.uniform(-span, span, size=(5, 1))


@pytest.mark.parametrize(("alpha", "span"), [(0.5, 2), (10, 2), (20, 2), (50, 1), (100, 1), (100, 2)])
def test_fair_with_strong_preferences(alpha, span):
    for seed in range(6):
        J = spread_rows(seed, span)
        solution = solvers.fair(J @ J.T, alpha)
        assert solution.converged
        # Of large projections the weights underflow to 0.
        np.testing.assert_allclose((J @ (solution.weights @ J)) ** -alpha, solution.weights, rtol=1e-5)


@pytest.mark.parametrize(("alpha", "span"), [(0.1, 3), (1000, 3)])
def test_fair_that_stops_on_the_way_conflicts_with_no_task(alpha, span):
    solutions = []
    for seed in range(6):
        J = spread_rows(seed, span)
        solutions.append(solvers.fair(J @ J.T, alpha))
        update = solutions[-1].weights @ J
        assert (unit_rows(J) @ update > -1e-12 * np.linalg.norm(update)).all()
    assert not all(solution.converged for solution in solutions)


@few
@given(J=full_rank(), exponents=st.integers(0, 1000))
def test_nash_direction_does_not_depend_on_lengths(J, exponents):
    scale = 10 ** np.random.default_rng(exponents).uniform(-3, 3, size=len(J))
    scaled = J * scale[:, None]
    plain, other = solvers.nash(J @ J.T), solvers.nash(scaled @ scaled.T)
    size = plain.weights @ np.linalg.norm(J, axis=1)
    np.testing.assert_allclose(other.weights @ scaled, plain.weights @ J, rtol=1e-6, atol=1e-8 * size)


def test_nash_without_a_solution():
    """Opposite gradients have no bargain; the fallback is finite and hardly moves."""
    J = np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 2.0]])
    solution = solvers.nash(J @ J.T)
    assert not solution.converged
    assert solution.weights.max() <= 1e3 + 1
    np.testing.assert_allclose(solution.weights @ J, [0.0, 1.0], atol=1e-5)


@few
@given(J=full_rank())
def test_imtl_g_and_config_project_equally(J):
    G = J @ J.T
    for solver in (solvers.imtl_g, solvers.config):
        solution = solver(G)
        assert solution.converged
        projections = unit_rows(J) @ (solution.weights @ J)
        np.testing.assert_allclose(projections, projections.mean(), rtol=1e-6)
    assert solvers.imtl_g(G).weights.sum() == pytest.approx(1)


@few
@given(J=full_rank())
def test_config_length_and_sign(J):
    update = solvers.config(J @ J.T).weights @ J
    length = np.linalg.norm(update)
    assert length == pytest.approx((J @ update).sum() / length, rel=1e-6)
    assert (J @ update > 0).all()


def test_equal_projections_that_do_not_exist():
    J = np.array([[1.0, 0.0], [-1.0, 0.0]])
    imtl_g, config = solvers.imtl_g(J @ J.T), solvers.config(J @ J.T)
    assert not imtl_g.converged
    assert imtl_g.weights.tolist() == [0.5, 0.5]
    assert not config.converged
    assert config.weights.tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("solver", "exists"), [(solvers.aligned, True), (solvers.imtl_g, False), (solvers.config, False)]
)
@pytest.mark.parametrize("dependence", ["sum", "plane", "twin"])
def test_dependent_gradients_in_single_precision(solver, exists, dependence):
    """Rounding errors of float32 products are no direction of their own."""
    for seed in range(12):
        J = np.random.default_rng(seed).normal(size=(3, 2 if dependence == "plane" else 500))
        J[2] = {"sum": J[0] + J[1], "plane": J[2], "twin": 2 * J[0]}[dependence]
        single = J.astype(np.float32)
        found, expected = solver(single @ single.T), solver(J @ J.T)
        update = expected.weights @ J
        assert np.linalg.norm(found.weights @ J - update) <= 1e-3 * np.linalg.norm(update)
        assert found.converged == expected.converged == (exists or dependence == "twin")


def test_config_can_conflict_where_no_equal_projections_exist():
    J = np.array([[-0.57, -1.03], [-1.04, 0.27], [0.36, 1.32], [-0.01, 1.04]])
    solution = solvers.config(J @ J.T)
    assert not solution.converged
    assert (J @ (solution.weights @ J)).min() < 0 < (J @ (solvers.min_norm(J @ J.T).weights @ J)).min()


@few
@given(J=full_rank(), scale=st.sampled_from(["min", "median", "rmse"]))
def test_aligned_gradients_are_orthogonal_and_equally_long(J, scale):
    """One task's preference at a time gives that task's aligned gradient."""
    G = J @ J.T
    balanced = np.stack([solvers.aligned(G, scale=scale, preference=e).weights for e in np.eye(len(J))]) @ J
    squares = np.linalg.svd(J, compute_uv=False) ** 2
    reference = {"min": squares[-1], "median": squares[len(squares) // 2], "rmse": squares.mean()}[scale]
    np.testing.assert_allclose(balanced @ balanced.T / reference, np.eye(len(J)), atol=1e-5)


def test_krum_leaves_an_outlier_out():
    J = gradient_matrix("aligned", 8, 5, seed=1)
    J[3] *= -50
    weights = solvers.krum(J @ J.T, num_selected=7).weights
    assert weights[3] == 0
    assert np.delete(weights, 3) == pytest.approx(1 / 7)
    distances = np.linalg.norm(J[:, None] - J, axis=2) ** 2
    scores = np.sort(distances, axis=1)[:, 1:6].sum(axis=1)
    assert solvers.krum(J @ J.T).weights.argmax() == scores.argmin()


@few
@given(values=st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=8), seed=st.integers(0, 1000))
def test_simplex_projection(values, seed):
    projected = solvers.simplex_projection(values)
    assert projected.min() >= 0
    assert projected.sum() == pytest.approx(1)
    corner = np.random.default_rng(seed).dirichlet(np.ones(len(values)))
    assert (np.array(values) - projected) @ (corner - projected) <= 1e-9 * (1 + np.abs(values).max())
    np.testing.assert_allclose(solvers.simplex_projection(projected), projected, atol=1e-12)


def test_sdmgrad_finds_the_minimum():
    J = gradient_matrix("conflicting", 4, 8, seed=5)
    G = J @ J.T
    solution = solvers.sdmgrad(G, steps=4000, learning_rate=0.2, regularization=0.5)

    def objective(w):
        return (w + 0.125) @ G @ (w + 0.125)

    constraint = {"type": "eq", "fun": lambda w: w.sum() - 1}
    best = minimize(objective, np.full(4, 0.25), bounds=[(0, 1)] * 4, constraints=constraint, tol=1e-14)
    w = solvers.sdmgrad_simplex(solution.weights, 0.5)
    assert solution.weights.sum() == pytest.approx(1)
    assert objective(w) == pytest.approx(best.fun, rel=1e-6)


def test_sdmgrad_of_a_zero_matrix_keeps_its_weights():
    rows = solvers.sdmgrad(np.zeros((2, 2)), weights=[0.8, 0.2], regularization=0.3).weights
    np.testing.assert_allclose(solvers.sdmgrad_simplex(rows, 0.3), [0.8, 0.2])


def test_modo_steps_converge_to_the_regularised_minimum():
    G = np.array([[1.0, -0.2], [-0.2, 3.0]])
    w = np.array([0.5, 0.5])
    for _ in range(3000):
        w = solvers.modo(G, w, learning_rate=0.01, regularization=0.1).weights
    np.testing.assert_allclose(w, solvers.min_norm(G + 0.1 * np.eye(2)).weights, atol=1e-8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda G: solvers.cagrad(G, -0.5), r"Parameter `c` should be a non-negative float. Found `c = -0.5`."),
        (lambda G: solvers.fair(G, 0.0), r"Parameter `alpha` should be a positive float. Found `alpha = 0.0`."),
        (lambda G: solvers.aligned(G, scale="max"), r"Parameter `scale` should be one of"),
        (lambda G: solvers.dual_cone(G, [1.0]), r"Parameter `preference` should be 2 finite numbers."),
        (lambda G: solvers.upgrad(G, [1.0, np.nan]), r"Parameter `preference` should be 2 finite numbers."),
        (lambda G: solvers.gradvac(G, beta=1.5), "Parameter `beta` should be a float >= 0 and <= 1."),
        (lambda G: solvers.gradvac(G, np.ones(2)), r"Parameter `targets` should be finite, of shape \(2, 2\)."),
        (lambda G: solvers.pcgrad(G, [[0], [0]]), r"Each row of `orders` should be a permutation"),
        (lambda G: solvers.wpcgrad(G, [0, 0]), r"Parameter `order` should be a permutation of 2 tasks."),
        (lambda G: solvers.wpcgrad_pairwise(G, np.ones((2, 2))), r"should name one of each pair."),
        (lambda G: solvers.wpcgrad_pairwise(G, np.ones(2)), r"Parameter `keep` should have the shape \(2, 2\)."),
        (lambda G: solvers.krum(G, num_outliers=-1), r"Parameter `num_outliers` should be an int >= 0."),
        (lambda G: solvers.krum(G, num_selected=0), r"Parameter `num_selected` should be an int >= 1."),
        (
            lambda G: solvers.sdmgrad(G, regularization=-1.0),
            r"Parameter `regularization` should be a non-negative float.",
        ),
        (lambda G: solvers.modo(G, learning_rate=-1.0), r"Parameter `learning_rate` should be a non-negative float."),
        (solvers.simplex_projection, r"Parameter `values` should be a vector of finite numbers."),
    ],
)
def test_wrong_parameters(call, message):
    with pytest.raises(ValueError, match=message):
        call(np.eye(2))
