"""What a step reports."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchmto.solvers.unit import rounding_error


@dataclass(frozen=True)
class StepInfo:
    """What one ``mt.step`` did.

    Attributes:
        losses: The loss of every present task, as the closure returned it (averaged over micro-batches and ranks; in
            procedures the first value of the step).
        weights: The weight of every present task's gradient in the update of the shared parameters, where the method
            has one weight per task, the user's own loss weights (``weights=``) not counted; else None.
        skipped: Whether an optimizer step was left out (non-finite losses or gradients).
        reason: Why it was left out; empty otherwise.
        num_forward: Calls of the closure, micro-batches and extra forwards included.
        num_backward: Backward passes.
        num_optimizer_steps: Optimizer steps taken.
        engine: How the gradients of the tasks were computed: "parameters" (the rows), "layerwise", "mixed" or "representation";
            None if the step needed none.
        num_fallbacks: Solves that didn't converge and used the method's documented fallback.
        records: What the method records besides: phase, priority shares, groups, affinity, ...
        gramian: Inner products of the present tasks' gradients on the shared parameters, a float64 tensor [k, k] in the order
            of ``losses``; None if the method doesn't compute it.
        precision: The machine precision of these gradients.
    """

    losses: Mapping[str, float]
    weights: Mapping[str, float] | None = None
    skipped: bool = False
    reason: str = ""
    num_forward: int = 0
    num_backward: int = 0
    num_optimizer_steps: int = 0
    engine: str | None = None
    num_fallbacks: int = 0
    records: Mapping[str, Any] = field(default_factory=dict)
    gramian: Tensor | None = None
    precision: float = 0.0

    @functools.cached_property
    def cosines(self) -> Tensor | None:
        """Cosines between the tasks' gradients, like :attr:`gramian`; 0 where a gradient is zero."""
        if self.gramian is None:
            return None
        values = self.gramian.numpy()
        norms = np.sqrt(values.diagonal().clip(0))
        product = np.outer(norms, norms)
        return torch.from_numpy(np.divide(values, product, out=np.zeros_like(values), where=product > 0))

    @functools.cached_property
    def num_conflicts(self) -> int | None:
        """Pairs of tasks whose gradients have a negative inner product, by more than rounding errors; None if not computed."""
        if self.cosines is None:
            return None
        return int(np.count_nonzero(np.triu(self.cosines.numpy(), 1) < -rounding_error(self.precision)))
