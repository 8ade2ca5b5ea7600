"""Trimmed mean: entry by entry the mean without the extremes."""

import torch
from torch import Tensor

from torchmto.methods import Domain, GradientCombiner, Properties, hyper, register_method
from torchmto.methods.combine.columns import pieces
from torchmto.step import TaskGradients


@register_method("trimmed_mean")
class TrimmedMean(GradientCombiner):
    """For every entry the mean over the tasks without the b largest and b smallest values.

    Made for distributed learning with faulty workers; as a multi-task method it ignores outlying gradient entries.
    With 2b tasks or fewer, b is reduced to the largest number that leaves a value: two tasks give the mean.

    Scale: mean. Heads: their own task's gradient. Not random.

    Args:
        num_trimmed: The number b.
        **options: ``heads``.

    Source: Yin et al., Byzantine-Robust Distributed Learning, ICML 2018, Definition 2.
    """

    use = "Gradients of some tasks may be outliers, entry by entry."
    properties = Properties(pareto=False)
    whole_rows = ""  # every column is averaged by itself
    domain = Domain(corners="With one or two tasks nothing is trimmed: the mean.")
    num_trimmed: int = hyper.integer(1, minimum=0)

    @torch.no_grad()
    def combine(self, task_grads: TaskGradients) -> Tensor:
        """The trimmed mean of every column, [P]."""
        matrix = task_grads.matrix
        size = len(matrix)
        trimmed = min(self.num_trimmed, (size - 1) // 2)
        combined = torch.empty_like(matrix[0])
        for piece in pieces(matrix.shape[1]):
            kept = matrix[:, piece]
            if trimmed:
                kept = kept.sort(dim=0).values[trimmed : size - trimmed]
            torch.mean(kept, dim=0, out=combined[piece])
        return combined
