"""The theory of selective task groups on least-squares problems, where every answer is known.

Random problems of four tasks in two families of two (:mod:`torchmto.lab.reproduce.quadratics`). Learning rates are
multiples of 1/L, L the Lipschitz constant of the summed loss's gradient. "Gap" is the total loss above its known minimum,
as a share of the gap at the start.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchmto.checks import check_choice, check_integer, check_number
from torchmto.lab.atomic import plain, write_bytes
from torchmto.lab.reproduce.budget import Budget
from torchmto.lab.reproduce.findings import Findings, number
from torchmto.lab.reproduce.quadratics import STRATEGIES, Problems, descend, related_tasks, stationarity, train
from torchmto.lab.statistics import confidence95, paired
from torchmto.lab.terminal import Table
from torchmto.lab.versions import RESULTS_VERSION

Options = Mapping[str, Any]
Found = tuple[dict[str, Any], list[Table]]
OPTIONS = {"problems": 50, "batches": 1000, "kinship": 0.8, "long": 4000}
PARTITIONS: dict[str, tuple[tuple[int, ...], ...]] = {
    "joint": ((0, 1, 2, 3),),
    "by family": ((0, 1), (2, 3)),
    "across families": ((0, 2), (1, 3)),
    "one per task": ((0,), (1,), (2,), (3,)),
}
RATES = (0.001, 0.01, 0.1, 0.5, 1.0, 2.0, 4.0)
"""Learning rates in 1/L at which single steps are looked at."""
VIEWS = (0.1, 0.5, 1.0)
"""Learning rates at which whole runs are."""
GRID = (0.05, 0.1, 0.2, 0.5, 1.0, 1.5, 1.9, 2.5, 3.5, 5.0)
"""Of these every strategy gets its best, for each problem."""
MARKS = (1, 10, 100, 1000)
DIVERGED = 10.0
"""A gap that many times the one at the start counts as divergence."""


def check_options(options: Options) -> None:
    """Raise a ValueError or TypeError unless these are `OPTIONS` that make sense."""
    for name, value in options.items():
        if check_choice("options", name, tuple(OPTIONS)) == "kinship":
            check_number(name, value, minimum=0, maximum=1)
        else:
            check_integer(name, value, minimum=1)


def theory(folder: Path, options: Options, budget: Budget, say: Callable[[str], None]) -> Findings:
    """Run all checks that aren't in the folder yet, until the time is up."""
    options = {**OPTIONS, **options}
    findings = Findings()
    findings.notes.append(
        f"{options['problems']} random problems per check, kinship {options['kinship']} within a family; ± is the 95 % "
        "confidence interval of the mean over problems. The theorems are tested as far as we know their statements: "
        "affinities order as inner products of gradients do; related tasks in one group end lower than updated jointly; "
        "sequential groups converge to Pareto stationarity for Lipschitz gradients."
    )
    for name, check in CHECKS.items():
        path = folder / "checks" / f"{name.replace(' ', '-')}.json"
        known = {"options": options, "results_version": RESULTS_VERSION}
        done = json.loads(path.read_text()) if path.is_file() else {}
        if any(done.get(key) != value for key, value in known.items()):
            if budget.spent:
                findings.complete = False
                continue
            numbers, tables = check(options)
            done = plain({**known, "numbers": numbers, "tables": [vars(table) for table in tables]})
            path.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(path, (json.dumps(done, indent=1) + "\n").encode())
            say(f"  {name}: done, {budget.used:.1f} min")
        findings.numbers[name] = done["numbers"]
        findings.tables += [Table(**table) for table in done["tables"]]
    return findings


def _problems(options: Options, **more: Any) -> Problems:
    return related_tasks(options["problems"], torch.Generator().manual_seed(0), kinship=options["kinship"], **more)


def _gaps(problems: Problems, losses: Tensor) -> Tensor:
    best, start = problems.optimum(), problems.losses(problems.start()).sum(1)
    return torch.nan_to_num((losses - best) / (start - best), nan=math.inf, posinf=math.inf)


def _log(gaps: Tensor) -> list[float]:
    """Decimal logarithms, kept within the range in which float64 tells gaps apart."""
    result: list[float] = gaps.clamp(1e-14, 1e14).log10().tolist()
    return result


def affinities(options: Options) -> Found:
    """Theorem 1: does the affinity of {i, k} to k exceed that of {j, k} to k exactly where g_i g_k > g_j g_k?"""
    problems = _problems(options)
    start, unit = problems.start(), 1 / problems.smoothness()
    before = problems.losses(start)
    shared, _ = problems.gradients(start)
    numbers = {}
    for rate in RATES:
        agrees: list[bool] = []
        for target in range(4):
            affinity, dots = [], []
            for other in [task for task in range(4) if task != target]:
                after = descend(problems, start, unit * rate, [(other, target)], shared=True, heads=True)
                affinity.append(1 - problems.losses(after)[:, target] / before[:, target])
                dots.append((shared[:, other] * shared[:, target]).sum(1))
            for i, j in ((1, 0), (2, 0), (2, 1)):
                agrees += (((affinity[i] - affinity[j]) * (dots[i] - dots[j])) > 0).tolist()
        numbers[str(rate)] = {"agreement": sum(agrees) / len(agrees), "comparisons": len(agrees)}
    rows = [[rate, f"{100 * entry['agreement']:.1f}", str(entry["comparisons"])] for rate, entry in numbers.items()]
    note = "Affinity of a joint step of tasks i and k to k against that of j and k, from one starting point."
    header = ["learning rate (1/L)", "agreement %", "comparisons"]
    return numbers, [Table("Affinity orders as inner products do (theorem 1)", header, rows, [note])]


# ---------------------------------------------------------------------------------------- runs against joint updates

Ends = Mapping[int, Tensor]
"""Gaps ``[N]`` after so many batches."""


def _ends(
    problems: Problems, rates: Sequence[float], groups: Any, marks: Sequence[int], strategy: str = "both sequential"
) -> dict[float, Ends]:
    """For each learning rate in 1/L."""
    copies = problems.repeated(len(rates))
    factors = torch.tensor(rates, dtype=torch.float64).repeat_interleave(len(problems.A))
    _, noted = train(copies, factors / copies.smoothness(), groups, max(marks), strategy=strategy, marks=marks)
    by_rate = {mark: losses.view(len(rates), -1) for mark, losses in noted.items()}
    return {
        rate: {mark: _gaps(problems, losses[place]) for mark, losses in by_rate.items()}
        for place, rate in enumerate(rates)
    }


def _best(at_rate: Mapping[float, Ends], marks: Sequence[int]) -> Ends:
    """At the best learning rate, for each problem by itself."""
    return {mark: torch.stack([ends[mark] for ends in at_rate.values()]).amin(0) for mark in marks}


def _marks(options: Options) -> list[int]:
    return [mark for mark in MARKS if mark <= options["batches"]]


def _versus_joint(title: str, ends: Mapping[str, Ends], joint: Mapping[str, Ends]) -> tuple[Any, Table]:
    """How much lower than joint updates the others end: in decades of the gap, and how often.

    Args:
        title: Of the table.
        ends: Gaps by name.
        joint: What they are compared with.
    """
    numbers: dict[str, Any] = {}
    for name, own in ends.items():
        numbers[name] = {}
        for mark, gaps in own.items():
            rival = joint[name][mark]
            lower = float(((gaps < rival) & ((gaps - rival).abs() > 1e-12)).double().mean())
            mean = sum(_log(gaps)) / len(gaps)
            numbers[name][str(mark)] = {**vars(paired(_log(gaps), _log(rival))), "lower": lower, "log10_gap": mean}
    marks = list(next(iter(ends.values())))
    rows = [
        [name, *(f"{_decades(c['mean'], c['ci95'])} ({100 * c['lower']:.0f} %)" for c in cells.values())]
        for name, cells in numbers.items()
        if name != "joint"
    ]
    note = (
        "Cells: difference of the decimal logarithm of the gap to joint updates (negative: the groups end lower), and the "
        "share of problems where they end lower. By family: the tasks of high mutual affinity together."
    )
    return numbers, Table(title, ["updates", *(f"after {mark} batches" for mark in marks)], rows, [note])


def _decades(mean: float, interval: float | None) -> str:
    form = "+.2f" if abs(mean) >= 0.01 else "+.0e"
    return f"{mean:{form}}" + ("" if interval is None else f" ± {interval:{form.replace('+', '')}}")


def groups(options: Options) -> Found:
    """Theorems 2 and 3: after equal batches, equal optimizer steps, and each at its best learning rate."""
    problems, marks = _problems(options), _marks(options)
    ends = {name: _ends(problems, GRID, partition, marks) for name, partition in PARTITIONS.items()}
    steps = sorted({mark * len(partition) for mark in marks for partition in PARTITIONS.values()})
    longer = _ends(problems, VIEWS, PARTITIONS["joint"], steps)
    best = {name: _best(at_rate, marks) for name, at_rate in ends.items()}
    numbers: dict[str, Any] = {}
    tables = []
    views: list[tuple[str, Mapping[str, Ends], Mapping[str, Ends]]] = [
        ("equal batches, each at its best learning rate", best, dict.fromkeys(best, best["joint"]))
    ]
    for rate in VIEWS:
        own = {name: at_rate[rate] for name, at_rate in ends.items()}
        views.append((f"equal batches, learning rate {rate}/L", own, dict.fromkeys(own, own["joint"])))
        slower = {name: {mark: longer[rate][mark * len(PARTITIONS[name])] for mark in marks} for name in own}
        views.append((f"equal optimizer steps, learning rate {rate}/L", own, slower))
    for title, ends_of, joint in views:
        numbers[title], table = _versus_joint(f"Groups against joint updates: {title}", ends_of, joint)
        tables.append(table)
    return numbers, tables


def parts(options: Options) -> Found:
    """Which sequential updates help: the heads', the shared parameters', or both."""
    problems, marks = _problems(options), _marks(options)
    numbers: dict[str, Any] = {}
    tables = []
    for partition in ("by family", "one per task"):
        ends = {name: _ends(problems, GRID, PARTITIONS[partition], marks, name) for name in STRATEGIES}
        views = {f"{rate}/L": {name: at_rate[rate] for name, at_rate in ends.items()} for rate in VIEWS}
        views["best"] = {name: _best(at_rate, marks) for name, at_rate in ends.items()}
        for title, own in views.items():
            name = f"{partition}, learning rate {title}"
            heading = f"Sequential updates of which part: {name}"
            numbers[name], table = _versus_joint(heading, own, dict.fromkeys(own, own["joint"]))
            tables.append(table)
    return numbers, tables


# -------------------------------------------------------------------------------------------- stationarity, divergence


def stationary(options: Options) -> Found:
    """Theorem 4: how far from Pareto stationary runs end, at a constant and at a falling learning rate, smooth and not."""
    batches: int = options["long"]
    constant = (0.03, 0.1, 0.3, 1.0)
    numbers: dict[str, Any] = {}
    for kind, absolute in (("squares", False), ("absolute values", True)):
        problems = _problems(options, absolute=absolute)
        copies = problems.repeated(len(constant))
        rates = torch.tensor(constant, dtype=torch.float64).repeat_interleave(len(problems.A)) / copies.smoothness()
        unit, numbers[kind] = 1 / problems.smoothness(), {}
        for name in ("joint", "by family", "one per task"):
            state, _ = train(copies, rates, PARTITIONS[name], batches, start=copies.minimizer())
            ends = list(stationarity(copies, state).view(len(constant), -1))
            state, _ = train(problems, unit, PARTITIONS[name], batches, schedule=lambda b: 1 / (1 + 20 * b / batches))
            ends.append(stationarity(problems, state))
            labels = [*(f"constant {rate}" for rate in constant), "falling from 1.0"]
            logs = dict(zip(labels, map(_log, ends), strict=True))
            numbers[kind][name] = {
                label: {"mean": sum(v) / len(v), "ci95": confidence95(v)} for label, v in logs.items()
            }
    note = (
        "Decimal logarithm of the shortest convex combination of the gradients, relative to the gradients at zero; learning "
        "rates in 1/L of the squares. Constant: begun where the sum of squares is least, which is Pareto stationary for "
        "squares, so what is left is the updates' own doing. Falling: as 1/t, from zero. Absolute values have no Lipschitz "
        "gradient: the theorem's assumption fails."
    )
    tables = []
    for kind, names in numbers.items():
        rows = [[name, *(number(cell["mean"], cell["ci95"]) for cell in row.values())] for name, row in names.items()]
        header = ["updates", *names["joint"]]
        tables.append(Table(f"Distance from Pareto stationarity at the end, {kind}", header, rows, [note]))
    return numbers, tables


def step_sizes(options: Options) -> Found:
    """The share of problems that diverge, by learning rate and grouping."""
    problems, batches, rates = _problems(options), min(500, options["batches"]), (1.0, 1.9, 2.1, 3.0, 4.0, 6.0)
    numbers = {
        name: {
            str(rate): float((ends[batches] > DIVERGED).double().mean())
            for rate, ends in _ends(problems, rates, partition, [batches]).items()
        }
        for name, partition in PARTITIONS.items()
    }
    rows = [[name, *(f"{100 * share:.0f}" for share in row.values())] for name, row in numbers.items()]
    note = f"Share of problems in %, after {batches} batches; joint gradient descent is stable up to 2/L."
    return numbers, [Table("Divergence by learning rate (1/L)", ["updates", *map(str, rates)], rows, [note])]


CHECKS: dict[str, Callable[[Options], Found]] = {
    "affinities": affinities,
    "groups": groups,
    "stationarity": stationary,
    "step sizes": step_sizes,
    "parts": parts,
}
