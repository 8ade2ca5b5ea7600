"""Backwards for chosen parameters, without what PyTorch checks of the arguments in Python: an eighth of a small one's time."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from torchmto.gradients.torch_private import run_backward

_PLAIN = {Tensor, nn.Parameter}


def _overridden(root: Tensor, inputs: Sequence[Tensor]) -> bool:
    """Whether subclasses of tensors may have something to say about a backward."""
    return run_backward is None or type(root) is not Tensor or not _PLAIN.issuperset(map(type, inputs))


def backward(root: Tensor, seed: Tensor, inputs: Sequence[Tensor], *, retain: bool = False) -> None:
    """Add the gradients of ``inputs`` to their ``.grad``; ``seed`` is the cotangent of ``root``, and of its shape and type."""
    if not inputs or _overridden(root, inputs):
        torch.autograd.backward(root, seed, inputs=inputs, retain_graph=retain)
    else:
        run_backward((root,), (seed,), retain, False, tuple(inputs), True, accumulate_grad=True)


def gradients_of(
    root: Tensor, seed: Tensor | None, inputs: Sequence[Tensor], *, retain: bool
) -> tuple[Tensor | None, ...]:
    """The gradients of ``inputs``, None where ``root`` doesn't reach one; a ``seed`` of None is 1."""
    if not inputs or _overridden(root, inputs):
        return torch.autograd.grad(root, inputs, seed, retain_graph=retain, allow_unused=True)
    seed = torch.ones_like(root) if seed is None else seed
    found: tuple[Tensor | None, ...] = run_backward(
        (root,), (seed,), retain, False, tuple(inputs), True, accumulate_grad=False
    )
    return found
