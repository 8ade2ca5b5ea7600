"""Fixed weights given by the user."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from torchmto.checks import check_number, found
from torchmto.methods.method import LossWeighting, Properties
from torchmto.methods.registry import register


@register("static")
class Static(LossWeighting):
    r"""The weighted sum :math:`\sum_i w_i l_i` with constant weights.

    Scale: sum, the weights are used as they are given. Heads: times the task's weight, as the sum says.

    Args:
        weights: Task -> non-negative weight, or a sequence in the order of the tasks.

    Raises:
        ValueError: If a weight is negative or not finite, or (when the tasks are known) a task has none.

    Source: constant weights, tuned by hand or by search.

    Example:
        >>> import torch, torchmto
        >>> torchmto.make_method("static", weights=[1.0, 10.0]).objective(torch.tensor([2.0, 3.0]))
        tensor(32.)
    """

    source = "constant weights"
    use = "Weights known from a paper or a search."
    properties = Properties(equivariant=False, identity=False)
    fixed = True

    def __init__(self, *, weights: Mapping[str, float] | Sequence[float]) -> None:
        super().__init__()
        if isinstance(weights, str) or not isinstance(weights, Mapping | Sequence):
            raise TypeError(found("weights", "a mapping of task names to floats, or a sequence of floats", weights))
        items = weights.items() if isinstance(weights, Mapping) else enumerate(weights)
        checked = {key: check_number(f"weights[{key!r}]", value, minimum=0) for key, value in items}
        self.given = weights
        self._values = list(checked.values())

    def bind(self, tasks: tuple[str, ...]) -> None:
        """Match the weights with the tasks."""
        if isinstance(self.given, Mapping):
            if set(self.given) != set(tasks):
                raise ValueError(found("weights", f"a mapping with exactly the tasks {list(tasks)}", dict(self.given)))
            self._values = [float(self.given[name]) for name in tasks]
        elif len(self.given) != len(tasks):
            raise ValueError(found("weights", f"a sequence of {len(tasks)} weights", list(self.given)))
        super().bind(tasks)

    def objective(self, losses: Tensor, indices: Sequence[int] | None = None) -> Tensor:
        """The weighted sum of the losses."""
        chosen = range(len(losses)) if indices is None else indices
        return (losses * torch.tensor([self._values[i] for i in chosen]).to(losses)).sum()
