"""wPCGrad and PCGrad through the step: the properties that the papers claim, on the rows that the step computed."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import torchmto
from torchmto.methods.gramian.pcgrad import random_orders

few = settings(max_examples=25, deadline=None)
pytestmark = pytest.mark.cpu  # where NumPy's matrices are


@st.composite
def rows(draw, min_tasks=2, max_tasks=5):
    """Random directions; sometimes duplicates, opposites, zeros, low rank or norms 1e±6 apart."""
    count = draw(st.integers(min_tasks, max_tasks))
    size = draw(st.integers(1, 6))
    generator = np.random.default_rng(draw(st.integers(0, 10**6)))
    matrix = generator.standard_normal((count, size))
    kind = draw(st.sampled_from(["random", "low rank", "opposite", "zero", "scales"]))
    if kind == "low rank":
        matrix = generator.standard_normal((count, 1)) @ generator.standard_normal((1, size))
    elif kind == "opposite":
        matrix[-1] = -2 * matrix[0]
    elif kind == "zero":
        matrix[-1] = 0
    elif kind == "scales":
        matrix *= 10.0 ** generator.uniform(-6, 6, (count, 1))
    return torch.from_numpy(matrix)


def step(method, matrix):
    """One step on losses with these gradients: the update (before the learning rate) and the StepInfo."""
    model = nn.ParameterList([torch.zeros(matrix.shape[1], dtype=torch.float64)])
    tasks = [f"t{i}" for i in range(len(matrix))]
    mt = torchmto.MultiTask(model, torch.optim.SGD(model.parameters(), lr=0.0), tasks=tasks, method=method)
    info = mt.step(lambda wanted: {t: 1 + matrix[tasks.index(t)] @ model[0] for t in wanted})
    return model[0].grad, info


def norm(matrix):
    return float(matrix.norm(dim=1).max()) + 1e-300


@few
@given(rows(), st.integers(0, 100))
def test_the_first_task_stays_untouched_and_no_conflict_is_left(matrix, seed):
    """Replays the recorded order in vector space."""
    method = torchmto.make_method("wpcgrad", priority="uniform")
    method.seed(seed)
    update, info = step(method, matrix)
    order = [int(name[1:]) for name in info.records["order"]]
    current = matrix.clone()
    for position, i in enumerate(order):
        square = current[i] @ current[i]
        original = matrix[i] @ matrix[i]
        if square <= 1e-10 * original:
            current[i] = 0
            continue
        for j in order[position + 1 :]:
            dot = current[j] @ current[i]
            if dot < -1e-9 * matrix[j].norm() * matrix[i].norm():
                current[j] = current[j] - dot / square * current[i]
    torch.testing.assert_close(update, current.sum(0), rtol=1e-6, atol=1e-6 * norm(matrix))
    assert torch.equal(current[order[0]], matrix[order[0]]) or not matrix[order[0]].any()
    cosines = current @ current.T / (matrix.norm(dim=1)[:, None] * matrix.norm(dim=1) + 1e-300)
    assert float(cosines.min()) >= -1e-6


@few
@given(rows(), st.sampled_from(["order", "pairwise", "pcgrad"]))
def test_all_the_mass_on_one_task_always_protects_it(matrix, mode):
    """Its loss never rises: the others' gradients lose what conflicts with it."""
    if mode == "pcgrad":
        mode = "order"
    protected = len(matrix) - 1
    method = torchmto.make_method("wpcgrad", mode=mode, priority={f"t{protected}": 1.0})
    for _ in range(3):
        update, info = step(method, matrix)
        if mode == "order":
            assert info.records["order"][0] == f"t{protected}"
            own = float(matrix[protected] @ matrix[protected])
            assert float(update @ matrix[protected]) >= own - 1e-6 * norm(matrix) * float(matrix[protected].norm())
        assert info.records["probabilities"] == {f"t{i}": float(i == protected) for i in range(len(matrix))}


@few
@given(rows(2, 2), st.sampled_from(["order", "pairwise"]), st.floats(0, 1))
def test_two_tasks_have_a_closed_form(matrix, mode, p):
    """The winner stays, the loser is projected off it if they conflict; the winner is one of the two with its probability."""
    method = torchmto.make_method("wpcgrad", mode=mode, priority=[p, 1 - p])
    update, _ = step(method, matrix)
    a, b = matrix
    results = []
    for winner, loser, chance in ((a, b, p), (b, a, 1 - p)):
        dot = winner @ loser
        if chance > 0:
            results.append(winner + (loser - dot / (winner @ winner) * winner if dot < 0 else loser))
    scale = 1e-6 * norm(matrix)
    assert any(torch.allclose(update, result, rtol=1e-6, atol=scale) for result in results)


def test_the_winner_is_drawn_from_the_probabilities():
    matrix = torch.tensor([[1.0, 0.0], [-1.0, 1.0]], dtype=torch.float64)
    for mode in ("order", "pairwise"):
        method = torchmto.make_method("wpcgrad", mode=mode, priority=[0.8, 0.2])
        gramian = matrix @ matrix.T
        first = sum(
            torch.allclose(method.weights(gramian) @ matrix, matrix[0] + torch.tensor([0.0, 1.0])) for _ in range(500)
        )
        assert 350 < first < 450


@few
@given(rows(), st.integers(0, 100))
def test_pcgrad_is_its_definition(matrix, seed):
    method = torchmto.make_method("pcgrad")
    method.seed(seed)
    orders = random_orders(len(matrix), torch.Generator().manual_seed(seed))
    update, _ = step(method, matrix)
    total = torch.zeros(matrix.shape[1], dtype=torch.float64)
    for i, row in enumerate(matrix):
        current = row.clone()
        for j in orders[i].tolist():
            dot = current @ matrix[j]
            if dot < 0:
                current = current - dot / (matrix[j] @ matrix[j]) * matrix[j]
        total += current
    torch.testing.assert_close(update, total, rtol=1e-6, atol=1e-6 * norm(matrix))


@pytest.mark.parametrize("mode", ["order", "pairwise", "pcgrad"])
@few
@given(rows(), st.sampled_from([1e-8, 1e-4, 1e4, 1e8]))
def test_homogeneity(mode, matrix, scale):
    """A(sJ) = s A(J), under the same random choices."""
    updates = []
    for factor in (1.0, scale):
        updates.append(
            step(torchmto.make_method("wpcgrad", mode=mode, priority="uniform"), factor * matrix)[0] / factor
        )
    torch.testing.assert_close(*updates, rtol=1e-6, atol=1e-6 * norm(matrix))


@few
@given(rows())
def test_without_a_conflict_nothing_changes(matrix):
    matrix = matrix.abs()
    for mode in ("order", "pairwise", "pcgrad"):
        update, info = step(torchmto.make_method("wpcgrad", mode=mode, priority="uniform"), matrix)
        torch.testing.assert_close(update, matrix.sum(0))
        assert info.num_conflicts == 0


def test_priorities_renormalise_over_the_present_tasks():
    model = nn.ParameterList([torch.zeros(3, dtype=torch.float64)])
    method = torchmto.make_method("wpcgrad", priority={"a": 0.5, "b": 0.3, "c": 0.2})
    mt = torchmto.MultiTask(model, torch.optim.SGD(model.parameters(), lr=0.1), tasks=["a", "b", "c"], method=method)
    info = mt.step(lambda tasks: {t: 1 + model[0].sum() for t in tasks if t != "a"})
    assert info.records["probabilities"] == pytest.approx({"b": 0.6, "c": 0.4})
    mt.step(lambda tasks: {t: 1 + model[0].sum() for t in tasks})


def test_windows_of_the_loss_priorities():
    """Uniform first; then the last window's means; relative ones divided by the first window's."""
    for relative, expected in ((False, {"a": 2 / 8, "b": 6 / 8}), (True, {"a": 0.4, "b": 0.6})):
        model = nn.ParameterList([torch.zeros(3, dtype=torch.float64)])
        method = torchmto.make_method("wpcgrad", priority="relative_loss" if relative else "loss", window=2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        mt = torchmto.MultiTask(model, optimizer, tasks=["a", "b"], method=method)
        values = {"a": [1.0, 3.0, 1.0, 3.0, 5.0], "b": [3.0, 5.0, 5.0, 7.0, 5.0]}
        infos = [
            mt.step(lambda tasks: {t: values[t][i] + model[0].sum() for t in tasks})  # noqa: B023
            for i in range(5)
        ]
        assert infos[0].records["probabilities"] == {"a": 0.5, "b": 0.5}
        assert infos[1].records["probabilities"] == {"a": 0.5, "b": 0.5}
        uniform = {"a": 0.5, "b": 0.5}
        assert infos[2].records["probabilities"] == pytest.approx(uniform if relative else {"a": 1 / 3, "b": 2 / 3})
        assert infos[4].records["probabilities"] == pytest.approx(expected)


@pytest.mark.parametrize("relative", [False, True])
def test_a_mean_loss_that_was_never_positive_has_no_priority(relative):
    """One that isn't known has the mean of the others'."""
    model = nn.ParameterList([torch.zeros(3, dtype=torch.float64)])
    method = torchmto.make_method("wpcgrad", priority="relative_loss" if relative else "loss", window=1)
    mt = torchmto.MultiTask(
        model, torch.optim.SGD(model.parameters(), lr=0.0), tasks=["a", "b", "c", "d"], method=method
    )
    values = {"a": -1.0, "b": 2.0, "c": 2.0, "d": 7.0}
    for present in ("abc", "abc", "abcd"):
        info = mt.step(lambda _, present=present: {t: values[t] + model[0].sum() for t in present})
    assert info.records["probabilities"] == pytest.approx({"a": 0.0, "b": 3 / 8, "c": 3 / 8, "d": 2 / 8})


def test_a_baseline_that_is_just_reached_leaves_no_shortfall():
    """Not even one of -0."""
    model = nn.ParameterList([torch.zeros(3, dtype=torch.float64)])
    method = torchmto.make_method(
        "wpcgrad", priority="performance", baseline={"a": 0.5, "b": 0.5}, higher_is_better={"a": True, "b": False}
    )
    mt = torchmto.MultiTask(model, torch.optim.SGD(model.parameters(), lr=0.0), tasks=["a", "b"], method=method)
    mt.report({"a": 0.5, "b": 0.5})
    assert [str(value) for value in method.priority.shortfall.tolist()] == ["0.0", "0.0"]
    mt.report({"a": 0.4, "b": 0.5})
    info = mt.step(lambda _: {t: 1 + model[0].sum() for t in "ab"})
    assert [str(value) for value in info.records["probabilities"].values()] == ["1.0", "0.0"]
