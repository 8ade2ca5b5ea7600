"""Interleaved step times, and peak memory in a fresh process per contestant."""

import copy
import random
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from statistics import median, quantiles
from typing import Any

import torch

from torchmto.lab.bench.cases import make_case
from torchmto.lab.bench.contestants import Bound, Contestant, bound_of, make_contestant
from torchmto.lab.memory import PeakMemory, tensor_peak

REFERENCES = ("gd*", "lb*", "lbm*")


@dataclass
class Measurement:
    """What was measured for one contestant on one case.

    Ratios are medians over rounds of the contestant's time to the reference's in the same round, so that a slow spell of
    the machine hits both. Times are those of one step, the average over its cycle for a method that has one.

    Attributes:
        model: The case.
        num_tasks: K.
        num_shared: P.
        name: The contestant.
        bound: The hand-written step it has to meet.
        seconds: Median step time.
        iqr: Distance of the quartiles of the step times.
        ratios: Reference -> median ratio.
        ratio_iqr: Distance of the quartiles of the ratios to ``bound``.
        num_updates: Optimizer steps per step: more than one for procedures (the last round's number).
        peak_bytes: Peak memory above model and batch; None if not measured.
        tensor_bytes: The same of the tensors alone, where ``peak_bytes`` is the process's (on the CPU).
        failed: The error that ended it, or empty.
    """

    model: str
    num_tasks: int
    num_shared: int
    name: str
    bound: str
    seconds: float | None = None
    iqr: float | None = None
    ratios: dict[str, float] | None = None
    ratio_iqr: float | None = None
    num_updates: int | None = None
    peak_bytes: int | None = None
    tensor_bytes: int | None = None
    failed: str = ""


def _clock(device: str, kind: str) -> float:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return time.process_time() if kind == "cpu" else time.perf_counter()


def _spread(values: Sequence[float]) -> float:
    if len(values) < 2:
        return 0.0
    low, _, high = quantiles(values, n=4)
    return high - low


def measure_times(
    model: str,
    num_tasks: int,
    names: Sequence[str],
    *,
    repeats: int,
    device: str = "cpu",
    clock: str = "wall",
    room: float = 4e9,
    tick: Callable[[str], None] = lambda _: None,
) -> list[Measurement]:
    """Time contestants in rounds: in every round each takes one step, the references too.

    Contestants whose gradient matrices together might need more than ``room`` bytes are timed in several such runs, each
    with the references again. The clock is "wall", or "cpu": the process's own processor time, which says more on one
    thread of a machine that has other work.
    """
    num_shared = make_case(model, num_tasks, device).num_shared
    size = min(12, max(1, int(room / (4 * num_tasks * num_shared)) - 1))
    wanted = [name for name in dict.fromkeys(names) if name not in REFERENCES]
    results: list[Measurement] = []
    for start in range(0, max(len(wanted), 1), size):
        batch = wanted[start : start + size]
        results += _rounds(model, num_tasks, batch, repeats, device=device, clock=clock, tick=tick, first=not results)
    return results


def _rounds(
    model: str,
    num_tasks: int,
    names: list[str],
    repeats: int,
    *,
    device: str,
    clock: str,
    tick: Callable[[str], None],
    first: bool,
) -> list[Measurement]:
    case = make_case(model, num_tasks, device)
    bounds = {name: bound_of(name, num_tasks) for name in names}
    needed = list(dict.fromkeys([*REFERENCES, *(part for bound in bounds.values() for part, _ in bound.parts)]))
    bounds.update({name: bound_of(name, num_tasks) for name in needed})
    contestants: dict[str, Contestant] = {}
    failed: dict[str, str] = {}
    for name in [*needed, *names]:
        tick(f"{model} K={num_tasks} {name}")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                # Task-specific norms and hooks on modules change the trunk; the others may share it.
                alone = name.startswith(("connection_strength", "torchjd-gramian"))
                contestant = make_contestant(name, copy.deepcopy(case) if alone else case)
                contestant.run()
                contestant.run()
            contestants[name] = contestant
        except Exception as error:  # noqa: BLE001  one contestant's failure mustn't end the run
            failed[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    times: dict[str, list[float]] = {name: [] for name in contestants}
    updates: dict[str, list[int]] = {name: [] for name in contestants}
    # Drawn anew in every round, as a step leaves the next one a warmer or colder cache.
    order, shuffle = list(contestants), random.Random(0).shuffle  # noqa: S311  no secret
    for number in range(repeats):
        tick(f"{model} K={num_tasks} round {number + 1}/{repeats}")
        shuffle(order)
        for name in order:
            contestant = contestants[name]
            start = _clock(device, clock)
            updates[name].append(contestant.run())
            times[name].append((_clock(device, clock) - start) / contestant.num_steps)
    results = []
    for name in names if not first else [*needed, *names]:
        result = Measurement(model, num_tasks, case.num_shared, name, bounds[name].name, failed=failed.get(name, ""))
        if name in contestants:
            _evaluate(result, bounds[name], times, updates[name])
        results.append(result)
    return results


def _evaluate(result: Measurement, bound: Bound, times: dict[str, list[float]], updates: list[int]) -> None:
    own = times[result.name]
    references = {name: times[name] for name in REFERENCES if name in times}
    if all(part in times for part, _ in bound.parts):
        references[bound.name] = [
            sum(times[part][i] * factor for part, factor in bound.parts) * (updates[i] if bound.per_update else 1)
            for i in range(len(own))
        ]
    ratios = {name: [a / b for a, b in zip(own, values, strict=True)] for name, values in references.items()}
    result.seconds, result.iqr = median(own), _spread(own)
    result.ratios = {name: median(values) for name, values in ratios.items()}
    result.ratio_iqr = _spread(ratios[bound.name]) if bound.name in ratios else None
    result.num_updates = updates[-1]


def measure_memory(model: str, num_tasks: int, name: str, *, device: str = "cpu") -> tuple[int | None, int | None]:
    """Peak memory of three steps (or one cycle) above that of model and batch, each in a process of its own.

    Returns:
        On the CPU the process's resident memory as the kernel sees it, which includes what the allocators hold and don't use
        and code that is loaded late, and what PyTorch handed out to tensors. On CUDA the latter alone, first. None where a
        run failed.
    """
    whole = _in_a_process(model, num_tasks, name, device, "process")
    return whole, None if device.startswith("cuda") else _in_a_process(model, num_tasks, name, device, "tensors")


def _in_a_process(*arguments: Any) -> int | None:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(_peak, *arguments).result()
        except Exception:  # noqa: BLE001  the memory may be too small for it
            return None


def _peak(model: str, num_tasks: int, name: str, device: str, what: str) -> int | None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    # One step of something small first: code and thread pools that are loaded late aren't the step's.
    make_contestant(name, make_case("mlp", 2, device)).run()
    case = make_case(model, num_tasks, device)

    def steps() -> None:
        contestant = make_contestant(name, case)
        for _ in range(3 if contestant.num_steps == 1 else 1):
            contestant.run()

    if what == "tensors":
        return tensor_peak(steps)
    memory = PeakMemory(device)
    steps()
    return memory.bytes()
