"""Gradient checkpointing that knows about tasks and running statistics."""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from torchmto.structure import active_tasks, current_tasks


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


def _contexts(block: nn.Module) -> tuple[AbstractContextManager[None], "_SecondRun"]:
    return nullcontext(), _SecondRun(block, current_tasks())


class _SecondRun:
    """Tasks and buffers for running a block again; entered once for every backward pass through one forward."""

    def __init__(self, block: nn.Module, tasks: tuple[str, ...]) -> None:
        self.block = block
        self.tasks = tasks
        self.entered = ExitStack()

    def __enter__(self) -> None:
        if self.tasks:
            self.entered.enter_context(active_tasks(self.tasks))
        self.entered.enter_context(_unchanged(list(self.block.buffers())))

    def __exit__(self, *error: object) -> None:
        self.entered.close()


@contextmanager
def _unchanged(buffers: list[Tensor]) -> Iterator[None]:
    before = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)
