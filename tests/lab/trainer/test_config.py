"""Settings are checked before anything is loaded."""

import pytest

from torchmto.lab.trainer import (
    ConfigError,
    DataConfig,
    MethodConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
    train,
)
from torchmto.lab.trainer.build import rate_factor
from torchmto.lab.trainer.config import changed_settings


@pytest.fixture(autouse=True)
def nothing_is_loaded(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("data were loaded before the settings had been checked")

    monkeypatch.setattr("torchmto.lab.trainer.build.load_data", refuse)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (TrainConfig(epochs=0), "Parameter `epochs` should be an int >= 1. Found `epochs = 0`."),
        (TrainConfig(accumulate=0), "accumulate"),
        (TrainConfig(ema=1.0), "ema"),
        (TrainConfig(precision="16"), "precision"),
        (TrainConfig(loggers=["paper"]), "loggers"),
        (TrainConfig(baseline={"left": 0.0}), "baseline.left"),
        (TrainConfig(data=DataConfig("nope")), "one of digits"),
        (TrainConfig(data=DataConfig("digits:somewhere")), "takes no path"),
        (TrainConfig(data=DataConfig("nyuv2")), "needs a path"),
        (TrainConfig(data=DataConfig("nyuv2:/nowhere.npz")), "There is no `/nowhere.npz`.*Where to get it"),
        (TrainConfig(data=DataConfig(options={"trian": 3})), "no option `trian`"),
        (TrainConfig(data=DataConfig(batch_size=0)), "data.batch_size"),
        (TrainConfig(model=ModelConfig("nope")), "model.name"),
        (TrainConfig(model=ModelConfig("mlp", {"width": 3})), "widths"),
        (TrainConfig(model=ModelConfig(compile=True, gradient_checkpointing=True)), "not both"),
        (TrainConfig(method=MethodConfig("nope")), "Unknown method `nope`"),
        (TrainConfig(method=MethodConfig("wpcgrad", {"mode": "nope"})), "Parameter `mode`"),
        (TrainConfig(method=MethodConfig("wpcgrad", {"mood": 1})), "mood"),
        (TrainConfig(method=MethodConfig(weights={"left": -1.0})), "method.weights.left"),
        (TrainConfig(optimizer=OptimizerConfig(lr=0.0)), "optimizer.lr"),
        (TrainConfig(optimizer=OptimizerConfig(momentum=1.0)), "optimizer.momentum"),
        (TrainConfig(optimizer=OptimizerConfig(clip=0.0)), "optimizer.clip"),
    ],
)
def test_wrong_settings(config, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_missing_logger_says_what_to_type(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install wandb"):
        train(TrainConfig(loggers=["wandb"]), tmp_path / "run")


def test_plain_values_round_trip():
    config = TrainConfig(data=DataConfig("rooms", {"size": [24, 32]}), losses={"depth": {"loss": "mse"}}, ema=0.5)
    assert TrainConfig.from_dict(config.as_dict()) == config
    with pytest.raises(ConfigError):
        TrainConfig.from_dict({"epocs": 3})


def test_which_changes_count():
    before = TrainConfig().as_dict()
    after = TrainConfig(
        method=MethodConfig("uw"), data=DataConfig(workers=7), log_every=3, optimizer=OptimizerConfig(lr=0.5)
    )
    assert changed_settings(before, after.as_dict()) == ["method.name", "optimizer.lr"]


@pytest.mark.parametrize(
    ("schedule", "first", "middle", "last"),
    [("constant", 1, 1, 1), ("poly", 1, 0.5**0.9, 0), ("cosine", 1, 0.5, 0), ("step", 1, 0.25, 0.0625)],
)
def test_schedules(schedule, first, middle, last):
    config = OptimizerConfig(schedule=schedule, step_epochs=1, gamma=0.25)
    factor = rate_factor(config, steps_per_epoch=10, total_steps=20)
    assert [factor(0), factor(10), factor(20)] == pytest.approx([first, middle, last])


def test_warmup_rises_linearly():
    factor = rate_factor(OptimizerConfig(warmup_steps=3), steps_per_epoch=10, total_steps=20)
    assert [factor(step) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
