"""No setting is ignored silently: each one changes something, or is refused by a line."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from torchmto import lab
from torchmto.cli import main
from torchmto.lab.grid import plan
from torchmto.lab.grid.identity import identity
from torchmto.lab.references import load_problem
from torchmto.lab.run.build import build, problem_of
from torchmto.lab.run.config import ConfigError, RunConfig, config_of
from torchmto.lab.run.folder import RunFolder
from torchmto.lab.run.inference import evaluate_run, predict_run

FARM = str(Path(__file__).parents[1] / "farm.py")
SETTINGS = [
    f"{name}.{key}" if isinstance(value, dict) and name != "losses" else name
    for name, value in RunConfig().as_dict().items()
    for key in (value if isinstance(value, dict) and name != "losses" else [""])
]
OTHER = {
    "data.name": None,  # given by the first argument
    "data.options": None,
    "data.tasks": ["crop"],
    "model.name": None,
    "model.options": None,
    "model.compile_backend": "eager",
    "method.name": "pcgrad",
    "method.options": None,  # no method has none; see below
    "method.weights": {"crop": 2.0},
    "method.on_nonfinite": "skip",
    "optimizer.name": "sgd",
    "optimizer.schedule": "poly",
    "optimizer.gamma": 0.1,
    "losses": {"crop": {"loss": "cross_entropy", "label_smoothing": 0.1}},
    "precision": "bf16-mixed",
    "device": "cpu",
    "ema": 0.5,
    "baseline": {"crop": 0.5, "yield": 0.5},
    "loggers": ["csv"],
    "source": None,  # found by itself
    "content": None,
}
ON_THE_WAY = {"data.workers", "device", "checkpoint_every", "model.compile"}
"""Settings of how a Run is done, not of what comes out."""


def other(name):
    if name in OTHER:
        return OTHER[name]
    section, _, key = name.partition(".")
    values = RunConfig().as_dict()
    value = values[section][key] if key else values[section]
    return not value if isinstance(value, bool) else 0.5 if isinstance(value, float) else (value or 1) + 1


@pytest.mark.parametrize("name", [name for name in SETTINGS if OTHER.get(name, 0) is not None])
def test_a_comparison_ignores_no_setting(name, tmp_path, monkeypatch):
    settings = {"epochs": 1, "data.batch_size": 16}

    class Planned(Exception):
        pass

    def stop(experiment, *_, **__):
        raise Planned(experiment)

    monkeypatch.setattr(plan, "try_grid", stop)

    def runs(more):
        with pytest.raises(Planned) as planned:
            lab.compare(
                f"{FARM}:farm", "gd", seeds=1, out=tmp_path / f"{bool(more)}", progress=False, **{**settings, **more}
            )
        (experiment,) = planned.value.args
        return [identity(run) for run in (*experiment.single_task_runs(["crop", "yield"]), *experiment.method_runs())]

    try:
        changed = runs({name: other(name)})
    except ValueError as error:
        message = str(error)
    else:
        assert name in ON_THE_WAY or changed != runs({})
        return
    assert name.rpartition(".")[2] in message
    assert len(message.splitlines()) == 1
    assert not (tmp_path / "True").exists()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a trained run."""
    folder = RunFolder(tmp_path_factory.mktemp("used") / "run")
    lab.fit(f"{FARM}:farm", out=folder.path, epochs=1, batch_size=16, loggers=[], say=lambda _: None)
    return folder


def evaluated(folder, more):
    """Figures and predictions of trained and untrained weights; of those that are refused, why."""
    for verb in (evaluate_run, lambda *given: [path.read_text() for path in predict_run(*given, 2)]):
        for weights in ("best", "untrained"):
            try:
                yield verb(config_of(more, folder.read_settings()), folder, weights, "test")
            except ConfigError as error:
                yield str(error)


def diagnosed(_, more):
    """What a diagnosis says, but for times; or why it is refused."""
    settings = {"data.batch_size": 16, "epochs": 1, "optimizer.name": "adamw", **more}
    if "optimizer.momentum" in more:
        settings["optimizer.name"] = "sgd"
    try:
        found = lab.diagnose(f"{FARM}:farm", batches=2, **settings).as_dict()
    except ValueError as error:
        yield str(error)
    else:
        yield {
            "plan": found["plan"],
            **{name: found["measurements"][name] for name in ("cosines", "losses", "affinity")},
        }


WITHOUT_TRACE = {
    evaluated: {"data.batch_size", "data.split_seed", "model.task_norms", "model.channels_last", "threads"},
    diagnosed: {
        "data.split_seed",
        "data.augment",
        "model.task_norms",
        "model.channels_last",
        "method.same_noise",
        "threads",
    },
}
"""Settings that are used, and leave no trace on the farm: it has no splits to draw, no augmentation, norms or dropout."""


@pytest.mark.parametrize("verb", [evaluated, diagnosed])
def test_no_other_verb_ignores_a_setting(verb, run):
    usual = list(verb(run, {}))
    for name in SETTINGS:
        if OTHER.get(name, 0) is None or name in ON_THE_WAY - {"checkpoint_every"} | WITHOUT_TRACE[verb]:
            continue
        changed = list(verb(run, {name: other(name)}))
        assert changed != usual, name
        for message in changed:
            assert not isinstance(message, str) or (name in message and len(message.splitlines()) == 1)


def test_a_runs_own_settings_may_be_given_again(run, capsys):
    own = ["evaluate", "--run", str(run.path), "--config", str(run.settings)]
    assert main(own) == 0
    assert main([*own, "--optimizer.lr", "0.5"]) == 2
    assert "The setting `optimizer.lr` has no effect here: nothing is trained." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "name"), [({"precision": "16-mixed"}, "precision"), ({"model.compile": True}, "model.compile")]
)
def test_a_diagnosis_refuses_what_it_would_leave_out(settings, name):
    with pytest.raises(ConfigError, match=f"The setting `{name}` has no effect here"):
        lab.diagnose("digits", **settings)


def test_an_own_evaluation_knows_no_split(tmp_path):
    lab.fit(f"{FARM}:pinn", out=tmp_path, epochs=1, loggers=[], say=lambda _: None)
    folder = RunFolder(tmp_path)
    assert evaluate_run(folder.read_settings(), folder, "best", "test")["metrics"]["start"]
    with pytest.raises(ConfigError, match="`split` has no effect here"):
        evaluate_run(folder.read_settings(), folder, "best", "validation")


@pytest.mark.parametrize("given", [{"method": "gd"}, {"method.name": "gd"}, {"method": {"options": {}}}])
def test_a_comparison_names_its_methods_once(given, tmp_path):
    with pytest.raises(ConfigError, match="`methods` names"):
        lab.compare("digits", out=tmp_path / "x", **given)


@pytest.mark.parametrize(
    ("problem", "settings", "message"),
    [
        ("optimizer", {"lr": 0.1}, "`optimizer.lr` can't be used"),
        ("optimizer", {"weight_decay": 0.1}, "`optimizer.weight_decay` can't be used"),
        ("optimizer", {"optimizer.name": "sgd"}, "`optimizer.name` can't be used"),
        ("optimizer", {"optimizer.head_rate": 2.0}, "`optimizer.head_rate` can't be used"),
        ("pinn", {"losses": {"equation": {"loss": "mse"}}}, "`losses` can't be used"),
    ],
)
def test_settings_of_what_a_problem_brings_itself_are_refused(problem, settings, message):
    own = load_problem(f"{FARM}:pinn", {})
    if problem == "optimizer":
        own = replace(
            load_problem(f"{FARM}:farm", {}), optimizer=lambda model: torch.optim.SGD(model.parameters(), 0.1)
        )
    used, config = problem_of(config_of({"epochs": 1}), own)
    build(config, used)
    used, config = problem_of(config_of({"epochs": 1, **settings}), own)
    with pytest.raises(ConfigError, match=message):
        build(config, used)


@pytest.mark.parametrize(
    "settings",
    [{"optimizer.momentum": 0.5}, {"optimizer.gamma": 0.1}, {"optimizer.power": 2.0}, {"log_every": 2}, {"keep": 3}],
)
def test_a_run_without_use_for_a_setting_says_so(settings):
    with pytest.raises(ConfigError, match=f"The setting `{next(iter(settings))}`"):
        lab.fit(load_problem(f"{FARM}:farm", {}), epochs=1, **settings)


def test_a_problems_usual_options_stay_beside_those_that_are_given():
    _, config = problem_of(config_of({"model.options": {"grid": [2, 2]}}))
    assert config.model.options == {"widths": [16, 32, 64], "grid": [2, 2]}
    _, config = problem_of(config_of({"model.options": {"widths": [8]}}))
    assert config.model.options == {"widths": [8]}
