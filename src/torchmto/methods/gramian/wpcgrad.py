"""wPCGrad: in a conflict, a probability per task decides who is projected."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from torchmto import solvers
from torchmto.methods import Domain, GramianWeighting, Indices, Properties, hyper, register_method
from torchmto.methods.gramian.pcgrad import random_orders
from torchmto.methods.priority import Priority, PrioritySource, make_priority


def plackett_luce(probabilities: Tensor, generator: torch.Generator, num_orders: int = 1) -> Tensor:
    """Orders drawn without replacement: the next task is drawn from those left, in proportion to their probabilities.

    Tasks of probability zero come last, in random order.

    Args:
        probabilities: Non-negative, any scale, [K].
        generator: Where the randomness comes from.
        num_orders: How many orders to draw.

    Returns:
        Orders, int64 [num_orders, K].

    Example:
        >>> import torch
        >>> plackett_luce(torch.tensor([0.0, 1.0]), torch.Generator()).tolist()
        [[1, 0]]
    """
    uniform = torch.rand(num_orders, len(probabilities), generator=generator, dtype=torch.float64)
    # The minimum of exponential times with rates p falls on task i with probability p_i / sum p.
    times = -torch.log1p(-uniform)
    zero = (probabilities <= 0).expand_as(times)
    times = torch.where(zero, times, times / probabilities.clamp_min(torch.finfo(torch.float64).tiny))
    by_time = times.argsort(dim=1, stable=True)
    last = torch.gather(zero, 1, by_time).to(torch.int8).argsort(dim=1, stable=True)
    return torch.gather(by_time, 1, last)


@register_method("wpcgrad")
class WPCGrad(GramianWeighting):
    r"""PCGrad with task weights: a probability per task says who wins a conflict; without conflict nothing changes.

    ``mode="order"`` (our reading of the paper's text, where the sampled task stays intact): each step draws an order without
    replacement from the probabilities (Plackett-Luce). Going down the order, each task is the reference, and every later
    task whose gradient conflicts with it (both as modified so far) is projected onto its normal plane. The first task's
    gradient stays as it is, and at the end no two gradients conflict. ``mode="pairwise"``: in each conflicting pair i is kept
    with probability :math:`p_i / (p_i + p_j)` and j is projected off i's original gradient. ``mode="pcgrad"`` (the printed
    algorithm read literally): PCGrad's inner loop with each task's order drawn from the probabilities.

    Scale: sum. Heads: their own task's gradient. Uniform probabilities are not PCGrad, which alters both members of a
    conflicting pair. Random, from :attr:`generator`: the order ("pcgrad": every task's own); in mode "pairwise" who is kept in
    each pair, and the order of every task's projections.

    Args:
        mode: "order", "pairwise" or "pcgrad".
        priority: Where the probabilities come from. A mapping of probabilities (missing tasks have 0); "loss": the previous
            window's mean loss to the power ``gamma``; "relative_loss": each divided by its first positive window's mean; a loss
            weighting (name or object), normalised to sum 1; "performance": the shortfall of the reported validation metric
            (``mt.report``) to ``baseline``, to the power ``gamma``; "uniform"; or a callable of the losses [k]. Uniform until
            a first window or report.
        gamma: The exponent.
        window: Steps per averaging window; None: windows end at ``mt.end_window()``.
        baseline: Task -> single-task value, for ``priority="performance"``.
        higher_is_better: Task -> direction of the metric, or one bool for all.
        **options: ``heads``, ``refresh_every``.

    Raises:
        ValueError: If probabilities don't sum to 1, are negative or name unknown tasks (the latter when the tasks are known).

    Source: Bohn et al., Task Weighting through Gradient Projection for Multitask Learning, 2024 (arXiv 2409.01793).

    Example:
        >>> import torch, torchmto
        >>> method = torchmto.make_method("wpcgrad", priority=[1.0, 0.0])
        >>> method.weights(torch.tensor([[1.0, -1.0], [-1.0, 4.0]]))
        tensor([2., 1.])
    """

    use = "Gradients conflict and some tasks matter more: priorities act only in conflicts."
    properties = Properties(equivariant=False, uses_losses=True)
    domain = Domain(
        corners="A mean loss that isn't positive has priority 0; where all have, the tasks are alike. Of a loss weighting as "
        "priority its own domain holds, and weights below 0 count as 0."
    )
    mode: str = hyper.choice("order", "pairwise", "pcgrad")
    priority: Priority = hyper.given("loss", kind=PrioritySource, search=("choice", "loss", "relative_loss"))
    gamma: float = hyper.number(1.0, search=("linear", 0.5, 3.0))
    window: int | None = hyper.integer(None, minimum=1)
    baseline: Mapping[str, float] | None = hyper.given(None)
    higher_is_better: Mapping[str, bool] | bool = hyper.given(True)

    def __post_init__(self) -> None:
        """The priority is a method, too: a state."""
        super().__post_init__()
        names = ("priority", "gamma", "window", "baseline", "higher_is_better")
        self.add_state("priority", make_priority(**{name: getattr(self, name) for name in names}))
        self._drawn: dict[str, Any] = {"probabilities": {}}

    def weights(self, gramian: Tensor, losses: Tensor | None = None, indices: Indices | None = None) -> Tensor:
        """Column sums of the projected gradients' coefficients, [k]."""
        num_tasks = len(gramian)
        present = tuple(range(num_tasks)) if indices is None else tuple(indices)
        p = self.priority.probabilities(losses, present)
        self._drawn = {"probabilities": dict(zip(map(self.label, present), p.tolist(), strict=True))}
        array = self.as_array(gramian)
        if self.mode == "order":
            (order,) = plackett_luce(p, self.generator).tolist()
            self._drawn["order"] = [self.label(present[i]) for i in order]
            return self.solved(solvers.wpcgrad, gramian, order=order)
        if self.mode == "pairwise":
            both = p.unsqueeze(1) + p.unsqueeze(0)
            chance = torch.where(both > 0, p.unsqueeze(1) / both.clamp_min(torch.finfo(p.dtype).tiny), 0.5)
            draws = torch.rand(num_tasks, num_tasks, generator=self.generator, dtype=torch.float64)
            upper = (draws < chance).triu(1)
            keep = upper | (~upper).triu(1).T
            orders = random_orders(num_tasks, self.generator)
            return self.accept(solvers.wpcgrad_pairwise(array, keep.numpy(), orders), gramian)
        turns = plackett_luce(p, self.generator, num_tasks)
        others = turns[turns != torch.arange(num_tasks).unsqueeze(1)].view(num_tasks, num_tasks - 1)
        return self.accept(solvers.pcgrad(array, others.numpy()), gramian)

    def records(self) -> Mapping[str, Any]:
        """The probabilities and, in mode "order", the order drawn; nothing in a step that reused its weights."""
        drawn, self._drawn = self._drawn, {"probabilities": {}}
        return drawn
