"""ConsMTL: fair shares of the update, and heads that turn their tasks' gradients towards it."""

import torch
from torch import Tensor

from torchmto.checks import warn
from torchmto.gradients.finite import real
from torchmto.methods import Cost, hyper, register_method
from torchmto.methods.gramian.fairgrad import FairGrad
from torchmto.step import Network, StepContext, TaskGradients


@register_method("consmtl")
class ConsMTL(FairGrad):
    r"""FairGrad's update (alpha = 2) of the shared parameters; heads also learn to agree with it.

    With w the fair weights and :math:`\delta_j` the gradient of task j's loss by the representation, what i's head reads, the
    gradient of i's head is that of :math:`l_i - \lambda \langle \delta_i, \sum_j w_j \delta_j \rangle` with the sum held fixed.
    The second term's gradient over the head is shortened to ``limit`` times the first one's length where it is longer. So heads
    whose tasks pull the representation elsewhere are bent towards the common update: second derivatives, through the heads
    alone.

    The representation is found in the graph: the results that several tasks share where a task's own part reads them (several
    scales are several inputs of a head, also where one is computed from another). Where heads are missing, or nothing but
    parameters is shared, it is FairGrad; so with split norms, whose tasks have a forward each (a warning). Micro-batches that
    differ in their tasks are looked at one by one, so that the second terms aren't those of one batch (a warning): a task alone
    in one has none there. Compiled models are refused, and sharded ones; what PyTorch can't differentiate twice raises its
    error.

    Scale, fallbacks and ``scale="released"`` (times K, clipped to norm 1) as for ``fairgrad``; the representation's sum
    takes w as it is solved for, and weights in front of the losses as constants. No eps (1e-6 in the released clipping). Cost:
    K backwards, one more forward with the same noise, and 2 K backwards through the heads (K more for each further choice of
    results, where heads read different ones). Not random.

    Args:
        strength: :math:`\lambda`. Released: 1 for NYUv2, 50 for Cityscapes and CelebA, 1e-3 for QM9.
        limit: The longest second term, relative to the head's own gradient. Released: 0.1; for Cityscapes by hand 0.05 for
            segmentation and 0 for depth.
        scale: "paper", or "released".

    Source: Qin et al., Towards Consistent Multi-Task Learning: Unlocking the Potential of Task-Specific Parameters, CVPR 2025,
    as in its released code (jianke0604/MTLlib).

    Example:
        >>> import torchmto
        >>> torchmto.make_method("consmtl", strength=50.0).cost(3)
        Cost(num_forward=2, num_backward=9, num_optimizer_steps=1)
    """

    use = (
        "When tasks pull the representation apart and their heads could read it otherwise; twice differentiable heads."
    )
    needs_closure = True
    whole_rows = "takes second derivatives by whole parameters"
    strength: float = hyper.number(1.0, minimum=0, search=("log", 1e-3, 100.0))
    limit: float = hyper.number(0.1, minimum=0)
    alpha = 2.0
    # Reused weights, or the tasks' weights, would change what the heads agree with.
    heads = "unit"
    refresh_every = 1

    def cost(self, num_tasks: int) -> Cost:
        """A pass for the gradients, another one for the heads."""
        return Cost(2, 3 * num_tasks, 1)

    @property
    def only_weighs(self) -> bool:
        """It changes the heads' gradients, too."""
        return False

    def no_backward(self, num_sources: int) -> str:
        """Micro-batches of earlier calls are gone by then."""
        return "runs the model again for second derivatives"

    def attach(self, network: Network) -> None:
        """Say so where the heads can't get their second terms."""
        super().attach(network)
        if network.split:
            warn(
                "Method `consmtl` is FairGrad with split norms: tasks share no representation in a forward of their own."
            )

    def _combine(self, context: StepContext, gradients: TaskGradients) -> Tensor:
        """The fair update, and the second terms of the heads' gradients."""
        # First, since another forward invalidates graphs that an engine has kept.
        weights = super()._combine(context, gradients)
        assert weights is not None
        solved = weights if self.scale == "paper" else self.kept(weights) / len(weights)
        found = context.agreement(gradients, solved)
        for task in gradients.indices:
            pairs = [(parameter, held[task]) for parameter, held in found.values() if task in held]
            length = self.strength * torch.nn.utils.get_total_norm([derivative for _, derivative in pairs])
            own = [held[task] for _, held in gradients.heads.values() if task in held]
            longest = self.limit * torch.nn.utils.get_total_norm(own)
            factor = self.strength * float((longest / length).clamp_max(1).nan_to_num())
            for parameter, derivative in pairs:
                if parameter.grad is not None:
                    real(parameter.grad).sub_(factor * derivative)
        return weights
