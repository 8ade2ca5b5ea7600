"""Gradients that cancel up to rounding: no weight may be spent on the rounding errors."""

import numpy as np
import pytest
import torch

import torchmto
from gradient_matrices import CANCELLING, cancelling
from torchmto import solvers
from torchmto.gradients.rows import gramian

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SCALES = (1e-9, 1.0, 1e9)
NONCONFLICTING = ("upgrad", "dualproj", "cagrad")

# What cancellation leaves well defined: the solver of the rounded rows finds the update of the exact ones.
DEFINED = {
    "upgrad": solvers.upgrad,
    "dual_cone": solvers.dual_cone,
    "min_norm": solvers.min_norm,
    "aligned": solvers.aligned,
    "config": solvers.config,
    "krum": solvers.krum,
    "wpcgrad": lambda G, **options: solvers.wpcgrad(G, np.arange(len(G)), **options),
    "pcgrad": lambda G, **_: solvers.pcgrad(G),
}


def rounded(J, dtype, scale=1.0):
    """The rows as a step holds them, in float32, their exact values, and the precision that it tells."""
    rows = torch.tensor(J).to(dtype).float() * scale
    return rows, rows.double().numpy(), torch.finfo(dtype).eps


def solve(name, rows, precision, **options):
    """The update in float32, as it is applied."""
    solver = {"upgrad": solvers.upgrad, "dualproj": solvers.dual_cone, "cagrad": solvers.cagrad}[name]
    solution = solver(gramian(rows).numpy(), precision=precision, **options)
    return solution, (torch.from_numpy(solution.weights).float() @ rows).double().numpy()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", CANCELLING)
@pytest.mark.parametrize("name", NONCONFLICTING)
def test_no_update_is_too_long_or_conflicts(name, kind, dtype):
    for seed in range(4):
        for num_tasks, width in ((3, 3), (4, 1000), (12, 60)):
            J = cancelling(kind, num_tasks, width, seed)
            for scale in SCALES if dtype == torch.float32 else (1.0,):
                rows, exact, precision = rounded(J, dtype, scale)
                solution, update = solve(name, rows, precision, **({"c": 1.0} if name == "cagrad" else {}))
                lengths, mean = np.linalg.norm(exact, axis=1), np.linalg.norm(exact.mean(axis=0))
                size = max(mean, 2e-3 * lengths.mean())
                assert solution.converged
                assert solution.weights.max() < 2e3
                assert (exact @ update >= -5 * precision**0.5 * lengths * size).all()
                assert (exact @ update >= -2e-2 * lengths * size).all()
                if name == "cagrad":
                    assert np.linalg.norm(update - exact.mean(axis=0)) <= mean + 1e-2 * size
                else:
                    assert np.linalg.norm(update) <= (lengths.mean() if name == "upgrad" else mean) + 1e-2 * size


@pytest.mark.parametrize("kind", CANCELLING)
@pytest.mark.parametrize("name", DEFINED)
def test_single_precision_finds_the_exact_update(name, kind):
    for seed in range(3):
        for num_tasks, width in ((3, 4), (6, 500)):
            J = cancelling(kind, num_tasks, width, seed)
            rows, exact, precision = rounded(J, torch.float32)
            found = DEFINED[name](gramian(rows).numpy(), precision=precision)
            expected = DEFINED[name](J @ J.T)
            difference = found.weights @ exact - expected.weights @ J
            assert np.linalg.norm(difference) <= 5e-3 * np.linalg.norm(J, axis=1).max()
            assert found.converged == expected.converged


@pytest.mark.parametrize("kind", CANCELLING)
@pytest.mark.parametrize("c", [0.2, 0.5, 0.9])
def test_cagrad_stays_in_its_ball_and_serves_the_worst_off(kind, c):
    for seed in range(3):
        for num_tasks, width in ((3, 4), (6, 500)):
            J = cancelling(kind, num_tasks, width, seed)
            rows, exact, precision = rounded(J, torch.float32)
            _, update = solve("cagrad", rows, precision, c=c)
            expected = solvers.cagrad(J @ J.T, c).weights @ J
            mean, lengths = exact.mean(axis=0), np.linalg.norm(J, axis=1)
            size = max(np.linalg.norm(mean), 2e-3 * lengths.mean())
            assert np.linalg.norm(update - mean) <= c * np.linalg.norm(mean) + 2e-3 * size
            assert (exact @ update).min() >= (J @ expected).min() - 1e-2 * lengths.mean() * size


def nearly_cancelling(num_tasks, left, seed, span=0.0):
    """Rows of which one is the others' mean turned round, but for a part of size ``left``; their lengths over 10**±span."""
    rng = np.random.default_rng(seed)
    J = rng.normal(size=(num_tasks, 100))
    J[-1] = left * rng.normal(size=100) - J[:-1].mean(axis=0)
    return J * 10.0 ** rng.uniform(-span, span, size=(num_tasks, 1))


@pytest.mark.parametrize("left", [1e-3, 1e-4, 1e-5])
@pytest.mark.parametrize(("alpha", "span"), [(1.0, 0.0), (1.0, 2.0), (2.0, 0.0), (2.0, 2.0)])
def test_a_bargain_that_is_there_is_found_whatever_the_last_bit(alpha, span, left):
    for num_tasks, seed in ((2, 0), (2, 1), (3, 0), (3, 1), (5, 0), (5, 1)):
        J = nearly_cancelling(num_tasks, left, seed, span)
        lengths = []
        for number in range(4):
            noise = np.random.default_rng(number).normal(size=(num_tasks, num_tasks)) * 3e-16
            solution = solvers.fair(J @ J.T * (1 + (noise + noise.T) / 2), alpha)
            assert solution.converged
            lengths.append(np.linalg.norm(solution.weights @ J))
        assert max(lengths) <= 1.01 * min(lengths)


@pytest.mark.parametrize("left", [3e-5, 1e-5, 3e-6, 1e-6, 3e-7])
@pytest.mark.parametrize("c", [0.4, 0.5, 0.9])
def test_cagrad_conflicts_with_none_where_it_need_not(c, left):
    for num_tasks in (2, 3, 4, 8, 20):
        for seed in range(8):
            J = nearly_cancelling(num_tasks, left, seed)
            mean = J.mean(axis=0)
            size = np.linalg.norm(mean)
            update = solvers.cagrad(J @ J.T, c).weights @ J
            nearest = solvers.dual_cone(J @ J.T).weights @ J
            if np.linalg.norm(nearest - mean) < c * size:
                assert (J @ update / np.linalg.norm(J, axis=1)).min() >= -1e-4 * size


@pytest.mark.parametrize("name", ["upgrad", "dualproj", "cagrad", "mgda"])
def test_stationary_gradients_are_noticed(name):
    for num_tasks, width in ((2, 5), (3, 1000), (10, 50)):
        J = cancelling("strongly_stationary", num_tasks, width, seed=num_tasks)
        rows, exact, precision = rounded(J, torch.float32)
        method = torchmto.make_method(name, **({"c": 1.0} if name == "cagrad" else {}))
        update = method.weights(gramian(rows).float()).double().numpy() @ exact
        assert np.linalg.norm(update) <= 2e-3 * np.linalg.norm(exact, axis=1).mean(), precision


@pytest.mark.parametrize("name", ["upgrad", "dualproj", "cagrad", "imtl_g", "config", "aligned_mtl", "mgda", "krum"])
def test_homogeneous_in_single_precision(name):
    for kind in ("opposed", "equality", "reversal"):
        J = cancelling(kind, 4, 200, seed=1)
        updates = []
        for scale in SCALES:
            rows, exact, _ = rounded(J, torch.float32, scale)
            weights = torchmto.make_method(name).weights(gramian(rows).float())
            updates.append(weights.double().numpy() @ exact / scale)
        for update in updates:
            assert np.linalg.norm(update - updates[1]) <= 1e-3 * np.linalg.norm(J, axis=1).max()


def test_nash_and_fair_say_that_there_is_no_bargain():
    for kind in ("opposed", "weakly_stationary", "reversal"):
        rows, exact, precision = rounded(cancelling(kind, 4, 300, seed=2), torch.float32)
        for alpha in (1.0, 2.0):
            solution = solvers.fair(gramian(rows).numpy(), alpha, precision=precision)
            assert not solution.converged
            update, lengths = solution.weights @ exact, np.linalg.norm(exact, axis=1)
            assert (exact @ update >= -2e-3 * lengths * max(np.linalg.norm(update), 1.0)).all()


def test_solvers_of_double_precision_are_unmoved():
    """The precision says how little is known, not how much: an exact problem is solved exactly in either."""
    J = np.random.default_rng(0).normal(size=(5, 40))
    for solver in (solvers.upgrad, solvers.dual_cone, solvers.cagrad, solvers.nash, solvers.min_norm):
        coarse = solver(J @ J.T, precision=float(np.finfo(np.float32).eps))
        np.testing.assert_allclose(coarse.weights, solver(J @ J.T).weights, rtol=1e-9)


def test_the_type_of_the_gramian_tells_its_precision():
    J = cancelling("opposed", 3, 3, seed=7)
    G = (J.astype(np.float32) @ J.astype(np.float32).T).astype(np.float32)
    precision = float(np.finfo(np.float32).eps)
    np.testing.assert_array_equal(
        solvers.upgrad(G).weights, solvers.upgrad(G.astype(float), precision=precision).weights
    )


@pytest.mark.parametrize("precision", [0.0, -1e-7, 1.0, np.nan])
def test_wrong_precision(precision):
    with pytest.raises(ValueError, match=r"Parameter `precision` should be a float > 0 and < 1. Found"):
        solvers.upgrad(np.eye(2), precision=precision)


def test_gradvac_with_targets_at_the_pole():
    """Twins have a cosine of 1; what rounding leaves of their difference isn't turned into a long update."""
    J = np.random.default_rng(3).normal(size=(2, 1000))
    J[1] = 1.3 * J[0]
    rows, exact, precision = rounded(J, torch.float32)
    projection, _ = solvers.gradvac(gramian(rows).numpy(), np.ones((2, 2)), precision=precision)
    assert np.linalg.norm(projection.weights @ exact) <= 4 * np.linalg.norm(J, axis=1).sum()


def test_krum_gives_ties_to_the_first():
    """h, -h and a gradient orthogonal to both: every nearest neighbour is equally far."""
    for seed in range(10):
        J = np.random.default_rng(seed).normal(size=(3, 500))
        J[2] -= J[2] @ J[0] / (J[0] @ J[0]) * J[0]
        J[1] = -J[0]
        rows, _, precision = rounded(J, torch.float32)
        solution = solvers.krum(gramian(rows).numpy(), num_selected=2, precision=precision)
        assert solution.weights.tolist() == [0.5, 0.5, 0.0]
