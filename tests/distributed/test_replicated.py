"""N processes with a part of the batch each make the step that one process makes with all of it."""

import warnings

import cases
import pytest
import torch

import torchmto
from torchmto.methods import method_class
from toy import batch, closure, make

OPTIONS = {
    "static": {"weights": {"a": 1.0, "b": 0.5, "c": 2.0}},
    "constant": {"weights": {"a": 1.0, "b": 0.5, "c": 2.0}},
    "task_groups": {"warmup": 1, "decay": 0.5, "measure_last": True},
    "connection_strength": {"total_steps": 3},
    "stch": {"warmup": 1},
    "nash_mtl": {"update_every": 3, "max_norm": 0.5, "heads": "weighted"},
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


SHARDED = {
    "all labels": (4, {}),
    "halves": (2, {"labelled": "halves", "model": "branching"}),
    "micro-batches": (2, {"micro": ((1, 3), (2, 2)), "labelled": "mixed", "model": "branching"}),
    "task-specific norms": (2, {"model": "split", "labelled": "mixed", "shares": (4, 4)}),
    "clip and scaler": (2, {"mt_options": {"clip": 0.5, "scaler": True}}),
}


@pytest.mark.parametrize("situation", SHARDED)
@pytest.mark.parametrize("name", ["gd", "wpcgrad", "trimmed_mean", "task_groups"])
def test_divided_columns(pool, name, situation):
    """With shard_gradients=True every rank holds a part of the gradient matrix, and the update is the same."""
    size, arguments = SHARDED[situation]
    more = {**arguments.get("mt_options", {}), "shard_gradients": True}
    options = {**OPTIONS.get(name, {}), **({"inner": "pcgrad"} if name == "task_groups" else {})}
    check(pool, name, options, size, **{**arguments, "mt_options": more})


def test_which_methods_take_divided_columns(pool):
    works, refused = pool.run(2, cases.try_sharded, [(name, OPTIONS.get(name, {})) for name in torchmto.methods()])[0]
    assert set(refused) == {
        "connection_strength",
        *(name for name in torchmto.methods() if method_class(name).whole_rows),
    }
    for name, message in refused.items():
        assert message.startswith(f"Method `{name}` doesn't work with shard_gradients=True: it ")
    for name in sorted(works):
        check(pool, name, OPTIONS.get(name, {}), 2, steps=2, mt_options={"shard_gradients": True})


@pytest.mark.parametrize("engine", ["parameters", "layerwise"])
def test_weights_are_recomputed_where_a_task_has_none_on_any_rank(pool, engine):
    first, last = pool.run(2, cases.reuse, engine)
    more = engine == "layerwise"
    assert first[0] == [2 + more, 1, 2 + more, 1, 1, 1, 2 + more, 1]
    assert last[0] == [1 + more, 1, 2 + more, 1, 1, 1, 2 + more, 1]
    assert torch.equal(first[1], last[1])


LAYERWISE = {name: situation for name, situation in SITUATIONS.items() if name != "wrapped in DDP"} | {
    "two processes": (2, {}),
    "norms, scaler, micro-batches": (2, {"model": "split", "micro": ((2, 2), (4,)), "mt_options": {"scaler": True}}),
    "weights": (4, {"labelled": "mixed", "mt_options": {"weights": {"a": 2.0}}}),
}


@pytest.mark.parametrize("situation", LAYERWISE)
def test_layerwise(pool, situation):
    """Segments' gradients are summed before they enter the Gramian; one process with rows is the reference."""
    size, arguments = LAYERWISE[situation]
    more = {**arguments.get("mt_options", {}), "gradients": "layerwise"}
    for name in ("wpcgrad", "mgda"):
        check(pool, name, OPTIONS.get(name, {}), size, **{**arguments, "mt_options": more})


@pytest.mark.parametrize("shard", [False, True])
@pytest.mark.parametrize("name", ["modo", "sdmgrad"])
def test_independent_batches(pool, name, shard):
    check(pool, name, {}, 2, independent=True, mt_options={"shard_gradients": shard})


DECIDING = {
    "sequential": {"shuffle": True},
    "connection_strength": {"total_steps": 12},
    "connection_strength ": {"schedule": "phase2"},
    "task_groups": {"warmup": 1, "decay": 0.9, "inner": "wpcgrad"},
    "task_groups ": {"groups": "random"},
    "wpcgrad": {"priority": "loss", "window": 2},
    "rlw": {},
    "famo": {"lr": 0.5},
    "son_goku": {"refresh_every": 1},
    "dwa": {"window": 2},
}


NORMS = {"connection_strength": "split", "connection_strength ": "split groups"}
"""The models of methods that need norms."""


@pytest.mark.parametrize("name", DECIDING)
def test_decisions_are_the_same_though_losses_differ(pool, name):
    """Each rank's data have another scale; phases, orders, groups and weights must agree all the same."""
    results = pool.run(4, cases.decide, name.strip(), DECIDING[name], 8, NORMS.get(name, "toy"))
    for result in results[1:]:
        assert torch.equal(result["parameters"], results[0]["parameters"])
        assert result["decisions"] == results[0]["decisions"]
    assert results[0]["local"] != results[1]["local"]


@pytest.mark.parametrize("schedule", ["phase1", "phase2"])
def test_layers_that_one_rank_alone_has_seen_have_the_same_priorities_everywhere(pool, schedule):
    results = pool.run(2, cases.pair, schedule)
    assert torch.equal(results[0]["parameters"], results[1]["parameters"])
    for key in ("priorities", "records"):
        assert results[0][key] == results[1][key]
    assert results[0]["priorities"]["pairs"]["second"] == ["norm", None, "recorded"]
    assert results[0]["records"]["layer_priority_shares"]["second"]["a"] == 0


FAILURES = {
    "closure": ("closure", "ValueError: no batch"),
    "no graph": ("no graph", "ValueError: The loss of task `b` has no autograd graph"),
    "unknown task": ("unknown", "ValueError: Unknown task `z`"),
    "backward": ("backward", "RuntimeError: broken backward"),
    "reentrant": ("reentrant", "ValueError: The model runs a part of its forward under a reentrant checkpoint"),
    "interrupt": ("interrupt", "KeyboardInterrupt: stop"),
    "interrupted backward": ("interrupted backward", "KeyboardInterrupt: stop"),
    "argument": ("argument", "ValueError: Unknown task `nobody`"),
    "rule": ("rule", "ValueError: no rule"),
    "second run": ("second run", "OSError: no data the second time"),
    "inner": ("inner", "ValueError: The gradient of parameter `heads.b.weight` (2 such in all) has appeared by itself"),
}


@pytest.mark.parametrize("name", ["gd", "rlw", "pcgrad", "pcgrad, layerwise", "sequential"])
def test_a_failure_on_one_rank_ends_the_step_on_all(pool, name):
    """Every rank raises, with the failed rank's message; nothing has changed, and the next step is fine."""
    for kind, message in FAILURES.values():
        for pieces in (1, 2):
            # Micro-batches run twice where the weights aren't known before all losses are, and sub-steps of procedures.
            twice = name == "sequential" or (name == "rlw" and pieces == 2)
            if (kind == "second run" and not twice) or (kind == "rule" and name == "sequential"):
                continue
            results = pool.run(4, cases.fail, name, kind, pieces)
            assert f"{results[2]['type']}: {results[2]['message']}".startswith(message)
            for rank in (0, 1, 3):
                assert results[rank]["type"] == "RankFailedError"
                assert results[rank]["message"].startswith(f"Rank 2 failed, so the step ended on all ranks. {message}")
            for result in results:
                assert result["unchanged"] or name == "sequential"
                assert torch.equal(result["parameters"], results[0]["parameters"])


@pytest.mark.parametrize(("place", "after"), [(0, False), (1, False), (1, True)])
def test_a_message_that_fails_is_the_end_of_all_ranks(pool, place, after):
    """Nobody is told what doesn't fit what they wait for: all raise, no process is aborted, and nobody takes another step."""
    for rank, (first, second, unchanged) in enumerate(pool.run(4, cases.lose, place, after)):
        assert first == "MemoryError: no room" if rank == 1 else ": " in first
        assert second.startswith("RankFailedError: A message between the ranks has failed before")
        assert unchanged == "True"


@pytest.mark.parametrize("name", ["gd", "rlw", "uw", "pcgrad", "graddrop"])
def test_backward_of_a_trainer_that_owns_the_step(pool, name):
    first, second = pool.run(2, cases.backward, name)
    assert torch.equal(first["stepped"], second["stepped"])
    torch.testing.assert_close(first["stepped"], first["stepping"], rtol=1e-9, atol=1e-12)


def test_different_tasks_are_an_error_on_all_ranks(pool):
    """And no abort: their messages would have different sizes."""
    for kind, message in pool.run(2, cases.other_tasks):
        assert kind == "ValueError"
        assert message.startswith("The ranks don't have the same tasks.")


def test_different_parameters_are_an_error_on_all_ranks(pool):
    for message in pool.run(3, cases.other_parameters):
        assert message.startswith("ValueError: Parameter `heads.b.weight` should be the same on all ranks")
        assert "Found other values on rank 2 than on rank 0" in message


@pytest.mark.parametrize("name", ["gd", "pcgrad", "graddrop"])
@pytest.mark.parametrize("what", ["optimizer", "optimizers", "shared"])
def test_ranks_that_list_parameters_in_another_order(pool, what, name):
    expected, layout = cases.reordered(0, 1, None, what, name)
    for parameters, found in pool.run(2, cases.reordered, what, name):
        torch.testing.assert_close(parameters, expected, rtol=1e-9, atol=1e-9)
        assert found == layout


def test_what_only_some_ranks_are_told_is_an_error_on_all(pool):
    for result in pool.run(2, cases.differ):
        for alike in ("alike", "all told", "nobody hears it", "left alone", "numbers alike", "expanded"):
            assert result.pop(alike) == "nothing"
        assert "same `leak` of method `graddrop`. Rank 0: 0.0. Rank 1: 0.5." in result.pop("hyper-parameter")
        assert "same `weights` of method `static`. Rank 0: {'a': 1.0," in result.pop("by task")
        assert "same `clip`. Rank 0: 1.0. Rank 1: 2.0." in result.pop("clip")
        assert "Parameter `heads.a.weight` should be the same on all ranks" in result.pop("frozen")
        assert "Found heads.c.weight on rank 1 where rank 0 has heads.a.weight." in result.pop("order")
        for message in result.values():
            assert message.startswith("ValueError: The ranks aren't taking the same step")


def test_a_process_group_that_comes_after_the_multitask(monkeypatch):
    model, _, mt = make("gd")
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda group=None: 2)
    with pytest.raises(ValueError, match="initialised after MultiTask was built"):
        mt.step(closure(model, batch(("a", "b", "c"))))
    monkeypatch.setattr("torch.distributed.get_world_size", lambda group=None: 1)
    mt.step(closure(model, batch(("a", "b", "c"))))


@pytest.mark.parametrize("name", ["gd", "rlw", "pcgrad", "sequential"])
def test_ranks_agree_after_a_micro_batch_without_labels(pool, name):
    first, second = pool.run(2, cases.unlabelled, name)
    assert torch.equal(first["parameters"], second["parameters"])
    assert first["buffers"] == second["buffers"]
    assert first["roles"] == second["roles"]


@pytest.mark.parametrize("name", ["gd", "pcgrad"])
def test_what_all_ranks_raise(pool, name):
    for result in pool.run(2, cases.refuse, name):
        assert result["empty"].startswith("ValueError: Empty batch")
        assert result["loss"].startswith("NonFiniteError: The loss of task `a` is nan")
        unshared = "nothing" if name == "gd" else "ValueError: The tasks share no parameters"
        assert result["unshared"].startswith(unshared)
        assert result["skip"] == (True, "The loss of task `a` is nan.")
        for key in ("tasks", "seed", "method", "lists", "split lists"):
            assert result[key].startswith("ValueError: The ranks aren't taking the same step")


def test_overflow_is_found_on_all_ranks(pool):
    """One rank's gradient overflows: all skip the step and lower the scale."""
    for name in ("gd", "pcgrad"):
        results = pool.run(2, cases.overflow, name)
        assert results[0] == results[1] == (True, 128.0)
