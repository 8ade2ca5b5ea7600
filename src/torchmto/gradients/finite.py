"""Gradients as plain real numbers, and whether they are finite, in as little time as possible."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from torchmto.gradients.ranks import local
from torchmto.gradients.torch_private import flattened

FEW = 2048
"""Elements up to which a gradient is copied next to others: adding up many small tensors one by one takes longer."""


def dense(gradient: Tensor) -> Tensor:
    """A gradient as an ordinary tensor: ``nn.Embedding(sparse=True)`` has sparse ones."""
    return gradient.to_dense() if gradient.is_sparse else gradient


def real(tensor: Tensor) -> Tensor:
    """A tensor as real numbers, without graph: of a complex one the pairs, [*shape, 2]; a view unless it is conjugated."""
    return torch.view_as_real(tensor.detach().resolve_conj()) if tensor.dtype.is_complex else tensor


def plain(gradient: Tensor) -> Tensor:
    """A gradient as autograd gives it as an ordinary tensor of real numbers."""
    return real(dense(gradient))


def dtype_of_gradient(tensor: Tensor) -> torch.dtype:
    """The type of a tensor's gradients: its own, unless newer versions of PyTorch were told of another (``grad_dtype``)."""
    own: torch.dtype | None = getattr(tensor, "grad_dtype", None) if tensor.is_leaf else None
    return own or tensor.dtype


def gapless(tensor: Tensor) -> bool:
    """Whether the elements of ``tensor`` fill one block of memory, in whatever order of dimensions."""
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.numel() > 0 and span == tensor.numel()


def like(numbers: Tensor, tensor: Tensor) -> Tensor:
    """Plain real numbers as a gradient of ``tensor``: in its shape, type and layout, on its device, complex where it is.

    The layout is the one that autograd gives to what it accumulates: the tensor's own where that is :func:`gapless`, else
    row by row. Fused optimizers go through both from beginning to end, without a look at the strides.

    Args:
        numbers: Pairs for a complex tensor; of a sharded one this rank's part.
        tensor: Whose gradient it becomes.
    """
    place, kind = real(local(tensor)), dtype_of_gradient(tensor).to_real()
    given, own = numbers.view_as(place), gapless(place)
    laid_out = given.stride() == place.stride() if own else given.is_contiguous()
    # Complex numbers are a copy: in a row pairs may begin at any place, complex numbers only at every second one.
    if not laid_out or tensor.is_complex() or (given.dtype, given.device) != (kind, place.device):
        form = torch.preserve_format if own else torch.contiguous_format
        given = torch.empty_like(place, dtype=kind, memory_format=form, requires_grad=False).copy_(given)
    return torch.view_as_complex(given) if tensor.is_complex() else given


def finite_mark(gradients: Sequence[Tensor]) -> Tensor:
    """A scalar tensor that is finite only if all entries of ``gradients`` are; 0 for none.

    On the CPU the sum of the entries, which takes a third of the time of their norm; elsewhere the norm. Either can overflow
    although all entries are finite: look at each then.
    """
    if not gradients:
        return torch.zeros(())
    if False in [gradient.is_cpu for gradient in gradients]:
        return nn.utils.get_total_norm(gradients)
    parts = [gradient for gradient in gradients if gradient.numel() > FEW]
    if len(parts) < len(gradients):
        parts.append(flattened([gradient for gradient in gradients if gradient.numel() <= FEW]))
    total = parts[0].sum()
    for part in parts[1:]:
        total = total + part.sum()
    return total
