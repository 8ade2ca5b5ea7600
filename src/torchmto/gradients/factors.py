"""Inner products of gradients that needn't be formed: those of linear layers' weights and of embeddings.

The gradient of a linear layer's weight is D_i^T X, with the layer's input X [n, in], the same for all tasks, and task i's
cotangent D_i [n, out]. So the inner product of two is the sum of the elements of D_i * (X X^T D_j): with few samples n that
is much less work than K gradients [out, in], and needs less room. An embedding's input is one-hot: only looked-up rows
of its gradients differ from zero.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from torchmto.gradients.rows import products

AT_ONCE = 2**20
"""Elements of the cotangents that are copied next to each other at a time: as much as stays in a processor's cache."""

_INPUTS = {"AddmmBackward0": "mat1", "MmBackward0": "self"}
"""Nodes of products with a matrix -> what they call the other one."""


class Factor(ABC):
    """A parameter whose K gradients are known by their cotangents at one node, and by what the forward kept there.

    Attributes:
        leaf: The parameter.
        node: The node of the only operation that uses it; its first input takes the cotangents.
        between: The nodes between that one and the parameter.
        size: What the cotangent of one task has in elements.
    """

    def __init__(self, leaf: Tensor, node: Node, between: Sequence[Node], size: int) -> None:
        self.leaf = leaf
        self.node = node
        self.between = between
        self.size = size

    @abstractmethod
    def products(self, cotangents: Sequence[Tensor | None]) -> Tensor:
        """The inner products of the gradients, [k, k], from one cotangent per task, None for zero."""


class Linear(Factor):
    """A matrix that samples are multiplied with."""

    def products(self, cotangents: Sequence[Tensor | None]) -> Tensor:
        """Sum of D_i * (X X^T D_j), a few columns of the D at a time."""
        inputs = _inputs(self.node)
        inputs = inputs.to(torch.promote_types(inputs.dtype, torch.float32))
        inner = inputs @ inputs.T
        width = self.size // len(inputs)
        step = max(1, AT_ONCE // (len(cotangents) * len(inputs)))
        total = torch.zeros(())
        for start in range(0, width, step):
            columns = slice(start, min(start + step, width))
            stacked = _stack(cotangents, (len(inputs), width), inputs, columns)
            total = total.to(inner.device) + products(stacked.flatten(1), torch.matmul(inner, stacked).flatten(1))
        return (total + total.T) / 2


class Lookup(Factor):
    """A matrix whose rows are looked up."""

    def products(self, cotangents: Sequence[Tensor | None]) -> Tensor:
        """Inner products of the rows that were looked up."""
        indices: Tensor = self.node._saved_indices.flatten()  # type: ignore[attr-defined] # noqa: SLF001
        stacked = _stack(cotangents, (len(indices), self.leaf.shape[1]), self.leaf)
        padding: int = self.node._saved_padding_idx  # type: ignore[attr-defined] # noqa: SLF001
        stacked[:, indices == padding] = 0
        known, place = torch.unique(indices, return_inverse=True)
        rows = stacked.new_zeros(len(stacked), len(known), stacked.shape[2]).index_add_(1, place, stacked)
        return products(rows.flatten(1))


def _stack(
    cotangents: Sequence[Tensor | None], shape: tuple[int, int], like: Tensor, columns: slice = slice(None)
) -> Tensor:
    """Columns of cotangents [*shape] as one tensor [k, shape[0], columns], float32 at least."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    width = len(range(*columns.indices(shape[1])))
    stacked = torch.empty(len(cotangents), shape[0], width, dtype=dtype, device=like.device)
    for place, cotangent in zip(stacked, cotangents, strict=True):
        if cotangent is None:
            place.zero_()
        else:
            place.copy_(cotangent.reshape(shape)[:, columns])
    return stacked


def find_factors(
    order: Sequence[Node], uses: Mapping[Node, int], wanted: Mapping[int, Tensor], num_tasks: int
) -> dict[Node, Factor]:
    """The nodes whose parameters' inner products are cheaper without their gradients.

    Args:
        order: The nodes of a graph.
        uses: How many edges lead to each of them.
        wanted: ``id`` of a parameter -> it; parameters that no other graph uses.
        num_tasks: K.
    """
    factors: dict[Node, Factor] = {}
    for node in order:
        name = node.name()
        if name in _INPUTS:
            found = _linear(node, uses, wanted, num_tasks)
        elif name == "EmbeddingBackward0":
            found = _lookup(node, uses, wanted)
        else:
            continue
        if found is not None:
            factors[node] = found
    return factors


def _linear(node: Any, uses: Mapping[Node, int], wanted: Mapping[int, Tensor], num_tasks: int) -> Factor | None:
    leaf, between = _parameter(node.next_functions[-1][0], uses, wanted)
    if leaf is None or not _plain(node, _INPUTS[node.name()]) or getattr(node, "_saved_alpha", 1) != 1:
        return None
    given = _inputs(node)
    if given.layout is not torch.strided or given.is_complex() or not given.numel():
        return None
    samples, inputs = given.shape
    outputs = leaf.numel() // inputs
    # Multiplications and room of either way.
    formed = num_tasks * (samples + num_tasks) * leaf.numel()
    factored = samples * samples * inputs + num_tasks * (samples + num_tasks) * samples * outputs
    room = samples * samples + num_tasks * samples * outputs
    if factored >= formed or room > num_tasks * leaf.numel():
        return None
    return Linear(leaf, node, between, samples * outputs)


def _lookup(node: Any, uses: Mapping[Node, int], wanted: Mapping[int, Tensor]) -> Factor | None:
    leaf, between = _parameter(node.next_functions[0][0], uses, wanted)
    turned = any(step.name() == "TBackward0" for step in between)
    if leaf is None or turned or not _plain(node, "indices"):
        return None
    if node._saved_sparse or node._saved_scale_grad_by_freq:  # noqa: SLF001
        return None
    size = node._saved_indices.numel() * leaf.shape[1]  # noqa: SLF001
    return Lookup(leaf, node, between, size) if 2 * size < leaf.numel() else None


def _parameter(
    node: Node | None, uses: Mapping[Node, int], wanted: Mapping[int, Tensor]
) -> tuple[Tensor | None, list[Node]]:
    """The parameter behind transpositions and conversions, if nothing else uses or hooks it; and these."""
    between: list[Node] = []
    while node is not None and uses[node] == 1:
        leaf: Tensor | None = getattr(node, "variable", None)
        if leaf is not None:
            hooked = bool(leaf._backward_hooks)  # noqa: SLF001 - they change gradients that factors never form
            return None if hooked else wanted.get(id(leaf)), between
        if node.name() not in {"TBackward0", "ToCopyBackward0"}:
            break
        between.append(node)
        node = node.next_functions[0][0]
    return None, []


def _inputs(node: Any) -> Tensor:
    """The samples [n, in] of a product with a matrix."""
    inputs: Tensor = getattr(node, f"_saved_{_INPUTS[node.name()]}")
    return inputs.detach()


def _plain(node: Any, name: str) -> bool:
    """Whether a saved tensor is there as it is: hooks (checkpointing, offloading) may be run by backwards only."""
    saved = getattr(node, f"_raw_saved_{name}")
    return getattr(saved, "unpack_hook", saved) is None
