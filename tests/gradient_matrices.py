"""Gradient matrices for tests: random ones with the troubles that real gradients have."""

import numpy as np
from hypothesis import strategies as st

KINDS = (
    "random",
    "aligned",
    "conflicting",
    "rank_deficient",
    "duplicate_rows",
    "opposite_rows",
    "zero_row",
    "norms",
    "identical",
    "zero",
)


def gradient_matrix(kind: str, num_tasks: int, num_columns: int, seed: int) -> np.ndarray:
    """A matrix of gradients, one per row."""
    rng = np.random.default_rng(seed)
    J = rng.normal(size=(num_tasks, num_columns))
    if kind == "aligned":
        J += 3 * rng.normal(size=num_columns)
    elif kind == "conflicting":
        J -= 0.9 * J.mean(axis=0)
    elif kind == "rank_deficient":
        rank = max(1, min(num_tasks, num_columns) // 2)
        J = rng.normal(size=(num_tasks, rank)) @ rng.normal(size=(rank, num_columns))
    elif kind == "duplicate_rows":
        J[-1] = J[0]
    elif kind == "opposite_rows":
        J[-1] = -J[0]
    elif kind == "zero_row":
        J[-1] = 0
    elif kind == "norms":
        J *= np.logspace(-3, 3, num_tasks)[:, None]
    elif kind == "identical":
        J[:] = J[0]
    elif kind == "zero":
        J[:] = 0
    return J


@st.composite
def matrices(draw, kinds=KINDS, min_tasks=1, max_tasks=7, min_columns=1):
    """A matrix of one of the kinds."""
    num_tasks = draw(st.integers(min_tasks, max_tasks))
    num_columns = draw(st.integers(max(1, min_columns), 12))
    return gradient_matrix(draw(st.sampled_from(kinds)), num_tasks, num_columns, draw(st.integers(0, 10**6)))


def full_rank(kinds=("random", "aligned", "conflicting", "norms"), min_tasks=2, max_tasks=7):
    """Matrices with linearly independent rows."""
    return matrices(kinds=kinds, min_tasks=min_tasks, max_tasks=max_tasks, min_columns=max_tasks + 2)


CANCELLING = (
    "opposed",
    "equality",
    "reversal",
    "weakly_stationary",
    "strongly_stationary",
    "opposed_pairs",
    "opposed_and_twin",
    "rank",
    "twins",
)
"""Kinds of exact dependence, most of them with a positive combination that vanishes."""


def cancelling(kind: str, num_tasks: int, num_columns: int, seed: int) -> np.ndarray:
    """A matrix of gradients that are linearly dependent before they are rounded."""
    rng = np.random.default_rng(seed)
    J = rng.normal(size=(num_tasks, num_columns))
    shares = rng.uniform(0.2, 1.2, size=num_tasks)
    if kind == "opposed":
        J[1] = -rng.uniform(0.3, 0.9) * J[0]
    elif kind == "equality":
        J[1] = -J[0]
    elif kind == "reversal":
        J += 0.5 * rng.normal(size=num_columns)
        J[-1] = -J[0]
    elif kind == "weakly_stationary":
        last = max(1, num_tasks - 2)
        J[last] = -(shares[:last] @ J[:last]) / shares[last]
    elif kind == "strongly_stationary":
        J[-1] = -(shares[:-1] @ J[:-1]) / shares[-1]
    elif kind == "opposed_pairs":
        J[1::2] = -0.7 * J[: num_tasks - 1 : 2][: len(J[1::2])]
    elif kind == "opposed_and_twin":
        J[1], J[2] = -0.7 * J[0], 1.3 * J[0]
    elif kind == "rank":
        rank = max(1, num_tasks // 2)
        J = rng.normal(size=(num_tasks, rank)) @ rng.normal(size=(rank, num_columns))
    elif kind == "twins":
        J[1] = 1.3 * J[0]
    return J
