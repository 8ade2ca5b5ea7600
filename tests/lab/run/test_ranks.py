"""Training on several processes: the numbers of one, and nothing lost when one of them fails, is killed or is asked to stop."""

import contextlib
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from scripts import load_script
from torchmto.lab.data.base import Task, TensorData
from torchmto.lab.run.checkpoint import CheckpointError, CheckpointFolder
from torchmto.lab.run.config import DataConfig, MethodConfig, ModelConfig, OptimizerConfig, RunConfig
from torchmto.lab.run.evaluation import Measures, merged_values, metric_states
from torchmto.lab.run.folder import RunFolder
from torchmto.lab.run.logs import CsvLog, RecordLog
from torchmto.lab.run.loop import Trainer
from torchmto.lab.run.processes import _launch, attempt_name
from torchmto.lab.run.single import train

kill = load_script("benchmarks/kill_training.py")

build, evaluation = (sys.modules[f"torchmto.lab.run.{name}"] for name in ("build", "evaluation"))
TINY = {"train": 100, "validation": 40, "test": 24}


def config(method="gd", options=None, **more):
    """Batches of 16: 6, 5 and 5 samples on three processes; three validation batches, the last a short one."""
    defaults = {
        "data": DataConfig("digits", TINY, batch_size=16, workers=0),
        "model": ModelConfig("mlp", {"widths": [8]}),
        "method": MethodConfig(method, options or {}),
        "optimizer": OptimizerConfig("sgd", lr=0.05, schedule="poly"),
        "epochs": 2,
        "loggers": ["csv"],
        "log_every": 1,
    }
    return RunConfig(**{**defaults, **more})


@pytest.fixture(scope="module", autouse=True)
def imported(tmp_path_factory):
    """Everything that a run imports on the way, so that forked processes needn't."""
    train(config(epochs=1), tmp_path_factory.mktemp("first") / "run")


def noisy(**more):
    """A run whose processes draw noise of their own."""
    return config("wpcgrad", model=ModelConfig("mlp", {"widths": [8], "dropout": 0.3}), ema=0.9, **more)


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def on_ranks(size, settings, out, patch=lambda rank: None, **options):
    """Train on some processes, as Fabric starts them but forked; returns their exit codes and what they printed.

    Args:
        patch: Called on each with its rank, before it trains.
    """
    port = free_port()
    out.parent.mkdir(parents=True, exist_ok=True)
    printed = [out.parent / f"{out.name}-{rank}.txt" for rank in range(size)]

    def work(rank):
        if size > 1:
            os.environ |= {"LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.dup2(os.open(printed[rank], os.O_CREAT | os.O_WRONLY | os.O_TRUNC), 2)
        sys.stderr = os.fdopen(2, "w", buffering=1)
        patch(rank)
        (settings or RunFolder(out).read_settings()).validate()
        chosen = RunConfig.from_dict({**(settings or RunFolder(out).read_settings()).as_dict(), "devices": size})
        train(chosen, out, **options)

    children = [kill.forked(lambda rank=rank: work(rank)) for rank in range(size)]
    codes = [kill.wait(child) for child in children]
    return codes, [path.read_text() for path in printed]


def succeed(size, settings, out, patch=lambda rank: None, **options):
    codes, printed = on_ranks(size, settings, out, patch, **options)
    assert codes == [0] * size, "\n".join(printed)
    return kill.final_state(out)


def alike(first, second):
    """Whether two final states are equal up to rounding, their random generators and numbers of processes aside."""
    for part in ("model", "optimizer", "average"):
        torch.testing.assert_close(first[part], second[part], rtol=1e-4, atol=1e-6)
    for name, metrics in first["progress"]["validation"].items():
        assert metrics == pytest.approx(second["progress"]["validation"][name], rel=1e-4)


def stopping(step, only=None):
    """A patch that sends a process SIGTERM once a step is done; all processes, or one of them."""

    def patch(rank):
        original = Trainer._log_step

        def log_step(self, info):
            original(self, info)
            if self.progress.step == step and only in {None, rank}:
                os.kill(os.getpid(), signal.SIGTERM)

        Trainer._log_step = log_step

    return patch


def comparing(rank):
    """A patch that lets processes check in the end that they hold the same, bit for bit."""
    original = Trainer._finish

    def finish(self):
        state = self.state_dict()
        held = {name: state[name] for name in ("model", "optimizer", "scheduler", "multitask", "average")}
        assert all(kill.same(held, other) for other in self.processes.gather(held))
        return original(self)

    Trainer._finish = finish


@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("gd", {"accumulate": 2, "ema": 0.9, "optimizer": OptimizerConfig(clip=1.0)}),
        ("wpcgrad", {}),
        ("connection_strength", {"model": ModelConfig("mlp", {"widths": [8]}, task_norms=False)}),
        ("task_groups", {"options": {"warmup": 3}, "data": DataConfig("digits", TINY, batch_size=16, workers=2)}),
    ],
)
def test_processes_give_the_numbers_of_one(tmp_path, method, more):
    settings = config(method, **more)
    one = succeed(1, settings, tmp_path / "1")
    for size in (2, 3) if method == "gd" else (2,):
        alike(one, succeed(size, settings, tmp_path / str(size), comparing))
        logged = [[row[:2] for row in kill.logged(tmp_path / name)] for name in ("1", str(size))]
        assert logged[0] == logged[1]
    results = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("1", "2")]
    for name, metrics in results[0]["test"].items():
        assert metrics == pytest.approx(results[1]["test"][name], rel=1e-4)


def test_stopped_on_two_processes_it_goes_on_with_one_four_and_two(tmp_path):
    straight = succeed(1, config(), tmp_path / "straight")
    out = tmp_path / "run"
    codes, _ = on_ranks(2, config(), out, stopping(2, only=1))
    assert codes == [130, 130]
    for step, size in enumerate((1, 4, 2), start=4):
        codes, printed = on_ranks(size, None, out, stopping(step), resume=True)
        assert codes == [130] * size, printed
        assert CheckpointFolder(out / "checkpoints").read_last()[1]["progress"]["step"] == step
    alike(straight, succeed(4, None, out, comparing, resume=True))


def test_resuming_on_as_many_processes_is_exact(tmp_path):
    """With dropout: each process goes on with its own noise; a new one gets the same noise whenever it joins at a step."""
    straight = succeed(2, noisy(), tmp_path / "straight", comparing)
    first, second = straight["random"]
    assert not torch.equal(first["torch"], second["torch"])
    out = tmp_path / "run"
    assert on_ranks(2, noisy(), out, stopping(4, only=0))[0] == [130, 130]
    again = succeed(2, None, out, comparing, resume=True)
    assert kill.same({**straight, "config": ""}, {**again, "config": ""})
    assert kill.logged(tmp_path / "straight") == kill.logged(out)
    half = CheckpointFolder(tmp_path / "straight" / "checkpoints").steps()[0]
    states = []
    for out in (tmp_path / "a", tmp_path / "b"):
        out.mkdir()
        states.append(succeed(3, noisy(), out, checkpoint=half))
    assert kill.same(*states)


def fails_at(name, owner, rank, number, error):
    """A patch that lets a function fail on one rank when it is called for the ``number``-th time."""

    def patch(own):
        original, calls = getattr(owner, name), []

        def replacement(*args, **options):
            calls.append(1)
            if own == rank and len(calls) == number:
                raise error
            return original(*args, **options)

        setattr(owner, name, replacement)

    return patch


@pytest.mark.parametrize(
    ("patch", "settings", "rank", "message"),
    [
        # The data set of one node can't be read: at the start, in training, in validation.
        (fails_at("load_problem", build, 1, 1, FileNotFoundError("no such disk")), config(), 1, "no such disk"),
        (fails_at("batch", TensorData, 1, 5, OSError("bad sector")), config(), 1, "OSError: bad sector"),
        (fails_at("batch", TensorData, 1, 1, OSError("bad sector")), config(), 1, "OSError: bad sector"),
        (fails_at("forward", evaluation.Network, 1, 3, ValueError("odd shape")), config(), 1, "ValueError: odd shape"),
        # Only the first process writes.
        (
            fails_at("save", CheckpointFolder, 0, 2, CheckpointError("No space")),
            config(),
            0,
            "CheckpointError: No space",
        ),
        (fails_at("write", RecordLog, 0, 1, OSError("log disk full")), config(), 0, "OSError: log disk full"),
        (fails_at("log_metrics", CsvLog, 0, 3, OSError("log disk full")), config(), 0, "OSError: log disk full"),
        (lambda rank: None, config(data=DataConfig("digits", TINY, batch_size=1)), 0, "at least the number of proc"),
    ],
)
def test_the_error_of_one_process_ends_all(tmp_path, patch, settings, rank, message):
    codes, printed = on_ranks(2, settings, tmp_path / "run", patch)
    assert codes == [1, 1]
    assert all(message in text for text in printed)
    assert "RankError" not in printed[rank]
    assert f"Rank {rank} failed, so the " in printed[1 - rank] or settings.data.batch_size == 1


def test_a_used_folder_is_refused_by_all(tmp_path):
    train(config(epochs=1), tmp_path / "run")
    codes, printed = on_ranks(2, config(epochs=1), tmp_path / "run")
    assert codes == [1, 1]
    assert "ConfigError: `" in printed[0]
    assert "Rank 0 failed, so the run ended on all ranks. ConfigError: `" in printed[1]
    assert "Add --resume" in printed[1]


def test_a_job_that_was_refused_a_folder_is_not_let_in_after_a_restart(tmp_path):
    folder = RunFolder(tmp_path)
    folder.write_claim(("mine", False))
    assert not folder.claimed_by(("other", True))
    assert folder.claimed_by(("mine", True))
    assert not folder.claimed_by(("mine", False))  # a new start of a job with the same name
    assert not folder.claimed_by(("mine", True))
    assert not folder.claimed_by(None)


def test_restarted_processes_agree_on_a_name_whatever_the_dead_left_behind():
    store = torch.distributed.HashStore()
    names = []
    for order in ((0, 1, 2), (2, 1, 0)):
        with ThreadPoolExecutor(3) as pool:
            jobs = [pool.submit(attempt_name, store, rank, 3) for rank in order]
            names.append({job.result() for job in jobs})
        store.set("rank 2 says", "I die before I get an answer")
    assert [len(each) for each in names] == [1, 1]
    assert names[0] != names[1]


@pytest.mark.parametrize(
    "kind", ["classification", "binary", "regression", "segmentation", "depth", "normals", "edges"]
)
def test_metrics_of_several_processes_are_those_of_one(kind):
    """Three processes saw 2, 1 and no batches; one saw them all. Of the labels of one batch there is none."""
    task = Task("t", kind, 3 if kind == "normals" else 1 if kind in {"depth", "edges"} else 2)
    generator = torch.Generator().manual_seed(0)
    batches = []
    for number in range(3):
        shape = (6, task.channels, 8, 8) if task.dense else (6, task.channels)
        prediction, target = torch.randn(shape, generator=generator), torch.rand(shape, generator=generator) + 0.5
        if kind in {"classification", "segmentation"}:
            target = (
                (target[:, 0] > 1).long() if number != 1 else torch.full_like(target[:, 0], task.ignore_index).long()
            )
        elif kind in {"binary", "edges"}:
            target = (target > 1).float() if number != 1 or kind == "edges" else target * float("nan")
        batches.append((prediction, target))
    shares = [batches, batches[::2], batches[1:2], []]
    measured = [{"t": Measures(task)} for _ in shares]
    for own, share in zip(measured, shares, strict=True):
        for prediction, target in share:
            own["t"].update(prediction, target)
    whole = merged_values(measured[0])["t"]
    assert merged_values(measured[1], [metric_states(m) for m in measured[2:]])["t"] == pytest.approx(whole, rel=1e-9)


# ---------------------------------------------------------------------- real launchers


def start(module, log):
    """Start a Python module with arguments, printing into a file."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with log.open("w") as file:
        return subprocess.Popen([sys.executable, "-m", *module], stdout=file, stderr=subprocess.STDOUT, env=environment)


def write_config(path, settings):
    path.write_text(json.dumps(settings.as_dict()))  # JSON is YAML
    return ["--config", str(path)]


def until(done, process, log):
    while not done():
        assert process.poll() is None, log.read_text()
        time.sleep(0.02)


def worker(process, rank):
    """The process of a rank among the children of torchrun."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return next(int(n) for n in children if f"\0RANK={rank}\0" in Path(f"/proc/{n}/environ").read_text())


def steps_done(out):
    return max((step for step, _, _ in kill.logged(out)), default=0)


LONG = {"epochs": 100, "checkpoint_every": 2, "keep": 1000}


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the workers in /proc")
@pytest.mark.slow
def test_torchrun_restarts_after_a_kill_and_saves_when_asked_to_stop(tmp_path):
    settings, out, log = noisy(**LONG), tmp_path / "run", tmp_path / "log"
    launcher = ["torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "2", "--master-port", free_port()]
    arguments = ["-m", "torchmto", "train", *write_config(tmp_path / "c", settings), "--out", str(out)]
    process = start([*launcher, *arguments], log)
    with ended(process):
        until(lambda: steps_done(out) >= 9, process, log)
        os.kill(worker(process, 1), signal.SIGKILL)
        until(lambda: " steps.\n" in log.read_text(), process, log)
        resumed = int(re.search(r"Restarted by torchrun.\nGoing on from .*, (\d+) steps", log.read_text())[1])
        until(lambda: steps_done(out) >= resumed + 7, process, log)
        process.terminate()
        assert process.wait() != 0
    assert "torchrun --nproc-per-node 2 -m torchmto train --resume --out=" in log.read_text()
    straight = tmp_path / "straight"
    stopped = CheckpointFolder(out / "checkpoints").read_last()[1]
    assert resumed + 7 <= stopped["progress"]["step"]
    step = stopped["progress"]["step"]
    on_ranks(2, settings, straight, stopping(step))
    calm = CheckpointFolder(straight / "checkpoints").read_last()[1]
    for state in (calm, stopped):
        state["config"] = ""
        state["progress"] |= {"seconds": 0, "wait_seconds": 0}
        for entry in state["progress"]["history"]:
            entry["seconds"] = 0
    assert kill.same(calm, stopped)
    assert kill.logged(straight) == kill.logged(out)


def test_messages_come_again_after_a_launch_that_fails():
    def launch():
        raise RuntimeError("no port")

    before = logging.root.manager.disable
    with pytest.raises(RuntimeError, match="no port"):
        _launch(SimpleNamespace(launch=launch))
    assert logging.root.manager.disable == before


@pytest.mark.slow
def test_fabric_starts_the_processes_and_one_signal_stops_them(tmp_path):
    settings, out, log = noisy(**LONG, devices=2), tmp_path / "run", tmp_path / "log"
    arguments = ["train", *write_config(tmp_path / "c", settings), "--out", str(out)]
    process = start(["torchmto", *arguments], log)
    with ended(process):
        until(lambda: steps_done(out) >= 5, process, log)
        process.terminate()  # one of the two: the other hears of it from the first
        assert process.wait() == 130, log.read_text()
    assert log.read_text().count("torchmto train --resume --out=") == 1
    state = CheckpointFolder(out / "checkpoints").read_last()[1]
    assert len(state["random"]) == 2
    assert state["progress"]["step"] >= 5


@contextlib.contextmanager
def ended(process):
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(300)
        except subprocess.TimeoutExpired:  # a failing test mustn't leave a process behind
            process.kill()
