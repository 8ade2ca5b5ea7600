"""Takes very many steps of every method on a tiny network and looks for what builds up.

    python benchmarks/long_runs.py --steps 20000
    python benchmarks/long_runs.py --steps 20000 --methods pcgrad,uw --once

What must hold for every method: all parameters stay finite; losses end lower than they began; from the first quarter to the
end neither the method's state, nor Python's objects, nor the resident memory grow; a second process, started afresh, ends with
the same parameters and state to the bit; after `SHORT` steps bfloat16 and float16 (autocast, float16 with a scaler) are near
float32 (`NEAR`).
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import hashlib
import json
import math
import os
import subprocess
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import sklearn.cluster  # noqa: F401  imported at a method's first need, it would look like growth
import torch
from torch import Tensor, nn

import torchmto

TASKS = ("a", "b", "c")
WINDOW = 50
"""Steps between ends of a window, and how many steps' losses are averaged."""
OBJECTS, MEGABYTES = 300, 4.0
"""How much may be gained: caches fill late."""
SHORT = 200
NEAR = {"bfloat16": 0.1, "float16": 0.02}
"""How far the mean loss may end from float32's, as a share of it."""


def start(name: str, precision: str) -> tuple[nn.ModuleDict, torchmto.MultiTask]:
    """A tiny network and its MultiTask."""
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh())
    model = nn.ModuleDict({"trunk": trunk, **{task: nn.Linear(8, 1) for task in TASKS}})
    arguments = {"weights": [1.0, 2.0, 0.5]} if name in ("constant", "static") else {}
    mt = torchmto.MultiTask(
        model,
        torch.optim.SGD(model.parameters(), lr=0.01),
        tasks=TASKS,
        method=torchmto.make_method(name, **arguments),
        scaler=torch.amp.GradScaler("cpu", init_scale=1024.0) if precision == "float16" else None,
        seed=0,
    )
    return model, mt


def size(state: object) -> int:
    """How many numbers and other leaves a state has."""
    if isinstance(state, Tensor):
        return state.numel()
    if isinstance(state, Mapping):
        return sum(map(size, state.values())) + len(state)
    return sum(map(size, state)) + len(state) if isinstance(state, list | tuple | set) else 1


def in_use(mt: torchmto.MultiTask) -> dict[str, float]:
    """What must not grow."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1]) if sys.platform == "linux" else 0
    megabytes = pages * os.sysconf("SC_PAGE_SIZE") / 2**20
    return {"state": size(mt.state_dict()), "objects": len(gc.get_objects()), "megabytes": megabytes}


def run(name: str, steps: int, precision: str = "float32") -> dict[str, Any]:
    """One long run; returns its end in figures, and where it stopped being finite, if it did."""
    # What was there before needn't be looked at.
    gc.freeze()
    model, mt = start(name, precision)
    generator = torch.Generator().manual_seed(1)
    dtype = getattr(torch, precision)
    cast = contextlib.nullcontext() if precision == "float32" else torch.autocast("cpu", dtype)
    means: list[float] = []
    early: dict[str, float] = {}
    for step in range(steps):
        x = torch.randn(8, 6, generator=generator)
        noise = 0.3 * torch.randn(3, 8, generator=generator)

        def losses(tasks: Sequence[str], x: Tensor = x, noise: Tensor = noise) -> dict[str, Tensor]:
            with cast:
                features = model["trunk"](x)
                outputs = {task: model[task](features)[:, 0].float() for task in tasks}
            targets = {task: (1 + i) * x[:, i] + noise[i] for i, task in enumerate(TASKS)}
            return {task: (output - targets[task]).square().mean() for task, output in outputs.items()}

        info = mt.step(losses)
        if step < WINDOW or step >= steps - WINDOW:
            means.append(sum(float(loss) for loss in info.losses.values()) / len(TASKS))
        if step % WINDOW == WINDOW - 1:
            mt.end_window()
            if not all(bool(p.isfinite().all()) for p in model.parameters()):
                return {"finding": f"not finite by step {step}"}
        if step == steps // 4:
            early = in_use(mt)
    late, digest = in_use(mt), hashlib.sha256()
    for tensor in model.state_dict().values():
        digest.update(tensor.numpy().tobytes())
    digest.update(repr(mt.state_dict()).encode())
    gc.unfreeze()
    half = len(means) // 2
    ends = {"first": math.fsum(means[:half]) / half, "last": math.fsum(means[half:]) / half}
    return {**ends, "digest": digest.hexdigest(), "gained": {key: late[key] - early[key] for key in late}}


def judge(result: Mapping[str, Any]) -> str:
    """What is wrong with a run in float32, "" if nothing."""
    if "finding" in result:
        return str(result["finding"])
    gained = result["gained"]
    if gained["state"] > 0 or gained["objects"] > OBJECTS or gained["megabytes"] > MEGABYTES:
        return f"it grows: {gained}"
    return "" if result["last"] < result["first"] else f"losses went from {result['first']:.3g} to {result['last']:.3g}"


def compare(result: Mapping[str, Any], other: Mapping[str, Any], precision: str) -> str:
    """What is wrong with a run in lower precision, "" if nothing."""
    if "finding" in other:
        return f"{precision}: {other['finding']}"
    away = abs(other["last"] / result["last"] - 1)
    return "" if away <= NEAR[precision] else f"{precision}: the mean loss is {away:.1%} away from float32's"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--methods", default=",".join(torchmto.methods()), metavar="A,B")
    parser.add_argument(
        "--once", action="store_true", help="float32 alone, and no second process: one line of JSON each"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    names = arguments.methods.split(",")
    if arguments.once:
        for name in names:
            print(json.dumps([name, run(name, arguments.steps)]), flush=True)
        return 0
    command = [sys.executable, __file__, "--once", "--steps", str(arguments.steps), "--methods", arguments.methods]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as second:
        assert second.stdout is not None
        findings = 0
        for name in names:
            result, again = run(name, arguments.steps), json.loads(second.stdout.readline())[1]
            wrong = [judge(result), "" if result["digest"] == again["digest"] else "another process ends elsewhere"]
            short = run(name, SHORT)
            wrong += [compare(short, run(name, SHORT, precision), precision) for precision in NEAR]
            findings += any(wrong)
            print(f"{name}: {'; '.join(filter(None, wrong)) or result}", flush=True)
    print(f"{len(names)} methods, {arguments.steps} steps each; {findings} with findings")
    return int(findings > 0)


if __name__ == "__main__":
    sys.exit(main())
