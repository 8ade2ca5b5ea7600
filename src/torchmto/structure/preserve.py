"""Forward passes that leave no trace."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.parameter import is_lazy


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Buffers of the model (norm statistics) and torch's random state are afterwards as they were before.

    Args:
        model: the module whose buffers are kept.
    """
    kept = [
        (module, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
        if not is_lazy(buffer)
    ]
    tensors = (*model.parameters(), *model.buffers())
    devices = sorted({tensor.device.index for tensor in tensors if tensor.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            with torch.no_grad():
                for module, name, buffer, value in kept:
                    buffer.copy_(value)
                    setattr(module, name, buffer)
