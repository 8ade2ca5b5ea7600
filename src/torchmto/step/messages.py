"""Every message between the ranks of a step: who sends what, and when. All functions here are called by all ranks together.

An exchange (:class:`Exchange`) of losses and counts, or of a method's weights
    before each backward, after a forward without gradient, before each optimizer step.
A row (``Rows.send``), one task's gradient
    as soon as its backward is done, or after the last micro-batch.
The sum of the heads' gradients and of what was reached (:func:`sum_heads`)
    after the backwards of single tasks.
The sum of ``.grad`` (:func:`sum_gradients`), after a message that says what was reached
    after a weighted backward.
The Gramian's K x K inner products
    after the rows.
An engine's segments, K gradients of a few parameters
    while it goes down the graph.
Running statistics of norms (:func:`average_statistics`)
    after the backwards.
Which task reaches which parameter (:class:`~torchmto.gradients.roles.Agreement`)
    when an exchange or one of the two sums said that a rank has learnt of it.
The first error's words (:func:`raise_together`)
    when one of these said that a rank failed.

A rank on which something fails still owes the others the messages they wait for. So between an exchange and the sum that ends
its backwards an error is kept, what is left to send is sent as it is, and the sum says that it isn't worth anything. Anywhere
else the next message of the others is an exchange: the rank answers it with its failure. All ranks end the step together.

What fails in a message (a lost connection, no memory for a buffer, Ctrl-C while it waits) can't be answered: its rank raises
and says no more, the others raise when its connection ends or by their time limit, and none of them takes another step.
"""

import contextlib
import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn

from torchmto.gradients.backwards import PLAIN
from torchmto.gradients.finite import dtype_of_gradient, real
from torchmto.gradients.ranks import Ranks, all_equal, checksum, fingerprint, is_sharded, local
from torchmto.gradients.rows import Rows
from torchmto.gradients.sharded import ShardedRows
from torchmto.gradients.torch_private import NormBase, left_alone
from torchmto.step.network import Heads, Network
from torchmto.step.wrappers import wrappers_around

BEGINNING = 2**18
"""How many numbers of a parameter that isn't trained are compared before the first step."""


class RankFailedError(RuntimeError):
    """Another rank failed, which ended the work on all: in a step, nothing has been updated then."""


class EndedTogether(Exception):  # noqa: N818 - carries an error that all ranks know of
    """Ends a step on all ranks; ``error`` is what this rank raises."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(error)
        self.error = error


def raise_together(ranks: Ranks, failure: BaseException | None) -> NoReturn:
    """End the step on all ranks, because at least one has failed.

    Raises:
        EndedTogether: With this rank's own failure; else a :class:`RankFailedError` with that of the first that failed.
    """
    messages = ranks.objects(None if failure is None else f"{type(failure).__name__}: {failure}")
    if failure is not None:
        raise EndedTogether(failure)
    rank, message = next((rank, text) for rank, text in enumerate(messages) if text is not None)
    raise EndedTogether(RankFailedError(f"Rank {rank} failed, so the step ended on all ranks. {message}"))


def tell(ranks: Ranks, num_tasks: int, device: torch.device, failure: BaseException) -> None:
    """Tell the other ranks of a failure outside a pass: the next message they wait for is an exchange."""
    if ranks.owing:
        # A rank that is gone can't be told.
        with contextlib.suppress(EndedTogether, RuntimeError):
            Exchange(ranks, num_tasks, "")({}, {}, doing="", device=device, disagree=False, failure=failure)


def meet(network: Network, settings: Mapping[str, str]) -> None:
    """Before the first step: find wrappers that the model doesn't know of, and compare what the ranks begin with.

    Args:
        network: The model.
        settings: What a rank was told, in words -> as text.

    Raises:
        ValueError: If there is a wrapper that can't be driven, or the ranks don't have the same settings (with other tasks
            their messages would have different sizes) or parameters, in the same order.
    """
    ranks = network.ranks
    ranks.check_alone()
    if ranks.size == 1:
        return
    if not network.replicas:
        network.replicas = wrappers_around(network.parameters)
        if any(replica.process_group is not (ranks.group or dist.group.WORLD) for replica in network.replicas):
            raise ValueError(
                "Parameter `process_group` should be that of the DistributedDataParallel around the model. Found another one."
            )
    trained = set(map(id, network.parameters))
    apart = left_alone(network.model)
    own = {n: _mark(p, whole=id(p) in trained) for n, p in network.everything().items() if n not in apart}
    everywhere = ranks.objects((settings, own, network.roles.layout))
    first, expected, shared = everywhere[0]
    for rank, (others, sums, layout) in enumerate(everywhere):
        # Other methods have other settings, which the first exchange tells of.
        for what in (what for what in first if others.get(what, first[what]) != first[what]):
            raise ValueError(
                f"The ranks don't have the same {what}. Rank 0: {first[what]}. Rank {rank}: {others[what]}."
            )
        for one, other in (*itertools.zip_longest(expected, sums), *itertools.zip_longest(shared, layout)):
            if one != other:
                raise ValueError(
                    "The ranks' models don't have the same parameters, or shared parameters, in the same order. "
                    f"Found {other} on rank {rank} where rank 0 has {one}."
                )
        differing = [name for name in expected if sums[name] != expected[name]]
        if differing:
            raise ValueError(
                f"Parameter `{differing[0]}` should be the same on all ranks before the first step. Found other values on rank "
                f"{rank} than on rank 0 ({len(differing)} such in all). Call `torch.manual_seed` with the same seed before the "
                "model is built, or wrap it in DistributedDataParallel, which makes all parameters equal but those that its "
                "`_set_params_and_buffers_to_ignore_for_model` names; these may differ."
            )


def _mark(parameter: Tensor, *, whole: bool) -> int:
    """A number made from the bits of a parameter; of one that isn't trained, which may be large, from its beginning."""
    # Of sharded parameters, and others of classes of their own, every rank may hold something else.
    if type(parameter) not in PLAIN or parameter.is_meta or parameter.layout is not torch.strided:
        return 0
    return checksum(parameter if whole else parameter.detach().flatten()[:BEGINNING])


@dataclass(frozen=True)
class Told:
    """What all ranks know after an exchange.

    Attributes:
        totals: Task index -> summed counts, of the tasks that at least one rank brought.
        weighted: Task index -> sum of count times loss, float64.
        disagree: Whether a rank knows of roles that the others may not know.
        even: Whether all ranks brought the same tasks and counts in the same micro-batches.
    """

    totals: dict[int, float]
    weighted: dict[int, Tensor]
    disagree: bool
    even: bool


class Exchange:
    """One small sum over the ranks, from which all of them draw the same conclusions.

    Args:
        ranks: The processes.
        num_tasks: K.
        step: What this step is about, for the check that all ranks are doing the same: its tasks, its random state.
    """

    def __init__(self, ranks: Ranks, num_tasks: int, step: str) -> None:
        self._ranks = ranks
        self._num_tasks = num_tasks
        self._step = step
        self._number = 0

    @torch.no_grad()
    def __call__(
        self,
        totals: Mapping[int, float],
        weighted: Mapping[int, Tensor],
        *,
        doing: str,
        device: torch.device,
        disagree: bool,
        counts: Sequence[object] | None = None,
        failure: BaseException | None = None,
    ) -> Told:
        """Sum counts and losses; called by all ranks together.

        Args:
            totals: Task index -> count.
            weighted: Task index -> count times loss.
            doing: What these losses are for; must be the same everywhere.
            device: Where the process group can send from.
            disagree: Whether this rank knows of roles that the others may not know.
            counts: Tasks and counts of this rank's micro-batches; None if they aren't even among themselves.
            failure: What this rank raised.

        Raises:
            EndedTogether: If a rank failed.
            ValueError: If the ranks aren't doing the same.
        """
        count = self._num_tasks
        self._number += 1
        here = f"{doing}, exchange {self._number} of a step {self._step}"
        marks = fingerprint(here), fingerprint(counts)
        vector = torch.zeros(2 * count + 7, dtype=torch.float64)
        for index, total in totals.items():
            vector[index] = total
        vector[2 * count :] = torch.tensor(
            [failure is not None, disagree, counts is None, *marks, *(mark * mark for mark in marks)]
        )
        vector = vector.to(device)
        if weighted:
            places = torch.tensor([count + index for index in weighted])
            vector[places.to(device)] = torch.stack([value.to(vector) for value in weighted.values()])
        values = self._ranks.sum_(vector).tolist()
        failed, disagreeing, uneven, doings, shapes, doings_squared, shapes_squared = values[2 * count :]
        if failed:
            raise_together(self._ranks, failure)
        if not all_equal(doings, doings_squared, self._ranks.size):
            everywhere = self._ranks.objects(here)
            other = next(rank for rank, text in enumerate(everywhere) if text != everywhere[0])
            raise ValueError(
                "The ranks aren't taking the same step: they need the same tasks, trained parameters, method, weights, state "
                "and seed, and calls of report, end_window and load_state_dict. "
                f"Rank 0: {everywhere[0]}. Rank {other}: {everywhere[other]}."
            )
        present = [index for index in range(count) if values[index] > 0]
        return Told(
            {index: values[index] for index in present},
            {index: vector[count + index] for index in present},
            bool(disagreeing),
            not uneven and all_equal(shapes, shapes_squared, self._ranks.size),
        )


@torch.no_grad()
def sum_heads(
    network: Network,
    rows: Rows | ShardedRows,
    heads: Heads,
    tasks: tuple[int, ...],
    failure: BaseException | None = None,
) -> None:
    """Sum the heads' gradients over the ranks, all in one buffer, and say which shared parameters were reached.

    What a backward has newly found out about the roles of parameters is agreed on here, and parameters that turned
    shared get their columns.

    Args:
        network: The model.
        rows: The gradient matrix, already summed.
        heads: Parameter -> task -> gradient, of this rank; of all ranks afterwards.
        tasks: The tasks that at least one rank brought.
        failure: What this rank's backward raised.

    Raises:
        EndedTogether: If a rank failed.
    """
    disagree = network.agreement.needed
    pairs = _pairs(network, rows, tasks)
    failed, disagree = _sum_pairs(network, rows, heads, pairs, (failure is not None, disagree))
    if failed:
        raise_together(network.ranks, failure)
    if disagree:
        network.agree()
        known = {(id(parameter), task) for parameter, task in pairs}
        new = [pair for pair in _pairs(network, rows, tasks) if (id(pair[0]), pair[1]) not in known]
        _sum_pairs(network, rows, heads, new, (False, False))
    network.lay_out(rows, heads)
    average_statistics(network)


def _pairs(network: Network, rows: Rows | ShardedRows, tasks: tuple[int, ...]) -> list[tuple[Tensor, int]]:
    """Parameters without columns and the tasks among ``tasks`` that reach them, as far as all ranks know."""
    return [
        (parameter, task)
        for parameter in network.parameters
        if id(parameter) not in rows.position
        for task in tasks
        if task in network.agreement.tasks_of(network.name(parameter))
    ]


def _sum_pairs(
    network: Network,
    rows: Rows | ShardedRows,
    heads: Heads,
    pairs: Sequence[tuple[Tensor, int]],
    flags: tuple[bool, bool],
) -> tuple[bool, bool]:
    """Sum the gradients of ``pairs``, marks for what is there, and two flags."""
    columns = len(rows.parameters)
    dtype = functools.reduce(torch.promote_types, (real(p).dtype for p, _ in pairs), torch.float32)
    shapes = [real(parameter).shape for parameter, _ in pairs]
    num_marks = 2 + columns + len(pairs)
    flat = torch.zeros(num_marks + sum(shape.numel() for shape in shapes), dtype=dtype, device=network.device)
    split = torch.split(flat[num_marks:], [shape.numel() for shape in shapes])
    parts = [part.view(shape) for part, shape in zip(split, shapes, strict=True)]
    reached = set(rows.reached())
    marks = [float(flag) for flag in flags] + [float(position in reached) for position in range(columns)]
    for (parameter, task), part in zip(pairs, parts, strict=True):
        gradient = heads.get(id(parameter), (parameter, {}))[1].get(task)
        marks.append(float(gradient is not None))
        if gradient is not None:
            part.copy_(gradient)
    flat[:num_marks] = torch.tensor(marks)
    marks = network.ranks.sum_(flat)[:num_marks].tolist()
    rows.fill(position for position in range(columns) if marks[2 + position])
    for (parameter, task), part, mark in zip(pairs, parts, marks[2 + columns :], strict=True):
        if mark:
            _, held = heads.setdefault(id(parameter), (parameter, {}))
            held[task] = part
    for key, (parameter, held) in heads.items():
        heads[key] = parameter, dict(sorted(held.items()))
    return bool(marks[0]), bool(marks[1])


@torch.no_grad()
def sum_gradients(network: Network, failure: BaseException | None = None) -> None:
    """Sum ``.grad`` over the ranks, in few buffers; a parameter that no rank reached keeps None.

    What the backward has newly found out about the roles of parameters is agreed on here.

    Args:
        network: The model.
        failure: What this rank's backward raised.

    Raises:
        EndedTogether: If a rank failed.
    """
    ranks = network.ranks
    if ranks.size == 1:
        return
    # FSDP has averaged the gradients of the parameters it shards during the backward.
    parameters = [p for p in network.parameters if not is_sharded(p)] if network.sharded else network.parameters
    marks = [failure is not None, network.agreement.needed, *(p.grad is not None for p in parameters)]
    failed, disagree, *needed = ranks.max_(torch.tensor(marks, dtype=torch.uint8, device=network.device)).tolist()
    if failed:
        raise_together(ranks, failure)
    reached = [p for p, mark in zip(parameters, needed, strict=True) if mark]
    for parameter in reached:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter, dtype=dtype_of_gradient(parameter))
    gradients = [p.grad for p in reached if p.grad is not None]
    ranks.sum_all_(gradients)
    if network.sharded and gradients:
        torch._foreach_div_(gradients, ranks.size)
    if disagree:
        network.agree()


@torch.no_grad()
def take_shards(network: Network) -> list[Tensor | None]:
    """What a backward with sharded parameters left in ``.grad``, averaged over the ranks: this rank's parts."""
    sum_gradients(network)
    gradients = [None if p.grad is None else local(p.grad) for p in network.parameters]
    network.zero_grad()
    return gradients


def settle(network: Network, rows: Rows | ShardedRows, heads: Heads) -> None:
    """Agree on roles if need be, and give parameters that turned shared their columns. Gradients are summed already."""
    flag = torch.tensor([float(network.agreement.needed)], device=network.device)
    if network.ranks.max_(flag).item():
        network.agree()
    network.lay_out(rows, heads)
    average_statistics(network)


def own_columns(network: Network, rows: Rows | ShardedRows) -> list[slice]:
    """The columns whose products this rank adds to the Gramian, so that all ranks together add each column once."""
    rank, size = network.ranks.rank, network.ranks.size
    width = rows.matrix.shape[1]
    if size == 1 or network.shard_gradients or (network.sharded and rank == 0):
        return [slice(0, width)]
    if not network.sharded:
        return [slice(width * rank // size, width * (rank + 1) // size)]
    runs: list[slice] = []
    for parameter, columns in zip(rows.parameters, rows.slices, strict=True):
        if not is_sharded(parameter):
            continue
        if runs and runs[-1].stop == columns.start:
            runs[-1] = slice(runs[-1].start, columns.stop)
        else:
            runs.append(columns)
    return runs


@torch.no_grad()
def average_statistics(network: Network) -> None:
    """Average the running statistics of norms in training mode, so that the ranks' models stay the same.

    What a method decides by them (connection strength) must be the same everywhere: those that split norms track for it
    count too. Their numbers of batches become the largest: a rank without labels may not have run the model.
    """
    if network.ranks.size == 1:
        return
    averaged: list[tuple[nn.Module, Tensor]] = []
    counted: list[tuple[nn.Module, Tensor]] = []
    for norm in network.model.modules():
        for name, buffer in norm.named_buffers(recurse=False):
            if name == "num_batches_tracked" and isinstance(norm, NormBase):
                counted.append((norm, buffer))
            elif name == "running_group_var" or (
                isinstance(norm, NormBase) and name in ("running_mean", "running_var")
            ):
                averaged.append((norm, buffer))
    sums = [buffer.clone() for _, buffer in averaged]
    network.ranks.sum_all_(sums)
    for (norm, buffer), total in zip(averaged, sums, strict=True):
        if norm.training:
            # Past the version counter, as the norm's own kernel writes: a graph that is still to be walked backwards checks it,
            # and in training mode doesn't use these numbers.
            torch.div(total, network.ranks.size, out=buffer.data)
    if counted:
        largest = network.ranks.max_(torch.stack([buffer.to(network.device) for _, buffer in counted]))
        for (norm, buffer), count in zip(counted, largest, strict=True):
            if norm.training:
                buffer.copy_(count)
