"""Lets one of several gloo processes fail at a random place of a step and checks that all of them end it together.

    python benchmarks/fuzz_ranks.py --cases 500 --processes 2
    python benchmarks/fuzz_ranks.py --seed 17 --processes 4     # replay one finding

A case is a good step, a step in which one process has a fault, and a good step. The fault: a closure that raises at its
n-th call, a hook that raises at the n-th backward, NaN, no labels, or an error at the n-th message that this process sends.
What must hold: nobody waits longer than the time limit; either all processes raise or none does; afterwards all have the same
weights; and the step after it is taken by all.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor, nn

import torchmto
from torchmto.gradients import Ranks

TASKS = ("a", "b", "c")
FAULTS = ("closure", "interrupt", "backward", "nan", "no labels", "message", "unknown task")
MESSAGES = ("sum_", "max_", "objects", "sum_all_")
SECONDS = 20


class FaultError(Exception):
    """What fails here."""


class Fault:
    """What goes wrong on one process, while it is armed.

    Args:
        kind: One of ``FAULTS``; "" on the other processes.
        place: At which call, from 0.
    """

    def __init__(self, kind: str, place: int) -> None:
        self.kind, self.place, self.armed = kind, place, False

    def at(self, kind: str) -> None:
        """A place where a fault of this kind may be."""
        if self.armed and self.kind == kind:
            self.place -= 1
            if self.place < 0:
                self.armed = False
                raise KeyboardInterrupt if kind == "interrupt" else FaultError(kind)


def hooked(gradient: Tensor, fault: Fault) -> Tensor:
    fault.at("backward")
    return gradient


def closure_for(model: nn.ModuleDict, seed: int, fault: Fault) -> Any:
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(seed))

    def closure(tasks: Sequence[str]) -> dict[str, Tensor]:
        fault.at("closure")
        fault.at("interrupt")
        features = model["trunk"](x)
        if features.requires_grad:
            features.register_hook(lambda gradient: hooked(gradient, fault))
        heads: Any = model["heads"]
        losses = {t: (heads[t](features) - i * x[:, :1]).square().mean() for i, t in enumerate(TASKS) if t in tasks}
        if fault.armed and fault.kind == "nan":
            losses = {task: loss * float("nan") for task, loss in losses.items()}
        if fault.armed and fault.kind == "unknown task":
            losses["zzz"] = features.sum()
        return {} if fault.armed and fault.kind == "no labels" else losses

    return closure


def case(seed: int, rank: int, size: int, methods: Sequence[str], fault: Fault) -> list[Any]:
    """Three steps; returns what came of each: the error's kind and the weights afterwards."""
    draw = random.Random(seed)
    name = methods[seed % len(methods)]
    torch.manual_seed(seed)
    arguments = {"weights": [1.0, 2.0, 3.0]} if name in ("constant", "static") else {}
    method = torchmto.make_method(name, **arguments)
    heads = nn.ModuleDict({task: nn.Linear(5, 1) for task in TASKS})
    model = nn.ModuleDict({"trunk": nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh()), "heads": heads})
    mt = torchmto.MultiTask(
        model,
        torch.optim.Adam(model.parameters(), lr=0.01),
        tasks=TASKS,
        method=method,
        seed=1,
        gradients=draw.choice(("auto", "layerwise")) if isinstance(method, torchmto.GramianWeighting) else "auto",
    )
    who, kind, micro = draw.randrange(size), draw.choice(FAULTS), draw.choice((1, 1, 2))
    fault.kind, fault.place = (kind if rank == who else ""), draw.choice((0, 0, 1, 2, 4, 8))
    seen = []
    for number in range(3):
        fault.armed = number == 1
        batches = [closure_for(model, seed + 10 * number + rank + 100 * i, fault) for i in range(micro)]
        try:
            info = mt.step(batches if micro > 1 else batches[0])
            end = "skipped" if info.skipped else "done"
        except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001  all kinds are compared
            end = f"{type(error).__name__}: {error}"
        fault.armed = False
        seen.append((end, [round(float(p.detach().double().sum()), 9) for p in model.parameters()]))
    return [name, kind, seen]


def judge(everywhere: Sequence[list[Any]]) -> str:
    """What is wrong with a case, "" if nothing."""
    steps = [seen for _, _, seen in everywhere]
    for number in range(3):
        ends = [seen[number][0] for seen in steps]
        raised = [": " in end for end in ends]
        if any(raised) != all(raised):
            return f"step {number}: not all have raised: {ends}"
        if number != 1 and any(raised):
            return f"step {number}: {ends}"
        if len({str(seen[number][1]) for seen in steps}) > 1:
            return f"step {number}: the weights differ: {ends}"
        if any("Timed out" in end or "Connection" in end for end in ends):
            return f"step {number}: {ends}"
    return ""


def work(rank: int, size: int, folder: str, seeds: Sequence[int]) -> None:
    """All cases in one process group; the results of rank 0 go to a file, one line per case."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    limit = timedelta(seconds=SECONDS)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size, timeout=limit)
    check = dist.new_group(list(range(size)), timeout=3 * limit)
    methods, fault = torchmto.methods(), Fault("", 0)
    for name in MESSAGES:
        original = getattr(Ranks, name)

        def sent(self: Ranks, *arguments: Any, _original: Any = original, **options: Any) -> Any:
            fault.at("message")
            return _original(self, *arguments, **options)

        setattr(Ranks, name, sent)
    with Path(folder, "out").open("a") as out:
        for seed in seeds:
            if rank == 0:
                print(seed, end="\t", flush=True, file=out)
            everywhere: list[Any] = [None] * size
            dist.all_gather_object(everywhere, case(seed, rank, size, methods, fault), group=check)
            if rank == 0:
                name, kind, _ = everywhere[0]
                wrong = judge(everywhere)
                print(f"{name}, {kind}\t{wrong!r}", flush=True, file=out)
            wrong = judge(everywhere)
            if wrong and rank == 0:
                # The group may be out of step. Nobody leaves before rank 0, which writes.
                sys.exit(1)
            if wrong:
                with contextlib.suppress(RuntimeError):
                    dist.barrier(check)
                sys.exit(1)
    dist.destroy_process_group()


def run(seeds: Sequence[int], size: int) -> tuple[Counter[str], list[str]]:
    """All cases, with new processes after each finding; returns counts and findings."""
    ends: Counter[str] = Counter()
    findings = []
    left = list(seeds)
    while left:
        with tempfile.TemporaryDirectory() as folder:
            context = torch.multiprocessing.get_context("spawn")
            processes = [context.Process(target=work, args=(rank, size, folder, left)) for rank in range(size)]
            for process in processes:
                process.start()
            for process in processes:
                process.join()
            lines = Path(folder, "out").read_text().splitlines()
        if not lines:
            raise RuntimeError("The processes died before the first case.")
        for line in lines:
            seed, about, wrong = (*line.split("\t"), "'the processes died'")[:3]
            ends["cases"] += 1
            if wrong != "''":
                findings.append(f"--seed {seed} --processes {size} ({about}): {wrong}")
        left = left[len(lines) :]
    return ends, findings


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=500)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--start", type=int, default=0, help="the first seed")
    parser.add_argument("--seed", type=int, help="replay this one")
    arguments = parser.parse_args()
    seeds = range(arguments.start, arguments.start + arguments.cases)
    ends, findings = run([arguments.seed] if arguments.seed is not None else seeds, arguments.processes)
    print(*findings, sep="\n")
    print(f"{dict(ends)}; {len(findings)} findings")
    return int(bool(findings))


if __name__ == "__main__":
    sys.exit(main())
