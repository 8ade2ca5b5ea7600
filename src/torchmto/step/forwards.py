"""The forwards of one step: closures are called here, and nowhere else, and what they return is checked."""

import contextlib
from collections.abc import Collection, Iterator, Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from torchmto.checks import unknown_task, warn
from torchmto.gradients.reach import check_keeps, reach_of, sight_of
from torchmto.gradients.torch_private import nodes_made
from torchmto.step.losses import Chunk, Source, needs_closure
from torchmto.step.network import Network
from torchmto.step.parts import Parts, Request
from torchmto.step.reduction import check_same
from torchmto.step.surroundings import random_state, set_random_state
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
    network, micro_batches = parts.network, parts.sources[request.source]
    # Whether losses are averages over several forwards with the same tasks, so that counts matter.
    averaged = parts.several or len(micro_batches) > 1 or parts.carried is not None
    for number, closure in enumerate(micro_batches):
        for group in groups(parts, closure, request.asked):
            if parts.repeats or parts.same_noise:
                parts.noise.before((request.source, number), group)
            # The graph of ready losses was made since the last look.
            start = network.nodes_made if isinstance(closure, Mapping) else nodes_made()
            chunk = _call(parts, closure, group, grad=grad)
            if averaged and apart:
                _round_counts(parts, chunk)
            if not averaged:
                chunk.counts = dict.fromkeys(chunk.counts, 1.0)
            if grad:
                network.nodes_made = nodes_made()
                _observe(parts, chunk, closure, group, size=network.nodes_made - start, apart=apart)
                if apart and (network.compiled or network.sharded):
                    check_keeps(loss for index, loss in chunk.losses.items() if index in request.wanted)
            if network.sharded:
                check_same(parts, chunk, len(micro_batches))
            yield chunk


def _call(parts: Parts, closure: Source, names: tuple[str, ...], *, grad: bool) -> Chunk:
    """Run one closure (or read ready losses) for the tasks ``names``."""
    if isinstance(closure, Mapping):
        if id(closure) in parts.consumed:
            raise needs_closure("This method")
        chunk = _parse(parts, closure, names, needs_graph=grad, active=None, ready=True)
        if chunk.losses:
            # What holds none of these tasks can be asked for others.
            parts.consumed.add(id(closure))
            parts.num_forward += 1
        return chunk
    parts.num_forward += 1
    active = names[0] if len(names) == 1 else None
    network = parts.network
    before = None if grad or network.differentiates else random_state()
    while True:
        around = contextlib.nullcontext() if parts.surroundings.neutral else parts.surroundings.restored()
        try:
            with around, torch.set_grad_enabled(grad or network.differentiates):
                if active is None:
                    result = closure(names)
                else:
                    with active_task(active):
                        result = closure(names)
            break
        except RuntimeError as error:
            if before is None or "does not require grad" not in str(error):
                raise
            # It differentiates by itself, as physics-informed losses do: its forwards need a graph, then and from now on.
            network.differentiates = True
            set_random_state(before)
            before = None
    chunk = _parse(parts, result, names, needs_graph=grad, active=active)
    if not grad:
        chunk.losses = {index: loss.detach() for index, loss in chunk.losses.items()}
    return chunk


def _parse(
    parts: Parts, result: object, asked: tuple[str, ...], *, needs_graph: bool, active: str | None, ready: bool = False
) -> Chunk:
    """Check what a closure returned for the tasks ``asked`` and sort it by task.

    Args:
        parts: The step's parts.
        result: What it returned.
        asked: The tasks.
        needs_graph: Whether the losses must have a graph.
        active: The task whose norms were active.
        ready: Whether these are ready losses, which may be of more tasks than ``asked``.

    Raises:
        TypeError: If it isn't a mapping of scalar floating-point tensors.
        ValueError: If it names an unknown task, or a loss isn't scalar or has no graph.
    """
    if not isinstance(result, Mapping):
        raise TypeError(
            f"A closure should return a mapping of task names to scalar losses. Found {type(result).__name__}."
        )
    taken = [(index, name) for index, name in enumerate(parts.tasks) if name in result and name in asked]
    if len(taken) < len(result):
        _check_others(parts, result, asked, ready=ready)
    losses: dict[int, Tensor] = {}
    counts: dict[int, float] = {}
    for index, name in taken:
        loss: Any = result[name]
        count = 1.0
        if isinstance(loss, tuple):
            loss, count = _counted(name, loss)
            if count == 0:
                continue
        good = isinstance(loss, Tensor) and loss.dim() == 0 and loss.is_floating_point()
        if not good or (needs_graph and not loss.requires_grad):
            raise _refusal(name, loss)
        losses[index] = loss
        counts[index] = count
    return Chunk(losses, counts, active)


def _check_others(parts: Parts, result: Mapping[str, Any], asked: tuple[str, ...], *, ready: bool) -> None:
    """Raise if there are losses of unknown tasks; warn once of losses that nobody asked for."""
    unknown = [name for name in result if name not in parts.tasks]
    if unknown:
        raise ValueError(unknown_task(unknown[0], parts.tasks, "among the losses"))
    if not ready and "unasked" not in parts.network.warned:
        parts.network.warned.add("unasked")
        unasked = next(name for name in result if name not in asked)
        warn(
            f"The closure returned a loss for task `{unasked}`, which wasn't asked for; it is ignored. A closure gets the "
            "tuple of wanted task names and may compute only those. This warning isn't repeated.",
        )


def _counted(task: str, value: tuple[Any, ...]) -> tuple[Any, float]:
    """A loss and its count."""
    if len(value) != 2:
        raise ValueError(f"Task `{task}` should bring `loss` or `(loss, count)`. Found {len(value)} values.")
    loss, count = value
    count = float(count) if isinstance(count, Real | Tensor) else count
    if not isinstance(count, float) or not 0 <= count < float("inf"):
        raise ValueError(f"The count of task `{task}` should be a non-negative number. Found {count!r}.")
    return loss, count


def _round_counts(parts: Parts, chunk: Chunk) -> None:
    """Round counts to the types of their losses, in which backwards multiply by them: shares then add up to one."""
    for index, loss in chunk.losses.items():
        if loss.dtype in (torch.float16, torch.bfloat16):
            count = float(torch.tensor(chunk.counts[index], dtype=loss.dtype))
            if not 0 < count < float("inf"):
                raise ValueError(
                    f"The count {chunk.counts[index]:g} of task `{parts.tasks[index]}` doesn't fit the type of its loss, "
                    f"{loss.dtype}. Return the loss as float32: `(loss.float(), count)`."
                )
            chunk.counts[index] = count


_WITHOUT_LABELS = "If the batch has no labels for it, leave the task out, or give it count 0."


def _refusal(task: str, loss: object) -> Exception:
    """Why this can't be a task's loss."""
    if not isinstance(loss, Tensor):
        return TypeError(
            f"The loss of task `{task}` should be a scalar tensor. Found {type(loss).__name__}. {_WITHOUT_LABELS}"
        )
    if loss.dim() != 0:
        return ValueError(f"The loss of task `{task}` should be a scalar tensor. Found shape {list(loss.shape)}.")
    if not loss.is_floating_point():
        return TypeError(f"The loss of task `{task}` should be a floating-point tensor. Found dtype {loss.dtype}.")
    mode = "inference_mode" if loss.is_inference() else "no_grad"
    return ValueError(
        f"The loss of task `{task}` has no autograd graph, so it has no gradient. Was it computed under "
        f"torch.{mode}(), detached, or from frozen parameters only? {_WITHOUT_LABELS}"
    )


def _observe(parts: Parts, chunk: Chunk, closure: Source, names: tuple[str, ...], *, size: int, apart: bool) -> None:
    """Look at graphs of a size not seen before, and find the parameters that tasks seen for the first time reach.

    What hides parameters from the graph may be switched on at any time, and changes the number of its nodes; but inside a
    compiled region nothing does that shows.
    """
    network = parts.network
    new = [index for index in chunk.losses if index not in network.roles.walked]
    sizes = network.sizes.setdefault((apart, *chunk.losses), set())
    looked = not new and size in sizes
    if network.sharded or (looked and not network.opaque):
        # FSDP gives the graph other tensors than the optimizer's: roles then come from the gradients.
        return
    if not looked:
        network.look(chunk, again=apart)
    if new:
        _learn(parts, chunk, closure, names, list(chunk.losses) if network.opaque else new)
    if network.opaque:
        _look_behind(parts, chunk, closure, names, learnt=bool(new))
    sizes.add(size)


def _look_behind(parts: Parts, chunk: Chunk, closure: Source, names: tuple[str, ...], *, learnt: bool) -> None:
    """Learn what lies outside of compiled regions; and, where nothing tells what they hide, by a forward without compiling.

    Args:
        parts: The step's parts.
        chunk: The forward.
        closure: What it comes from.
        names: The tasks that were asked for.
        learnt: Whether there has been such a forward just now.
    """
    network = parts.network
    sights = {index: sight_of(loss) for index, loss in chunk.losses.items()}
    _tell(network, {index: sight.clear for index, sight in sights.items()})
    # Ready losses can't be run again, so new code of theirs is taken to do what the old one did.
    before = set(network.regions.zeros)
    by_name = dict(zip(network.names(), network.parameters, strict=True))
    unclear = network.regions.unclear(sights, by_name, known=isinstance(closure, Mapping) and not network.roles.given)
    if unclear and not learnt:
        _learn(parts, chunk, closure, names, list(chunk.losses))
    network.regions.settle(unclear)
    if network.regions.zeros != before:
        network.places = {}


def _learn(parts: Parts, chunk: Chunk, closure: Source, names: tuple[str, ...], new: list[int]) -> None:
    """Find the roles of the parameters that the tasks ``new`` reach."""
    network, roles = parts.network, parts.network.roles
    if network.compiled and not (roles.given and isinstance(closure, Mapping)):
        chunk = _run_eagerly(parts, closure, names)
    found = {index: reach_of([chunk.losses[index]]).leaves for index in new if index in chunk.losses}
    for leaves in found.values():
        network.note_precision(leaves)
    roles.walked |= _tell(network, found)


def _tell(network: Network, found: Mapping[int, Collection[int]]) -> set[int]:
    """Tell the roles which leaves, by ``id``, tasks have reached; return the tasks that have reached a parameter."""
    roles = network.roles
    by_id = {id(p): network.name(p) for p in network.parameters}
    columns = len(roles.layout)
    told = set()
    for index, leaves in found.items():
        reached = [name for key, name in by_id.items() if key in leaves]
        roles.observe(index, reached)
        if reached:
            told.add(index)
    if network.ranks.size == 1:
        # As several ranks do it, whose methods then draw the same random numbers for the same columns.
        roles.sort(columns, list(by_id.values()))
    return told


def _run_eagerly(parts: Parts, closure: Source, names: tuple[str, ...]) -> Chunk:
    """The losses of a compiled model, whose graph shows one opaque node, by a forward without compiling."""
    if isinstance(closure, Mapping):
        raise ValueError(
            "The model is compiled, which hides which parameters a loss reaches. Give `shared=`, or pass a closure so "
            "that they can be found by one eager forward."
        )
    with parts.noise.extra(), torch.compiler.set_stance("force_eager"):
        parts.network.room.set_aside()
        parts.noise.before((0, 0), names)
        chunk = _call(parts, closure, names, grad=True)
    parts.network.look(chunk)
    return chunk
