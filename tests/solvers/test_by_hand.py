"""Small cases by another way, where other tests would let a wrong constant pass."""

import importlib

import numpy as np
import pytest
import torch

import torchmto
from torchmto import solvers
from torchmto.solvers.unit import check_precision
from torchmto.structure import (
    ProximalAffinity,
    connection_strength,
    gradient_strength,
    normalized_affinity,
    normalized_strength,
    scaled_strength,
    top_priority,
)
from torchmto.structure.strength import channels_first


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("num_outliers", [0, 1, 2])
def test_krum_sums_over_the_right_neighbours(seed, num_outliers):
    J = np.random.default_rng(seed).normal(size=(7, 4))
    distances = ((J[:, None] - J) ** 2).sum(-1)
    scores = [sorted(np.delete(row, i))[: 7 - num_outliers - 2] for i, row in enumerate(distances)]
    best = int(np.argmin([sum(score) for score in scores]))
    assert solvers.krum(J @ J.T, num_outliers=num_outliers).weights.argmax() == best
    if num_outliers == 1:
        assert solvers.krum(J @ J.T).weights.argmax() == best


def test_pcd_scales_the_gradients_first():
    J = np.random.default_rng(0).normal(size=(3, 5))
    scales = np.array([1.0, 3.0, 0.5])
    scaled = scales[:, None] * J
    expected = scales * solvers.pcd(scaled @ scaled.T, 0.3).weights
    assert np.count_nonzero(expected) > 1
    assert solvers.pcd(J @ J.T, 0.3, scales).weights == pytest.approx(expected)


def test_pcd_that_has_no_answer_says_so():
    solution = solvers.pcd([[1.0, 0.0, 0.0], [0.0, 1.0, -1.0], [0.0, -1.0, 1.0]], 0.5)
    assert solution.weights.tolist() == [1, 0, 0]
    assert (solution.converged, solution.residual, solution.iterations) == (False, 1.0, 0)


def test_modo_without_a_rate_and_regularization():
    solution = solvers.modo(np.eye(2), [0.25, 0.75], regularization=0.0, learning_rate=0.0)
    assert solution.weights == pytest.approx([0.25, 0.75])


def test_modo_and_sdmgrad_by_one_step():
    solution = solvers.modo(np.diag([1.0, 3.0]), learning_rate=0.1, regularization=0.0)
    assert solution.weights == pytest.approx([0.55, 0.45])
    assert (solution.residual, solution.iterations) == (pytest.approx(0.05), 1)
    # Lengths of 2 and 1: the step is in units of 1.5.
    shift = 0.3 * 0.5 * (4 - 1) / 1.5**2 / 2
    solution = solvers.sdmgrad(np.diag([4.0, 1.0]), regularization=0.0, steps=1, learning_rate=0.3, momentum=0.0)
    assert solution.weights == pytest.approx([0.5 - shift, 0.5 + shift])
    assert (solution.residual, solution.iterations) == (pytest.approx(shift), 1)
    # A negative entry is of length 0: the step is in units of 1 / 2 of the largest length.
    solution = solvers.sdmgrad(np.diag([4.0, -1.0]), regularization=0.0, steps=1, learning_rate=0.1, momentum=0.0)
    assert solution.weights == pytest.approx([0.5 - 0.125, 0.5 + 0.125])
    for cross in ([[0.0, 1.0], [-1.0, 0.0]], [[-1.0, 0.0], [0.0, -1.0]]):  # no batch agrees with the other
        assert np.isfinite(solvers.sdmgrad(cross).weights).all()


def test_config_of_equal_gradients_is_their_sum():
    assert solvers.config(np.ones((3, 3))).weights == pytest.approx([1, 1, 1])


def test_config_has_the_rank_that_the_gradients_precision_shows():
    G = [[1.0, 0.99, 0.5], [0.99, 1.0, 0.4], [0.5, 0.4, 1.0]]
    assert solvers.config(G).converged
    assert not solvers.config(G, precision=0.1).converged


@pytest.mark.parametrize(("alpha", "most"), [(1.0, 5), (2.0, 6.7), (3.0, 9), (5.0, 15)])
def test_bargains_take_few_steps(alpha, most):
    steps = []
    for seed in range(40):
        draw = np.random.default_rng(seed)
        J = draw.normal(size=(4, 6)) * 10 ** draw.uniform(-3, 3, size=(4, 1))
        steps.append(solvers.fair(J @ J.T, alpha).iterations)
    assert np.mean(steps) <= most


def test_gradvac_keeps_targets_from_the_pole_by_what_is_known_of_cosines():
    weights = [solvers.gradvac(np.eye(2), np.ones((2, 2)), precision=p)[0].weights.max() for p in (None, 0.01)]
    assert weights[0] > 1e5
    assert weights[1] == pytest.approx(1 + 1 / np.sqrt(2 * 0.02**2), rel=1e-3)


def test_cagrad_rescaled_and_with_a_zero_gradient():
    G = np.array([[1.0, -0.3], [-0.3, 2.0]])
    assert solvers.cagrad(G, 0.5, rescale=True).weights == pytest.approx(solvers.cagrad(G, 0.5).weights / 1.25)
    assert solvers.cagrad(np.zeros((2, 2)), 0.5, rescale=True).weights == pytest.approx([0.4, 0.4])
    assert solvers.cagrad(np.eye(3)).iterations == 1
    # No direction improves a zero gradient: of those that harm none the nearest to the mean is best.
    assert solvers.cagrad(np.diag([1.0, 1.0, 0.0]), 0.5).weights == pytest.approx([1 / 3] * 3)


def test_cagrad_by_newton_steps_alone(monkeypatch):
    J = np.random.default_rng(0).normal(size=(4, 6))
    exact = solvers.cagrad(J @ J.T)
    ball = importlib.import_module("torchmto.solvers.cagrad")._Ball
    monkeypatch.setattr(ball, "_on_support", lambda *_: None)
    solution = solvers.cagrad(J @ J.T)
    assert solution.weights == pytest.approx(exact.weights, rel=1e-6)
    assert solution.converged


@pytest.mark.parametrize(
    ("solve", "residual"), [(solvers.upgrad, 0.5), (lambda G: solvers.dual_cone(G, [1.0, 0.0]), 0.5)]
)
def test_a_projection_that_gives_up_says_how_large_a_conflict_it_leaves(monkeypatch, solve, residual):
    module = importlib.import_module("torchmto.solvers.dual_cone")
    monkeypatch.setattr(module, "nonnegative_least_squares", lambda *_: None)
    solution = solve([[1.0, -1.0], [-1.0, 4.0]])
    assert (solution.converged, solution.residual, solution.iterations) == (False, pytest.approx(residual), 0)


@pytest.mark.parametrize(
    "name",
    [
        "aligned",
        "cagrad",
        "config",
        "dual_cone",
        "fair",
        "gradvac",
        "imtl_g",
        "krum",
        "min_norm",
        "nash",
        "pcd",
        "pcgrad",
        "upgrad",
    ],
)
def test_of_zero_gradients_there_is_nothing_to_solve(name):
    solution = getattr(solvers, name)(np.zeros((3, 3)))
    solution = solution[0] if isinstance(solution, tuple) else solution
    assert (solution.converged, solution.residual, solution.iterations) == (True, 0.0, 0)


def test_upgrad_counts_the_multipliers():
    assert solvers.upgrad([[1.0, -1.0], [-1.0, 4.0]]).iterations == 2


def test_wrong_turns_are_counted():
    with pytest.raises(ValueError, match="permutation of the other 2 tasks"):
        solvers.pcgrad(np.eye(3), [[1, 1], [0, 2], [0, 1]])


def test_pcd_leaves_a_primary_task_without_conflict_alone():
    for seed in range(20):
        squares = np.random.default_rng(seed).lognormal(sigma=3.0, size=3)
        assert solvers.pcd(np.diag(squares), 0.0).weights.tolist() == [1, 0, 0]


def test_solvers_answer_in_double_precision():
    assert solvers.dual_cone(np.zeros((2, 2)), [1, 2]).weights.dtype == np.float64
    assert solvers.simplex_projection(np.array([0.2, 0.9], dtype=np.float32)).dtype == np.float64


def test_precision_is_that_of_the_array():
    one = np.ones((1, 1))
    found = [check_precision(None, one.astype(kind)) for kind in ("f2", "f4", "f8", "i8")]
    assert found == [np.finfo("f2").eps, np.finfo("f4").eps, np.finfo("f8").eps, np.finfo("f8").eps]
    assert check_precision(None, [[1.0]]) == np.finfo("f8").eps


def test_pairwise_wpcgrad_draws_the_turns():
    # Who stays in a pair is certain, so what differs is the order of the turns.
    method = torchmto.make_method("wpcgrad", mode="pairwise", priority=[1.0, 1e-12, 1e-24, 1e-36])
    J = np.random.default_rng(1).normal(size=(4, 2))
    found = {tuple(method.weights(torch.from_numpy(J @ J.T)).tolist()) for _ in range(20)}
    assert len(found) > 1


def test_affinities_by_column():
    matrix = torch.tensor([[2.0, 1.0], [3.0, 4.0]])
    assert torch.equal(normalized_affinity(matrix / 8), normalized_affinity(matrix))
    assert normalized_affinity(matrix).tolist() == [[1, 0.875], [0.875, 1]]
    assert normalized_affinity(matrix, "official").tolist() == [[1, 1.625], [1.625, 1]]


def test_a_tie_is_a_part_of_the_larger_share():
    shares = torch.tensor([[0.25, 0.25], [0.2, 0.24]])
    assert top_priority(shares, tie=0.1).tolist() == [0, -1]


def test_strengths_are_in_double_precision():
    assert scaled_strength(torch.ones(1, 2), torch.ones(1, 1)).dtype == torch.float64
    assert gradient_strength(torch.ones(1, 2, 3)).dtype == torch.float64


def test_channels_of_transposed_weights_come_first():
    weight = torch.arange(6.0).reshape(2, 3)
    assert torch.equal(channels_first(weight, transposed=True), weight.T)


def test_strengths_by_hand():
    found = connection_strength(torch.ones(2, 3), torch.ones(2), torch.tensor([0.0, 2.0]), eps=1.0)
    assert found.tolist() == [3, 1]
    assert connection_strength(torch.tensor([2.0]), torch.ones(1)).tolist() == [4]
    kernels = torch.arange(12.0).reshape(2, 2, 3)  # of a convolution over sequences
    expected = (kernels.square().sum(2) * torch.tensor([1.0, 4.0])).sum(1)
    assert scaled_strength(kernels, in_scale=torch.tensor([[1.0, 2.0]])).tolist() == [pytest.approx(expected.tolist())]
    assert normalized_strength(torch.ones(2, 1)).tolist() == [[1], [1]]
    apart = normalized_strength(torch.tensor([[1e-300, 3e-300], [1e300, 1e300]], dtype=torch.float64))
    assert apart.flatten().tolist() == pytest.approx([0.25, 0.75, 0.5, 0.5])


def test_heterogeneous_groups_part_what_helps_each_other():
    affinity = ProximalAffinity(["a", "b", "c"])
    state = affinity.state_dict()
    matrix = torch.tensor([[1.0, 1.0, -1.0], [1.0, 1.0, -1.0], [-1.0, -1.0, 1.0]], dtype=torch.float64)
    affinity.load_state_dict({**state, "matrix": matrix})
    assert affinity.groups(cluster="correlation") == [["a", "b"], ["c"]]
    assert sorted(map(len, affinity.heterogeneous_groups())) == [1, 2]
    assert ["a", "b"] not in affinity.heterogeneous_groups()


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: solvers.pcgrad(np.ones((2, 3))), "G"),
        (lambda: solvers.sdmgrad(np.eye(2), learning_rate=-1.0), "learning_rate"),
        (lambda: solvers.sdmgrad(np.eye(2), [1.0]), "weights"),
        (lambda: solvers.modo(np.eye(2), [1.0]), "weights"),
        (lambda: solvers.sdmgrad(np.ones((2, 3))), "cross_gramian"),
        (lambda: solvers.sdmgrad(np.eye(2), momentum=-1.0), "momentum"),
        (lambda: ProximalAffinity(["a", "b"], decay=1.5), "decay"),
    ],
)
def test_what_is_wrong_is_named(call, name):
    with pytest.raises(ValueError, match=f"`{name}`"):
        call()
