"""SDMGrad: stochastic steps towards a common direction near the mean gradient."""

import torch
from torch import Tensor

from torchmto import solvers
from torchmto.methods import Domain, Indices, hyper, register_method, states
from torchmto.methods.gramian.double_sampling import DoubleSampling


@register_method("sdmgrad")
class SDMGrad(DoubleSampling):
    r"""Stochastic direction-oriented multi-objective gradient descent.

    Steps on the simplex along :math:`G_{12} (w + \lambda u)`, u = 1/K, where :math:`G_{12} = J_1 J_2^\top` of two
    independent mini-batches makes them unbiased; the update is :math:`(w + \lambda u)^\top J_3 / (1 + \lambda)`. As
    in the released code :math:`G_{12}` is first divided by the squared mean of its diagonal's roots, the steps have
    momentum, and w goes on from step to step (state).

    Scale: the weights sum to 1. No eps. Independent batches: see
    :class:`~torchmto.methods.gramian.double_sampling.DoubleSampling`. Heads: their own task's gradient, of the step's
    own batch. Not random.

    Args:
        lam: The pull :math:`\lambda` towards the mean gradient.
        num_steps: Steps on the simplex per training step.
        lr: Their learning rate.
        momentum: Their momentum, from rest in every training step.
        **options: ``heads``, ``refresh_every``.

    Source: Xiao et al., Direction-oriented Multi-objective Learning, NeurIPS 2023, Algorithm 1 (steps: its released
    code).

    Example:
        >>> import torch, torchmto
        >>> torchmto.make_method("sdmgrad").weights(torch.eye(2))
        tensor([0.5000, 0.5000])
    """

    use = "Stochastic gradients with an average direction to stay near, and independent mini-batches."
    domain = Domain(
        corners="A task whose gradient stays short takes weight from the others, down to the share that `lam` leaves them."
    )
    lam: float = hyper.number(0.3, minimum=0, search=("log", 0.03, 10.0))
    num_steps: int = hyper.integer(20, minimum=1)
    lr: float = hyper.number(5.0, above=0)
    momentum: float = hyper.number(0.5, minimum=0, below=1)

    def move(self, cross_gramian: Tensor, indices: Indices) -> None:
        """Take the steps on the simplex."""
        solution = solvers.sdmgrad(
            self.as_array(cross_gramian),
            states.shares_of(self.shares, indices).numpy(),
            regularization=self.lam,
            steps=self.num_steps,
            learning_rate=self.lr,
            momentum=self.momentum,
        )
        moved = solvers.sdmgrad_simplex(solution.weights, self.lam).clip(min=0.0)
        states.set_shares(self.shares, indices, torch.from_numpy(moved / moved.sum()))

    def row_weights(self, indices: Indices) -> Tensor:
        """Shares mixed with the mean."""
        return (states.shares_of(self.shares, indices) + self.lam / len(indices)) / (1 + self.lam)
