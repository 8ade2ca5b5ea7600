"""Lets one of several gloo processes fail at a random place of a step and checks that all of them end it together.

    python benchmarks/fuzz_ranks.py --cases 500 --processes 2
    python benchmarks/fuzz_ranks.py --seed 17 --processes 4     # replay one finding

A case is a good step, a step in which one process has a fault, and a good step. The fault: a closure that raises at its
n-th call, a hook that raises at the n-th backward, NaN, no labels, or an error in the n-th message that this process sends.
What must hold: nobody waits longer than the time limit; either all processes raise or none does; afterwards all have the same
weights; and the step after it is taken by all. After an error in a message, though, nobody takes a step; and if the message was
sent before the error, the others may have ended theirs.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor, nn

import torchmto

TASKS = ("a", "b", "c")
FAULTS = ("closure", "interrupt", "backward", "nan", "no labels", "message", "unknown task")
MESSAGES = ("all_reduce", "all_gather_object")
SECONDS = 5
"""How long the processes wait for one another in a step: all of it where a message has failed."""


class FaultError(Exception):
    """What fails here."""


class Fault:
    """What goes wrong on one process, while it is armed.

    Args:
        kind: One of ``FAULTS``; "" on the other processes.
        place: At which call, from 0.
        interrupt: Whether what is raised is Ctrl-C.
        late: Whether a message fails only after it was sent.
        fired: Whether it has been raised.
    """

    def __init__(self, kind: str = "", place: int = 0, *, interrupt: bool = False, late: bool = False) -> None:
        self.kind, self.place, self.interrupt, self.late = kind, place, interrupt, late
        self.armed = self.fired = False

    def at(self, kind: str) -> None:
        """A place where a fault of this kind may be."""
        if self.armed and self.kind == kind:
            self.place -= 1
            if self.place < 0:
                self.armed, self.fired = False, True
                raise KeyboardInterrupt if self.interrupt else FaultError(kind)


FAULT_OF: dict[Any, Fault] = {}
"""Process group -> what goes wrong on it."""


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


def failing(original: Callable[..., Any]) -> Callable[..., Any]:
    """A collective that may fail on the group that trains."""

    def sent(*arguments: Any, group: Any = None, **options: Any) -> Any:
        fault = FAULT_OF.get(group, Fault())
        if not fault.late:
            fault.at("message")
        result = original(*arguments, group=group, **options)
        if fault.late:
            fault.at("message")
        return result

    return sent


def case(seed: int, rank: int, size: int, methods: Sequence[str], group: Any) -> list[Any]:
    """Three steps; returns what came of each, the error's kind and the weights afterwards, and whether a message has failed."""
    draw = random.Random(seed)
    name = methods[seed % len(methods)]
    torch.manual_seed(seed)
    arguments = {"weights": [1.0, 2.0, 3.0]} if name in ("constant", "static") else {}
    method = torchmto.make_method(name, **arguments)
    heads = nn.ModuleDict({task: nn.Linear(5, 1) for task in TASKS})
    model = nn.ModuleDict({"trunk": nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh()), "heads": heads})
    engine = draw.choice(("auto", "layerwise")) if isinstance(method, torchmto.GramianWeighting) else "auto"
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    options: Any = {"tasks": TASKS, "method": method, "seed": 1, "process_group": group}
    try:
        mt = torchmto.MultiTask(model, optimizer, gradients=engine, **options)
    except ValueError:
        # Some methods need rows.
        mt = torchmto.MultiTask(model, optimizer, **options)
    who, kind, micro = draw.randrange(size), draw.choice(FAULTS), draw.choice((1, 1, 2))
    place, interrupt, late = draw.choice((0, 0, 1, 2, 4, 8)), draw.random() < 0.5, draw.random() < 0.3
    fault = Fault(kind if rank == who else "", place, interrupt=interrupt or kind == "interrupt", late=late)
    FAULT_OF[group] = fault
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
    return [name, kind, seen, fault.fired and kind == "message", late]


def judge(everywhere: Sequence[list[Any]]) -> str:
    """What is wrong with a case, "" if nothing."""
    steps = [seen for _, _, seen, *_ in everywhere]
    lost = [lost for _, _, _, lost, _ in everywhere]
    for number in range(3):
        ends = [seen[number][0] for seen in steps]
        raised = [": " in end for end in ends]
        if any(lost) and number == 2:
            return "" if all(raised) else f"step {number}: taken after a lost message: {ends}"
        late = everywhere[0][-1]
        if any(lost) and number == 1 and late and raised[lost.index(True)]:
            continue
        if any(raised) != all(raised):
            return f"step {number}: not all have raised: {ends}"
        if number != 1 and any(raised):
            return f"step {number}: {ends}"
        if len({str(seen[number][1]) for seen in steps}) > 1:
            return f"step {number}: the weights differ: {ends}"
        if not any(lost) and any("Timed out" in end or "Connection" in end for end in ends):
            return f"step {number}: {ends}"
    return ""


def work(rank: int, size: int, folder: str, seeds: Sequence[int]) -> None:
    """All cases in one process group; the results of rank 0 go to a file, one line per case."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    limit = timedelta(seconds=SECONDS)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size, timeout=limit)
    check = dist.new_group(list(range(size)), timeout=20 * limit)
    group, methods = dist.new_group(list(range(size)), timeout=limit), torchmto.methods()
    for name in MESSAGES:
        setattr(dist, name, failing(getattr(dist, name)))
    with Path(folder, "out").open("a") as out:
        for seed in seeds:
            if rank == 0:
                print(seed, end="\t", flush=True, file=out)
            everywhere: list[Any] = [None] * size
            dist.all_gather_object(everywhere, case(seed, rank, size, methods, group), group=check)
            wrong = judge(everywhere)
            if rank == 0:
                name, kind, *_ = everywhere[0]
                print(f"{name}, {kind}\t{wrong!r}", flush=True, file=out)
            if wrong:
                # The group may be out of step. Nobody leaves before rank 0, which writes.
                dist.barrier(check)
                sys.exit(1)
            if any(lost for _, _, _, lost, _ in everywhere):
                FAULT_OF.clear()
                dist.destroy_process_group(group)
                group = dist.new_group(list(range(size)), timeout=limit)
    dist.destroy_process_group()


def run(seeds: Sequence[int], size: int) -> tuple[Counter[str], list[str]]:
    """All cases, with new processes after each finding, which is printed at once; returns counts and findings."""
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
            codes = [process.exitcode for process in processes]
            out = Path(folder, "out")
            lines = out.read_text().splitlines() if out.exists() else []
        for line in lines or [f"{left[0]}\t"]:
            seed, about, wrong = (*line.split("\t"), f"the processes died with {codes}")[:3]
            ends["cases"] += 1
            if wrong != "''":
                findings.append(f"--seed {seed} --processes {size} ({about}): {wrong}")
                print(findings[-1], flush=True)
        left = left[max(1, len(lines)) :]
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
    print(f"{dict(ends)}; {len(findings)} findings")
    return int(bool(findings))


if __name__ == "__main__":
    sys.exit(main())
