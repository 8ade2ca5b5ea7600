"""Gradient checkpointing that knows about tasks and running statistics."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from types import MethodType
from typing import Any, Self

import torch
from torch import nn
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


class _SecondRun(ExitStack):
    """Tasks and buffers for running a block again; entered once for every backward pass through one forward."""

    def __init__(self, block: nn.Module, tasks: tuple[str, ...]) -> None:
        super().__init__()
        self.block = block
        self.tasks = tasks

    def __enter__(self) -> Self:
        if self.tasks:
            self.enter_context(active_tasks(self.tasks))
        for buffer in self.block.buffers():
            self.callback(torch.no_grad()(buffer.copy_), buffer.clone())
        return self
