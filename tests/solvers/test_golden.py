"""Numbers of exact solvers and, where they are accurate, of released implementations."""

import numpy as np
import pytest

from shared_data import golden
from torchmto import solvers

CASES = {case["name"]: case for case in golden("gradient_matrices")["cases"]}


def repeated_gradvac(calls):
    def solve(G):
        targets = None
        for _ in range(calls):
            projection, targets = solvers.gradvac(G, targets, beta=0.5)
        return projection

    return solve


def stored(case, row):
    """The row's vector, or None where the reference has none or it isn't finite."""
    result = case["results"][row]
    return np.array(result["vector"]) if result and result.get("finite") else None


def times(case, solution):
    """The update, and the size of the terms that it sums."""
    J = np.array(case["J"])
    return solution.weights @ J, np.abs(solution.weights) @ np.linalg.norm(J, axis=1)


ALL = set(CASES)
DEPENDENT = {name for name, case in CASES.items() if case["rank"] < case["K"]}
ZERO_ROW = {name for name in ALL if name.endswith("zero_row")}
NORMS = {name for name in ALL if name.endswith("norms")}
RANK_ONE = {name for name in ALL if CASES[name]["rank"] == 1} - ZERO_ROW
NO_SOLUTION = {name for name in ALL if stored(CASES[name], "exact.Nash/FairGrad1 (G a = 1/a)") is None} - ZERO_ROW

# Row -> solver, factor of the row's convention, relative tolerance, cases left out (and why).
ROWS = {
    "exact.MGDA": (solvers.min_norm, 1, 1e-8, set()),
    "exact.UPGrad": (solvers.upgrad, 1, 1e-8, set()),
    "exact.DualProj": (solvers.dual_cone, 1, 1e-8, set()),
    "exact.Nash/FairGrad1 (G a = 1/a)": (solvers.nash, 1, 1e-8, set()),
    "TorchJD.PCGrad[identity order]": (solvers.pcgrad, 1, 1e-8, set()),
    "TorchJD.ConFIG": (solvers.config, 1, 1e-8, set()),
    # No equal projections exist: the least-squares fallbacks differ.
    "TorchJD.IMTLG": (solvers.imtl_g, 1, 1e-8, DEPENDENT - ZERO_ROW),
    "LibMTL.IMTL": (solvers.imtl_g, 1, 1e-8, DEPENDENT),
    # LibMTL decomposes G, whose small eigenvalues are inaccurate where norms span 1e6.
    "LibMTL.Aligned_MTL": (solvers.aligned, 1, 1e-8, NORMS),
    "TorchJD.AlignedMTL[min]": (solvers.aligned, "1/K", 1e-8, set()),
    "TorchJD.AlignedMTL[median]": (lambda G: solvers.aligned(G, scale="median"), "1/K", 1e-8, set()),
    "TorchJD.AlignedMTL[rmse]": (lambda G: solvers.aligned(G, scale="rmse"), "1/K", 1e-8, set()),
    # Both add 1e-8 to lengths and denominators; with gradients on one line, which cancel, only that is left of them.
    "TorchJD.GradVac[beta=.5,identity order,call 1]": (repeated_gradvac(1), 1, 1e-5, set()),
    "TorchJD.GradVac[beta=.5,identity order,call 3]": (repeated_gradvac(3), 1, 1e-5, RANK_ONE),
    "LibMTL.GradVac[beta=.5,identity order,call 3]": (repeated_gradvac(3), 1, 1e-5, RANK_ONE),
    # Both have the wrong direction where norms span 1e6.
    "TorchJD.FairGrad[alpha=2]": (solvers.fair, 1, 1e-8, NORMS | NO_SOLUTION),
    "LibMTL.FairGrad[alpha=2]": (solvers.fair, 1, 1e-8, NORMS | NO_SOLUTION),
}


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("name", CASES)
def test_row(name, row):
    solver, factor, tolerance, left_out = ROWS[row]
    case = CASES[name]
    expected = stored(case, row)
    if name in left_out or expected is None:
        return
    J = np.array(case["J"])
    vector, size = times(case, solver(J @ J.T))
    vector = vector / case["K"] if factor == "1/K" else vector
    rounding = (1e-5 if tolerance > 1e-8 else 1e-12) * size
    assert np.linalg.norm(vector - expected) <= tolerance * np.linalg.norm(expected) + rounding


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("c", [0.5, 0.9])
def test_cagrad(name, c):
    """No worse than either library, and equal where the two agree."""
    case = CASES[name]
    J = np.array(case["J"])
    mean = J.mean(axis=0)
    solution = solvers.cagrad(J @ J.T, c)
    vector, size = times(case, solution)
    assert solution.converged
    radius = c * np.linalg.norm(mean)
    assert np.linalg.norm(vector - mean) <= radius * (1 + 1e-9)
    peers = [stored(case, f"TorchJD.CAGrad[c={c}]"), stored(case, f"LibMTL.CAGrad[calpha={c},rescale=0]")]
    for peer in peers:
        inside = mean + (peer - mean) * min(1, radius / max(np.linalg.norm(peer - mean), 1e-300))
        assert (J @ vector).min() >= (J @ inside).min() - 1e-10 * size * np.linalg.norm(J, axis=1).max()
    if np.linalg.norm(peers[0] - peers[1]) <= 1e-6 * np.linalg.norm(peers[0]):
        assert np.linalg.norm(vector - peers[0]) <= 1e-5 * np.linalg.norm(peers[0])


def test_cagrad_conventions():
    case = CASES["K3_P7_random"]
    J = np.array(case["J"])
    expected = stored(case, "LibMTL.CAGrad[calpha=0.5,rescale=1]")
    assert solvers.cagrad(J @ J.T, 0.5, rescale=True).weights @ J == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_equation_that_the_libraries_miss(name):
    """Nash and FairGrad solve their equation also where norms span 1e6; without a solution they say so."""
    J = np.array(CASES[name]["J"])
    G = J @ J.T
    live = G.diagonal() > 0
    for alpha in (1.0, 2.0):
        solution = solvers.fair(G, alpha)
        assert solution.converged == (name not in NO_SOLUTION)
        if solution.converged:
            w = solution.weights[live]
            np.testing.assert_allclose((G @ solution.weights)[live], w ** (-1 / alpha), rtol=1e-7)


def test_affinity_propagation_groups():
    for case in golden("task_groups")["cases"]:
        for probe in case["clustering_probes"]:
            if probe["stable"]:
                expected = probe["groupings_over_20_random_states"][0]["groups"]
                groups = solvers.affinity_propagation_groups(probe["X"])
                assert [[case["tasks"][i] for i in group] for group in groups] == sorted(
                    expected, key=lambda group: case["tasks"].index(group[0])
                )
