"""Improvable gap balancing, first version."""

import torch
from torch import Tensor

from torchmto.methods import Domain, Indices, Properties, hyper, register_method, states
from torchmto.methods.losses.inside import safe_log
from torchmto.methods.losses.window import WindowedWeighting


@register_method("igb")
class IGB(WindowedWeighting):
    r"""Tasks with more room to improve weigh more: :math:`\sum_i w_i \log l_i`, :math:`w = K\,\mathrm{softmax}(l / b)`.

    The base :math:`b_i` is the task's mean loss over one early window, so :math:`l_i / b_i` is the share of the
    improvable gap that is left, the ideal loss taken as 0. The weights are constants in the derivative, and 1 until the
    base is known. A task that the base window hasn't seen has a gap of 1 until the end of its first window. K is the
    number of present tasks. This is the paper's first version (IGBv1); the second one learns the weights by
    reinforcement learning. Scale: sum. Heads: times the task's weight. Losses must be positive.

    Args:
        base_window: The number, from 1, of the window whose means are the base.
        window: Steps per window; None: a window ends at ``mt.end_window()``.

    Source: Dai et al., Improvable Gap Balancing for Multi-Task Learning, UAI 2023 (arXiv 2307.15429), IGBv1, as in its
    released code.

    Example:
        >>> import torch, torchmto
        >>> torchmto.make_method("igb").loss_weights(torch.tensor([0.5, 4.0]))
        tensor([2.0000, 0.2500])
    """

    use = "Losses on different scales, when tasks far from their start value should catch up."
    properties = Properties(homogeneity=0.0, identity=False, pareto=False)
    domain = Domain("0", corners="A task at many times its base takes nearly all of the weight.")
    base_window: int = hyper.integer(2, minimum=1)
    # The base losses (NaN: not known yet) and the number of windows so far.
    base: Tensor = states.each(torch.nan)
    windows: int = states.count()

    def objective(self, losses: Tensor, indices: Indices | None = None) -> Tensor:
        """The weighted sum of the logarithms."""
        chosen = self.present(losses, indices)
        base = self.base[chosen].to(losses)
        gaps = torch.where(base.isnan(), 1.0, losses.detach() / base)
        return (len(losses) * gaps.softmax(0) * safe_log(losses)).sum()

    def close(self, means: Tensor) -> None:
        """Take the base window's means as the base; a window without steps doesn't count."""
        if bool(means.isnan().all()):
            return
        self.windows += 1
        if self.windows >= self.base_window:
            self.base = torch.where(self.base.isnan(), means, self.base)
