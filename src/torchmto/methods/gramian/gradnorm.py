"""GradNorm: weights that balance the norms of the tasks' gradients."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from torchmto.checks import found
from torchmto.gradients.rows import gramian as gramian_of_rows
from torchmto.methods import Domain, GramianWeighting, Indices, Properties, hyper, register_method, states
from torchmto.methods.losses.learnable import LearnableScales
from torchmto.step import Losses, Network, StepContext, TaskGradients

LEAST = 1e-4
"""Smallest weight before the rescaling: the update of a weight isn't bounded below."""


def _path(name: str, given: Any) -> Any:
    if given is not None and not isinstance(given, str):
        raise TypeError(found(name, "the path of a module, a string", given))
    return given


@register_method("gradnorm")
class GradNorm(GramianWeighting):
    r"""Learnt loss weights that bring the gradients' norms to a common scale, more for tasks that train slowly.

    With norms :math:`n_i = w_i \|g_i\|`, their mean :math:`\bar n` and relative inverse training rates :math:`r_i =
    (l_i / l_i(0)) / \mathrm{mean}_j (l_j / l_j(0))`, the weights descend :math:`\sum_i |n_i - \bar n r_i^\alpha|` by
    Adam, where the targets are constants; then they are rescaled to sum K. The step itself uses the weights from
    before. The weights belong to the method; an absent task's weight and Adam moments stay, and the weights of the
    present tasks keep their sum.

    A loss weighting, but it needs the K gradients: K backwards per step. Scale: sum, weights sum to the number of
    present tasks. Heads: times the task's weight by default, as the weighted sum of losses says. Deviations: after
    Adam's step weights below 1e-4 are set to it, before the rescaling; :math:`l_i(0)` is the task's first positive loss,
    and until it has one :math:`r_i = 1`. Adam's eps of 1e-8 isn't relative: weights hardly learn from gradients that are all
    shorter than that.

    Args:
        alpha: How strongly slow tasks are pulled up; 0 makes all norms equal.
        lr: Adam's learning rate for the weights; 0.025 as in the paper.
        layer: Whose parameters the norms are taken of. None: all shared parameters. The path of a module in the model,
            e.g. "encoder.layer4": its shared parameters; the paper takes the last shared layer.
        **options: ``heads`` ("weighted" by default here), ``refresh_every``.

    Raises:
        ValueError: If the model has no module ``layer``, or (in a step) it has no shared parameter.

    Source: Chen et al., GradNorm: Gradient Normalization for Adaptive Loss Balancing, ICML 2018, Algorithm 1.

    Example:
        >>> import torch, torchmto
        >>> torchmto.make_method("gradnorm").weights(torch.eye(3), torch.ones(3))
        tensor([1., 1., 1.])
    """

    use = "Losses on different scales that train at different rates."
    recorded = {"scales": "scales.values"}
    properties = Properties(uses_losses=True)
    domain = Domain(
        corners="A loss that isn't positive counts as trained, r = 0; where none is positive the weights stay."
    )
    alpha: float = hyper.number(1.5, minimum=0, search=("linear", 0.0, 3.0))
    lr: float = hyper.number(0.025, above=0, search=("log", 1e-3, 1e-1))
    layer: str | None = hyper.given(None, _path)
    heads: str = hyper.choice("weighted", "unit")
    # The weights, and the first positive losses (NaN: not seen yet).
    scales: LearnableScales = states.made(lambda own, k: LearnableScales(k, lr=own.lr, initial=1.0))
    first: Tensor = states.each(torch.nan)
    _norms: Tensor | None = None

    def refusal(self, network: Network) -> str:
        """A layer's columns may lie on several ranks, or not be kept."""
        if (network.divided or network.engine is not None) and self.layer is not None:
            return "takes the norms over one layer's columns"
        return super().refusal(network)

    def attach(self, network: Network) -> None:
        """Check that the model has the layer."""
        if self.layer is None:
            return
        try:
            network.model.get_submodule(self.layer)
        except AttributeError as error:
            raise ValueError(found("layer", "the path of a module of the model", self.layer)) from error

    def step_weights(self, context: StepContext, gradients: TaskGradients) -> Tensor:
        """The weights; the norms of the gradients on the layer are kept for :meth:`after_step`."""
        gramian = (
            gradients.gramian if self.layer is None else self._layer_gramian(context.network, gradients, self.layer)
        )
        return self.weights(gramian, gradients.losses, gradients.indices)

    def _layer_gramian(self, network: Network, gradients: TaskGradients, layer: str) -> Tensor:
        total = torch.zeros_like(gradients.gramian)
        # By its path, as the module may have been replaced.
        shared = [p for p in network.model.get_submodule(layer).parameters() if gradients.has(p)]
        if not shared:
            raise ValueError(found("layer", "a module with shared parameters", layer))
        for parameter in shared:
            total += gramian_of_rows(gradients.matrix[:, gradients.columns(parameter)])
        return total

    def weights(self, gramian: Tensor, losses: Tensor | None = None, indices: Indices | None = None) -> Tensor:
        """The weights learnt so far, [k], summing to k; the Gramian only matters to the update after the step."""
        chosen = list(range(len(gramian)) if indices is None else indices)
        self.ensure_setup(max(chosen) + 1)
        self._norms = gramian.detach().diagonal().to("cpu", torch.float64).clamp_min(0).sqrt()
        weights = self.scales.of(chosen)
        return (weights * (len(chosen) / weights.sum())).to(gramian)

    def after_step(self, losses: Losses, context: StepContext) -> None:
        """One step of Adam on the weights; none in a step that reused its weights (``refresh_every``)."""
        norms, self._norms = self._norms, None
        if norms is None:
            return
        chosen = list(losses.indices)
        values = losses.values.to("cpu", torch.float64)
        self.first[chosen] = torch.where(self.first[chosen].isnan() & (values > 0), values, self.first[chosen])
        before = self.scales.of(chosen)
        scaled = before * norms
        first = self.first[chosen]
        # Below 0 there is nothing left to gain: the mean of the others' progress must stay positive.
        progress = (values / first).clamp_min(0)
        rates = torch.where(first.isnan(), 1.0, progress / progress[~first.isnan()].mean())
        distances = scaled - scaled.mean() * rates**self.alpha
        if not bool(distances.isfinite().all()):
            return
        self.scales.step(torch.sign(distances) * norms, chosen)
        moved = self.scales.of(chosen).clamp_min(LEAST)
        self.scales.assign(moved * (before.sum() / moved.sum()), chosen)

    def restore(self, kept: Mapping[str, Any]) -> None:
        """The norms of a step that wasn't taken go, too."""
        super().restore(kept)
        self._norms = None
