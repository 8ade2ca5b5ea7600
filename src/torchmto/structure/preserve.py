"""Forward passes that leave no trace."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from torchmto.undo import BufferSnapshot


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Buffers of the model (norm statistics) and the random states of torch, numpy and Python are afterwards as before.

    Args:
        model: The module whose buffers are kept.
    """
    kept = BufferSnapshot(model)
    kept.take()
    tensors = (*model.parameters(), *model.buffers())
    devices = sorted({tensor.device.index for tensor in tensors if tensor.device.type == "cuda"})
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - models draw from it
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002
            kept.restore()
