"""Bytes sent: what the scaling model says, what the step counts, and what the kernel has sent."""

import cases
import pytest

from torchmto.lab.scaling import Setting

LARGE = {"shared": 300 * 400 + 400, "heads": 3 * 401, "shared_tensors": 2, "head_tensors": 6}

STEPS = {
    "gd": ("loss weighting", {}),
    "uw": ("loss weighting", {}),
    "wpcgrad": ("gramian", {}),
    "wpcgrad, divided": ("gramian", {"shard_gradients": True}),
    "wpcgrad, layerwise": ("layerwise", {"gradients": "layerwise"}),
    "sequential": ("sequential", {}),
    "task_groups": ("task groups", {}),
}


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", STEPS)
def test_bytes(pool, name, size):
    """The model is exact to the byte; what gloo puts on the wire is 2 % more, headers included.

    Except for reduce-scatter, which gloo carries out as an all-reduce: twice the bytes of NCCL's.
    """
    family, options = STEPS[name]
    divided = options.get("shard_gradients", False)
    setting = Setting(tasks=3, ranks=size, family=family, groups=3, segments=1, shard_gradients=divided, **LARGE)
    results = pool.run(size, cases.count_bytes, name.split(",")[0], options)
    counted = sum(result["counted"] for result in results) / size
    sent = sum(result["sent"] for result in results) / size
    assert counted == pytest.approx(setting.bytes_sent(), rel=1e-12)
    extra = sum(size for what, size in setting.collectives() if what == "one task's row") if divided else 0.0
    assert sent == pytest.approx(counted + extra, rel=0.02)
    assert {result["collectives"] for result in results} == {len(setting.collectives())}


def test_rows_are_on_their_way_while_the_next_backward_runs(pool):
    for divided in (False, True):
        events = pool.run(2, cases.trace_events, divided)[0]
        backwards = [i for i, event in enumerate(events) if event == "backward"]
        starts = [i for i, event in enumerate(events) if event == "start row"]
        assert len(backwards) == len(starts) == 3
        assert [b < s for b, s in zip(backwards, starts, strict=True)] == [True] * 3
        assert starts[0] < backwards[1] < starts[1] < backwards[2] < starts[2]
        if not divided:
            assert events.index("wait") > starts[2]


def test_simulated_time():
    """By hand: forward 1, three backwards of 1 each; a row takes 0.5 (hidden but for the last) or 2 (the link is busy)."""
    fast = Setting(tasks=3, shared=10**6, ranks=2)
    row = 4e6
    assert fast.seconds(forward=1, backward=1, bandwidth=2 * row) == pytest.approx(4.5, rel=1e-3)
    assert fast.seconds(forward=1, backward=1, bandwidth=row / 2) == pytest.approx(2 + 3 * 2, rel=1e-3)
    assert fast.flops(1e12) == pytest.approx(7e12, rel=1e-3)
