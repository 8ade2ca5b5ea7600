"""What a Run is built of: fair starts, norms, evaluation, what a method is told."""

import math
from dataclasses import replace

import pytest
import torch

from torchmto import lab
from torchmto.lab.data import load_data
from torchmto.lab.problem import ProblemError
from torchmto.lab.run.build import Computer, build, problem_of
from torchmto.lab.run.config import ConfigError, config_of
from torchmto.lab.run.evaluation import evaluate, primary_values, tell_method
from torchmto.lab.run.loop import Trainer
from torchmto.lab.run.random_state import seed_everything
from torchmto.lab.specs import parse_method
from torchmto.structure import has_split_norms

SETTINGS = {"epochs": 1, "batch_size": 32, "lr": 3e-3, "model.options": {"widths": [8, 8]}, "seed": 3}


@pytest.fixture(scope="module")
def problem():
    return load_data("digits", train=128, validation=48, test=48)


def parts_of(problem, method="gd", **settings):
    spec = parse_method(method)
    own = {"method": {"name": spec.name, "options": dict(spec.hyperparameters)}}
    chosen, config = problem_of(config_of({**SETTINGS, **own, **settings}), problem)
    seed_everything(config.seed)
    return build(config, chosen)


def trainer_of(problem, **settings):
    chosen, config = problem_of(config_of({**SETTINGS, **settings}), problem)
    return Trainer(config, chosen)


def test_paired_runs_start_alike_and_see_the_same_batches(problem):
    first, *others = [parts_of(problem, method=m, tasks=t) for m, t in (("gd", None), ("mgda", None), ("gd", ["left"]))]
    for other in others:
        for name, parameter in other.model.trunk.named_parameters():
            assert torch.equal(parameter, first.model.trunk.get_parameter(name)), name
        assert torch.equal(*(next(parts.loader.epoch(0, 1))["input"] for parts in (other, first)))
    assert others[1].problem.task_names == ("left",)


def test_connection_strength_gets_its_norms_and_its_length(problem):
    parts = parts_of(problem, method="connection_strength", epochs=5)
    assert has_split_norms(parts.model)
    assert parts.multitask.method.total_steps == 5 * 4
    assert not has_split_norms(parts_of(problem).model)


def test_adatask_gets_plain_sgd_and_heads_their_own_rate(problem):
    optimizer = parts_of(problem, method="adatask").optimizer
    assert isinstance(optimizer, torch.optim.SGD)
    assert optimizer.param_groups[0]["momentum"] == 0
    for method in ("adatask", "gd"):
        trunk, heads = parts_of(problem, method=method, **{"optimizer.head_rate": 3.0}).optimizer.param_groups
        assert heads["initial_lr"] == pytest.approx(3 * trunk["initial_lr"])


@pytest.mark.parametrize("method", ["gd", "connection_strength"])
def test_evaluation_measures_every_task_and_keeps_the_mode(problem, method):
    parts = parts_of(problem, method=method)
    parts.network.train()
    before = {name: value.clone() for name, value in parts.model.state_dict().items()}
    whole = evaluate(parts.network, problem, "test", batch_size=48)
    pieces = evaluate(parts.network, problem, "test", batch_size=7)
    assert parts.model.training
    assert all(torch.equal(value, before[name]) for name, value in parts.model.state_dict().items())
    assert list(whole) == ["left", "right", "offset"]
    for task, metrics in whole.items():
        assert metrics == pytest.approx(pieces[task], rel=1e-4, abs=1e-5), task
    assert primary_values(whole, problem.task_list)["offset"] == whole["offset"]["rmse"]


def test_a_network_that_is_nan_in_evaluation_has_no_score(problem):
    """As running statistics that overflow leave it: it trains, and nothing it is measured by may look like learning."""

    class Broken(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.trunk = torch.nn.Linear(math.prod(problem.shape), 8)
            self.heads = torch.nn.ModuleDict(
                {task.name: torch.nn.Linear(8, task.channels) for task in problem.task_list}
            )

        def forward(self, x):
            outputs = {task: head(self.trunk(x.flatten(1))) for task, head in self.heads.items()}
            return outputs if self.training else {**outputs, "left": outputs["left"] * torch.nan}

    run = lab.fit(replace(problem, model=Broken), epochs=2, batch_size=32, say=lambda _: None)
    assert all(math.isnan(value) for value in run.metrics["left"].values())
    assert all(math.isfinite(value) for value in run.metrics["right"].values())
    assert [entry["score"] for entry in run.history] == [None, None]


@pytest.mark.parametrize("method", ["dtp", "wpcgrad(priority=dtp)"])
def test_methods_that_want_shares_get_shares(problem, method):
    parts = parts_of(problem, method=method)
    tell_method(parts.multitask, {"left": 0.5, "right": float("nan"), "offset": 3.0}, problem.task_list)
    dtp = parts.multitask.method if method == "dtp" else parts.multitask.method.priority.weighting
    assert dtp.performance[0] == 0.5
    assert bool(dtp.performance[1].isnan())
    assert dtp.performance[2] == 0.25


def test_training_learns(problem):
    trainer = trainer_of(problem, epochs=4, lr=1e-2)
    untrained = trainer.evaluate("train")
    trainer.parts.model.train()
    for _ in range(4):
        trainer._train_epoch()
        trainer.progress.position = 0
    assert trainer.evaluate("train")["offset"]["rmse"] < 0.7 * untrained["offset"]["rmse"]
    assert trainer.parts.optimizer.param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-9)


def test_workers_change_nothing(problem):
    results = [trainer_of(problem, **{"data.workers": workers, "epochs": 2}).fit() for workers in (0, 2)]
    assert results[0]["test"] == results[1]["test"]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"tasks": ["middle"]}, ConfigError, "has the tasks left, right, offset"),
        ({"method": "gd(c=1)"}, ConfigError, "Method `gd`"),
        ({"model": "nothing"}, ConfigError, "should be one of"),
        ({"model.options": {"depth": 3}}, ConfigError, "has the options"),
    ],
)
def test_mistakes_are_named(problem, change, error, message):
    with pytest.raises(error, match=message):
        parts_of(problem, **change)


def test_an_own_optimizer_is_one(problem):
    with pytest.raises(ProblemError, match=r"`optimizer`.* one torch.optim.Optimizer. Found list"):
        parts_of(replace(problem, optimizer=lambda model: [torch.optim.SGD(model.parameters(), lr=0.1)]), lr=None)


def test_devices_are_checked():
    assert Computer.of(config_of({"device": "cpu"})).device.type == "cpu"
    for device in ("cuda:77", "tpu", "nowhere"):
        with pytest.raises(ConfigError, match="should be a device of this machine"):
            Computer.of(config_of({"device": device}))
