"""Post-accumulate-grad hooks of parameters: run once for every optimizer step, whichever backwards made the gradient."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from torchmto.gradients.torch_private import gradient_hooks


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
