"""The theory of selective task groups on least-squares problems, where every answer is known.

Random problems of four tasks in two families of two (:mod:`torchmto.lab.reproduce.studies.quadratics`). Learning rates are
multiples of 1/L, L the Lipschitz constant of the summed loss's gradient. "Gap" is the total loss above its known minimum,
as a share of the gap at the start.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from torchmto.lab.reproduce.findings import Findings, Table, number
from torchmto.lab.reproduce.studies.context import Context
from torchmto.lab.reproduce.studies.quadratics import (
    STRATEGIES,
    Problems,
    descend,
    related_tasks,
    stationarity,
    train,
)
from torchmto.lab.reproduce.units import complete, run_units
from torchmto.lab.statistics import confidence95, paired

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["run"]

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


def run(context: Context) -> Findings:
    """Run all checks."""
    options = {"problems": 50, "batches": 1000, "kinship": 0.8, "long": 4000, **context.recipe.options}
    units = {name: {"check": name, **options} for name in _CHECKS}
    results = run_units(
        context.folder / "units",
        units,
        lambda parameters: _CHECKS[parameters["check"]](parameters),
        budget=context.budget,
        say=context.say,
    )
    findings = Findings(numbers=dict(results), complete=complete(units, results))
    findings.notes = [
        (
            f"{options['problems']} random problems per check, kinship {options['kinship']} within a family; ± is the 95 % "
            "confidence interval of the mean over problems. The theorems are tested as far as we know their statements: "
            "affinities order as inner products of gradients do; related tasks in one group end lower than updated jointly; "
            "sequential groups converge to Pareto stationarity for Lipschitz gradients."
        )
    ]
    for name, result in results.items():
        findings.tables += _TABLES[name](result)
    if "stationarity" in results:
        findings.figures["stationarity"] = _stationarity_figure(results["stationarity"])
    if "groups" in results:
        findings.figures["groups"] = _groups_figure(results["groups"])
    return findings


def _problems(parameters: Mapping[str, Any], **more: Any) -> Problems:
    generator = torch.Generator().manual_seed(0)
    return related_tasks(parameters["problems"], generator, kinship=parameters["kinship"], **more)


def _gaps(problems: Problems, losses: Tensor) -> Tensor:
    best = problems.optimum()
    start = problems.losses(problems.start()).sum(1)
    return torch.nan_to_num((losses - best) / (start - best), nan=math.inf, posinf=math.inf)


def _log(gaps: Tensor) -> list[float]:
    """Decimal logarithms, kept within the range in which float64 tells gaps apart."""
    result: list[float] = gaps.clamp(1e-14, 1e14).log10().tolist()
    return result


def _figures(values: Sequence[float]) -> dict[str, float | None]:
    return {"mean": sum(values) / len(values), "ci95": confidence95(values)}


def _against(first: Tensor, second: Tensor) -> dict[str, Any]:
    """First against second gap: how often lower, and the mean difference in decades."""
    known = (first - second).abs() > 1e-12
    difference = paired(_log(first), _log(second))
    lower = float(((first < second) & known).double().mean())
    return {"lower": lower, "decades": difference.mean, "ci95": difference.ci95, "p": difference.p}


# ------------------------------------------------------------------------------------------------ theorem 1


def _affinities(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Does the affinity of {i, k} to k exceed that of {j, k} to k exactly where g_i g_k > g_j g_k?"""
    problems = _problems(parameters)
    start, unit = problems.start(), 1 / problems.smoothness()
    before = problems.losses(start)
    shared, _ = problems.gradients(start)
    result = {}
    for rate in RATES:
        agrees: list[bool] = []
        for target in range(4):
            affinity, dots = [], []
            for other in [task for task in range(4) if task != target]:
                after = descend(problems, start, unit * rate, [(other, target)], shared=True, heads=True)
                affinity.append(1 - problems.losses(after)[:, target] / before[:, target])
                dots.append((shared[:, other] * shared[:, target]).sum(1))
            for i in range(3):
                for j in range(i):
                    same = ((affinity[i] - affinity[j]) * (dots[i] - dots[j])) > 0
                    agrees += same.tolist()
        share = sum(agrees) / len(agrees)
        result[str(rate)] = {"agreement": share, "comparisons": len(agrees)}
    return result


def _affinity_tables(result: Mapping[str, Any]) -> list[Table]:
    rows = [[rate, f"{100 * entry['agreement']:.1f}", str(entry["comparisons"])] for rate, entry in result.items()]
    return [
        Table(
            "Affinity orders as inner products do (theorem 1)",
            ["learning rate (1/L)", "agreement %", "comparisons"],
            rows,
            ["Affinity of a joint step of tasks i and k to k against that of j and k, from one starting point."],
        )
    ]


# ------------------------------------------------------------------------------------------------ theorems 2 and 3


def _groups(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Groups against joint updates: after equal batches, equal optimizer steps, and each at its best learning rate."""
    problems = _problems(parameters)
    marks = [mark for mark in MARKS if mark <= parameters["batches"]]
    steps = sorted({mark * len(groups) for mark in marks for groups in PARTITIONS.values()})
    ends = {name: _ends(problems, GRID, groups, marks) for name, groups in PARTITIONS.items()}
    longer = _ends(problems, VIEWS, PARTITIONS["joint"], steps)
    result: dict[str, Any] = {"equal_batches": {}, "equal_steps": {}}
    for rate in VIEWS:
        chosen = {name: at_rate[rate] for name, at_rate in ends.items()}
        result["equal_batches"][str(rate)] = _versus_joint(chosen, marks, chosen["joint"], steps_per_batch=False)
        result["equal_steps"][str(rate)] = _versus_joint(chosen, marks, longer[rate], steps_per_batch=True)
    best = {name: _best(at_rate, marks) for name, at_rate in ends.items()}
    result["best_rate"] = _versus_joint(best, marks, best["joint"], steps_per_batch=False)
    return result


def _ends(
    problems: Problems,
    rates: Sequence[float],
    groups: Sequence[Sequence[int]],
    marks: Sequence[int],
    strategy: str = "both sequential",
) -> dict[float, dict[int, Tensor]]:
    """The gaps ``[N]`` at each mark, for each learning rate in 1/L."""
    copies = problems.repeated(len(rates))
    factors = torch.tensor(rates, dtype=torch.float64).repeat_interleave(len(problems.A))
    _, noted = train(copies, factors / copies.smoothness(), groups, max(marks), strategy=strategy, marks=marks)
    by_rate = {mark: losses.view(len(rates), -1) for mark, losses in noted.items()}
    return {
        rate: {mark: _gaps(problems, losses[number]) for mark, losses in by_rate.items()}
        for number, rate in enumerate(rates)
    }


def _best(ends: Mapping[float, Mapping[int, Tensor]], marks: Sequence[int]) -> dict[int, Tensor]:
    """The gap of the best learning rate, for each problem by itself."""
    return {mark: torch.stack([at_rate[mark] for at_rate in ends.values()]).amin(0) for mark in marks}


def _versus_joint(
    ends: Mapping[str, Mapping[int, Tensor]],
    marks: Sequence[int],
    joint: Mapping[int, Tensor],
    *,
    steps_per_batch: bool,
) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for name, groups in PARTITIONS.items():
        table[name] = {}
        for mark in marks:
            opponent = joint[mark * len(groups) if steps_per_batch else mark]
            table[name][str(mark)] = {
                "log10_gap": _figures(_log(ends[name][mark])),
                "versus_joint": _against(ends[name][mark], opponent),
            }
    return table


def _group_tables(result: Mapping[str, Any]) -> list[Table]:
    titles = {f"equal batches, learning rate {rate}/L": view for rate, view in result["equal_batches"].items()}
    titles |= {f"equal optimizer steps, learning rate {rate}/L": view for rate, view in result["equal_steps"].items()}
    titles["equal batches, each at its best learning rate"] = result["best_rate"]
    notes = [
        (
            "Cells: difference of the decimal logarithm of the gap to joint updates (negative: the groups end lower), and the "
            "share of problems where they end lower. By family: the tasks of high mutual affinity together."
        )
    ]
    return [_versus_table(f"Groups against joint updates: {title}", view, notes) for title, view in titles.items()]


def _versus_table(title: str, view: Mapping[str, Any], notes: Sequence[str]) -> Table:
    names = [name for name in view if name != "joint"]
    marks = list(view["joint"])
    rows = []
    for name in names:
        cells = [view[name][mark]["versus_joint"] for mark in marks]
        rows.append([name, *(f"{_decades(c['decades'], c['ci95'])} ({100 * c['lower']:.0f} %)" for c in cells)])
    return Table(title, ["updates", *(f"after {mark} batches" for mark in marks)], rows, notes)


def _decades(mean: float, interval: float) -> str:
    if abs(mean) >= 0.01:
        return f"{mean:+.2f} ± {interval:.2f}"
    return f"{mean:+.0e} ± {interval:.0e}"


def _groups_figure(result: Mapping[str, Any]) -> Figure:
    from matplotlib.figure import Figure  # noqa: PLC0415  without pyplot no display is needed

    views = {"equal batches": result["equal_batches"]["0.1"], "each at its best learning rate": result["best_rate"]}
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    for axis, (title, view) in zip(figure.subplots(1, 2, sharey=True), views.items(), strict=True):
        for name, marks in view.items():
            means = [entry["log10_gap"]["mean"] for entry in marks.values()]
            axis.plot([int(mark) for mark in marks], means, marker="o", label=name)
        axis.set(title=title, xlabel="batches", xscale="log")
        axis.grid(alpha=0.3)
    figure.axes[0].set_ylabel("log10 of the gap")
    figure.axes[0].legend(fontsize="small")
    return figure


# ------------------------------------------------------------------------------------------------ theorem 4


def _stationarity(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """How far from Pareto stationary runs end, with a constant and with a falling learning rate, smooth and not."""
    batches: int = parameters["long"]
    constant = (0.03, 0.1, 0.3, 1.0)
    falling = batches / 20

    def schedule(batch: int) -> float:
        return 1 / (1 + batch / falling)

    result: dict[str, Any] = {}
    for kind, absolute in (("squares", False), ("absolute values", True)):
        problems = _problems(parameters, absolute=absolute)
        copies = problems.repeated(len(constant))
        rates = torch.tensor(constant, dtype=torch.float64).repeat_interleave(len(problems.A)) / copies.smoothness()
        result[kind] = {}
        for name in ("joint", "by family", "one per task"):
            state, _ = train(copies, rates, PARTITIONS[name], batches, start=copies.minimizer())
            ends = stationarity(copies, state).view(len(constant), -1)
            rows = {f"constant {rate}": _figures(_log(end)) for rate, end in zip(constant, ends, strict=True)}
            state, _ = train(problems, 1 / problems.smoothness(), PARTITIONS[name], batches, schedule=schedule)
            rows["falling from 1.0"] = _figures(_log(stationarity(problems, state)))
            result[kind][name] = rows
    return result


def _stationarity_tables(result: Mapping[str, Any]) -> list[Table]:
    tables = []
    for kind, names in result.items():
        rates = list(next(iter(names.values())))
        rows = [[name, *(number(cell["mean"], cell["ci95"]) for cell in row.values())] for name, row in names.items()]
        tables.append(
            Table(
                f"Distance from Pareto stationarity at the end, {kind}",
                ["updates", *rates],
                rows,
                [
                    (
                        "Decimal logarithm of the shortest convex combination of the gradients, relative to the gradients at "
                        "zero; learning rates in 1/L of the squares. Constant: begun where the sum of squares is least, which "
                        "is Pareto stationary for squares, so what is left is the updates' own doing. Falling: as 1/t, from "
                        "zero. Absolute values have no Lipschitz gradient: the theorem's assumption fails."
                    )
                ],
            )
        )
    return tables


def _stationarity_figure(result: Mapping[str, Any]) -> Figure:
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    for axis, (kind, names) in zip(figure.subplots(1, len(result)), result.items(), strict=True):
        for name, row in names.items():
            constant = {key.split()[1]: cell["mean"] for key, cell in row.items() if key.startswith("constant")}
            axis.plot([float(rate) for rate in constant], list(constant.values()), marker="o", label=name)
        axis.set(title=kind, xlabel="constant learning rate (1/L)", xscale="log")
        axis.grid(alpha=0.3)
    figure.axes[0].set_ylabel("log10 distance from Pareto stationarity")
    figure.axes[0].legend(fontsize="small")
    return figure


# ------------------------------------------------------------------------------------------------ step sizes


def _step_sizes(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The share of problems that diverge, by learning rate and grouping."""
    problems, batches = _problems(parameters), min(500, parameters["batches"])
    result: dict[str, Any] = {}
    for name, groups in PARTITIONS.items():
        ends = _ends(problems, (1.0, 1.9, 2.1, 3.0, 4.0, 6.0), groups, [batches])
        result[name] = {
            str(rate): float((at_rate[batches] > DIVERGED).double().mean()) for rate, at_rate in ends.items()
        }
    return result


def _step_size_tables(result: Mapping[str, Any]) -> list[Table]:
    rates = list(next(iter(result.values())))
    rows = [[name, *(f"{100 * share:.0f}" for share in row.values())] for name, row in result.items()]
    notes = ["Share of problems in %, after 500 batches; joint gradient descent is stable up to 2/L."]
    return [Table("Divergence by learning rate (1/L)", ["updates", *rates], rows, notes)]


# ------------------------------------------------------------------------------------------------ heads or trunk


def _parts(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Which sequential updates help: the heads', the shared parameters', or both."""
    problems = _problems(parameters)
    marks = [mark for mark in MARKS if mark <= parameters["batches"]]
    result: dict[str, Any] = {}
    for groups in ("by family", "one per task"):
        ends = {name: _ends(problems, GRID, PARTITIONS[groups], marks, name) for name in STRATEGIES}
        views = {f"{rate}/L": {name: at_rate[rate] for name, at_rate in ends.items()} for rate in VIEWS}
        views["best"] = {name: _best(at_rate, marks) for name, at_rate in ends.items()}
        for title, view in views.items():
            result[f"{groups}, learning rate {title}"] = {
                name: {
                    str(mark): {
                        "log10_gap": _figures(_log(view[name][mark])),
                        "versus_joint": _against(view[name][mark], view["joint"][mark]),
                    }
                    for mark in marks
                }
                for name in STRATEGIES
            }
    return result


def _part_tables(result: Mapping[str, Any]) -> list[Table]:
    notes = ["As above: difference of log10 gaps to joint updates and share of problems that end lower. Rates in 1/L."]
    return [_versus_table(f"Sequential updates of which part: {title}", view, notes) for title, view in result.items()]


_CHECKS = {
    "affinities": _affinities,
    "groups": _groups,
    "stationarity": _stationarity,
    "step sizes": _step_sizes,
    "parts": _parts,
}
_TABLES = {
    "affinities": _affinity_tables,
    "groups": _group_tables,
    "stationarity": _stationarity_tables,
    "step sizes": _step_size_tables,
    "parts": _part_tables,
}
