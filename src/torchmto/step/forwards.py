"""The forwards of one step: closures are called here, and nowhere else."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch

from torchmto.checks import warn
from torchmto.gradients import check_keeps, nodes_made, reach_of
from torchmto.step.losses import Chunk, Source, needs_closure, parse
from torchmto.step.parts import Parts, Request
from torchmto.task_norms import active_task


def groups(parts: Parts, closure: Source, names: tuple[str, ...]) -> list[tuple[str, ...]]:
    """The tasks of each call of a closure: task-specific norms need one forward per task."""
    if parts.network.split and not isinstance(closure, Mapping):
        return [(name,) for name in names]
    return [names]


def forwards(parts: Parts, request: Request, *, grad: bool = True, apart: bool = False) -> Iterator[Chunk]:
    """The losses of a batch, one chunk for every call of a closure.

    Args:
        parts: The step's parts.
        request: Of which tasks, on which batch.
        grad: Whether the losses have a graph.
        apart: Whether the wanted tasks get a backward each, one after the other through the same graph.
    """
    if parts.held:
        held, parts.held = parts.held, []
        yield from held
        return
    network = parts.network
    for number, closure in enumerate(parts.sources[request.source]):
        for group in groups(parts, closure, request.asked):
            parts.noise.before((request.source, number), group)
            # The graph of ready losses was made since the last look.
            start = network.nodes_made if isinstance(closure, Mapping) else nodes_made()
            chunk = _call(parts, closure, group, grad=grad)
            if grad:
                network.nodes_made = nodes_made()
                _observe(parts, chunk, closure, group, size=network.nodes_made - start)
                if apart and (network.compiled or network.sharded):
                    check_keeps(loss for index, loss in chunk.losses.items() if index in request.wanted)
            if network.sharded:
                parts.reduction.check_same(chunk, len(parts.sources[request.source]))
            yield chunk


def _call(parts: Parts, closure: Source, names: tuple[str, ...], *, grad: bool) -> Chunk:
    """Run one closure (or read ready losses) for the tasks ``names``."""
    tasks, network = parts.tasks, parts.network
    if isinstance(closure, Mapping):
        if id(closure) in parts.consumed:
            raise needs_closure("This method")
        parts.consumed.add(id(closure))
        parts.num_forward += 1
        given = {name: loss for name, loss in closure.items() if name in names or name not in tasks}
        return parse(given, tasks, names, needs_graph=grad, active=None)[0]
    active = names[0] if len(names) == 1 else None
    with contextlib.nullcontext() if active is None else active_task(active), torch.set_grad_enabled(grad):
        result = closure(names)
    parts.num_forward += 1
    chunk, unasked = parse(result, tasks, names, needs_graph=grad, active=active)
    if unasked is not None and not network.warned_unasked:
        network.warned_unasked = True
        warn(
            f"The closure returned a loss for task `{unasked}`, which wasn't asked for; it is ignored. A closure gets the "
            "tuple of wanted task names and may compute only those. This warning isn't repeated.",
        )
    return chunk


def _observe(parts: Parts, chunk: Chunk, closure: Source, names: tuple[str, ...], *, size: int) -> None:
    """Look at graphs of a size not seen before, and find the parameters that tasks seen for the first time reach.

    What hides parameters from the graph may be switched on at any time, and changes the number of its nodes.
    """
    network = parts.network
    new = [index for index in chunk.losses if index not in network.roles.walked]
    sizes = network.sizes.setdefault(tuple(chunk.losses), set())
    if network.sharded or (not new and size in sizes):
        # FSDP gives the graph other tensors than the optimizer's: roles then come from the gradients.
        return
    network.look(chunk)
    if new:
        _learn(parts, chunk, closure, names, new)
    sizes.add(size)


def _learn(parts: Parts, chunk: Chunk, closure: Source, names: tuple[str, ...], new: list[int]) -> None:
    """Find the roles of the parameters that the tasks ``new`` reach."""
    network, roles = parts.network, parts.network.roles
    if network.compiled and not (roles.given and isinstance(closure, Mapping)):
        chunk = _run_eagerly(parts, closure, names)
    found = {index: reach_of([chunk.losses[index]]).leaves for index in new}
    network.warn_of_untrained(set().union(*found.values()))
    by_id = {id(p): network.name(p) for p in network.parameters}
    columns = len(roles.layout)
    for index, leaves in found.items():
        network.note_precision(leaves)
        reached = [name for key, name in by_id.items() if key in leaves]
        roles.observe(index, reached)
        if reached:
            roles.walked.add(index)
    if network.ranks.size == 1:
        # As several ranks do it, whose methods then draw the same random numbers for the same columns.
        roles.sort(columns, list(by_id.values()))


def _run_eagerly(parts: Parts, closure: Source, names: tuple[str, ...]) -> Chunk:
    """The losses of a compiled model, whose graph shows one opaque node, by a forward without compiling."""
    if isinstance(closure, Mapping):
        raise ValueError(
            "The model is compiled, which hides which parameters a loss reaches. Give `shared=`, or pass a closure so "
            "that they can be found by one eager forward."
        )
    with parts.noise.extra(), torch.compiler.set_stance("force_eager"):
        parts.noise.before((0, 0), names)
        chunk = _call(parts, closure, names, grad=True)
    parts.network.look(chunk)
    return chunk
