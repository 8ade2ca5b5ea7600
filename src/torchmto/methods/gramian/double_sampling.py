"""Methods whose weights come from two independent mini-batches."""

from abc import abstractmethod

from torch import Tensor

from torchmto.checks import warn
from torchmto.methods import GramianWeighting, Indices, states
from torchmto.step import Network, StepContext, TaskGradients


class DoubleSampling(GramianWeighting):
    r"""Base of methods that move a point of the simplex by :math:`G_{12} = J_1 J_2^\top` of two batches.

    With ``mt.step(closure, independent=(c2, c3))`` the two matrices come from c2 and c3, and the weights apply to the
    gradients of ``closure``, the third sample. With one more batch they come from ``closure`` and it. Without, the
    same batch is reused, which biases the weights; that is warned of once. A further batch costs a forward and K
    backwards.

    A subclass implements :meth:`move` and :meth:`row_weights`.
    """

    independent_batches = 2
    # A point of the simplex [K], uniform at first.
    shares: Tensor = states.shares()
    _warned_of_reuse = False

    def refusal(self, network: Network) -> str:
        """The rows of several batches are needed at once."""
        if network.engine is not None:
            return "needs products between the gradients of several batches"
        return super().refusal(network)

    @abstractmethod
    def move(self, cross_gramian: Tensor, indices: Indices) -> None:
        """Move the shares of the tasks ``indices`` by their cross-Gramian [k, k]."""

    @abstractmethod
    def row_weights(self, indices: Indices) -> Tensor:
        """The weights of the present tasks' gradients, from their shares, float64 [k]."""

    def weights(self, gramian: Tensor, losses: Tensor | None = None, indices: Indices | None = None) -> Tensor:
        """Move the shares by a Gramian or cross-Gramian (which needs no symmetry); the weights after that, [k]."""
        self.ensure_setup(len(gramian))
        present = tuple(range(len(gramian))) if indices is None else tuple(indices)
        self.move(gramian, present)
        return self.row_weights(present).to(gramian)

    def step_weights(self, context: StepContext, gradients: TaskGradients) -> Tensor:
        """Weights for the gradients of the step's own batch, with the cross-Gramian of the independent ones."""
        if context.num_sources == 1:
            if not self._warned_of_reuse:
                self._warned_of_reuse = True
                warn(
                    f"Method `{self.name}` needs independent mini-batches, `mt.step(closure, independent=(c2, c3))`. "
                    "Without them the same batch is reused, which biases its weights; this warning isn't repeated.",
                )
            return super().step_weights(context, gradients)
        first = gradients if context.num_sources == 2 else context.gradients(source=1)
        second = context.gradients(source=1 if context.num_sources == 2 else 2)
        common = [i for i in first.indices if i in second.indices and i in gradients.indices]
        if common:
            rows = [first.indices.index(task) for task in common]
            columns = [second.indices.index(task) for task in common]
            self.move(context.inner_products(first, second)[rows][:, columns], common)
        return self.row_weights(gradients.indices).to(gradients.gramian)
