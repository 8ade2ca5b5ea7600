"""Smooth Tchebycheff scalarisation."""

import torch
from torch import Tensor

from torchmto.methods import Domain, Indices, Properties, hyper, register_method, states
from torchmto.methods.losses.inside import safe_log
from torchmto.methods.losses.window import WindowedWeighting


@register_method("stch")
class STCH(WindowedWeighting):
    r"""A smooth maximum of the losses' logarithms, :math:`\mu \log \sum_i \exp(f_i / \mu)`, after a warm-up.

    :math:`f_i = \log(l_i / n_i)`, where the nadir :math:`n_i` is the task's mean loss over the last warm-up window.
    During the warm-up the objective is :math:`\sum_i \log l_i`. Preferences are 1 and the ideal point is 0, as in the
    released multi-task code. A window is an epoch (``mt.end_window()``), or ``window`` steps; without either, the
    warm-up never ends. A task that the warm-up hasn't seen has f = 0 until the end of its first window. Scale: the
    weights are a softmax divided by the losses, not multiplied by K (LibMTL multiplies). Heads: times the task's
    weight. Losses must be positive.

    Args:
        mu: Smoothing: towards 0 the objective becomes the maximum.
        warmup: Warm-up windows.
        window: Steps per window; None: a window ends at ``mt.end_window()``.

    Source: Lin et al., Smooth Tchebycheff Scalarization for Multi-Objective Optimization, ICML 2024.

    Example:
        >>> import torch, torchmto
        >>> torchmto.make_method("stch").objective(torch.tensor([1.0, 1.0]))
        tensor(0.)
    """

    use = "The worst task counts most, smoothly, at one backward."
    properties = Properties(homogeneity=0.0, identity=False, pareto=False)
    domain = Domain("0", corners="The weight of a loss near 0 grows like 1 / l during the warm-up.")
    mu: float = hyper.number(1.0, above=0, search=("log", 0.1, 10.0))
    warmup: int = hyper.integer(4, minimum=1)
    # The nadir (NaN: not known yet) and the number of windows so far.
    nadir: Tensor = states.each(torch.nan)
    windows: int = states.count()

    def objective(self, losses: Tensor, indices: Indices | None = None) -> Tensor:
        """The sum of logarithms in the warm-up, then the smooth maximum."""
        chosen = self.present(losses, indices)
        if self.windows < self.warmup:
            return safe_log(losses).sum()
        nadir = self.nadir[chosen].to(losses)
        nadir = torch.where(nadir.isnan(), losses.detach(), nadir)
        return self.mu * torch.logsumexp((safe_log(losses) - nadir.log()) / self.mu, 0)

    def close(self, means: Tensor) -> None:
        """Take the window's means as the nadir while the warm-up lasts; a window without steps doesn't count."""
        seen = ~means.isnan()
        if not bool(seen.any()):
            return
        if self.windows >= self.warmup:
            seen = seen & self.nadir.isnan()
        self.nadir = torch.where(seen, means, self.nadir)
        self.windows += 1
