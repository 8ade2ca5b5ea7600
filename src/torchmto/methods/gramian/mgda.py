"""MGDA: the shortest convex combination of the gradients."""

import torch
from torch import Tensor

from torchmto import solvers
from torchmto.methods import Domain, GramianWeighting, Indices, Properties, hyper, register_method
from torchmto.step import StepContext, TaskGradients


@register_method("mgda")
class MGDA(GramianWeighting):
    r"""Multiple-gradient descent: the weights on the simplex that minimise :math:`\|\sum_i w_i g_i\|`.

    Solved exactly (closed form for two tasks, active set otherwise), where public codes run a fixed number of
    Frank-Wolfe steps. With ``normalize``, the minimum is over :math:`g_i / s_i` with :math:`s_i = \|g_i\|` ("l2"),
    :math:`l_i` ("loss") or :math:`l_i \|g_i\|` ("loss+"); s = 1 where it would be 0. As in the released code the
    weights then apply to the gradients as they are; LibMTL updates with the normalised ones
    (``normalize_update=True``).

    Scale: the weights sum to 1. No eps. In a step zero gradients take no part, where the definition (:meth:`weights`) gives
    them all the weight and so stops the other tasks. Heads: their own task's gradient; the released code weights the loss
    and so the heads too (``heads="weighted"``). Not random. LibMTL bounds the weights to [.001, .999]; we don't.

    Args:
        normalize: "none" (paper), "l2", "loss" or "loss+".
        normalize_update: Whether the update uses the normalised gradients too.
        **options: ``heads``, ``refresh_every``.

    Raises:
        ValueError: If ``normalize`` needs losses and there are none (when the weights are computed).

    Source: Désidéri, 2012; Sener & Koltun, NeurIPS 2018, equation 4 (normalisations: its released code).

    Example:
        >>> import torch, torchmto
        >>> torchmto.make_method("mgda").weights(torch.tensor([[1.0, 0.0], [0.0, 3.0]]))
        tensor([0.7500, 0.2500])
    """

    use = "A guaranteed common descent direction; note that it follows the smallest gradient (see `normalize`)."
    properties = Properties(nonconflicting=True)
    domain = Domain(
        corners='With `normalize="loss"` and `"loss+"` non-negative losses only. In a step zero gradients take no part; the '
        "shortest of the others takes most of the weight, and what it leaves of the update can be very short."
    )
    normalize: str = hyper.choice("none", "l2", "loss", "loss+", search=("choice", "none", "l2"))
    normalize_update: bool = hyper.flag(False)

    def __post_init__(self) -> None:
        """Gradients divided by a loss need its sign."""
        super().__post_init__()
        if self.normalize.startswith("loss"):
            self.domain = Domain("0", attained=True)

    def step_weights(self, context: StepContext, gradients: TaskGradients) -> Tensor:
        """The weights; without the zero gradients, of which one would stop all other tasks."""
        gramian, losses, indices = gradients.gramian, gradients.losses, gradients.indices
        live = (gramian.diagonal() > 0).nonzero().flatten().tolist()
        if len(live) in (0, len(gramian)):
            return super().step_weights(context, gradients)
        weights = torch.zeros_like(gramian[0])
        self._precision = gradients.precision
        try:
            weights[live] = self.weights(gramian[live][:, live], losses[live], [indices[i] for i in live])
        finally:
            self._precision = None
        return weights

    def weights(self, gramian: Tensor, losses: Tensor | None = None, indices: Indices | None = None) -> Tensor:
        """Weights with sum 1, [k] (with ``normalize_update``: divided by s)."""
        if self.normalize == "none":
            return self.solved(solvers.min_norm, gramian)
        if losses is not None:
            self.check_losses(losses, indices)
        sizes = self._sizes(gramian, losses)
        scaled = gramian / sizes / sizes.unsqueeze(1)
        weights = self.solved(solvers.min_norm, scaled)
        return weights / sizes if self.normalize_update else weights

    def _sizes(self, gramian: Tensor, losses: Tensor | None) -> Tensor:
        """What each gradient is divided by, [k]."""
        norms = gramian.diagonal().clamp_min(0).sqrt()
        if self.normalize == "l2":
            sizes = norms
        elif losses is None:
            raise ValueError(
                f"Method `mgda` with normalize={self.normalize!r} needs the losses. Found `losses = None`."
            )
        else:
            sizes = losses.to(norms) if self.normalize == "loss" else losses.to(norms) * norms
        return torch.where(sizes > 0, sizes, torch.ones_like(sizes))
