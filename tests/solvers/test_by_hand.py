"""Small cases by another way, where other tests would let a wrong constant pass."""

import numpy as np
import pytest
import torch

from torchmto import solvers
from torchmto.structure import ProximalAffinity, normalized_affinity, scaled_strength, top_priority


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


def test_affinities_by_column():
    matrix = torch.tensor([[2.0, 1.0], [3.0, 4.0]])
    assert normalized_affinity(matrix).tolist() == [[1, 0.875], [0.875, 1]]
    assert normalized_affinity(matrix, "official").tolist() == [[1, 1.625], [1.625, 1]]


def test_a_tie_is_a_part_of_the_larger_share():
    shares = torch.tensor([[0.25, 0.25], [0.2, 0.24]])
    assert top_priority(shares, tie=0.1).tolist() == [0, -1]


def test_strengths_are_in_double_precision():
    assert scaled_strength(torch.ones(1, 2), torch.ones(1, 1)).dtype == torch.float64


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: solvers.sdmgrad(np.ones((2, 3))), "cross_gramian"),
        (lambda: solvers.sdmgrad(np.eye(2), momentum=-1.0), "momentum"),
        (lambda: ProximalAffinity(["a", "b"], decay=1.5), "decay"),
    ],
)
def test_what_is_wrong_is_named(call, name):
    with pytest.raises(ValueError, match=f"`{name}`"):
        call()
