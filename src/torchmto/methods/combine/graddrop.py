"""GradDrop: per entry one sign is picked, and gradients of the other sign are dropped."""

import torch
from torch import Tensor

from torchmto.methods import GradientCombiner, Properties, hyper, register_method
from torchmto.methods.combine.columns import pieces
from torchmto.methods.per_task import PerTask
from torchmto.step import TaskGradients


@register_method("graddrop")
class GradDrop(GradientCombiner):
    r"""Gradient sign dropout.

    Per entry, the sign purity is :math:`P = \frac12 (1 + \sum_i g_i / \sum_i |g_i|)`; positive values are kept with
    probability P and negative ones otherwise, by one draw for all tasks. The update is the sum of
    :math:`(\ell_i + (1 - \ell_i) M_i) g_i` with M the kept entries and :math:`\ell_i` the leak.

    Scale: sum. On the gradients of the shared parameters, as in TorchJD; the paper drops gradients of the shared
    representation, per sample and after multiplication by its sign. No eps: entries where all gradients are 0 stay 0.
    Two public libraries give ``leak`` opposite meanings; here, as in the paper, it is the share of the raw gradient
    that leaks through: 0 is GradDrop, 1 the plain sum. Heads: their own task's gradient. Random: P numbers per step
    from :attr:`generator`; on another device than the CPU, from a generator there that :attr:`generator` seeds every
    step.

    Args:
        leak: One number in [0, 1] for all tasks, or one per task.
        **options: ``heads``.

    The signs are drawn where the gradients are: a GPU draws other ones from the same seed than a CPU.

    Source: Chen et al., Just Pick a Sign, NeurIPS 2020, Algorithm 1.
    """

    use = "Many conflicting tasks; random sign dropout as a regulariser."
    properties = Properties(pareto=False)
    leak: PerTask = hyper.per_task(0.0, minimum=0, maximum=1, search=("linear", 0.0, 0.9))

    @torch.no_grad()
    def combine(self, task_grads: TaskGradients) -> Tensor:
        """The sum of what is kept or leaks through, [P]."""
        matrix = task_grads.matrix
        leak = self.leak.of(task_grads.indices).to(matrix).unsqueeze(1)
        generator = self.generator_on(matrix.device)
        combined = torch.empty_like(matrix[0])
        for piece in pieces(matrix.shape[1]):
            rows = matrix[:, piece]
            positive = rows.clamp_min(0).sum(0)
            purity = positive / (positive - rows.clamp_max(0).sum(0))
            drawn = torch.rand(purity.shape, generator=generator, dtype=matrix.dtype, device=matrix.device)
            # An entry without any gradient has no purity (0/0); whatever is picked there, 0 stays 0.
            kept = (rows > 0) == (drawn < purity)
            torch.sum(rows * (leak + (1 - leak) * kept), dim=0, out=combined[piece])
        return combined
