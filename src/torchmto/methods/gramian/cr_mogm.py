"""CR-MOGM: any weighting, smoothed over the steps."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from torchmto.methods import Domain, GramianWeighting, Indices, hyper, register_method, states
from torchmto.methods.registry import weighing_method
from torchmto.step import StepContext, TaskGradients


@register_method("cr_mogm")
class CRMOGM(GramianWeighting):
    r"""Correlation-reduced multi-objective gradient manipulation: :math:`w_t = \alpha w_{t-1} + (1 - \alpha) \hat w_t`.

    :math:`\hat w_t` are the weights of another method. Weights that follow one mini-batch are correlated with its
    gradients, which biases the update; the running mean has less of that.

    Scale, losses, randomness and pairs of batches: those of the other method, whose ``heads`` and ``refresh_every``
    are replaced by this method's. The mean starts at the average of the first weights for every task: 1/K for methods
    on the simplex, as in the paper. A task's mean runs over the steps in which it was present, whichever others were:
    in a batch without some tasks the smoothed weights of the others needn't sum to 1. A bound of the other method on
    its update (``max_norm`` of ``nash_mtl``, ``scale="released"``) clips the smoothed update instead, as it clips none
    of the weights that are smoothed. Heads: their own task's gradient. The declared properties are those with ``mgda``.

    Args:
        method: A Gramian method, by name or as an object.
        alpha: Share of the past, in [0, 1). The paper only asks that it tend to 1; 0.9 is our choice.
        **options: ``heads``, ``refresh_every``.

    Raises:
        TypeError: If ``method`` isn't a Gramian method.

    Source: Zhou et al., On the Convergence of Stochastic Multi-Objective Gradient Manipulation and Beyond, NeurIPS
    2022, Algorithm 1.

    Example:
        >>> import torch, torchmto
        >>> torchmto.make_method("cr_mogm", method="mgda", alpha=0.5).weights(torch.tensor([[1.0, 0.0], [0.0, 3.0]]))
        tensor([0.6250, 0.3750])
    """

    use = "Any weighting whose weights jump from batch to batch: smooths them."
    domain = Domain(corners="Those of the other method; its domain holds.")
    inner: GramianWeighting = hyper.called("method", hyper.given("mgda", weighing_method, str | GramianWeighting))
    alpha: float = hyper.number(0.9, minimum=0, below=1, search=("linear", 0.0, 0.99))
    # The smoothed weights [K] and which tasks have some.
    smoothed: Tensor = states.each(0.0)
    seen: Tensor = states.each(False, torch.bool)

    def __post_init__(self) -> None:
        """The other method's bound is this one's."""
        super().__post_init__()
        self.add_state("inner", self.inner)
        self.max_norm = self.inner.max_norm

    def weights(self, gramian: Tensor, losses: Tensor | None = None, indices: Indices | None = None) -> Tensor:
        """The smoothed weights, [k]. Moves those of the present tasks."""
        self.inner.num_fallbacks = 0
        return self._smooth(self.inner.weights(gramian, losses, indices), gramian, indices)

    def step_weights(self, context: StepContext, gradients: TaskGradients) -> Tensor:
        """The other method's weights of this step, smoothed."""
        self.inner.num_fallbacks = 0
        return self._smooth(self.inner.step_weights(context, gradients), gradients.gramian, gradients.indices)

    def _smooth(self, weights: Tensor, gramian: Tensor, indices: Indices | None) -> Tensor:
        self.num_fallbacks += self.inner.num_fallbacks
        self.ensure_setup(len(weights))
        present = torch.arange(len(weights)) if indices is None else torch.tensor(list(indices))
        new = self.inner.kept(weights).to(device="cpu", dtype=torch.float64)
        old = torch.where(self.seen[present], self.smoothed[present], new.mean())
        self.smoothed[present] = new + self.alpha * (old - new)
        self.seen[present] = True
        return self.shortened(self.smoothed[present].to(weights), gramian)

    def records(self) -> Mapping[str, Any]:
        """What the other method records."""
        return self.inner.records()
