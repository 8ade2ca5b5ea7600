"""Gradient checkpointing that knows about tasks and running statistics."""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from torchmto.structure import active_tasks, current_tasks

__all__ = ["checkpoint_blocks"]


def checkpoint_blocks(blocks: Iterable[nn.Module]) -> None:
    """Keep only the inputs of each block in training, and run it again in the backward pass.

    Memory falls by what the blocks hold between them, for about one more forward pass. The second run uses the norms
    of the tasks that were active in the first, wherever the backward pass happens, draws the same dropout masks,
    and leaves the norms' running statistics alone. Works on any module; state keys don't change.

    Args:
        blocks: Modules, changed in place. None may lie inside another.
    """
    for block in blocks:
        block.forward = MethodType(_forward, block)


def _forward(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    forward = partial(type(block).forward, block)
    if not (block.training and torch.is_grad_enabled()):
        return forward(*args, **kwargs)
    contexts = partial(_contexts, block)
    return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **kwargs)


def _contexts(block: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    return nullcontext(), _second_run(block, current_tasks())


@contextmanager
def _second_run(block: nn.Module, tasks: tuple[str, ...]) -> Iterator[None]:
    buffers = list(block.buffers())
    before = [buffer.clone() for buffer in buffers]
    try:
        with active_tasks(tasks) if tasks else nullcontext():
            yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)
