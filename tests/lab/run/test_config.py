"""Settings are checked before anything is loaded."""

from dataclasses import replace

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from torchmto.lab.run.build import scheduler_of
from torchmto.lab.run.config import (
    ConfigError,
    DataConfig,
    MethodConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    changed_settings,
    config_of,
)
from torchmto.lab.run.folder import RunFolder, read_yaml
from torchmto.lab.run.single import train
from torchmto.methods import registry


@pytest.fixture(autouse=True)
def nothing_is_loaded(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("data were loaded before the settings had been checked")

    monkeypatch.setattr("torchmto.lab.data.digits._compose", refuse)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (RunConfig(epochs=0), "Parameter `epochs` should be an int >= 1. Found `epochs = 0`."),
        (RunConfig(accumulate=0), "accumulate"),
        (RunConfig(ema=1.0), "ema"),
        (RunConfig(precision="16"), "precision"),
        (RunConfig(loggers=["paper"]), "loggers"),
        (RunConfig(baseline={"left": 0.0}), "baseline.left"),
        (RunConfig(data=DataConfig("nope")), "one of digits"),
        (RunConfig(data=DataConfig("digits:somewhere")), "takes no path"),
        (RunConfig(data=DataConfig("nyuv2")), "needs a path"),
        (RunConfig(data=DataConfig("nyuv2:/nowhere.npz")), "`/nowhere.npz`, which doesn.t exist. Get it from"),
        (RunConfig(data=DataConfig(options={"trian": 3})), "no option `trian`"),
        (RunConfig(data=DataConfig(batch_size=0)), "data.batch_size"),
        (RunConfig(model=ModelConfig("nope")), "`model` should be one of mlp"),
        (RunConfig(model=ModelConfig("mlp", {"width": 3})), "widths"),
        (RunConfig(model=ModelConfig(compile=True, gradient_checkpointing=True)), "not both"),
        (RunConfig(method=MethodConfig("nope")), "Unknown method `nope`"),
        (RunConfig(method=MethodConfig("wpcgrad", {"mode": "nope"})), "Parameter `mode`"),
        (RunConfig(method=MethodConfig("wpcgrad", {"mood": 1})), "mood"),
        (RunConfig(method=MethodConfig(weights={"left": -1.0})), "method.weights.left"),
        (RunConfig(optimizer=OptimizerConfig(lr=0.0)), "optimizer.lr"),
        (RunConfig(optimizer=OptimizerConfig(momentum=1.0)), "optimizer.momentum"),
        (RunConfig(optimizer=OptimizerConfig(clip=0.0)), "optimizer.clip"),
    ],
)
def test_wrong_settings(config, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_missing_logger_says_what_to_type(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install wandb"):
        train(RunConfig(loggers=["wandb"]), tmp_path / "run")


def test_plain_values_round_trip():
    config = RunConfig(data=DataConfig("rooms", {"size": [24, 32]}), losses={"depth": {"loss": "mse"}}, ema=0.5)
    assert RunConfig.from_dict(config.as_dict()) == config
    with pytest.raises(ConfigError):
        RunConfig.from_dict({"epocs": 3})


LIKE_NUMBERS = [
    "12e3",
    "1e3",
    "023e763975073668",
    "0892",
    "0o17",
    "0x1F",
    ".5e3",
    ".inf",
    "1_000",
    "1:30",
    "yes",
    "~",
    "<<",
]
TEXTS = st.text() | st.sampled_from(LIKE_NUMBERS) | st.from_regex(r"[-+]?[0-9.]{1,3}e?[0-9_:]{0,3}", fullmatch=True)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=8,
)


@given(st.dictionaries(TEXTS, VALUES, max_size=4), st.lists(TEXTS, max_size=3), TEXTS)
@example({text: text for text in LIKE_NUMBERS}, LIKE_NUMBERS, "023e763975073668")
def test_written_settings_are_read_as_they_were(tmp_path_factory, options, tasks, source):
    config = RunConfig(DataConfig(options=options, tasks=tasks), losses={"1e3": options}, source=source)
    path = tmp_path_factory.getbasetemp() / "written.yaml"
    path.write_text(RunFolder.settings_text(config), encoding="utf-8")
    assert read_yaml(path) == config.as_dict()
    assert RunConfig.from_dict(read_yaml(path)) == config


@pytest.mark.parametrize("source", ["023e763975073668", "0892000000000000", "1234567890123e45", "a48425bbfd4fc951"])
def test_a_hash_that_was_written_without_quotes_is_one(tmp_path, source):
    (tmp_path / "config.yaml").write_text(f"source: {source}\ncontent: null\n")
    settings = RunConfig.from_dict(read_yaml(tmp_path / "config.yaml"))
    assert settings == replace(RunConfig(), source=source, content=None)


ONE_POINT_TWO = {
    "1e-3": 0.001,
    "010": 10,
    "0o17": 15,
    "0x1F": 31,
    "-5": -5,
    ".inf": float("inf"),
    "True": True,
    "No": False,
    "on": True,
    "~": None,
    "": None,
}
ONE_POINT_TWO |= {text: text for text in ("yEs", "n", "1:30", "1_000", "2024-01-31", "0b1", "1e", ".", "+.e3")}


@pytest.mark.parametrize(("text", "value"), ONE_POINT_TWO.items())
def test_what_has_no_quotes_is_read_as_yaml_1_2_says(tmp_path, text, value):
    (tmp_path / "c.yaml").write_text(f"a: {text}\n")
    read = read_yaml(tmp_path / "c.yaml")["a"]
    assert (read, type(read)) == (value, type(value))


def test_which_changes_count():
    before = RunConfig().as_dict()
    after = RunConfig(
        method=MethodConfig("uw"), data=DataConfig(workers=7), log_every=3, optimizer=OptimizerConfig(lr=0.5)
    )
    assert changed_settings(before, after.as_dict()) == ["method.name", "optimizer.lr"]


def rates(config):
    """The learning rate at each of 20 steps and after them."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = scheduler_of(config, optimizer, steps_per_epoch=10, total_steps=20)
    found = []
    for _ in range(21):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize(
    ("schedule", "first", "middle", "last"),
    [("constant", 1, 1, 1), ("poly", 1, 0.5**0.9, 0), ("cosine", 1, 0.5, 0), ("step", 1, 0.25, 0.0625)],
)
def test_schedules(schedule, first, middle, last):
    config = OptimizerConfig(schedule=schedule, step_epochs=1, gamma=0.25)
    factors = rates(config)
    assert [factors[0], factors[10], factors[20]] == pytest.approx([first, middle, last])


def test_warmup_rises_linearly():
    constant = rates(OptimizerConfig(schedule="constant", warmup_steps=3))
    assert constant[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    falling, plain = rates(OptimizerConfig(warmup_steps=3)), rates(OptimizerConfig())
    assert falling[:5] == pytest.approx([share * rate for share, rate in zip(constant, plain[:5], strict=False)])


def test_a_problems_file_may_register_the_method_it_is_trained_with(tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    (tmp_path / "own_method.py").write_text(
        "import torchmto\n@torchmto.register_method('of_a_file')\nclass Own(type(torchmto.make_method('gd'))):\n    pass\n"
        "def problem():\n    pass\n"
    )
    with pytest.raises(ConfigError, match="Unknown method `of_a_file`"):
        config_of({"method": "of_a_file"}).validate()
    config_of({"method": "of_a_file", "data": f"{tmp_path}/own_method.py:problem"}).validate()


@pytest.mark.parametrize("name", ["data.workers", "devices", "threads"])
@pytest.mark.parametrize("number", [1025, 2**31, 2**63 - 1])
def test_no_machine_is_asked_for_billions_of_processes(name, number):
    config_of({name: 1024}).validate()
    with pytest.raises(ConfigError, match=f"Parameter `{name}` should be at most 1024"):
        config_of({name: number}).validate()
