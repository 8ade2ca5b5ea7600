"""N processes with a part of the batch each make the step that one process makes with all of it."""

import warnings

import cases
import pytest
import torch

import torchmto

OPTIONS = {
    "static": {"weights": {"a": 1.0, "b": 0.5, "c": 2.0}},
    "constant": {"weights": {"a": 1.0, "b": 0.5, "c": 2.0}},
    "task_groups": {"warmup": 1, "decay": 0.5, "measure_last": True},
    "connection_strength": {"total_steps": 3},
    "stch": {"warmup": 1},
}
"""Hyper-parameters where the defaults need some, or do nothing special in three steps."""


def check(pool, name, options, size, *, tolerance=1e-9, **arguments):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = cases.train(0, 1, None, name, options, **arguments)
    results = pool.run(size, cases.train_case, name, options, arguments)
    for result in results:
        assert torch.equal(result["parameters"], results[0]["parameters"]), "parameters differ between ranks"
        assert result["generator"] == expected["generator"]
        assert result["infos"] == results[0]["infos"]
    assert results[0]["grads"] == expected["grads"], "other parameters have a gradient"
    torch.testing.assert_close(results[0]["parameters"], expected["parameters"], rtol=tolerance, atol=tolerance)
    for (losses, weights, skipped), (l, w, s) in zip(results[0]["infos"], expected["infos"], strict=True):
        assert skipped == s
        assert losses == pytest.approx(l, rel=1e-8)
        assert (weights is None) == (w is None)
        if w is not None:
            assert weights == pytest.approx(w, rel=1e-5, abs=1e-8)
    return results


@pytest.mark.parametrize("name", torchmto.methods())
def test_every_method(pool, name):
    check(pool, name, OPTIONS.get(name, {}), 2)


KINDS = ("gd", "famo", "pcgrad", "graddrop", "sequential", "task_groups")
"""One method per way through the step."""

SITUATIONS = {
    "four processes": (4, {}),
    "wrapped in DDP": (2, {"ddp": True}),
    "ranks see other tasks first": (2, {"model": "branching", "labelled": "halves"}),
    "a rank without any task": (4, {"labelled": "idle"}),
    "labels at random": (4, {"model": "branching", "labelled": "mixed", "steps": 4}),
    "unequal batches": (2, {"shares": (5, 3), "labelled": "mixed"}),
    "micro-batches": (2, {"micro": ((2, 2), (2, 2))}),
    "uneven micro-batches": (2, {"micro": ((1, 3), (2, 2)), "labelled": "mixed", "model": "branching"}),
    "lists of unequal length": (2, {"micro": ((4,), (1, 2, 1))}),
    "clip and scaler": (2, {"mt_options": {"clip": 0.5, "scaler": True}}),
    "learnt loss weights": (2, {"mt_options": {"weights": "uw"}}),
    "task-specific norms": (2, {"model": "split"}),
    "task-specific norms, partial labels": (4, {"model": "split", "labelled": "mixed", "shares": (2, 2, 2, 2)}),
}


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("name", KINDS)
def test_situations(pool, name, situation):
    size, arguments = SITUATIONS[situation]
    check(pool, name, OPTIONS.get(name, {}), size, **arguments)
