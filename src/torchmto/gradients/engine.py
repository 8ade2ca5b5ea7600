"""What computes the Gramian of the tasks' gradients where the K x P matrix isn't kept."""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

Take = Callable[[int, Tensor, Tensor], None]
"""Called with a task, a parameter outside the shared ones and its gradient."""


@dataclass(frozen=True)
class Piece:
    """The losses of one forward, and where their backwards start.

    Attributes:
        losses: Task -> loss with graph.
        seeds: Task -> cotangent of its loss, None for 1.
        context: What the backwards run in.
    """

    losses: Mapping[int, Tensor]
    seeds: Mapping[int, Tensor | None]
    context: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext


@dataclass(frozen=True)
class Wanted:
    """What a Gramian is computed of.

    Attributes:
        pieces: The forwards that were read, in that order. Gradients are summed over them, and over the ranks.
        tasks: The tasks of all pieces and ranks, k of them.
        shared: The shared parameters, the same ones in the same order on all ranks.
        others: The other parameters: the heads.
        take: Gets each task's gradients of the heads, of this rank.
    """

    pieces: Sequence[Piece]
    tasks: Sequence[int]
    shared: Sequence[Tensor]
    others: Sequence[Tensor]
    take: Take


class Engine(ABC):
    """Computes a Gramian from the graphs of a step's forwards, then takes one weighted backward through the same graphs.

    Attributes:
        name: What ``MultiTask(gradients=)`` calls it.
        adds: Whether it can add gradients up: over several forwards and processes.
        optional: Whether the rows take its place where it can't be used, or isn't worth it.
    """

    name: ClassVar[str]
    adds: ClassVar[bool] = False
    optional: ClassVar[bool] = False

    def suits(self, sources: Sequence[Sequence[Any]], parameters: Sequence[Tensor]) -> bool:
        """Whether it should be used in a step, as far as that can be told before a forward.

        Args:
            sources: For every independent batch its micro-batches, each a closure or ready losses.
            parameters: What is trained.
        """
        return True

    def pays(self, shared: Sequence[Tensor], num_tasks: int) -> bool:
        """Whether it should compute the Gramian of the graphs that it has read: else the rows do."""
        return True

    @abstractmethod
    def begin(self) -> None:
        """Called before the forwards that :meth:`read` will read."""

    @abstractmethod
    def read(self, forwards: Sequence[Mapping[int, Tensor]]) -> dict[int, int]:
        """Read the graphs of each forward's losses, by task: ``id`` of a leaf -> the tasks that reach it, as a bit mask.

        Leaves that can't be heads may be left out.
        """

    @abstractmethod
    def gramian(self, wanted: Wanted) -> Tensor:
        """The Gramian on the shared parameters, [k, k] in the order of the tasks; and the heads' gradients.

        The graphs are kept.
        """

    @abstractmethod
    def forget(self) -> None:
        """Give up the graphs of a step that ended before its backward."""

    @abstractmethod
    def backward(self, pieces: Sequence[Piece], shared: Sequence[Tensor]) -> int:
        """Backward of all losses into ``.grad`` of the shared parameters, of this rank. The graphs are given up.

        Args:
            pieces: The forwards, now with each loss's weight in its seed.
            shared: The shared parameters.

        Returns:
            How many backward passes it took.
        """


def ratio(weighted: Tensor | None, seed: Tensor | None) -> Tensor:
    """A weighted loss's cotangent relative to the loss's own."""
    assert weighted is not None
    return (weighted if seed is None else weighted / seed).detach()
