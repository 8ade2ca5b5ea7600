"""What computes the Gramian of the tasks' gradients where the K x P matrix isn't kept."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

Take = Callable[[int, Tensor, Tensor], None]
"""Called with a task, a parameter outside the shared ones and its gradient."""


class Engine(ABC):
    """Computes a Gramian from the graph of one forward, then takes one weighted backward through the same graph.

    Attributes:
        name: What ``MultiTask(gradients=)`` calls it.
    """

    name: str

    @abstractmethod
    def begin(self) -> None:
        """Called before the forward."""

    @abstractmethod
    def read(self, losses: Mapping[int, Tensor]) -> dict[int, int]:
        """Read the graph of the losses, by task: ``id`` of a leaf -> the tasks that reach it, as a bit mask.

        Leaves that can't be heads may be left out.
        """

    @abstractmethod
    def gramian(
        self,
        losses: Mapping[int, Tensor],
        seeds: Mapping[int, Tensor | None],
        *,
        shared: Sequence[Tensor],
        others: Sequence[Tensor],
        take: Take,
    ) -> Tensor:
        """The Gramian on the shared parameters, and the heads' gradients. The graph is kept.

        Args:
            losses: Task -> loss with graph, k of them; those that were read.
            seeds: Task -> cotangent of its loss, None for 1.
            shared: The shared parameters.
            others: The other parameters: the heads.
            take: Gets each task's gradients of the heads.

        Returns:
            [k, k] in the order of ``losses``.
        """

    @abstractmethod
    def backward(self, losses: Sequence[Tensor], cotangents: Sequence[Tensor], shared: Sequence[Tensor]) -> None:
        """One backward of all losses into ``.grad`` of the shared parameters. The graph is given up.

        Args:
            losses: The losses of :meth:`gramian`, in its order.
            cotangents: One per loss: what its gradient is multiplied by.
            shared: The shared parameters.
        """
