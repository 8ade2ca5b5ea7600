"""Thinning keeps lines, and matching is as large as an assignment allows."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import label
from scipy.optimize import linear_sum_assignment

from torchmto.lab.data.base import Task
from torchmto.lab.edge_matching import matched_pixels, thin
from torchmto.lab.metrics import task_metrics
from torchmto.lab.streaming import BenchmarkOdsF, OdsF

seeds = given(st.integers(0, 10_000))


def blobs(seed, share=0.5, shape=(9, 11)):
    return np.random.default_rng(seed).random(shape) < share


@seeds
@settings(max_examples=25)
def test_thinning(seed):
    mask = blobs(seed)
    once = thin(mask)
    assert not (once & ~mask).any()
    assert np.array_equal(thin(once), once)
    eight = np.ones((3, 3))
    assert label(once, eight)[1] <= label(mask, eight)[1]  # never breaks a piece; a 2 x 2 square may vanish
    line = np.zeros((9, 20), dtype=bool)
    line[3:6, 2:18] = True
    assert thin(line).sum(axis=0).max() == 1
    assert thin(line).sum() >= 12


@seeds
@settings(max_examples=25)
def test_matching_is_maximal(seed):
    predicted, labelled = blobs(seed, 0.2), blobs(seed + 1, 0.2)
    p, q = np.argwhere(predicted), np.argwhere(labelled)
    for radius in (0.5, 1.0, 1.5, 2.3):
        far = np.linalg.norm(p[:, None] - q[None], axis=-1) > radius
        rows, columns = linear_sum_assignment(far.astype(float))
        found = matched_pixels(predicted, labelled, radius)
        assert found == (~far[rows, columns]).sum()
        assert found == matched_pixels(labelled, predicted, radius)
    assert matched_pixels(predicted, predicted, 0.0) == predicted.sum()
    assert matched_pixels(predicted, np.zeros_like(predicted), 2.0) == 0


def edge_batch():
    target = torch.zeros(1, 1, 16, 16)
    target[..., 8, 2:14] = 1
    return target


@pytest.mark.parametrize("metric", [OdsF, BenchmarkOdsF])
def test_perfect_edges(metric):
    metric = metric(Task("e", "edges", 1))
    metric.update(edge_batch() * 20 - 10, edge_batch())
    assert metric.compute() == 1


def test_two_lines_for_one():
    """Both lie within the tolerance, but only one can be the label's."""
    prediction = torch.full((1, 1, 16, 16), -10.0)
    prediction[..., 6, 2:14] = prediction[..., 10, 2:14] = 10.0
    results = {}
    for metric in (OdsF(Task("e", "edges", 1), 0.1), BenchmarkOdsF(Task("e", "edges", 1), 0.1, thresholds=5)):
        metric.update(prediction, edge_batch())
        results[type(metric)] = float(metric.compute())
    assert results[OdsF] == 1
    assert results[BenchmarkOdsF] == pytest.approx(2 * 0.5 * 1 / 1.5)


def test_ignored_pixels_and_choice():
    task = Task("e", "edges", 1, {"edge_matching": "one_to_one"})
    metric = task_metrics(task)["odsF"]
    assert isinstance(metric, BenchmarkOdsF)
    target = edge_batch()
    target[..., :4, :] = 255
    prediction = edge_batch() * 20 - 10
    prediction[..., 2, :] = 10  # where there is no label to be wrong about
    metric.update(prediction, target)
    assert metric.compute() == 1
