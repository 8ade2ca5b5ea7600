"""Parameters sharded by FSDP2: the same step as one process with the whole batch, or a reason why not."""

import cases
import pytest
from test_replicated import OPTIONS, check

import torchmto
from torchmto.methods import method_class

METHODS = [
    "gd",
    "uw",
    "famo",
    "pcgrad",
    "wpcgrad",
    "cagrad",
    "nash_mtl",
    "upgrad",
    "trimmed_mean",
    "sequential",
    "task_groups",
    "connection_strength",
]


@pytest.mark.parametrize("where", ["all", "trunk"])
@pytest.mark.parametrize("name", METHODS)
def test_fully_shard(pool, name, where):
    model = "split" if name == "connection_strength" else "toy"
    options = {"schedule": "phase2"} if name == "connection_strength" else OPTIONS.get(name, {})
    check(pool, name, options, 2, fsdp=where, model=model, mt_options={"clip": 0.5})


@pytest.mark.parametrize("name", ["gd", "mgda"])
def test_gradients_are_summed_whatever_is_set_for_other_backwards(pool, name):
    check(pool, name, {}, 2, fsdp="all", unsynced=True)


@pytest.mark.parametrize("name", ["rlw", "mgda", "connection_strength"])
def test_micro_batches(pool, name):
    check(pool, name, OPTIONS.get(name, {}), 2, fsdp="all", micro=((2, 2), (2, 2)))


def test_what_is_refused(pool):
    works, refused = pool.run(2, cases.try_fsdp, [(name, OPTIONS.get(name, {})) for name in torchmto.methods()])[0]
    assert set(refused) == {name for name in torchmto.methods() if method_class(name).whole_rows}
    assert all("doesn't work with sharded parameters: it " in message for message in refused.values())
    assert len(works) > 30
    messages = pool.run(2, cases.refuse_fsdp)[0]
    assert "`scaler` should be None" in messages["scaler"]
    assert "`shard_gradients` should be False" in messages["shard_gradients"]
    assert 'needs heads="weighted"' in messages["reused weights"]
    assert "every rank should return losses for the same tasks" in messages["missing task"]
    assert messages["divide factor"].startswith("ValueError: `set_gradient_divide_factor`")


@pytest.mark.parametrize("name", ["sdmgrad", "modo"])
def test_independent_batches(pool, name):
    check(pool, name, {}, 2, fsdp="all", independent=True)
