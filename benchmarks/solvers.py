"""Times of the K x K solvers on one core: `OMP_NUM_THREADS=1 python benchmarks/solvers.py [K]`."""

import sys
import time
from collections.abc import Callable

import numpy as np

from torchmto import solvers

BUDGETS: dict[str, tuple[float, Callable[[np.ndarray], object]]] = {
    "pcgrad": (1, solvers.pcgrad),
    "wpcgrad": (1, lambda gramian: solvers.wpcgrad(gramian, np.arange(len(gramian)))),
    "gradvac": (1, lambda gramian: solvers.gradvac(gramian, np.full_like(gramian, 0.1))),
    "aligned": (1, solvers.aligned),
    "imtl_g": (1, solvers.imtl_g),
    "config": (1, solvers.config),
    "krum": (1, solvers.krum),
    "min_norm": (10, solvers.min_norm),
    "cagrad": (10, solvers.cagrad),
    "nash": (10, solvers.nash),
    "fair": (10, solvers.fair),
    "dual_cone": (10, solvers.dual_cone),
    "upgrad": (10, solvers.upgrad),
    "sdmgrad": (10, solvers.sdmgrad),
}


def gramians(num_tasks: int) -> dict[str, np.ndarray]:
    """Gramians of the kinds that a solver may find hard."""
    rng = np.random.default_rng(0)
    gradients = rng.normal(size=(num_tasks, 1000))
    common = rng.normal(size=1000)
    few = rng.normal(size=(num_tasks, 7))
    cone = few.copy()
    cone[:, 0] += 6.0
    kinds = {
        "random": gradients,
        "aligned": gradients + common,
        "conflicting": gradients - 0.98 * gradients.mean(axis=0),
        "rank 7": few,
        "cone": cone,
        "norms 1e6": gradients * np.logspace(-3, 3, num_tasks)[:, None],
    }
    return {kind: rows @ rows.T for kind, rows in kinds.items()}


def milliseconds(function: Callable[[np.ndarray], object], gramian: np.ndarray, repeats: int = 15) -> float:
    """The median time of a call."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function(gramian)
        times.append(time.perf_counter() - start)
    return 1e3 * float(np.median(times))


def main() -> None:
    """Print a table: one row per solver, one column per kind of Gramian, in milliseconds."""
    num_tasks = int(sys.argv[1]) if len(sys.argv) > 1 else 40
    problems = gramians(num_tasks)
    print(f"K = {num_tasks}, milliseconds per solve (median of 15)")
    print(f"{'':10}{'budget':>9}" + "".join(f"{kind:>13}" for kind in problems))
    for name, (budget, function) in BUDGETS.items():
        times = [milliseconds(function, gramian) for gramian in problems.values()]
        print(f"{name:10}{budget:9}" + "".join(f"{t:12.3f}{'!' if t > budget else ' '}" for t in times))


if __name__ == "__main__":
    main()
