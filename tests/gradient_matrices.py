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
