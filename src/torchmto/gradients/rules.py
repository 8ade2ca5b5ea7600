# ruff: noqa: ARG001  the functions of a table take the same arguments
"""Backward formulas for K cotangents at once: one small function per kind of node, in a table.

A node's own backward takes one cotangent. Each function here takes K of them, stacked [k, *shape of the node's output],
together with what the node has saved, and returns one stack per input of the node, or None for one that isn't needed. The
shape of an input that was broadcast needn't be restored: the walk sums over it, as autograd does. Nodes without an entry are
called once per cotangent. An entry more is ``RULES["NameBackward0"] = function``.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from torchmto.gradients.torch_private import saved

Rule = Callable[[Any, Tensor, Sequence[bool]], Sequence[Tensor | None] | None]
"""(node, cotangents [k, *shape], which inputs need one) -> cotangents of the inputs; None: call the node once for each."""

SMALL = 2**16
"""Elements of one task's cotangent up to which all tasks together take less time than one call for each."""


def _addmm(node: Any, given: Tensor, needs: Sequence[bool]) -> list[Tensor | None] | None:
    shift = given if saved(node, "beta") == 1 else given * saved(node, "beta")
    found = _products(node, given, needs[1:], ("mat1", "mat2"))
    return found and [shift, *found]


def _mm(node: Any, given: Tensor, needs: Sequence[bool]) -> list[Tensor | None] | None:
    return _products(node, given, needs, ("self", "mat2"))


def _products(node: Any, given: Tensor, needs: Sequence[bool], names: tuple[str, str]) -> list[Tensor | None] | None:
    """The two factors of a product of matrices, which the node calls ``names``; None where one is sparse."""
    first, second = (saved(node, name) if need else None for name, need in zip(names, reversed(needs), strict=True))
    if any(part is not None and part.layout is not torch.strided for part in (first, second)):
        return None
    # The second one's is transposed, since linear layers hold their weights so.
    found = [None if second is None else given @ second.mT, None if first is None else (given.mT @ first).mT]
    alpha = saved(node, "alpha", 1)
    return [part if part is None or alpha == 1 else part * alpha for part in found]


def _elementwise(node: Any, given: Tensor, needs: Sequence[bool]) -> list[Tensor | None]:
    """The derivatives, which are the same for all tasks, are what the node makes of ones."""
    derivatives = node(torch.ones_like(given[0]))
    derivatives = derivatives if isinstance(derivatives, tuple) else (derivatives,)
    return [given * d if need and d is not None else None for d, need in zip(derivatives, needs, strict=True)]


def _selecting(node: Any, given: Tensor, needs: Sequence[bool]) -> list[Tensor | None]:
    """Zeros where ReLU gave none, whatever arrives there: times zero, the infinite derivative of a root would be NaN."""
    return [torch.ops.aten.threshold_backward(given, saved(node, "result").detach(), 0)]


def _power(node: Any, given: Tensor, needs: Sequence[bool]) -> list[Tensor | None]:
    """Zeros, too, from what doesn't depend on its input."""
    return [torch.zeros_like(given)] if saved(node, "exponent") == 0 else _elementwise(node, given, needs)


def _divided(node: Any, given: Tensor, needs: Sequence[bool]) -> list[Tensor | None]:
    """Really divided: the reciprocal of a tiny number is infinite."""
    other = _elementwise(node, given, [False, True])[1] if needs[1] else None
    return [given / saved(node, "other").detach() if needs[0] else None, other]


def _add(node: Any, given: Tensor, needs: Sequence[bool]) -> list[Tensor | None]:
    alpha = saved(node, "alpha", 1)
    return [given, given if alpha == 1 or not needs[-1] else given * alpha][: len(needs)]


def _sub(node: Any, given: Tensor, needs: Sequence[bool]) -> list[Tensor | None]:
    alpha = saved(node, "alpha", 1)
    return [given, given * -alpha if needs[-1] else None][: len(needs)]


def _same(node: Any, given: Tensor, needs: Sequence[bool]) -> list[Tensor | None]:
    return [given]


def _reshaped(node: Any, given: Tensor, needs: Sequence[bool]) -> list[Tensor | None]:
    return [given.reshape(len(given), *saved(node, "self_sym_sizes"))]


def _turned(node: Any, given: Tensor, needs: Sequence[bool]) -> list[Tensor | None]:
    return [given.mT if given.dim() > 2 else given]


def _transposed(node: Any, given: Tensor, needs: Sequence[bool]) -> list[Tensor | None]:
    return [given.transpose(_place(saved(node, "dim0")), _place(saved(node, "dim1")))]


def _permuted(node: Any, given: Tensor, needs: Sequence[bool]) -> list[Tensor | None]:
    places = [_place(dim) % given.dim() for dim in saved(node, "dims")]
    return [given.permute(0, *(places.index(dim) + 1 for dim in range(1, given.dim())))]


def _unsqueezed(node: Any, given: Tensor, needs: Sequence[bool]) -> list[Tensor | None]:
    return [given.squeeze(_place(saved(node, "dim")))]


def _selected(node: Any, given: Tensor, needs: Sequence[bool]) -> list[Tensor | None]:
    sizes = [len(given), *saved(node, "self_sym_sizes")]
    return [torch.ops.aten.select_backward(given, sizes, _place(saved(node, "dim")), _signed(saved(node, "index")))]


def _layer_norm(node: Any, given: Tensor, needs: Sequence[bool]) -> list[Tensor | None] | None:
    if given[0].numel() > SMALL:
        return None
    dims = tuple(range(-len(saved(node, "normalized_shape")), 0))
    normed = (saved(node, "input") - saved(node, "result1")) * saved(node, "result2")
    weight = saved(node, "weight")
    inner = given if weight is None else given * weight
    found = None
    if needs[0]:
        means = inner.mean(dims, keepdim=True) + normed * (inner * normed).mean(dims, keepdim=True)
        found = (inner - means) * saved(node, "result2")
    return [found, given * normed if needs[1] else None, given]


def _convolution(node: Any, given: Tensor, needs: Sequence[bool]) -> list[Tensor | None] | None:
    """Without the kernels' gradients, which the node itself would form."""
    if needs[1]:
        return None
    names = ("stride", "padding", "dilation", "transposed", "output_padding", "groups")
    geometry = [saved(node, name) for name in names]
    calls = [
        torch.ops.aten.convolution_backward(
            part, saved(node, "input"), saved(node, "weight"), [part.shape[1]], *geometry, [needs[0], False, needs[2]]
        )
        for part in given
    ]
    return [None if parts[0] is None else torch.stack(parts) for parts in zip(*calls, strict=True)]


def _signed(value: int) -> int:
    """Negative numbers are saved as if they had no sign."""
    return value - 2**64 if value >= 2**63 else value


def _place(dim: int) -> int:
    """A dimension of the node's tensors, in a stack of them."""
    dim = _signed(dim)
    return dim if dim < 0 else dim + 1


_ELEMENTWISE = (
    *("LeakyRelu", "Elu", "Gelu", "Silu", "Softplus", "Tanh", "Sigmoid", "Sin", "Cos", "Exp"),
    *("Mul", "Neg", "NativeDropout"),
)
"""Operations whose backward multiplies the cotangent, where it is zero too: so infinite times zero is NaN in both."""

RULES: dict[str, Rule] = {
    "AddmmBackward0": _addmm,
    "MmBackward0": _mm,
    "AddBackward0": _add,
    "SubBackward0": _sub,
    "TBackward0": _turned,
    "TransposeBackward0": _transposed,
    "PermuteBackward0": _permuted,
    "UnsqueezeBackward0": _unsqueezed,
    "SelectBackward0": _selected,
    "NativeLayerNormBackward0": _layer_norm,
    "ConvolutionBackward0": _convolution,
    "ReluBackward0": _selecting,
    "PowBackward0": _power,
    "DivBackward0": _divided,
    **dict.fromkeys(
        ("ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0", "SqueezeBackward1", "SqueezeBackward0"),
        _reshaped,
    ),
    **dict.fromkeys(("CloneBackward0", "ToCopyBackward0", "AliasBackward0", "ExpandBackward0"), _same),
    **{f"{kind}Backward0": _elementwise for kind in _ELEMENTWISE},
}
"""The name of a kind of node -> its formula for K cotangents."""
