"""Proximal inter-task affinity: the moving average, its normalisation and the groups."""

import io
import itertools
import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import AffinityPropagation

from shared_data import golden
from torchmto.solvers import clustering
from torchmto.structure import ProximalAffinity, normalized_affinity


def by_definition(matrix, tasks, group, before, after, decay):  # noqa: PLR0917
    """One source and one target after the other."""
    change = {task: 1 - after[task] / before[task] for task in before if task in after}
    result = matrix.clone()
    present = [task for task in group if task in change]
    for source in present:
        for target, gain in change.items():
            if target == source and gain < 0:
                continue
            conflict = target in group and gain * change[source] < 0
            value = -max(gain, change[source]) if conflict else gain
            i, j = tasks.index(source), tasks.index(target)
            result[i, j] = (1 - decay) * matrix[i, j] + decay * value / len(present)
    return result


@pytest.mark.parametrize("number", range(3))
def test_reference_trajectory(number):
    """The reference keeps its matrix in float32. With a float32 matrix inside, ours is equal bit for bit.

    Ours in float64 differs by the reference's rounding: 1e-9, or as many float32 spacings of the largest entry.
    """
    case = golden("task_groups")["cases"][number]
    ours = ProximalAffinity(case["tasks"], decay=case["affin_decay"], attribution="official")
    single = ProximalAffinity(case["tasks"], decay=case["affin_decay"], attribution="official")
    single._matrix = single._matrix.astype(np.float32)
    compared = 0
    for iteration in case["iterations"]:
        for tracker in (ours, single):
            tracker.new_batch()
        for step in iteration["steps"]:
            for tracker in (ours, single):
                tracker.update(iteration["groups"][step["group"]], step["losses"])
            if step["affinity_after"] is not None:
                expected = torch.tensor(step["affinity_after"], dtype=torch.float64)
                assert torch.equal(single.matrix.double(), expected)
                rounding = 8 * float(np.spacing(np.float32(expected.abs().max())))
                torch.testing.assert_close(ours.matrix, expected, rtol=0, atol=max(1e-9, rounding))
                compared += 1
    assert compared > 30


def test_reference_normalisation():
    for case in golden("task_groups")["normalisation"]:
        matrix = torch.tensor(case["affinity"], dtype=torch.float64)
        for normalization, key in (("official", "X_official_in_place"), ("paper", "X_if_not_aliased")):
            expected = torch.tensor(case[key], dtype=torch.float64)  # float32 in the reference
            torch.testing.assert_close(normalized_affinity(matrix, normalization), expected, rtol=1e-6, atol=1e-6)


def test_reference_groups_where_they_are_stable():
    compared = 0
    for case in golden("task_groups")["cases"]:
        for probe in case["clustering_probes"]:
            if not probe["stable"]:
                continue
            options = {"normalization": "official", "attribution": "official"}
            tracker = with_matrix(case["tasks"], probe["affinity"], **options)
            expected = sorted(sorted(group) for group in probe["official_groups"].values())
            for random_state in (0, 1):
                assert tracker.groups(random_state) == expected
            compared += 1
    assert compared > 10


def with_matrix(tasks, matrix, **options):
    tracker = ProximalAffinity(tasks, **options)
    tracker.load_state_dict({**tracker.state_dict(), "matrix": torch.as_tensor(matrix, dtype=torch.float64)})
    return tracker


@settings(max_examples=40)
@given(st.integers(0, 10_000), st.sampled_from(["actor", "official"]))
def test_updates_equal_their_definition(seed, attribution):
    rng = np.random.default_rng(seed)
    tasks = [f"t{i}" for i in range(int(rng.integers(1, 5)))]
    decay = float(rng.uniform(0.01, 1))
    tracker = ProximalAffinity(tasks, decay=decay, attribution=attribution)
    expected = torch.zeros(len(tasks), len(tasks), dtype=torch.float64)
    for _ in range(3):
        tracker.new_batch()
        before = actor = None
        steps = int(rng.integers(1, 4))
        for step in range(steps + 1):
            group = [str(name) for name in rng.permutation(tasks)[: int(rng.integers(1, len(tasks) + 1))]]
            losses = {task: float(rng.uniform(0.5, 1.5)) for task in tasks if rng.uniform() > 0.2}
            if step < steps:
                tracker.update(group, losses)
            else:
                tracker.finish(losses)
            credited = actor if attribution == "actor" else group
            if before is not None and not (step == steps and attribution == "official"):
                expected = by_definition(expected, tasks, credited, before, losses, decay)
            before, actor = losses, group
    torch.testing.assert_close(tracker.matrix, expected, rtol=1e-12, atol=1e-15)


def test_the_rules_one_by_one():
    tracker = ProximalAffinity(["a", "b", "c"], decay=1.0)
    tracker.new_batch()
    tracker.update(["a", "b"], {"a": 1.0, "b": 1.0, "c": 1.0})
    tracker.update(["c"], {"a": 0.5, "b": 1.2, "c": 0.9})  # a gains 0.5, b loses 0.2, c gains 0.1
    expected = torch.tensor([[0.25, -0.25, 0.05], [-0.25, 0.0, 0.05], [0.0, 0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(tracker.matrix, expected)
    tracker.new_batch()
    tracker.update(["a"], {"a": 9.0, "b": 9.0, "c": 9.0})  # not compared with the batch before
    torch.testing.assert_close(tracker.matrix, expected)


def test_official_attribution_is_one_group_late():
    losses = [{"a": 1.0, "b": 1.0}, {"a": 0.5, "b": 0.9}]
    actor = ProximalAffinity(["a", "b"], decay=1.0)
    official = ProximalAffinity(["a", "b"], decay=1.0, attribution="official")
    for tracker in (actor, official):
        tracker.new_batch()
        tracker.update(["a"], losses[0])
        tracker.update(["b"], losses[1])
    torch.testing.assert_close(actor.matrix, torch.tensor([[0.5, 0.1], [0, 0]], dtype=torch.float64))
    torch.testing.assert_close(official.matrix, torch.tensor([[0, 0], [0.5, 0.1]], dtype=torch.float64))
    before = official.matrix
    official.finish({"a": 0.1, "b": 0.1})
    assert torch.equal(official.matrix, before)
    actor.finish({"a": 0.5, "b": 0.45})
    torch.testing.assert_close(actor.matrix[1], torch.tensor([0.0, 0.5], dtype=torch.float64))


def test_tensor_losses_of_any_dtype_and_losses_that_are_not_positive():
    tracker = ProximalAffinity(["a", "b"], decay=1.0)
    tracker.update(["a", "b"], {"a": torch.tensor(2.0, requires_grad=True), "b": torch.tensor([0.0])})
    tracker.update(["b"], {"a": torch.tensor(1.0, dtype=torch.float64), "b": 3})
    torch.testing.assert_close(tracker.matrix, torch.tensor([[0.5, 0], [0, 0]], dtype=torch.float64))
    assert tracker.matrix.dtype == torch.float64
    tracker.matrix.fill_(7)
    assert tracker.matrix.max() == 0.5


@pytest.mark.parametrize("cluster", ["affinity_propagation", "correlation"])
def test_groups_of_a_clear_block_matrix(cluster):
    tasks = list("abcdef")
    matrix = np.full((6, 6), -0.5)
    matrix[:3, :3] = matrix[3:, 3:] = 0.8
    np.fill_diagonal(matrix, 1.0)
    tracker = with_matrix(tasks, matrix)
    assert tracker.groups(cluster=cluster) == [["a", "b", "c"], ["d", "e", "f"]]
    order = [3, 0, 4, 1, 5, 2]
    shuffled = with_matrix([tasks[i] for i in order], matrix[np.ix_(order, order)])
    assert sorted(map(sorted, shuffled.groups(cluster=cluster))) == [["a", "b", "c"], ["d", "e", "f"]]


@pytest.mark.parametrize("normalization", ["paper", "official"])
@pytest.mark.parametrize("cluster", ["affinity_propagation", "correlation"])
def test_tasks_without_own_affinity_stay_alone(cluster, normalization):
    matrix = np.full((4, 4), 0.9)
    np.fill_diagonal(matrix, [1.0, 0.0, 1.0, -1.0])
    groups = with_matrix(list("abcd"), matrix, normalization=normalization).groups(cluster=cluster)
    assert sorted(name for group in groups for name in group) == list("abcd")
    assert ["b"] in groups
    assert ["d"] in groups
    assert ProximalAffinity(["a", "b"]).groups(cluster=cluster) == [["a"], ["b"]]


def test_groups_stay_when_clustering_fails(monkeypatch):
    tracker = with_matrix(["a", "b"], [[1.0, 0.9], [0.9, 1.0]])
    assert tracker.groups(cluster="correlation") == [["a", "b"]]
    monkeypatch.setattr(clustering, "affinity_propagation_groups", lambda *_, **__: None)
    assert tracker.groups() == [["a", "b"]]


@pytest.mark.parametrize(("seed", "converges"), [(0, True), (56, False)])
def test_official_attribution_accepts_what_has_not_converged(seed, converges):
    """As the released code does, whose exemplars count whatever scikit-learn warns of."""
    matrix = np.random.default_rng(seed).normal(size=(6, 6))
    np.fill_diagonal(matrix, 1.0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        X = (matrix + matrix.T) / 2
        labels = AffinityPropagation(affinity="precomputed", convergence_iter=50, random_state=0).fit_predict(X)
    assert bool(caught) is not converges
    names = np.array(list("abcdef"))
    found = sorted(sorted(names[labels == label].tolist()) for label in set(labels.tolist()))
    actor, official = (with_matrix(list("abcdef"), matrix, attribution=name) for name in ("actor", "official"))
    assert official.groups() == found
    assert actor.groups() == (found if converges else [[name] for name in "abcdef"])


def test_correlation_groups_do_not_depend_on_the_order_of_tasks():
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(4, 4)) + 2 * np.eye(4)
    np.fill_diagonal(matrix, np.abs(np.diagonal(matrix)) + 0.1)
    found = set()
    for order in itertools.permutations(range(4)):
        groups = with_matrix(["abcd"[i] for i in order], matrix[np.ix_(order, order)]).groups(cluster="correlation")
        found.add(tuple(sorted(tuple(sorted(group)) for group in groups)))
    assert len(found) == 1


def test_state_in_the_middle_of_a_batch():
    def losses(i):
        return {"a": 1 + math.sin(i) / 3, "b": 2 + math.cos(i)}

    tracker = ProximalAffinity(["a", "b"], decay=0.1)
    for i in range(5):
        tracker.update([("a", "b")[i % 2]], losses(i))
    tracker.groups(cluster="correlation")
    buffer = io.BytesIO()
    torch.save(tracker.state_dict(), buffer)
    buffer.seek(0)
    other = ProximalAffinity(["a", "b"], decay=0.1)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    for i in range(5, 8):
        for each in (tracker, other):
            each.update([("a", "b")[i % 2]], losses(i))
    assert torch.equal(tracker.matrix, other.matrix)
    assert tracker.state_dict()["groups"] == other.state_dict()["groups"]


def test_bad_states():
    tracker = ProximalAffinity(["a", "b"])
    state = tracker.state_dict()
    for change, message in [
        ({"tasks": ["a", "c"]}, "belongs to the tasks"),
        ({"matrix": torch.zeros(3, 3)}, "should have shape"),
        ({"groups": [["a"]]}, "should be a partition"),
    ]:
        with pytest.raises(ValueError, match=message):
            tracker.load_state_dict({**state, **change})


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"tasks": "ab"}, TypeError, "Found `tasks = 'ab'`"),
        ({"tasks": [1]}, TypeError, "`tasks` should be a sequence of strings"),
        ({"tasks": []}, ValueError, "`tasks` should be a sequence of at least one task"),
        ({"tasks": ["a", "a"]}, ValueError, "Task `a` is there twice"),
        ({"tasks": ["a"], "decay": 0}, ValueError, "Found `decay = 0`"),
        ({"tasks": ["a"], "decay": "0.1"}, TypeError, "Found `decay = '0.1'`"),
        ({"tasks": ["a"], "attribution": "next"}, ValueError, "`attribution` should be"),
        ({"tasks": ["a"], "normalization": "none"}, ValueError, "`normalization` should be"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        ProximalAffinity(**arguments)


@pytest.mark.parametrize(
    ("group", "losses", "error", "message"),
    [
        (["x"], {"a": 1.0}, ValueError, "Unknown task `x` in `group`"),
        ([], {"a": 1.0}, ValueError, "`group` should be a sequence of at least one"),
        (["a", "a"], {"a": 1.0}, ValueError, "Task `a` is there twice"),
        ("a", {"a": 1.0}, TypeError, "Found `group = 'a'`"),
        (["a"], {"x": 1.0}, ValueError, "Found .'x'"),
        (["a"], {"a": float("nan")}, ValueError, "finite numbers"),
        (["a"], {"a": torch.ones(2)}, ValueError, "should be one number"),
    ],
)
def test_bad_updates_change_nothing(group, losses, error, message):
    tracker = ProximalAffinity(["a", "b"])
    tracker.update(["a"], {"a": 1.0})
    before = tracker.state_dict()
    with pytest.raises(error, match=message):
        tracker.update(group, losses)
    after = tracker.state_dict()
    assert torch.equal(before.pop("matrix"), after.pop("matrix"))
    assert before == after


def test_bad_clusters_and_matrices():
    with pytest.raises(ValueError, match="`cluster` should be"):
        ProximalAffinity(["a"]).groups(cluster="kmeans")
    with pytest.raises(ValueError, match="positive diagonal"):
        normalized_affinity(torch.zeros(2, 2))
    with pytest.raises(ValueError, match=r"shape \[K, K\]"):
        normalized_affinity(torch.zeros(2, 3))
