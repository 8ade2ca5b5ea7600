"""Gradients summed over the ranks. All functions here are called by all ranks together."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _NormBase

from torchmto.gradients import Rows, ShardedRows, real
from torchmto.gradients.ranks import is_sharded, local
from torchmto.step.exchange import raise_together
from torchmto.step.network import Heads, Network


@torch.no_grad()
def sum_heads(
    network: Network, rows: Rows | ShardedRows, heads: Heads, tasks: tuple[int, ...], failure: Exception | None = None
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
        RuntimeError: If another rank failed; this rank's own failure is raised as it is.
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
def sum_gradients(network: Network, failure: Exception | None = None) -> None:
    """Sum ``.grad`` over the ranks, in few buffers; a parameter that no rank reached keeps None.

    Args:
        network: The model.
        failure: What this rank's backward raised.

    Raises:
        RuntimeError: If another rank failed; this rank's own failure is raised as it is.
    """
    if network.ranks.size == 1:
        return
    # FSDP has averaged the gradients of the parameters it shards during the backward.
    parameters = [p for p in network.parameters if not is_sharded(p)] if network.sharded else network.parameters
    if not parameters:
        return
    marks = [failure is not None, *(p.grad is not None for p in parameters)]
    failed, *needed = network.ranks.max_(torch.tensor(marks, dtype=torch.uint8, device=network.device)).tolist()
    if failed:
        raise_together(network.ranks, failure)
    reached = [p for p, mark in zip(parameters, needed, strict=True) if mark]
    for parameter in reached:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    gradients = [p.grad for p in reached if p.grad is not None]
    network.ranks.sum_all_(gradients)
    if network.sharded and gradients:
        torch._foreach_div_(gradients, network.ranks.size)


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
    count too.
    """
    if network.ranks.size == 1:
        return
    pairs = [
        (norm, buffer)
        for norm in network.model.modules()
        for name, buffer in norm.named_buffers(recurse=False)
        if name == "running_group_var" or (isinstance(norm, _NormBase) and name in ("running_mean", "running_var"))
    ]
    sums = [buffer.clone() for _, buffer in pairs]
    network.ranks.sum_all_(sums)
    for (norm, buffer), total in zip(pairs, sums, strict=True):
        if norm.training:
            torch.div(total, network.ranks.size, out=buffer)
