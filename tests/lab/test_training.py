"""The plain training loop: fair starts, evaluation with split norms, learning."""

from dataclasses import replace

import pytest
import torch

from torchmto.lab.data import load_data
from torchmto.lab.training import (
    RunConfig,
    build_run,
    check_device,
    evaluate,
    primary_values,
    tell_method,
    train_epoch,
)
from torchmto.structure import has_split_norms

CONFIG = RunConfig(epochs=1, batch_size=32, model_options={"widths": [8, 8]}, seed=3)


@pytest.fixture(scope="module")
def bundle():
    return load_data("digits", train=128, validation=48, test=48)


def test_paired_runs_start_alike_and_see_the_same_batches(bundle):
    runs = [
        build_run(replace(CONFIG, method=m, tasks=t), bundle) for m, t in (("gd", ()), ("mgda", ()), ("gd", ("left",)))
    ]
    first, *others = runs
    for other in others:
        for name, parameter in other.model.trunk.named_parameters():
            assert torch.equal(parameter, first.model.trunk.get_parameter(name)), name
        assert torch.equal(other.loader.batch(0, 1)["input"], first.loader.batch(0, 1)["input"])
    assert [task.name for task in runs[2].tasks] == ["left"]


def test_connection_strength_gets_its_norms_and_its_length(bundle):
    run = build_run(replace(CONFIG, method="connection_strength", epochs=5), bundle)
    assert has_split_norms(run.model)
    assert run.multitask.method.total_steps == run.total_steps == 5 * 4
    assert not has_split_norms(build_run(CONFIG, bundle).model)


def test_one_scheduler_step_per_batch_whatever_the_method(bundle):
    for method in ("gd", "sequential"):
        run = build_run(replace(CONFIG, method=method), bundle)
        seen = []
        train_epoch(run, 0, lambda info, seconds, seen=seen: seen.append((info.num_optimizer_steps, seconds)))
        assert len(seen) == 4
        assert all(seconds > 0 for _, seconds in seen)
        assert run.optimizer.param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("method", ["gd", "connection_strength"])
def test_evaluation_measures_every_task_and_keeps_the_mode(bundle, method):
    run = build_run(replace(CONFIG, method=method), bundle)
    train_epoch(run, 0)
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    whole = evaluate(run.model, bundle, "test", batch_size=48)
    pieces = evaluate(run.model, bundle, "test", batch_size=7)
    assert run.model.training
    assert all(torch.equal(value, before[name]) for name, value in run.model.state_dict().items())
    assert list(whole) == ["left", "right", "offset"]
    for task, metrics in whole.items():
        assert metrics == pytest.approx(pieces[task], rel=1e-4, abs=1e-5), task
    assert primary_values(whole, bundle.tasks)["offset"] == whole["offset"]["rmse"]


@pytest.mark.parametrize("method", ["dtp", "wpcgrad(priority=dtp)"])
def test_methods_that_want_shares_get_shares(bundle, method):
    run = build_run(RunConfig(method=method, epochs=1), bundle)
    tell_method(run.multitask, {"left": 0.5, "right": float("nan"), "offset": 3.0}, run.tasks)
    dtp = run.multitask.method if method == "dtp" else run.multitask.method.priority.weighting
    assert dtp.performance[0] == 0.5
    assert bool(dtp.performance[1].isnan())
    assert dtp.performance[2] == 0.25


def test_training_learns(bundle):
    run = build_run(replace(CONFIG, epochs=4, learning_rate=1e-2), bundle)
    untrained = evaluate(run.model, bundle, "train")
    for epoch in range(4):
        train_epoch(run, epoch)
    assert evaluate(run.model, bundle, "train")["offset"]["rmse"] < 0.7 * untrained["offset"]["rmse"]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"tasks": ("middle",)}, ValueError, "has the tasks left, right, offset"),
        ({"method": "gd(c=1)"}, TypeError, "Method `gd`"),
        ({"model": "nothing"}, ValueError, "should be one of"),
        ({"model_options": {"depth": 3}}, TypeError, "has the options"),
    ],
)
def test_mistakes_are_named(bundle, change, error, message):
    with pytest.raises(error, match=message):
        build_run(replace(CONFIG, **change), bundle)


def test_devices_are_checked():
    check_device("cpu")
    for device in ("cuda:77", "tpu", "nowhere"):
        with pytest.raises(ValueError, match="should be a device of this machine"):
            check_device(device)
