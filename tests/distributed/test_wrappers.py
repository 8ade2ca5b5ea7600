"""Wrappers of PyTorch around a model or an optimizer: the same step as without them, or a refusal at construction."""

import cases
import pytest
import torch

REFUSED = {
    "fsdp flat": "FullyShardedDataParallel",
    "fsdp": "FullyShardedDataParallel",
    "fsdp shared": "FullyShardedDataParallel",
    "fsdp trunk": "FullyShardedDataParallel",
    "fsdp inside": "FullyShardedDataParallel",
    "static_graph": "static_graph=True",
    "static_graph trunk": "static_graph=True",
    "static_graph compiled": "static_graph=True",
    "hook": "register_comm_hook",
    "mixed precision": "mixed_precision=",
    "delayed": "delay_all_reduce_named_params=",
    "ignored": "ignore",
    "replicate": "`replicate`",
    "tensor parallel": "Tensor parallelism",
    "deepspeed": "DeepSpeedEngine",
}
DRIVEN = [
    "unused",
    "bucket view",
    "parts",
    "of compiled",
    "compiled",
    "zero",
    "fused",
    "parametrized",
    "functional",
    "module",
]


def test_refused_at_construction(pool):
    """With the wrapper's name or that of its option, on all ranks."""
    for result in pool.run(2, cases.wrap, list(REFUSED)):
        for kind, told in REFUSED.items():
            assert result[kind].startswith("ValueError"), (kind, result[kind])
            assert told in result[kind], (kind, result[kind])


@pytest.mark.parametrize("method", ["gd", "pcgrad", "sequential"])
def test_driven_as_without(pool, method):
    results = pool.run(2, cases.drive, DRIVEN, method)
    for kind in DRIVEN:
        for result in results:
            torch.testing.assert_close(result[kind], result["plain"], msg=lambda text, kind=kind: f"{kind}: {text}")


@pytest.mark.parametrize(
    ("method", "options"), [("gd", {}), ("pcgrad", {}), ("pcgrad", {"gradients": "layerwise"})], ids=str
)
def test_ready_losses_of_a_wrapped_model(pool, method, options):
    """The wrapper, which the forward outside has prepared to reduce, keeps out; of the user's own backward it doesn't."""
    one, other = pool.run(2, cases.ready, method, options)
    for kind in ("unused", "bucket view"):
        torch.testing.assert_close(one[kind], one["plain"])
        assert torch.equal(one[kind], other[kind])
        assert torch.equal(one[f"{kind}, own"], other[f"{kind}, own"])


@pytest.mark.parametrize(
    ("method", "options"), [("gd", {}), ("pcgrad", {}), ("pcgrad", {"gradients": "layerwise"})], ids=str
)
def test_a_wrapper_that_was_not_given_is_driven_as_one_that_was(pool, method, options):
    one, other = pool.run(2, cases.outside, method, options)
    for kind, result in one.items():
        torch.testing.assert_close(result, one["given"], msg=lambda text, kind=kind: f"{kind}: {text}")
        assert torch.equal(result, other[kind])


def test_wrappers_that_turn_up_later(pool):
    for result in pool.run(2, cases.late):
        assert result["plain"] == "nothing"
        assert result["static"].startswith("ValueError: DistributedDataParallel with static_graph=True")
        assert result["group"].startswith("ValueError: Parameter `process_group` should be")
        assert result["hook"].startswith("ValueError: DistributedDataParallel with a communication hook")
        assert result["found"] == [(True, True)] * 3


def test_join_is_refused_in_the_step(pool):
    for message in pool.run(2, cases.join):
        assert message.startswith("ValueError: `join()`")
        assert "return no losses" in message
