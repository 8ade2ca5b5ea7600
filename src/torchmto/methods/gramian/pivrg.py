"""PIVRG: fair shares of the update, larger for tasks that are further behind their single-task models."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from torchmto.checks import found, warn
from torchmto.methods import Indices, Properties, hyper, register_method, states
from torchmto.methods.gramian.fairgrad import FairGrad
from torchmto.methods.per_task import Baseline


@register_method("pivrg")
class PIVRG(FairGrad):
    r"""Performance-informed variance reduction gradient: :math:`(G w)_i = (\lambda_i / w_i)^{1/2}`, w > 0.

    The importance :math:`\lambda = K \, \mathrm{softmax}(\Delta / T)` rises with how far a task is behind its single-task
    model: :math:`\Delta_i` is the relative drop of the last reported metric (``mt.report``), in percent, and :math:`T =
    \max\{(\max_i \Delta_i - \min_i \Delta_i) / \ln b, T_0\}`, so that no task is more than b times as important as
    another. With w = x / lambda it is FairGrad's equation (alpha = 2) for the gradients :math:`g_i / \lambda_i`, solved as
    there, with the same fallbacks. Before the first report, and for tasks without one, the drop is the mean of the known
    ones; where none is known it is FairGrad.

    Scale, heads and ``scale="released"`` (times K, clipped to norm 1): as for ``fairgrad``; both papers share that code.
    No eps. Not random. The released code takes the drops from the metrics of the last training epoch; here they are what
    the trainer reports, usually of the validation split.

    Args:
        baseline: Task -> the single-task model's value. Without it reports change nothing.
        higher_is_better: Task -> whether larger values are better (missing ones are True), or one bool for all.
        bound: The largest ratio b of two importances, above 1.
        min_temperature: The smallest temperature :math:`T_0`, in percent.
        scale: "paper", or "released": times the number of present tasks, then at most 1 long.
        **options: ``heads``, ``refresh_every``.

    Raises:
        ValueError: If a baseline is 0 or not of these tasks.

    Source: Qin et al., Revisiting Fairness in Multitask Learning: A Performance-Driven Approach for Variance Reduction,
    CVPR 2025, as in its released code.

    Example:
        >>> import torch, torchmto
        >>> method = torchmto.make_method("pivrg", baseline={"seg": 50.0, "depth": 80.0})
        >>> method.bind(("seg", "depth"))
        >>> method.report({"seg": 45.0, "depth": 80.0})
        >>> method.weights(torch.eye(2))
        tensor([1.1006, 0.8736])
    """

    use = "When some tasks end far behind their single-task models and others don't: evens out the drops."
    recorded = {"drops": "drops"}
    properties = Properties(homogeneity=-1 / 3, identity=False, pareto=False, nonconflicting=True)
    alpha = 2.0
    baseline: Any = hyper.given(None, kind=Mapping[str, float] | None)
    higher_is_better: Mapping[str, bool] | bool = hyper.given(True)
    ratio: float = hyper.called("bound", hyper.number(2.0, above=1))
    min_temperature: float = hyper.number(10.0, above=0)
    # The last drops in percent (NaN: not reported yet).
    drops: Tensor = states.each(torch.nan)
    _told = False

    def __post_init__(self) -> None:
        """Directions are of the baseline."""
        super().__post_init__()
        if self.baseline is not None:
            if not isinstance(self.baseline, Mapping):
                raise TypeError(found("baseline", "a mapping of task names to floats", self.baseline))
            self.baseline = Baseline(self.baseline, self.higher_is_better)

    def report(self, performance: Mapping[str, float]) -> None:
        """Take over validation results."""
        if self.baseline is None:
            if not self._told:
                self._told = True
                warn("Method `pivrg` has no `baseline` to compare reports with: all tasks stay equally important.")
            return
        for name, value in performance.items():
            self.drops[self.tasks.index(name)] = 100 * self.baseline.behind(name, value)

    def importance(self, indices: Indices) -> Tensor:
        """The importance of the present tasks, float64 [k], summing to k."""
        self.ensure_setup(max(indices) + 1)
        drops = self.drops[list(indices)]
        known = ~drops.isnan()
        drops = torch.where(known, drops, drops[known].mean() if bool(known.any()) else 0.0)
        temperature = max(float(drops.max() - drops.min()) / math.log(self.ratio), self.min_temperature)
        return len(drops) * (drops / temperature).softmax(0)

    def weights(self, gramian: Tensor, losses: Tensor | None = None, indices: Indices | None = None) -> Tensor:
        """Positive weights (0 for a zero gradient), [k]."""
        importance = self.importance(range(len(gramian)) if indices is None else indices).to(gramian)
        return self.scaled(self.shares(gramian / torch.outer(importance, importance)) / importance, gramian)
