"""Runs that are interrupted, killed and resumed; precision, accumulation, averaging, split norms."""

import json
import os
import random
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from scripts import load_script
from torchmto import lab
from torchmto.cli import main
from torchmto.lab.run.checkpoint import CheckpointError, CheckpointFolder, read_checkpoint
from torchmto.lab.run.config import ConfigError, DataConfig, MethodConfig, ModelConfig, OptimizerConfig, RunConfig
from torchmto.lab.run.folder import RunFolder
from torchmto.lab.run.inference import evaluate_run
from torchmto.lab.run.loop import Interrupted, Trainer
from torchmto.lab.run.scores import Measure
from torchmto.lab.run.single import train

kill = load_script("benchmarks/kill_training.py")

ROOMS = DataConfig("rooms", {"size": [32, 32], "train": 8, "validation": 4, "test": 4}, batch_size=2, workers=0)
VIT = {
    "patch": 8,
    "decoder_width": 8,
    "config": {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2},
}
TINY = {"train": 96, "validation": 32, "test": 32}


def config(method="gd", options=None, **more):
    defaults = {
        "data": DataConfig("digits", TINY, batch_size=16, workers=0),
        "model": ModelConfig("mlp", {"widths": [16], "dropout": 0.3}),
        "method": MethodConfig(method, options or {}),
        "optimizer": OptimizerConfig("adam", 1e-3, schedule="poly"),
        "epochs": 2,
        "loggers": ["csv"],
        "log_every": 1,
    }
    return RunConfig(**{**defaults, **more})


def interrupt_at(step, number=signal.SIGTERM):
    """A replacement of `Trainer._log_step` that sends this process a signal once a step is done."""
    original = Trainer._log_step

    def log_step(self, info):
        original(self, info)
        if self.progress.step == step:
            os.kill(os.getpid(), number)

    return log_step


@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("gd", {"accumulate": 2, "ema": 0.9}),
        ("uw", {"precision": "16-mixed"}),
        ("wpcgrad", {"precision": "bf16-mixed"}),
        ("famo", {"optimizer": OptimizerConfig("sgd", schedule="step", step_epochs=1, warmup_steps=2)}),
        ("connection_strength", {"model": ModelConfig("convnet", {"widths": [4, 8]})}),
        ("task_groups", {"options": {"warmup": 2}}),
        # torch.fx can't trace this model: its norms are found from a first step's dataflow.
        (
            "connection_strength",
            {"options": {"schedule": "phase2"}, "data": ROOMS, "model": ModelConfig("vit_tiny", VIT)},
        ),
    ],
)
def test_resuming_in_a_new_process_equals_never_stopping(tmp_path, monkeypatch, method, more):
    settings = config(method, **more)
    straight, halted = tmp_path / "straight", tmp_path / "halted"
    train(settings, straight)
    steps = kill.final_state(straight)["progress"]["step"]
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_log_step", interrupt_at(steps // 2 + 1))
        with pytest.raises(Interrupted, match=f"SIGTERM after {steps // 2 + 1} steps"):
            train(settings, halted)
    assert kill.wait(kill.forked(lambda: train(None, halted, resume=True))) == 0
    assert kill.same(kill.final_state(straight), kill.final_state(halted))
    assert kill.logged(straight) == kill.logged(halted)
    results = [json.loads((path / "results.json").read_text()) for path in (straight, halted)]
    assert results[0]["test"] == results[1]["test"]
    assert results[0]["trace"] == results[1]["trace"]
    for result in results:
        assert [entry["epoch"] for entry in result["history"]] == [0, 1]
        assert result["history"][-1].pop("seconds") > result["history"][0].pop("seconds")
    assert results[0]["history"] == results[1]["history"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("uw", {"precision": "16-mixed"}),
        ("wpcgrad", {"precision": "bf16-mixed"}),
        ("connection_strength", {"model": ModelConfig("convnet", {"widths": [4, 8]})}),
    ],
)
def test_resuming_on_a_gpu_equals_never_stopping(tmp_path, monkeypatch, method, more):
    settings = config(method, device="cuda", deterministic=True, **more)
    straight, halted = tmp_path / "straight", tmp_path / "halted"
    train(settings, straight)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_log_step", interrupt_at(7))
        with pytest.raises(Interrupted, match="SIGTERM after 7 steps"):
            train(settings, halted)
    _, trainer = train(None, halted, resume=True)
    assert {parameter.device.type for parameter in trainer.parts.model.parameters()} == {"cuda"}
    assert kill.same(kill.final_state(straight), kill.final_state(halted))
    assert kill.logged(straight) == kill.logged(halted)
    results = [json.loads((path / "results.json").read_text()) for path in (straight, halted)]
    assert results[0]["test"] == results[1]["test"]


def test_five_kills(tmp_path):
    assert kill.stress(tmp_path, kills=5, seed=0)["kills"] == 5


def test_new_process_from_the_command_line(tmp_path, monkeypatch, capsys):
    """SIGINT at the command line gives 130 and the command that goes on; that command, as a program, ends with 0."""
    out = tmp_path / "run"
    RunFolder(out).path.mkdir()
    (tmp_path / "c.yaml").write_text(
        "data: {name: digits, batch_size: 16, options: {train: 96, validation: 32, test: 32}}"
    )
    common = ["--config", str(tmp_path / "c.yaml"), "--model.name", "mlp", "--epochs", "2", "--loggers", "[csv]"]
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_log_step", interrupt_at(8, signal.SIGINT))
        assert main(["train", *common, "--out", str(out)]) == 130
    message = capsys.readouterr().err
    assert f"torchmto train --resume --out={out}" in message
    assert main(["train", *common, "--out", str(out)]) == 2
    assert "--resume" in capsys.readouterr().err
    assert main(["train", *common, "--out", str(out), "--resume", "--optimizer.lr", "0.5"]) == 2
    assert "optimizer.lr changed" in capsys.readouterr().err
    program = "import sys; from torchmto.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", program, "train", "--resume", "--keep", "5", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Data wait:" in done.stdout
    assert "left accuracy*" in done.stdout
    assert main(["evaluate", "--run", str(out), "--split", "validation"]) == 0
    results = json.loads((out / "results.json").read_text())
    evaluation = json.loads((out / "evaluation-validation.json").read_text())
    assert evaluation["metrics"] == results["validation"]
    assert main(["evaluate", "--run", str(out), "--weights", "untrained", "--split", "validation"]) == 0
    evaluation = json.loads((out / "evaluation-validation.json").read_text())
    assert evaluation["metrics"] == results["validation_untrained"]
    assert main(["predict", "--run", str(out), "--count", "3"]) == 0
    predictions = json.loads((out / "predictions-test.json").read_text())
    assert len(predictions["tasks"]["left"]["prediction"]) == 3
    assert (out / "predictions-test.png").read_bytes().startswith(b"\x89PNG")
    assert main(["predict", "--run", str(out), "--count", "0"]) == 2
    assert main(["evaluate", "--run", str(tmp_path / "nothing")]) == 2
    assert main(["evaluate", "--run", str(out), "--weights", str(tmp_path / "c.yaml")]) == 1
    assert main(["train", "--out", str(out), "--epochs", "x"]) == 2


def test_print_config_can_be_read_back(capsys, tmp_path):
    assert main(["train", "--out", "x", "--epochs", "7", "--method.options.mode", "order", "--print-config"]) == 0
    (tmp_path / "c.yaml").write_text(capsys.readouterr().out)
    assert main(["train", "--config", str(tmp_path / "c.yaml"), "--print-config"]) == 0
    printed = capsys.readouterr().out
    assert "epochs: 7" in printed
    assert "mode: order" in printed


@pytest.mark.parametrize(("evaluation", "place"), [(1, None), (2, (0, 6))])
def test_a_signal_during_validation_loses_nothing(tmp_path, monkeypatch, evaluation, place):
    settings, out = config(), tmp_path / "run"
    original, calls = Trainer.evaluate, []

    def evaluate(self, split):
        calls.append(split)
        if len(calls) == evaluation:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, split)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "evaluate", evaluate)
        with pytest.raises(Interrupted):
            train(settings, out)
    checkpoints = CheckpointFolder(out / "checkpoints")
    if place is None:  # the untrained network's
        assert not checkpoints.steps()
    else:
        progress = checkpoints.read_last()[1]["progress"]
        assert (progress["epoch"], progress["position"]) == place
    resumed, _ = train(None, out, resume=True)
    straight = tmp_path / "straight"
    whole, _ = train(settings, straight)
    assert [entry["score"] for entry in resumed["history"]] == [entry["score"] for entry in whole["history"]]
    assert kill.same(kill.final_state(straight), kill.final_state(out))


def test_the_log_of_a_run_that_ended_at_its_first_checkpoint_goes_on(tmp_path, monkeypatch):
    """The untrained network's figures are logged before step 0 is saved, and not again."""
    out, straight = tmp_path / "run", tmp_path / "straight"
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_train_epoch", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train(config(), out)
    train(None, out, resume=True)
    train(config(), straight)
    assert kill.logged(straight) == kill.logged(out)


def test_a_full_disk_ends_the_run_and_it_can_go_on(tmp_path, monkeypatch):
    out = tmp_path / "run"
    original, fail = os.fsync, []

    def fsync(descriptor):
        if fail:
            raise OSError(28, "No space left on device")
        original(descriptor)

    def log_step(self, info):
        if self.progress.step == 3:
            fail.append(True)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        patch.setattr(Trainer, "_log_step", log_step)
        with pytest.raises(CheckpointError, match=r"the disk is full.*step-00000000.ckpt`, is untouched"):
            train(config(), out)
    train(None, out, resume=True)
    assert (out / "results.json").exists()


def test_damaged_foreign_and_mismatched_checkpoints(tmp_path):
    out = tmp_path / "run"
    train(config(), out)
    checkpoints = CheckpointFolder(out / "checkpoints")
    older, last = checkpoints.steps()
    last.write_bytes(last.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=rf"damaged.*--checkpoint {older}"):
        train(None, out, resume=True)
    foreign = tmp_path / "foreign.ckpt"
    torch.save({"model": {}}, foreign)
    with pytest.raises(CheckpointError, match="isn't a checkpoint of torchmto"):
        train(None, out, checkpoint=foreign)
    with pytest.raises(ConfigError, match=r"epochs, seed changed"):
        train(config(epochs=5, seed=1), out, checkpoint=older)
    with pytest.raises(ConfigError, match="holds a run already"):
        train(config(), out)
    lines = []
    train(None, out, checkpoint=older, say=lines.append)
    assert any("Renamed a checkpoint of a later step" in line for line in lines)
    assert read_checkpoint(checkpoints.steps()[-1])["progress"]["epoch"] == 2


def test_two_processes_cannot_train_in_one_folder(tmp_path):
    folder = RunFolder(tmp_path / "run")
    with folder.locked(), pytest.raises(ConfigError, match="Another process"):
        train(config(), tmp_path / "run", resume=True)


def test_micro_batches_equal_one_batch(tmp_path):
    """Two micro-batches of 16 give the step of one batch of 32: the order of samples is the same."""
    plain = ModelConfig("mlp", {"widths": [16]})
    states = []
    for size, accumulate in ((32, 1), (16, 2)):
        data = DataConfig("digits", TINY, batch_size=size, workers=0)
        optimizer = OptimizerConfig("sgd", lr=0.05, momentum=0.0)
        settings = config(data=data, model=plain, accumulate=accumulate, epochs=1, optimizer=optimizer)
        train(settings, tmp_path / str(size))
        states.append(read_checkpoint(tmp_path / str(size) / "checkpoints" / "step-00000003.ckpt")["model"])
    for name, value in states[0].items():
        torch.testing.assert_close(value, states[1][name], rtol=1e-4, atol=1e-6)


def test_one_scheduler_step_per_batch_and_costs(tmp_path):
    results, _ = train(config("sequential"), tmp_path / "run")
    assert (results["cost"]["num_optimizer_steps"], results["cost"]["steps"]) == (3, 12)
    rates = {step: value for step, name, value in kill.logged(tmp_path / "run") if name == "lr"}
    assert list(rates) == list(range(1, 13))
    assert rates[6] == pytest.approx(1e-3 * 0.5**0.9)
    assert rates[12] == 0


def test_best_by_delta_m(tmp_path):
    baseline = {"left": 0.5, "right": 0.5, "offset": 1.0}
    results, _ = train(config(baseline=baseline), tmp_path / "run")
    assert results["measure"].startswith("delta_m")
    validation = results["validation"]
    changes = [validation[task]["accuracy"] / 0.5 - 1 for task in ("left", "right")]
    changes.append(1 - validation["offset"]["rmse"])
    assert results["score"] == pytest.approx(100 * sum(changes) / 3)
    with pytest.raises(ConfigError, match="none for `right`"):
        train(config(baseline={"left": 0.5}), tmp_path / "other")


def test_a_best_epoch_whose_weights_are_gone_doesnt_count(tmp_path, monkeypatch):
    def train_scored(scores, **more):
        measure = property(lambda self: Measure("x", "x", lambda _: scores[self.progress.epoch]))
        monkeypatch.setattr(Trainer, "_measure", measure)
        return train(config(epochs=6, keep=3), tmp_path / "run", **more)

    train_scored([0.0, 5.0, 1.0, 2.0, 4.0, 9.0])
    checkpoints = CheckpointFolder(tmp_path / "run" / "checkpoints")
    results, trainer = train_scored([None, None, None, None, 3.0, 1.0], checkpoint=checkpoints.path(24))
    assert (results["selected_epoch"], results["best_step"], results["score"]) == (4, 30, 3.0)
    assert results["validation"] == results["history"][4]["validation"]
    state, exported = read_checkpoint(checkpoints.path(30))["model"], load_file(tmp_path / "run" / "model.safetensors")
    for name, value in exported.items():
        assert torch.equal(value, state[name])
    checkpoints.mark_best(checkpoints.path(36))
    with pytest.raises(CheckpointError, match=r"isn't the best .*of step 30. Found that of step 36"):
        trainer._finish()


class Sampling(nn.Module):
    """Draws in evaluation, too; a signal may come into one."""

    forwards, signal_at = 0, -1

    def __init__(self):
        super().__init__()
        self.trunk, self.heads = nn.Linear(4, 8), nn.ModuleDict({name: nn.Linear(8, 1) for name in "ab"})

    def forward(self, x):
        features = self.trunk(x)
        features = features + 0.3 * torch.randn_like(features) + 0.1 * random.random()
        if not self.training:
            Sampling.forwards += 1
            if Sampling.forwards == Sampling.signal_at:
                os.kill(os.getpid(), signal.SIGTERM)
        return {name: head(features) for name, head in self.heads.items()}


class Running(nn.Module):
    """A loss over its own running mean."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.tensor(1.0))

    def forward(self, output, target):
        loss = (output - target).square().mean()
        self.mean = 0.9 * self.mean + 0.1 * loss.detach()
        return loss / self.mean


def sampled(losses=None):
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    rows = [(row, {"a": row.sum().reshape(1), "b": row[:1] * row[1:2]}) for row in x]
    tasks = [lab.Task(name, "regression", 1) for name in "ab"]
    return lab.Problem(tasks, rows, rows[:32], rows[32:], model=Sampling, losses=losses or {})


def ends_equal(first, second):
    results = [json.loads((path / "results.json").read_text()) for path in (first, second)]
    assert results[0]["test"] == results[1]["test"]
    keys = ("losses", "validation", "score")
    histories = [[{key: entry[key] for key in keys} for entry in result["history"]] for result in results]
    assert histories[0] == histories[1]
    weights = [load_file(path / "model.safetensors") for path in (first, second)]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


@pytest.mark.parametrize("at", range(5, 8))
def test_a_model_that_draws_in_evaluation_resumes_to_the_bit(tmp_path, monkeypatch, at):
    monkeypatch.setattr(Sampling, "forwards", 0)
    settings = RunConfig(data=DataConfig(f"{__file__}:sampled", batch_size=16), epochs=3, loggers=["csv"])
    train(settings, tmp_path / "whole", problem=sampled())
    monkeypatch.setattr(Sampling, "signal_at", Sampling.forwards + at)
    with pytest.raises(Interrupted):
        train(settings, tmp_path / "run", problem=sampled())
    results, _ = train(settings, tmp_path / "run", resume=True, problem=sampled())
    ends_equal(tmp_path / "whole", tmp_path / "run")
    folder = RunFolder(tmp_path / "run")
    for split in ("validation", "test"):
        assert evaluate_run(folder.read_settings(), folder, "best", split)["metrics"] == results[split]


def test_a_loss_that_keeps_something_keeps_it_for_its_run_alone(tmp_path, monkeypatch):
    shared = Running()
    problem = sampled(losses={"a": shared, "b": shared})
    settings = RunConfig(data=DataConfig(batch_size=16), epochs=2, loggers=["csv"])
    _, trainer = train(settings, tmp_path / "first", problem=problem)
    first, second = trainer.parts.loss_modules
    assert first is second
    assert first.mean != shared.mean == 1
    train(settings, tmp_path / "second", problem=problem)
    ends_equal(tmp_path / "first", tmp_path / "second")
    monkeypatch.setattr(Trainer, "_log_step", interrupt_at(6))
    with pytest.raises(Interrupted):
        train(settings, tmp_path / "third", problem=problem)
    train(settings, tmp_path / "third", resume=True, problem=problem)
    ends_equal(tmp_path / "first", tmp_path / "third")


def test_average_is_what_is_evaluated_and_exported(tmp_path):
    train(config(ema=0.9), tmp_path / "run")
    best = read_checkpoint(tmp_path / "run" / "checkpoints" / "best.ckpt")
    weights = load_file(tmp_path / "run" / "model.safetensors")
    for name, value in best["average"].items():
        if name.startswith("module."):
            assert torch.equal(weights[name.removeprefix("module.")], value)
            assert not torch.equal(best["model"][name.removeprefix("module.")], value)


@pytest.mark.parametrize(
    "option", [{"compile": True, "compile_backend": "eager"}, {"gradient_checkpointing": True}, {"channels_last": True}]
)
def test_ways_to_compute_a_model_train_alike(tmp_path, option):
    plain = ModelConfig("convnet", {"widths": [4, 8]})
    states = []
    for name, choice in (("other", ModelConfig("convnet", {"widths": [4, 8]}, **option)), ("plain", plain)):
        train(config("pcgrad", model=choice, epochs=1), tmp_path / name)
        states.append(read_checkpoint(tmp_path / name / "checkpoints" / "best.ckpt")["model"])
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        torch.testing.assert_close(value, states[1][name], rtol=1e-4, atol=1e-5)


class Told:
    """A logger that keeps what it was told at the end."""

    def __init__(self):
        self.statuses = []

    def log_metrics(self, metrics, step=None):
        pass

    def finalize(self, status):
        self.statuses.append(status)


def test_loggers_are_told_how_a_run_ended(tmp_path, monkeypatch):
    logger = Told()
    monkeypatch.setattr("torchmto.lab.run.loop.make_loggers", lambda *_, **__: [logger])

    def fail(*_):
        raise ValueError("full")

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_log_step", interrupt_at(2))
        with pytest.raises(Interrupted):
            train(config(), tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_log_step", fail)
        with pytest.raises(ValueError, match="full"):
            train(None, tmp_path / "run", resume=True)
    train(None, tmp_path / "run", resume=True)
    assert logger.statuses == ["killed", "failed", "finished"]


@pytest.mark.parametrize("before", [(False, False), (True, False), (True, True)])
def test_deterministic_is_put_back(monkeypatch, before):
    def now():
        return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()

    def fail(*_, **__):
        raise ValueError("no model")

    seen = []

    def look(*_):
        seen.append(now())
        if len(seen) > 2:
            raise ValueError("enough")

    monkeypatch.setattr(Trainer, "_log_step", look)
    settings = config(deterministic=True, loggers=None, log_every=10)
    try:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        with pytest.raises(ValueError, match="enough"):
            train(settings, None)
        assert seen == [(True, True)] * 3
        assert now() == before
        monkeypatch.setattr("torchmto.lab.run.loop.build", fail)
        with pytest.raises(ValueError, match="no model"):
            train(settings, None)
        assert now() == before
    finally:
        torch.use_deterministic_algorithms(mode=False)


def test_what_a_run_leaves_behind(tmp_path):
    out = tmp_path / "run"
    settings = config(
        "connection_strength", model=ModelConfig("convnet", {"widths": [4, 8]}), loggers=["csv", "tensorboard"]
    )
    train(settings, out)
    names = {name for _, name, _ in kill.logged(out)}
    assert {"loss/left", "priority_shares/left", "cost/num_forward", "validation/score", "lr", "method/phase"} <= names
    assert any((out / "tensorboard").iterdir())
    records = [json.loads(line) for line in (out / "records.jsonl").read_text().splitlines()]
    assert len(records) == 2
    assert "layer_priority_shares" in records[0]
    environment = json.loads((out / "environment.json").read_text())
    assert environment[0]["versions"]["torch"] == torch.__version__
    written = RunFolder(out).read_settings()
    assert (written.method, written.epochs, written.optimizer) == (settings.method, settings.epochs, settings.optimizer)


def test_dense_predictions(tmp_path):
    settings = config("connection_strength", data=ROOMS, model=ModelConfig("segnet", {"width": 4}), epochs=1)
    results, _ = train(settings, tmp_path / "run")
    assert set(results["test"]) == {"segmentation", "depth", "normals", "edges"}
    assert main(["predict", "--run", str(tmp_path / "run"), "--count", "2"]) == 0
    assert (tmp_path / "run" / "predictions-test.png").read_bytes().startswith(b"\x89PNG")
