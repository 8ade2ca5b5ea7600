"""SAMO: sharpness-aware multi-task optimisation with a joint global-local perturbation."""

import torch
from torch import Tensor

from torchmto.gradients.finite import dense, real
from torchmto.methods import Cost, Domain, GramianWeighting, Properties, hyper, register_method
from torchmto.methods.procedures.sharpness import Pairs, SharpnessAware, inner_method
from torchmto.step import StepContext, StepInfo


@register_method("samo")
class SAMO(SharpnessAware):
    r"""Sharpness-aware gradients of every task, perturbed by the mean gradient and a cheap guess of the task's own.

    One backward of the mean loss gives :math:`\bar g`. Task i's own gradient is estimated without a backward: with standard
    normal z, :math:`\hat g_i = z (l_i(\theta + \mu z) - l_i(\theta - \mu z)) / 2 \mu` on the shared parameters, and brought to
    the length of :math:`\bar g` for every parameter tensor by itself. The perturbation is :math:`\rho \, p_i / \|p_i\|` with
    :math:`p_i = \alpha \bar g + (1 - \alpha) \hat g_i`; a head is moved by :math:`\rho` along its part of :math:`\bar g`. The
    task's gradient is taken there, and those of all tasks are combined by the inner method.

    Scale: the inner method's. Heads: their own task's perturbed gradient. No eps (1e-12 in the released code): what vanishes
    moves nothing. The perturbed passes leave norm buffers as they are and draw new noise, as released; the estimates replay
    the noise of the first forward in training mode (released: evaluation mode). Cost: 3 K + 1 forwards, of which 2 K without
    gradient, K + 1 backwards, one optimizer step. Memory: one more K x P matrix. Random: z, per step and task, from
    :attr:`generator`; on another device than the CPU from a generator there that it seeds. The declared properties are those
    with ``fairgrad``.

    Args:
        rho: Length of the perturbation; released: 1e-3 (1e-5 for QM9).
        alpha: Share of the mean gradient in the perturbation, in [0, 1]; released: 0.5 (its ``beta`` is 1 - alpha; QM9: 0.1).
        mu: Length factor of the estimate's steps.
        adaptive: Perturb relative to the parameters' own sizes (ASAM), as an option of the released code.
        inner: A Gramian method (name or object). The released scripts take FairGrad at its released scale,
            ``make_method("fairgrad", scale="released")``.

    Raises:
        TypeError: If ``inner`` isn't a Gramian method.

    Source: Ban, Subramani & Ji, SAMO: A Lightweight Sharpness-Aware Approach for Multi-Task Optimization with Joint
    Global-Local Perturbation, ICCV 2025 (arXiv 2507.07883), as in its released code for CelebA.

    Example:
        >>> import torchmto
        >>> torchmto.make_method("samo", inner="pcgrad").cost(3).num_backward
        4
    """

    use = "Conflicting tasks that overfit: flat minima for about the price of one more backward than K."
    properties = Properties(homogeneity=-1 / 3, equivariant=False, identity=False, pareto=False)
    domain = Domain(corners="A gradient of zero moves nothing. Of the inner method its own domain holds.")
    rho: float = hyper.number(1e-3, minimum=0, search=("log", 1e-5, 1e-1))
    alpha: float = hyper.number(0.5, minimum=0, maximum=1, search=("linear", 0.0, 1.0))
    mu: float = hyper.number(0.01, above=0)
    inner: GramianWeighting = inner_method("fairgrad")

    def cost(self, num_tasks: int) -> Cost:
        """One pass for all tasks, one for each, and two forwards without gradient for each."""
        return Cost(1 + 3 * num_tasks, 1 + num_tasks, 1)

    def step(self, context: StepContext) -> StepInfo:
        """The mean gradient, an estimate per task, gradients where they lead, one optimizer step."""
        network = context.network
        losses = context.backward(lambda values, _: torch.full_like(values, 1 / len(values)))
        context.check(losses)
        # The next backward starts from new ones.
        mean = {network.name(p): (p, real(dense(p.grad))) for p in network.parameters if p.grad is not None}
        shared = {name: pair for name, pair in mean.items() if network.roles.is_shared(name)}

        def shifts_of(task: int) -> Pairs:
            own = [pair for name, pair in mean.items() if name not in shared and task in network.roles.tasks_of(name)]
            return self.shifts(self._joint(context, task, list(shared.values()))) + self.shifts(own)

        gradients, rows = self.perturbed(context, losses, shifts_of)
        self.inner.num_fallbacks = 0
        weights = self.inner.step_weights(context, gradients)
        context.combine(gradients, weights, vector=torch.mv(rows.T, weights.to(rows)))
        context.apply()
        self.after_step(losses, context)
        return context.info(
            weights=weights,
            indices=losses.indices,
            gradients=gradients,
            num_fallbacks=self.inner.num_fallbacks,
            records=self.records(),
        )

    def _joint(self, context: StepContext, task: int, mean: Pairs) -> Pairs:
        """The mean gradient and the estimate of a task's own, on the shared parameters."""
        if self.alpha == 1 or not mean:
            return mean
        noise = [(parameter, self._normal(gradient)) for parameter, gradient in mean]
        changes = []
        for sign in (1.0, -1.0):
            with context.moved([(parameter, sign * self.mu * z) for parameter, z in noise]):
                seen = context.losses([context.tasks[task]])
                changes.append(sign * (seen.raw if seen.factors is None else seen.raw * seen.factors.sign()))
        # Brought to a given length, nothing but its sign is left of the difference, and of the weights in front.
        there = len(changes[0]) == len(changes[1]) == 1
        uphill = float((changes[0] + changes[1]).sign().nan_to_num()) if there else 0.0
        joint: Pairs = []
        for (parameter, gradient), (_, z) in zip(mean, noise, strict=True):
            length = gradient.norm() / z.norm().clamp_min(torch.finfo(z.dtype).tiny)
            joint.append((parameter, self.alpha * gradient + (1 - self.alpha) * uphill * length * z))
        return joint

    def _normal(self, like: Tensor) -> Tensor:
        """Standard normal numbers."""
        generator = self.generator_on(like.device)
        return torch.randn(like.shape, generator=generator, dtype=like.dtype, device=like.device)
