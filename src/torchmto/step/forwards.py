"""The forwards of one step: closures are called here, and nowhere else."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence

import torch

from torchmto.gradients import check_keeps, reached_parameters
from torchmto.step.info import Passes
from torchmto.step.losses import Chunk, Source, needs_closure, parse
from torchmto.step.network import Network
from torchmto.step.noise import Noise
from torchmto.step.reduction import Reduction, Sums
from torchmto.structure import active_task


class Forwards:
    """Calls the closures of one step, and learns from their graphs which task reaches which parameter.

    Args:
        network: The model and the roles of its parameters.
        tasks: The names of all tasks.
        asked: The tasks this step is about.
        sources: For every independent batch the list of its micro-batches, each a closure or ready losses.
        noise: Random states of the forwards, for those that are repeated.
        passes: Where forwards are counted.
        reduction: How other ranks are told of a forward that failed.
    """

    def __init__(
        self,
        network: Network,
        tasks: tuple[str, ...],
        asked: tuple[str, ...],
        sources: Sequence[Sequence[Source]],
        *,
        noise: Noise,
        passes: Passes,
        reduction: Reduction,
    ) -> None:
        self.sources = sources
        self._network = network
        self._tasks = tasks
        self.asked = asked
        self._noise = noise
        self._passes = passes
        self._reduction = reduction
        self._consumed: set[int] = set()
        self.held: list[Chunk] = []

    def names(self, tasks: Sequence[str] | None) -> tuple[str, ...]:
        """Those of ``tasks`` that this step is about; all of them by default."""
        if tasks is None:
            return self.asked
        return tuple(name for name in tasks if name in self.asked)

    def groups(self, closure: Source, names: tuple[str, ...]) -> list[tuple[str, ...]]:
        """The tasks of each call of a closure: task-specific norms need one forward per task."""
        if self._network.split and not isinstance(closure, Mapping):
            return [(name,) for name in names]
        return [names]

    def run(
        self, names: tuple[str, ...], source: int, *, grad: bool = True, apart: Collection[int] = ()
    ) -> Iterator[Chunk]:
        """The losses of the tasks ``names``, one chunk for every call of a closure.

        Args:
            names: The tasks the closures are asked for.
            source: Which independent batch.
            grad: Whether the losses have a graph.
            apart: The tasks that get a backward each, one after the other through the same graph.
        """
        network = self._network
        if self.held:
            # They have been run: an engine has left their gradients to the rows.
            held, self.held = self.held, []
            yield from held
            return
        for number, closure in enumerate(self.sources[source]):
            for group in self.groups(closure, names):
                try:
                    self._noise.before((source, number), group)
                    chunk = self._call(closure, group, grad=grad)
                    if grad:
                        self._observe(chunk, closure, group)
                        if apart and (network.compiled or network.sharded):
                            check_keeps(loss for index, loss in chunk.losses.items() if index in apart)
                except Exception as error:
                    if network.ranks.size > 1:
                        self._reduction.tell(Sums(), failure=error)
                    raise
                if network.sharded:
                    self._reduction.check_same(chunk, len(self.sources[source]))
                yield chunk

    def _call(self, closure: Source, names: tuple[str, ...], *, grad: bool) -> Chunk:
        """Run one closure (or read ready losses) for the tasks ``names``."""
        if isinstance(closure, Mapping):
            if id(closure) in self._consumed:
                raise needs_closure("This method")
            self._consumed.add(id(closure))
            self._passes.forward += 1
            chunk, _ = parse(
                {name: loss for name, loss in closure.items() if name in names or name not in self._tasks},
                self._tasks,
                names,
                needs_graph=grad,
                active=None,
            )
            return chunk
        active = names[0] if len(names) == 1 else None
        norms = contextlib.nullcontext() if active is None else active_task(active)
        with norms, torch.set_grad_enabled(grad):
            result = closure(names)
        self._passes.forward += 1
        chunk, unasked = parse(result, self._tasks, names, needs_graph=grad, active=active)
        if unasked is not None and not self._network.warned_unasked:
            self._network.warned_unasked = True
            warnings.warn(
                f"The closure returned a loss for task `{unasked}`, which wasn't asked for; it is ignored. A closure gets the "
                "tuple of wanted task names and may compute only those. This warning isn't repeated.",
                stacklevel=2,
            )
        return chunk

    def _observe(self, chunk: Chunk, closure: Source, names: tuple[str, ...]) -> None:
        """Find the roles of the parameters that tasks seen for the first time reach."""
        network, roles = self._network, self._network.roles
        new = [index for index in chunk.losses if index not in network.walked]
        if not new or network.sharded:
            # FSDP gives the graph other tensors than the optimizer's: roles then come from the gradients.
            return
        found = {index: reached_parameters(chunk.losses[index]) for index in new}
        if any(compiled for _, compiled in found.values()):
            network.compiled = True
            if not (roles.given and isinstance(closure, Mapping)):
                found = self._probe_eagerly(closure, names, new)
        network.walked.update(new)
        network.warn_of_untrained(set().union(*(leaves for leaves, _ in found.values())))
        by_id = {id(p): network.name(p) for p in network.parameters}
        columns = len(roles.layout)
        for index, (leaves, _) in found.items():
            roles.observe(index, [name for key, name in by_id.items() if key in leaves])
        if network.ranks.size == 1:
            # As several ranks do it, whose methods then draw the same random numbers for the same columns.
            roles.sort(columns, list(by_id.values()))
            roles.check()

    def _probe_eagerly(
        self, closure: Source, names: tuple[str, ...], new: list[int]
    ) -> dict[int, tuple[set[int], bool]]:
        """Roles of a compiled model: its graph shows one opaque node, so the forward is run once without compiling."""
        if isinstance(closure, Mapping):
            raise ValueError(
                "The model is compiled, which hides which parameters a loss reaches. Give `shared=`, or pass a closure so "
                "that they can be found by one eager forward."
            )
        with self._noise.extra(), torch.compiler.set_stance("force_eager"):
            self._noise.before((0, 0), names)
            chunk = self._call(closure, names, grad=True)
        return {index: reached_parameters(chunk.losses[index]) for index in new}
