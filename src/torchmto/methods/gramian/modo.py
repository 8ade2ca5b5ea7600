"""MoDo: one double-sampling step on the simplex per training step."""

import torch
from torch import Tensor

from torchmto import solvers
from torchmto.methods import Domain, Indices, Properties, hyper, register_method, states
from torchmto.methods.gramian.double_sampling import DoubleSampling


@register_method("modo")
class MoDo(DoubleSampling):
    r"""Multi-objective gradient with double sampling.

    Every step moves the weights by :math:`w \leftarrow \Pi_\Delta(w - \gamma (G_{12} + \rho I) w)`, where
    :math:`G_{12} = J_1 J_2^\top` of two independent mini-batches makes the step unbiased; the update is :math:`w^\top
    J_3` with the new w.

    Scale: the weights sum to 1. The learning rate is meant for gradients as they are, so the method isn't
    homogeneous. Independent batches: see :class:`~torchmto.methods.gramian.double_sampling.DoubleSampling`. Heads:
    their own task's gradient, of the step's own batch (LibMTL averages all three). Not random.

    Args:
        gamma: Learning rate of the weights.
        rho: Pull towards equal weights.
        **options: ``heads``, ``refresh_every``.

    Source: Chen et al., Three-Way Trade-Off in Multi-Objective Learning, NeurIPS 2023, Algorithm 1.

    Example:
        >>> import torch, torchmto
        >>> torchmto.make_method("modo", gamma=0.1, rho=0.0).weights(torch.tensor([[1.0, 0.0], [0.0, 3.0]]))
        tensor([0.5500, 0.4500])
    """

    use = "Generalisation-minded multi-objective training with independent mini-batches."
    properties = Properties(homogeneity=None)
    domain = Domain(
        corners="A task whose gradient stays short takes weight from the others, against the pull of `rho`."
    )
    gamma: float = hyper.number(1e-3, above=0, search=("log", 1e-4, 1e-1))
    rho: float = hyper.number(0.1, minimum=0, search=("log", 1e-3, 1.0))

    def move(self, cross_gramian: Tensor, indices: Indices) -> None:
        """Take one step on the simplex."""
        solution = solvers.modo(
            self.as_array(cross_gramian),
            states.shares_of(self.shares, indices).numpy(),
            regularization=self.rho,
            learning_rate=self.gamma,
        )
        states.set_shares(self.shares, indices, torch.from_numpy(solution.weights))

    def row_weights(self, indices: Indices) -> Tensor:
        """The shares themselves."""
        return states.shares_of(self.shares, indices)
