"""Kills a training with SIGKILL at random moments, resumes it each time, and checks that nothing was lost.

    python benchmarks/kill_training.py --kills 50
    python benchmarks/kill_training.py --kills 20 --processes 2

With several processes torchrun starts them, a random one is killed, and torchrun restarts them all.

After every kill: the latest checkpoint is whole, it is at most one checkpoint interval behind what the log shows was done,
and every file that looks like a checkpoint loads. At the end: the weights and the logged losses equal those of a run that
nobody killed, bit for bit.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from torchmto.lab.run.checkpoint import CheckpointFolder, read_checkpoint
from torchmto.lab.run.config import DataConfig, MethodConfig, ModelConfig, OptimizerConfig, RunConfig
from torchmto.lab.run.loop import Interrupted
from torchmto.lab.run.single import train

INTERVAL = 3


def settings(method: str = "wpcgrad", epochs: int = 4, **more: Any) -> RunConfig:
    """A run of a few seconds that uses everything that has to be saved."""
    return RunConfig(
        data=DataConfig("digits", {"train": 192, "validation": 32, "test": 32}, batch_size=16, workers=0),
        model=ModelConfig("mlp", {"widths": [32], "dropout": 0.2}),
        method=MethodConfig(method),
        optimizer=OptimizerConfig(schedule="cosine", clip=5.0),
        epochs=epochs,
        ema=0.9,
        checkpoint_every=INTERVAL,
        loggers=["csv"],
        log_every=1,
        **more,
    )


def forked(work: Callable[[], object]) -> int:
    """Start a process that does some work; returns its number. Its exit code is 130 if it was interrupted."""
    number = os.fork()
    if number:
        return number
    code = 1
    try:
        work()
        code = 0
    except Interrupted:
        code = 130
    except BaseException:  # noqa: BLE001  the child must not go on as if it were the parent
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(number: int) -> int:
    """The exit code of a process; negative: the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])


def check_after_kill(out: Path) -> int:
    """Check what a killed run left behind; returns the step it can go on from, 0 if it has to start again."""
    checkpoints = CheckpointFolder(out / "checkpoints")
    steps = checkpoints.steps()
    for path in [*steps, checkpoints.best]:
        if path.exists():
            read_checkpoint(path)  # raises unless it is whole
    saved = int(steps[-1].stem.removeprefix("step-")) if steps else 0
    done = max((step for step, _, _ in logged(out)), default=0)
    assert done - saved <= INTERVAL, f"{done} steps were done, {saved} saved"
    return saved


def logged(out: Path) -> list[tuple[int, str, float]]:
    """The rows of metrics.csv, without a last one that a kill cut off."""
    path = out / "metrics.csv"
    if not path.exists():
        return []
    with path.open(newline="") as file:
        rows = list(csv.reader(file))[1:]
    return [(int(row[0]), row[1], float(row[2])) for row in rows if len(row) == 3 and row[2]]


def same(first: object, second: object) -> bool:
    """Whether two states are equal bit for bit."""
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple) and isinstance(second, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


def final_state(out: Path) -> dict[str, Any]:
    """The last checkpoint without what may differ: timings."""
    _, state = CheckpointFolder(out / "checkpoints").read_last()
    for timing in ("seconds", "wait_seconds"):
        state["progress"].pop(timing)
    for epoch in state["progress"]["history"]:
        epoch.pop("seconds")
    return state


def stress(folder: Path, kills: int, seed: int, config: RunConfig | None = None) -> dict[str, float]:
    """Train once in peace and once under fire, and compare.

    Args:
        folder: Where both runs go.
        kills: How many times to kill.
        seed: Of the moments.
        config: The settings; by default those of `settings`.

    Returns:
        How many kills there were and the median step they hit.
    """
    config = config or settings()
    draws = random.Random(seed)
    calm = folder / "calm"
    began = time.monotonic()
    assert wait(forked(lambda: train(config, calm))) == 0
    length = time.monotonic() - began
    hits: list[int] = []
    attempt = 0
    while len(hits) < kills:
        out = folder / f"killed-{attempt}"
        attempt += 1
        finished = False
        while not finished:
            child = forked(lambda out=out: train(config, out, resume=out.exists()))  # type: ignore[misc]
            if len(hits) < kills:
                # Mostly in the loop, sometimes while it is being set up.
                time.sleep(draws.uniform(0.02, 0.6) * length)
                os.kill(child, signal.SIGKILL)
            code = wait(child)
            if code == -signal.SIGKILL:
                hits.append(check_after_kill(out))
            else:
                assert code == 0, f"resuming failed with {code}"
                finished = True
        check_equal(calm, out)
    return {"kills": len(hits), "median_step": float(sorted(hits)[len(hits) // 2]), "runs": attempt}


def torchrun(config: Path, out: Path, processes: int, restarts: int) -> subprocess.Popen[bytes]:
    """Start a training on several processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [
        "torch.distributed.run",
        "--nproc-per-node",
        processes,
        "--max-restarts",
        restarts,
        "--master-port",
        port,
    ]
    command = [*launcher, "-m", "torchmto", "train", "--config", config, "--out", out]
    with out.with_suffix(".log").open("w") as log:
        return subprocess.Popen([sys.executable, "-m", *map(str, command)], stdout=log, stderr=log)


def children(process: subprocess.Popen[bytes]) -> list[int]:
    """The workers of a running torchrun."""
    path = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return [int(number) for number in path.read_text().split()] if process.poll() is None else []


def starts(out: Path) -> int:
    """How often the workers began to train."""
    path = out / "environment.json"
    return len(json.loads(path.read_text())) if path.exists() else 0


def stress_ranks(folder: Path, kills: int, seed: int, processes: int) -> dict[str, float]:
    """Train on several processes, once in peace and once with workers being killed, and compare.

    Args:
        folder: Where both runs go.
        kills: How many times to kill a worker.
        seed: Of the moments and the victims.
        processes: Number of workers.

    Returns:
        How many kills there were, and the median step they hit.
    """
    draws = random.Random(seed)
    config = folder / "config.yaml"
    config.write_text(json.dumps(settings(epochs=max(4, kills)).as_dict()))
    calm, out = folder / "calm", folder / "killed"
    assert torchrun(config, calm, processes, 0).wait() == 0
    process = torchrun(config, out, processes, kills)
    hits: list[int] = []
    while len(hits) < kills and process.poll() is None:
        begun = starts(out)
        # One in four while they start, the others a few steps later.
        early, more = draws.random() < 0.25, draws.randint(0, 12)
        if early:
            time.sleep(draws.uniform(0, 5))
        else:
            while process.poll() is None and starts(out) == begun:
                time.sleep(0.01)
            step = max((step for step, _, _ in logged(out)), default=0)
            while process.poll() is None and max((s for s, _, _ in logged(out)), default=0) < step + more:
                time.sleep(0.01)
        workers = children(process)
        if workers:
            os.kill(draws.choice(workers), signal.SIGKILL)
            while any(number in workers for number in children(process)):
                time.sleep(0.01)
            hits.append(check_after_kill(out))
    assert process.wait() == 0, out.with_suffix(".log").read_text()
    check_equal(calm, out)
    return {"kills": len(hits), "median_step": float(sorted(hits)[len(hits) // 2])}


def check_equal(calm: Path, out: Path) -> None:
    """Check that a run which was killed ended as one in peace did."""
    assert same(final_state(calm), final_state(out)), "the resumed run differs from the calm one"
    assert logged(calm) == logged(out), f"the logs differ: {set(logged(calm)) ^ set(logged(out))}"
    one, other = (json.loads((path / "results.json").read_text()) for path in (calm, out))
    assert one["test"] == other["test"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        if arguments.processes == 1:
            print(stress(Path(name), arguments.kills, arguments.seed))
        else:
            print(stress_ranks(Path(name), arguments.kills, arguments.seed, arguments.processes))
