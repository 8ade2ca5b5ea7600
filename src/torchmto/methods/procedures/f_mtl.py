"""F-MTL: every task in a flat region, by sharpness-aware gradients of its own."""

import copy

import torch
from torch import Tensor

from torchmto.gradients.rows import gramian, views_of
from torchmto.methods import Cost, Domain, GramianWeighting, Properties, hyper, register_method
from torchmto.methods.combine.columns import pieces
from torchmto.methods.procedures.sharpness import Pairs, SharpnessAware, inner_method
from torchmto.step import StepContext, StepInfo, TaskGradients


@register_method("f_mtl")
class FMTL(SharpnessAware):
    r"""Task-based flat minima: two forwards and backwards per task.

    The first pass gives the tasks' gradients :math:`g_i`. The second takes task i's gradient :math:`\tilde g_i` where the
    shared parameters are moved by :math:`\rho \, g_i / \|g_i\|` and its head by :math:`\rho` along the head's own gradient.
    Its loss direction :math:`g_i` and its flat direction :math:`h_i = \tilde g_i - g_i` are combined apart, each by the inner
    method, and summed: :math:`w(g) g + w(h) h`.

    Scale: the inner method's. Heads: their own task's gradient of the second pass. No eps (1e-12 in the released code): a
    gradient of zero moves nothing. The second pass leaves norm buffers as they are and draws new noise, as released. Cost: K
    more forwards and backwards; one optimizer step. Memory: two more K x P matrices. Not random, unless the inner method is.
    The declared properties are those with ``cagrad``.

    Args:
        rho: Length of the perturbation; 0 is the inner method at twice the price. Released: 0.05, with ``adaptive`` 2.
        adaptive: Perturb along :math:`|\theta|^2 g / \||\theta| g\|` (ASAM), as an option of the released code.
        apart: Combine loss and flat directions apart, as in the paper; else the gradients of the second pass as they are (the
            "a-" variants of the released code).
        inner: A Gramian method (name or object). The released scripts take CAGrad, whose ``c`` is 0.4 there; its MGDA is
            multiplied by K.

    Raises:
        TypeError: If ``inner`` isn't a Gramian method.

    Source: Phan et al., Beyond Losses Reweighting: Empowering Multi-Task Learning via the Generalization Perspective, ICCV
    2025 (arXiv 2211.13723, before: Improving Multi-task Learning via Seeking Task-based Flat Regions), as in its released code.

    Example:
        >>> import torchmto
        >>> torchmto.make_method("f_mtl", inner="mgda").cost(3).num_backward
        6
    """

    use = "Tasks that overfit, or few samples, where twice the price per step is affordable."
    properties = Properties(identity=False, pareto=False)
    domain = Domain(corners="A gradient of zero moves nothing. Of the inner method its own domain holds.")
    rho: float = hyper.number(0.05, minimum=0, search=("log", 1e-3, 0.5))
    apart: bool = hyper.flag(True)
    inner: GramianWeighting = inner_method("cagrad")
    flat: GramianWeighting | None

    def __post_init__(self) -> None:
        """A second inner method with a state of its own: it sees other gradients."""
        super().__post_init__()
        self.add_state("flat", copy.deepcopy(self.inner) if self.apart else None)

    def cost(self, num_tasks: int) -> Cost:
        """One pass for all tasks, one for each."""
        return Cost(1 + num_tasks, 2 * num_tasks, 1)

    def step(self, context: StepContext) -> StepInfo:
        """Gradients here, gradients where they lead, one optimizer step."""
        first = context.gradients()
        self.inner.num_fallbacks = 0
        losses, rows, parameters = first.reduced, first.matrix.clone(), first.parameters
        weights = self.inner.step_weights(context, first) if self.apart else None
        places = {task: place for place, task in enumerate(losses.indices)}

        def shifts_of(task: int) -> Pairs:
            shared: Pairs = list(zip(parameters, views_of(rows[places[task]], parameters), strict=True))
            own = [(parameter, held[task]) for parameter, held in first.heads.values() if task in held]
            return self.shifts(shared) + self.shifts(own)

        second, moved = self.perturbed(context, losses, shifts_of)
        rows = torch.nn.functional.pad(rows, (0, moved.shape[1] - rows.shape[1]))
        vector, fallbacks = self._combined(context, second, rows, moved, weights)
        context.combine(second, vector=vector)
        context.apply()
        self.after_step(losses, context)
        return context.info(gradients=first, num_fallbacks=fallbacks, records=self.records())

    @torch.no_grad()
    def _combined(
        self, context: StepContext, second: TaskGradients, rows: Tensor, moved: Tensor, weights: Tensor | None
    ) -> tuple[Tensor, int]:
        """The combined gradient [P], and how many solves fell back."""
        if weights is None or self.flat is None:
            weights = self.inner.step_weights(context, second).to(moved)
            return torch.mv(moved.T, weights), self.inner.num_fallbacks
        product = torch.zeros_like(second.gramian)
        for piece in pieces(moved.shape[1]):
            product += gramian(moved[:, piece] - rows[:, piece])
        # What cancels in the difference leaves fewer digits.
        lengths, left = second.gramian.diagonal().clamp_min(0).sqrt(), product.diagonal().clamp_min(0).sqrt()
        lost = float((lengths[left > 0] / left[left > 0]).max()) if bool((left > 0).any()) else 1.0
        precision = min(0.1, second.precision * max(1.0, lost))
        differences = TaskGradients(second.rows, second.reduced, product, {}, second.reduced, precision=precision)
        self.flat.num_fallbacks = 0
        flat = self.flat.step_weights(context, differences)
        vector = torch.mv(rows.T, (weights - flat).to(rows)) + torch.mv(moved.T, flat.to(moved))
        return vector, self.inner.num_fallbacks + self.flat.num_fallbacks
