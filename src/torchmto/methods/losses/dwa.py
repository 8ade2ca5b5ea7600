"""Dynamic weight average."""

import torch
from torch import Tensor

from torchmto.methods import Domain, Indices, hyper, register_method, states
from torchmto.methods.losses.window import WindowedWeighting


@register_method("dwa")
class DWA(WindowedWeighting):
    r"""Weights from how fast each loss has fallen: :math:`w = K\,\mathrm{softmax}(r / T)`.

    :math:`r_i` is the task's mean loss over the last window divided by that over the window before: tasks that stagnate
    weigh more. A window is an epoch (``mt.end_window()``), or ``window`` steps. The weights are 1 until two windows
    have ended; a task that wasn't present in two windows, or whose mean isn't positive, has r = 1,
    and a window without a task leaves its means as they are. K is the number of present tasks. Scale: sum. Heads: times
    the task's weight.

    Args:
        temperature: T; large values make the weights alike.
        window: Steps per window; None: a window ends at ``mt.end_window()``. Some codes use 25 steps.

    Source: Liu et al., End-to-End Multi-Task Learning with Attention, CVPR 2019, Eq. 7.

    Example:
        >>> import torch, torchmto
        >>> torchmto.make_method("dwa").loss_weights(torch.tensor([1.0, 2.0]))
        tensor([1., 1.])
    """

    use = "A cheap first adaptive weighting: one backward, two windows of losses."
    domain = Domain(
        corners="Where a window's mean isn't positive a ratio has no meaning: r = 1. A task whose loss has grown many times "
        "over takes nearly all of the weight for a window."
    )
    temperature: float = hyper.number(2.0, above=0, search=("linear", 0.5, 5.0))
    # The mean losses of the last window and of the one before; NaN: not seen yet.
    last: Tensor = states.each(torch.nan)
    before: Tensor = states.each(torch.nan)

    def objective(self, losses: Tensor, indices: Indices | None = None) -> Tensor:
        """The weighted sum of the losses."""
        chosen = self.present(losses, indices)
        last, before = self.last[chosen], self.before[chosen]
        rates = last / before
        rates = torch.where(rates.isfinite() & (last >= 0) & (before > 0), rates, 1.0)
        return ((rates / self.temperature).softmax(0) * len(chosen)).to(losses).mul(losses).sum()

    def close(self, means: Tensor) -> None:
        """Compare with the window before from now on."""
        seen = ~means.isnan()
        self.before = torch.where(seen, self.last, self.before)
        self.last = torch.where(seen, means, self.last)
