"""Interleaved step times, and peak memory in a fresh process per contestant."""

import copy
import json
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import median, quantiles

import torch

from torchmto.lab.bench.bounds import Step
from torchmto.lab.bench.cases import make_case
from torchmto.lab.bench.contestants import bound_of, holds_rows, make_step
from torchmto.lab.memory import PeakMemory

__all__ = ["Measurement", "measure_memory", "measure_times"]

REFERENCES = ("gd*", "lb*", "lbm*")


@dataclass
class Measurement:
    """What was measured for one contestant on one case.

    Ratios are medians over rounds of the contestant's time to the reference's in the same round, so that a slow spell of
    the machine hits both.

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
        peak_bytes: Peak memory above that before the first step; None if not measured.
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
    peak_bytes: int | None = None
    failed: str = ""

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)


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

    Contestants whose gradient matrices together would need more than ``room`` bytes are timed in several such runs, each
    with the references again. The clock is "wall", or "cpu": the process's own processor time, which says more on one
    thread of a machine that has other work.
    """
    num_shared = make_case(model, num_tasks, device).num_shared
    capacity = max(1, int(room / (4 * num_tasks * num_shared)) - 1)
    results: list[Measurement] = []
    batch: list[str] = []
    held = 0
    wanted = [name for name in dict.fromkeys(names) if name not in REFERENCES]
    for name in [*wanted, None]:
        if name is not None:
            batch.append(name)
            held += holds_rows(name) or "/" in name
        if batch and (name is None or held >= capacity or len(batch) >= 12):
            results += _rounds(
                model, num_tasks, batch, repeats, device=device, clock=clock, tick=tick, first=not results
            )
            batch, held = [], 0
    return results or _rounds(model, num_tasks, [], repeats, device=device, clock=clock, tick=tick, first=True)


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
    needed = [*REFERENCES, *(bound for bound in dict.fromkeys(map(bound_of, names)) if bound not in REFERENCES)]
    steps: dict[str, Step] = {}
    failed: dict[str, str] = {}
    for name in [*needed, *names]:
        tick(f"{model} K={num_tasks} {name}")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                # Task-specific norms and hooks on modules change the trunk; the others may share it.
                alone = name == "connection_strength" or name.startswith("torchjd-gramian")
                own = copy.deepcopy(case) if alone else case
                step = make_step(name, own)
                step()
                step()
            steps[name] = step
        except Exception as error:  # noqa: BLE001  one contestant's failure mustn't end the run
            failed[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(repeats):
        tick(f"{model} K={num_tasks} round {number + 1}/{repeats}")
        for name, step in steps.items():
            start = _clock(device, clock)
            step()
            times[name].append(_clock(device, clock) - start)
    shown = names if not first else [*needed, *names]
    results = []
    for name in shown:
        result = Measurement(model, num_tasks, case.num_shared, name, bound_of(name), failed=failed.get(name, ""))
        _evaluate(result, times)
        results.append(result)
    return results


def _evaluate(result: Measurement, times: dict[str, list[float]]) -> None:
    own = times.get(result.name)
    if own:
        ratios = {
            other: [a / b for a, b in zip(own, times[other], strict=True)]
            for other in dict.fromkeys([*REFERENCES, result.bound])
            if other in times
        }
        result.seconds, result.iqr = median(own), _spread(own)
        result.ratios = {other: median(values) for other, values in ratios.items()}
        result.ratio_iqr = _spread(ratios[result.bound]) if result.bound in ratios else None


def measure_memory(model: str, num_tasks: int, name: str, *, device: str = "cpu") -> int | None:
    """Peak memory of three steps above the memory before the first, in a process of its own.

    On the CPU it is resident memory as the kernel sees it, so it includes what the allocator holds and doesn't use.
    """
    command = [sys.executable, "-m", "torchmto.lab.bench.timing", model, str(num_tasks), name, device]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603  our own module
    if done.returncode:
        return None
    value: int | None = json.loads(done.stdout.splitlines()[-1])
    return value


def _memory_main(model: str, num_tasks: int, name: str, device: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    # One step of something small first: code and thread pools that any step loads aren't the contestant's.
    make_step("lbm*", make_case("mlp", 2, device))()
    step = make_step(name, make_case(model, num_tasks, device))
    peak = PeakMemory(device)
    for _ in range(3):
        step()
    print(json.dumps(peak.bytes()))  # noqa: T201  read by the parent process


if __name__ == "__main__":
    _memory_main(sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4])
