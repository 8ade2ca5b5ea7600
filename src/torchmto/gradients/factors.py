"""Inner products of gradients that needn't be formed: those of the weights of linear layers and convolutions, and embeddings.

The gradient of a linear layer's weight is D_i^T X, with the layer's input X [n, in], the same for all tasks, and task i's
cotangent D_i [n, out]. So the inner product of two is the sum of the elements of D_i * (X X^T D_j): with few samples n that
is much less work than K gradients [out, in], and needs less room. A convolution is the same with positions for samples and
patches for inputs. The mean sample m is taken apart, X - 1 m^T and m being the samples of D_i and of its sum over the
samples: behind a batch norm that sum is nearly zero, and where the mean is large all else would be lost in what cancels. An
embedding's input is one-hot: only looked-up rows of its gradients differ from zero. A weighted sum of the gradients takes no
more than one product, with the weighted sum of the cotangents.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from torchmto.gradients.reach import can_be_called, leaf_of
from torchmto.gradients.rows import products, wide_dtype
from torchmto.gradients.torch_private import has_hooks, hooked, places, saved

AT_ONCE = 2**20
"""Elements of the cotangents that are multiplied at a time: as much as stays in a processor's cache."""

AT_ONCE_ELSEWHERE = 2**25
"""The same on other devices, whose launches cost more than what memory they take."""

TRAFFIC = 60
"""What an element of a gradient costs that is written, copied to its row, read for the Gramian and again for the combination,
in multiplications: a fit to processors, where memory is slow in about the same way."""

TURNING = frozenset(("TBackward0", "ToCopyBackward0"))
"""Nodes that do no more than transpose or convert."""

_INPUTS = {"AddmmBackward0": "mat1", "MmBackward0": "self"}
"""Nodes of products with a matrix -> what they call the other one."""


class Factor(ABC):
    """A parameter whose K gradients are known by their cotangents at one node, and by what the forward kept there.

    Attributes:
        leaf: The parameter.
        node: The node of the only operation that uses it; its first input takes the cotangents.
        between: The nodes between that one and the parameter.
        size: What the cotangent of one task has in elements.
        gain: How many multiplications fewer the K gradients take than if they were formed.
    """

    def __init__(self, leaf: Tensor, node: Node, between: Sequence[Node], size: int, gain: float) -> None:
        self.leaf = leaf
        self.node: Any = node
        self.between = between
        self.size = size
        self.gain = gain

    @abstractmethod
    def products(self, cotangents: Tensor) -> Tensor:
        """The inner products of the gradients, [k, k], from one cotangent per task, [k, *shape]."""

    def combined(self, cotangent: Tensor) -> Tensor:
        """The gradient that belongs to one cotangent: a weighted sum of the tasks'."""
        gradient = self._gradient(cotangent)
        for node in self.between:
            gradient = gradient.mT if node.name() == "TBackward0" else gradient
        return gradient

    @abstractmethod
    def _gradient(self, cotangent: Tensor) -> Tensor:
        """The gradient as it leaves the node."""


class Linear(Factor):
    """A matrix that samples are multiplied with."""

    def _given(self) -> Tensor:
        return _inputs(self.node)

    def _samples(self, cotangents: Tensor) -> Tensor:
        """Cotangents as [k, samples, outputs]."""
        return cotangents

    def products(self, cotangents: Tensor) -> Tensor:
        """Sum of D_i * (X X^T D_j), a few columns of the D at a time; the mean sample apart."""
        given = _wide(self._given())
        mean = given.mean(0, keepdim=True)
        given = torch.cat([given - mean, mean])
        inner = given @ given.T
        cotangents = self._samples(cotangents)
        elements = AT_ONCE if cotangents.is_cpu else AT_ONCE_ELSEWHERE
        step = max(1, elements // (len(cotangents) * len(given)))
        total: Tensor | None = None
        for start in range(0, cotangents.shape[2], step):
            # One long product instead of k short ones, then inner products sample by sample.
            part = _wide(cotangents[:, :, start : start + step]).transpose(0, 1)
            part = torch.cat([part, part.sum(0, keepdim=True)])
            other = (inner @ part.flatten(1)).view(part.shape)
            found = torch.bmm(part, other.mT).sum(0, dtype=wide_dtype(part.device))
            total = found if total is None else total + found
        assert total is not None
        return (total + total.T) / 2

    def _gradient(self, cotangent: Tensor) -> Tensor:
        return (cotangent.mT @ _inputs(self.node).to(cotangent)).mT


class Patches(Linear):
    """The kernels of a convolution in two dimensions."""

    def _geometry(self, name: str) -> tuple[int, ...]:
        """What the node has saved, for each dimension: one number may stand for both, as ``padding="valid"`` is kept."""
        given = tuple(saved(self.node, name))
        return given * 2 if len(given) == 1 else given

    def _given(self) -> Tensor:
        geometry = {name: self._geometry(name) for name in ("dilation", "padding", "stride")}
        inputs = saved(self.node, "input").detach()
        patches = torch.nn.functional.unfold(inputs, self.leaf.shape[2:], **geometry)
        return patches.transpose(1, 2).flatten(0, 1)

    def _samples(self, cotangents: Tensor) -> Tensor:
        return cotangents.flatten(3).transpose(2, 3).flatten(1, 2)

    def _gradient(self, cotangent: Tensor) -> Tensor:
        given = saved(self.node, "input").detach().to(cotangent)
        geometry = [self._geometry(name) for name in ("stride", "padding", "dilation")]
        found: tuple[Tensor, ...] = torch.ops.aten.convolution_backward(
            cotangent, given, self.leaf.detach().to(cotangent), None, *geometry, False, [0, 0], 1, [False, True, False]
        )
        return found[1]


class Lookup(Factor):
    """A matrix whose rows are looked up."""

    def _rows(self, cotangents: Tensor) -> tuple[Tensor, Tensor]:
        """Cotangents as [k, lookups, width] without those of padding, and what was looked up."""
        indices: Tensor = saved(self.node, "indices").flatten()
        kept = indices != saved(self.node, "padding_idx")
        stacked = _wide(cotangents).reshape(len(cotangents), len(indices), self.leaf.shape[1])
        return stacked * kept[:, None], indices

    def products(self, cotangents: Tensor) -> Tensor:
        """Inner products of the rows that were looked up."""
        stacked, indices = self._rows(cotangents)
        known, place = torch.unique(indices, return_inverse=True)
        rows = stacked.new_zeros(len(stacked), len(known), stacked.shape[2]).index_add_(1, place, stacked)
        return products(rows.flatten(1))

    def _gradient(self, cotangent: Tensor) -> Tensor:
        stacked, indices = self._rows(cotangent.unsqueeze(0))
        return stacked.new_zeros(self.leaf.shape).index_add_(0, indices, stacked[0])


def _wide(tensor: Tensor) -> Tensor:
    """A tensor in float32 at least."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def find_factors(
    order: Sequence[Node], uses: Mapping[Node, int], wanted: Mapping[int, Tensor], num_tasks: int
) -> dict[Node, Factor]:
    """The nodes whose parameters' inner products are cheaper without their gradients.

    Args:
        order: Nodes of a graph.
        uses: How many edges lead to each of them.
        wanted: ``id`` of a parameter -> it; parameters that no other graph uses.
        num_tasks: K.
    """
    factors: dict[Node, Factor] = {}
    for node in order:
        find = _FINDERS.get(node.name())
        factor = None if find is None else find(node, uses, wanted, num_tasks)
        if factor is not None and can_be_called(node):
            factors[node] = factor
    return factors


def _linear(node: Any, uses: Mapping[Node, int], wanted: Mapping[int, Tensor], num_tasks: int) -> Factor | None:
    leaf, between = _parameter(node.next_functions[-1][0], uses, wanted)
    if leaf is None or hooked(node) or saved(node, "alpha", 1) != 1:
        return None
    given = _inputs(node)
    if given.layout is not torch.strided or given.is_complex() or not given.numel():
        return None
    samples, inputs = given.shape
    return _if_cheaper(Linear, (leaf, node, between), (samples, inputs), num_tasks)


def _convolution(node: Any, uses: Mapping[Node, int], wanted: Mapping[int, Tensor], num_tasks: int) -> Factor | None:
    leaf, between = _parameter(node.next_functions[1][0], uses, wanted)
    if leaf is None or leaf.dim() != 4 or hooked(node) or saved(node, "transposed") or saved(node, "groups") != 1:
        return None
    given = saved(node, "input")
    if given.dim() != 4 or not given.numel():
        return None
    inputs = leaf[0].numel()
    samples = len(given) * math.prod(places(node)[0].shape[2:])
    # The patches aren't there yet.
    return _if_cheaper(Patches, (leaf, node, between), (samples, inputs), num_tasks, room=samples * inputs)


def _if_cheaper(
    kind: Callable[[Tensor, Node, Sequence[Node], int, float], Factor],
    found: tuple[Tensor, Node, Sequence[Node]],
    given: tuple[int, int],
    num_tasks: int,
    room: int = 0,
) -> Factor | None:
    """A factor for a matrix of ``given`` = (samples, inputs), if it takes less time and room than the gradients."""
    leaf, node, between = found
    samples, inputs = given
    size = samples * (leaf.numel() // inputs)
    formed = num_tasks * (samples + num_tasks + TRAFFIC) * leaf.numel()
    factored = samples * samples * inputs + samples * leaf.numel() + num_tasks * (samples + num_tasks + TRAFFIC) * size
    room += samples * samples + num_tasks * size
    if factored >= formed or room > num_tasks * leaf.numel():
        return None
    return kind(leaf, node, between, size, formed - factored)


def _lookup(node: Any, uses: Mapping[Node, int], wanted: Mapping[int, Tensor], num_tasks: int) -> Factor | None:
    leaf, between = _parameter(node.next_functions[0][0], uses, wanted)
    turned = any(step.name() == "TBackward0" for step in between)
    if leaf is None or turned or hooked(node):
        return None
    if saved(node, "sparse") or saved(node, "scale_grad_by_freq"):
        return None
    size = saved(node, "indices").numel() * leaf.shape[1]
    gain = num_tasks * (TRAFFIC + num_tasks) * (leaf.numel() - size)
    return Lookup(leaf, node, between, size, gain) if 2 * size < leaf.numel() else None


_FINDERS = {
    "AddmmBackward0": _linear,
    "MmBackward0": _linear,
    "ConvolutionBackward0": _convolution,
    "EmbeddingBackward0": _lookup,
}


def _parameter(
    node: Node | None, uses: Mapping[Node, int], wanted: Mapping[int, Tensor]
) -> tuple[Tensor | None, list[Node]]:
    """The parameter behind transpositions and conversions, if nothing else uses or hooks it; and these."""
    between: list[Node] = []
    while node is not None and uses[node] == 1:
        leaf = leaf_of(node)
        if leaf is not None:
            # Hooks change gradients, and factors never form any.
            return None if has_hooks(leaf) else wanted.get(id(leaf)), between
        if node.name() not in TURNING:
            break
        between.append(node)
        node = node.next_functions[0][0]
    return None, []


def _inputs(node: Any) -> Tensor:
    """The samples [n, in] of a product with a matrix."""
    inputs: Tensor = saved(node, _INPUTS[node.name()])
    return inputs.detach()
