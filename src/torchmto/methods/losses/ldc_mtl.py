"""LDC-MTL: loss discrepancy control by learnt weights."""

import torch
from torch import Tensor

from torchmto.methods import Domain, Indices, LossWeighting, Properties, hyper, register_method, states
from torchmto.methods.losses.inside import beyond_rounding, inside, safe_log
from torchmto.methods.losses.learnable import LearnableScales
from torchmto.step import Losses, StepContext


def _gaps(weighted: Tensor) -> Tensor:
    """The differences of each loss to the one before."""
    sizes = weighted.detach().abs()
    return beyond_rounding(weighted.diff(), torch.maximum(sizes[1:], sizes[:-1]))


@register_method("ldc_mtl")
class LDCMTL(LossWeighting):
    r"""Bilevel loss balancing in one loop: weighted losses, and a penalty on the differences between neighbouring ones.

    With weights :math:`\sigma_i = \mathrm{sigmoid}(W_i)` and normalised losses :math:`\tilde l`, model and W both descend
    :math:`\sum_i \sigma_i \tilde l_i / \sum_j \sigma_j + \lambda \sum_i |\sigma_i \tilde l_i - \sigma_{i+1} \tilde l_{i+1}|`,
    where :math:`\sum_j \sigma_j` is a constant in the derivative: the lower level is the first sum, the upper level the second
    one. One backward per step, whatever the number of tasks.

    W is one number per task, as released for CelebA and QM9, and belongs to the method, with an Adam of its own; for dense
    prediction the released code has a small network on the model's features instead, which a method can't see. An absent
    task's number stays, and its neighbours are compared with each other.

    Scale: mean (the first weights sum to 1). Order: neighbours are tasks next to each other in the given order. No eps. Heads:
    times the task's weight. Not random. With a large ``penalty`` the weight of a task whose loss is small can be negative.

    Args:
        penalty: The weight :math:`\lambda` of the discrepancy; released: 0.01 (40 tasks), 0.05 and 0.1 (2).
        lr: Adam's learning rate for W; as released that of the model, between 8e-5 and 1e-3.
        initial: Initial value of W; 1 as released for CelebA.
        normalize: "none" (released for CelebA, Cityscapes); "ratio": each loss divided by its first value's ratio to the
            smallest first value (NYUv2); "log": :math:`\log(l / l_0)` (QM9). The latter two take positive losses only.

    Source: Xiao et al., LDC-MTL: Balancing Multi-Task Learning through Scalable Loss Discrepancy Control, 2025 (arXiv
    2502.08585), as in its released code.

    Example:
        >>> import torch, torchmto
        >>> torchmto.make_method("ldc_mtl", penalty=0.1).loss_weights(torch.tensor([1.0, 3.0]))
        tensor([0.4269, 0.5731])
    """

    use = "Many tasks whose losses should stay close to each other, at the cost of one backward."
    recorded = {"logits": "logits.values"}
    properties = Properties(equivariant=False)
    domain = Domain(corners="With a large `penalty` the smallest losses have negative weights, and climb.")
    penalty: float = hyper.number(0.05, minimum=0, search=("log", 1e-3, 0.3))
    lr: float = hyper.number(1e-3, above=0, search=("log", 1e-4, 1e-2))
    initial: float = hyper.number(1.0)
    normalize: str = hyper.choice("none", "ratio", "log")
    # W, and the tasks' first losses (NaN: not seen yet).
    logits: LearnableScales = states.made(lambda own, k: LearnableScales(k, lr=own.lr, initial=own.initial))
    first: Tensor = states.each(torch.nan)

    def __post_init__(self) -> None:
        """Ratios and logarithms need positive losses."""
        if self.normalize != "none":
            self.domain = Domain("0", corners=self.domain.corners)

    def _normalised(self, losses: Tensor, chosen: Indices) -> Tensor:
        if self.normalize == "none":
            return losses
        first = self.first[list(chosen)].to(losses)
        first = torch.where(first.isnan(), losses.detach(), first)
        if self.normalize == "log":
            return safe_log(losses) - first.log()
        known = self.first[~self.first.isnan()].to(losses)
        # In this order the first losses are exactly equal, and rounding errors don't decide on a sign.
        return inside(losses, losses > 0) / first * torch.cat([first, known]).min()

    def objective(self, losses: Tensor, indices: Indices | None = None) -> Tensor:
        """The weighted losses and the discrepancy."""
        chosen = self.present(losses, indices)
        weights = self.logits.of(chosen).sigmoid().to(losses)
        normalised = self._normalised(losses, chosen)
        gaps = _gaps(weights * normalised)
        return (weights / weights.sum() * normalised).sum() + self.penalty * gaps.abs().sum()

    @torch.no_grad()
    def after_step(self, losses: Losses, context: StepContext) -> None:
        """One step of Adam on W, along the objective's derivative."""
        values = losses.values.to("cpu", torch.float64)
        normalised = self._normalised(values, losses.indices)
        weights = self.logits.of(losses.indices).sigmoid()
        signs = _gaps(weights * normalised).sign()
        # |a - b| of a task and the next one, and of the one before and it.
        zero = signs.new_zeros(1)
        slope = 1 / weights.sum() + self.penalty * (torch.cat([zero, signs]) - torch.cat([signs, zero]))
        self.logits.step(normalised * slope * weights * (1 - weights), losses.indices)
        unseen = [task for task in losses.indices if self.normalize != "none" and bool(self.first[task].isnan())]
        self.first[unseen] = values[[losses.indices.index(task) for task in unseen]]
