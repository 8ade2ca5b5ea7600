"""Backwards for chosen parameters, without what PyTorch checks of the arguments in Python: an eighth of a small one's time.

And backwards that end at chosen nodes, and the post-accumulate-grad hooks of parameters: run once for every optimizer step,
whichever backwards made the gradient.
"""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from torchmto.gradients.torch_private import gradient_hooks, run_backward

PLAIN = {Tensor, nn.Parameter}
"""The classes of tensors that have nothing to say of their own."""


def _overridden(root: Tensor, inputs: Sequence[Tensor]) -> bool:
    """Whether subclasses of tensors may have something to say about a backward."""
    return run_backward is None or type(root) is not Tensor or not PLAIN.issuperset(map(type, inputs))


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


@contextlib.contextmanager
def ending_at(nodes: Iterable[Node]) -> Iterator[None]:
    """No backward inside gets past ``nodes``: gradients by their results are those by paths past none of the others.

    Asked for the gradients by two results of which one is computed from the other, a backward by itself goes on from the one
    to the other, which then holds again what the first one has.
    """
    with contextlib.ExitStack() as handles:
        for node in dict.fromkeys(nodes):
            # A node's hooks run once the gradients by its results are taken. Without gradients what lies below does nothing.
            handles.enter_context(node.register_prehook(lambda gradients: (None,) * len(gradients)))
        yield


def quiet(parameters: Sequence[Tensor]) -> contextlib.AbstractContextManager[None]:
    """Keep the hooks of ``parameters`` from running in the backwards inside: what these leave isn't the step's gradient yet."""
    every = [gradient_hooks(parameter) for parameter in parameters]
    held = [(hooks, dict(hooks)) for hooks in every if hooks]
    return _emptied(held) if held else contextlib.nullcontext()


@contextlib.contextmanager
def _emptied(held: Sequence[tuple[dict[Any, Any], dict[Any, Any]]]) -> Iterator[None]:
    """Each first dict is empty inside, and afterwards as the second."""
    for hooks, _ in held:
        hooks.clear()
    try:
        yield
    finally:
        for hooks, own in held:
            hooks.update(own)


def run_hooks(parameters: Sequence[Tensor]) -> list[Tensor]:
    """Run the hooks of all ``parameters`` that have a gradient; return those that had hooks."""
    hooked = [p for p in parameters if gradient_hooks(p) and p.grad is not None]
    with torch.no_grad() if hooked else contextlib.nullcontext():
        for parameter in hooked:
            for hook in list((gradient_hooks(parameter) or {}).values()):
                hook(parameter)
    return hooked
