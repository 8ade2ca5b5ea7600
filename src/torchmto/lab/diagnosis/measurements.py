"""The numbers a probing run yields."""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from torch import Tensor

from torchmto.solvers.unit import EPS, eigenvalue_noise, rounding_error

Array = npt.NDArray[np.float64]
Matrix = tuple[tuple[float, ...], ...]
"""K x K, NaN where nothing was measured."""


@dataclass(frozen=True)
class Layer:
    """Where in the model gradients conflict.

    Attributes:
        name: Path of the module.
        num_parameters: Its shared parameters.
        conflict_share: Share of its (batch, pair) combinations whose inner product is negative.
        conflict_part: Its part of all layers' summed negative inner products, in [0, 1].
    """

    name: str
    num_parameters: int
    conflict_share: float
    conflict_part: float


@dataclass(frozen=True)
class Margins:
    """How clearly channels belong to their leading task, after some steps of connection strength's phase 1.

    Attributes:
        num_channels: Channels of all structured layers.
        num_batches: Steps of phase 1 before the measurement.
        median: Median over channels of (largest - second) / largest normalised strength.
        ambiguous_share: Share of channels whose margin is below 5 %.
        stable_share: Share of channels with the same leader half way through.
    """

    num_channels: int
    num_batches: int
    median: float
    ambiguous_share: float
    stable_share: float


@dataclass(frozen=True)
class Measurements:
    """What `probe` measured. Matrices are K x K in the order of ``tasks``.

    Attributes:
        tasks: K names.
        num_batches: Batches on which gradients were measured.
        losses: Mean loss of each task over these batches.
        gradient_norms: Median norm of each task's gradient on the shared parameters.
        cosines: Mean cosine of each pair's gradients.
        cosine_errors: Standard errors of these means.
        conflict_shares: Share of the batches in which a pair's inner product was negative.
        sum_cosines: Mean cosine of each task's gradient with the sum of all.
        sum_shares: Mean of each task's part in the squared norm of the sum, adding up to 1.
        condition_number: Median condition number of the matrix of cosines, which the gradients' scales don't enter; None
            where it is singular.
        layers: Layer by layer, most conflict first.
        affinity: Mean affinity: how much of the column's loss one step of the row's task alone takes off.
        affinity_errors: Standard errors of these means.
        noise_floor: Mean absolute change of each loss between two forwards of one batch without any step.
        num_shared: Shared parameters.
        num_other: Parameters of the heads and the like.
        gradient_bytes: Memory of the K x P matrix of gradients.
        seconds: Per batch, median: "gd" (one backward), "gramian" (K backwards), "sequential" (K optimizer steps).
        margins: Of channel priorities, where they were probed.
        sum_ratio: Median of the sum's squared norm over the sum of squared norms: 0 where gradients cancel, 1 at right
            angles, K where all are equal.
    """

    tasks: tuple[str, ...]
    num_batches: int
    losses: Mapping[str, float]
    gradient_norms: Mapping[str, float]
    cosines: Matrix
    cosine_errors: Matrix
    conflict_shares: Matrix
    sum_cosines: Mapping[str, float]
    sum_shares: Mapping[str, float]
    condition_number: float | None
    layers: tuple[Layer, ...] = ()
    affinity: Matrix | None = None
    affinity_errors: Matrix | None = None
    noise_floor: Mapping[str, float] = field(default_factory=dict)
    num_shared: int = 0
    num_other: int = 0
    gradient_bytes: int = 0
    seconds: Mapping[str, float] = field(default_factory=dict)
    margins: Margins | None = None
    sum_ratio: float = math.nan


_CANCELLED = 1e-12
"""A sum with at most this part of the squared norms, or what rounding leaves of one that cancels, has no direction."""


def matrix_of(array: Array) -> Matrix:
    """An array as nested tuples."""
    return tuple(tuple(float(value) for value in row) for row in array)


def mean_and_error(samples: Array) -> tuple[Array, Array]:
    """Mean over the first dimension, NaN left out, and its standard error (NaN for fewer than two samples)."""
    known = np.where(np.isfinite(samples), samples, np.nan)
    with warnings.catch_warnings(), np.errstate(invalid="ignore", divide="ignore"):
        warnings.simplefilter("ignore", RuntimeWarning)  # of means of nothing
        error = np.nanstd(known, axis=0, ddof=1) / np.sqrt(np.isfinite(known).sum(axis=0))
        return np.nanmean(known, axis=0), error


def _median(samples: Array) -> Array:
    """Median of all finite numbers, NaN if there are none."""
    known = samples[np.isfinite(samples)]
    return np.array(np.median(known) if known.size else np.nan)


def summarize_gramians(gramians: Array, precision: float = EPS) -> dict[str, Array]:
    """Statistics of several batches' Gramians.

    Args:
        gramians: [B, K, K], NaN in the rows and columns of tasks without a label.
        precision: Machine precision of the gradients: conflicts, sums and eigenvalues within their rounding errors are 0.

    Returns:
        ``cosines``, ``cosine_errors``, ``conflict_shares`` [K, K]; ``norms``, ``sum_cosines``, ``sum_shares`` [K], the last
        two NaN where the sum cancels; ``sum_ratio`` [], the median of the sum's squared norm over the sum of squared norms;
        ``conditions`` of the cosines [number of complete batches], infinite where singular.

    Example:
        >>> import numpy as np
        >>> found = summarize_gramians(np.array([[[4.0, -2.0], [-2.0, 4.0]]]))
        >>> found["cosines"].tolist(), found["conditions"].round(6).tolist()
        ([[1.0, -0.5], [-0.5, 1.0]], [3.0])
    """
    rounding = rounding_error(precision)
    squares = np.diagonal(gramians, axis1=1, axis2=2)
    norms = np.sqrt(np.maximum(squares, 0))
    with np.errstate(invalid="ignore", divide="ignore"):
        cosines = gramians / (norms[:, :, None] * norms[:, None, :])
        known = np.isfinite(cosines)
        conflicts = np.where(known, cosines < -rounding, 0).sum(axis=0) / known.sum(axis=0)
        with_sum = np.where(np.isfinite(gramians), gramians, 0.0).sum(axis=2)
        total = with_sum.sum(axis=1, keepdims=True)
        ratios = total / np.nansum(squares, axis=1, keepdims=True)
        total = np.where(ratios > max(_CANCELLED, rounding), total, np.nan)
        sum_cosines = np.where(np.isfinite(norms), with_sum / (norms * np.sqrt(total)), np.nan)
        sum_shares = np.where(np.isfinite(norms), with_sum / total, np.nan)
    # A task without a gradient has no cosines; for this one it makes the matrix singular.
    complete = np.nan_to_num(cosines[np.isfinite(gramians).all(axis=(1, 2))])
    eigenvalues = np.linalg.eigvalsh(complete) if len(complete) else np.zeros((0, 1))
    lowest = eigenvalues[:, 0]
    singular = lowest <= eigenvalue_noise(precision, gramians.shape[1]) * eigenvalues[:, -1]
    conditions = np.where(singular, np.inf, eigenvalues[:, -1] / np.where(singular, 1.0, lowest))
    mean, error = mean_and_error(cosines)
    return {
        "cosines": mean,
        "cosine_errors": error,
        "conflict_shares": conflicts,
        "norms": np.array([_median(n) for n in norms.T]),
        "sum_cosines": mean_and_error(sum_cosines)[0],
        "sum_shares": mean_and_error(sum_shares)[0],
        "sum_ratio": _median(ratios),
        "conditions": conditions,
    }


def relative_margins(normalized: Tensor) -> Tensor:
    """How clearly each channel belongs to its leading task.

    Args:
        normalized: Normalised strengths, [T, C].

    Returns:
        (largest - second) / largest, [C], in [0, 1]; 0 where all are zero.

    Example:
        >>> import torch
        >>> relative_margins(torch.tensor([[0.4, 0.5], [0.2, 0.5]])).tolist()
        [0.5, 0.0]
    """
    first, second = normalized.double().topk(2, dim=0).values
    margins: Tensor = (first - second) / first.clamp_min(1e-300)
    return margins


def summarize_margins(margins: Sequence[Tensor], agreement: float, num_batches: int) -> Margins:
    """Margins of all layers in one."""
    flat = np.concatenate([margin.numpy() for margin in margins])
    return Margins(len(flat), num_batches, float(np.median(flat)), float((flat < 0.05).mean()), agreement)
