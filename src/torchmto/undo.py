"""Copies of a model's buffers, and of random states, to undo what a forward has done to them."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from torchmto.gradients.torch_private import buffers_of, children_of, version_of


class BufferSnapshot:
    """A copy of a model's buffers that can be put back, buffers that a forward replaced by new tensors included.

    Batch-norm kernels write running statistics without raising the tensors' version counters, so small buffers are copied
    every time. Large ones are copied only if their version counter says that they changed.

    Copies are put back as buffers were written: past the version counters that haven't moved, since graphs that are still to
    be walked backwards check those of what they have saved.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._kept: dict[tuple[int, str], _KeptBuffer] = {}
        self._empty: list[tuple[nn.Module, str, Tensor | None]] = []

    def take(self) -> None:
        """Copy the buffers."""
        current: dict[tuple[int, str], _KeptBuffer] = {}
        again: list[_KeptBuffer] = []
        empty: list[tuple[nn.Module, str, Tensor | None]] = []
        ordinary: dict[Tensor, Tensor] = {}
        # Like `model.modules()`, but several times as fast; a reused module comes more than once.
        stack: list[nn.Module | None] = [self._model]
        while stack:
            module = stack.pop()
            if module is None:
                continue
            stack.extend(children_of(module).values())
            for name, buffer in buffers_of(module).items():
                if buffer is None or is_lazy(buffer):
                    empty.append((module, name, buffer))
                    continue
                kept = self._kept.get((id(module), name))
                if kept is None or not kept.fits(module, buffer):
                    if buffer.is_inference():
                        # It has no version counter, and nothing can be written to it outside of the mode.
                        with torch.inference_mode(False):
                            if buffer not in ordinary:
                                ordinary[buffer] = buffer.clone()
                        own = ordinary[buffer]
                        buffers_of(module)[name] = own
                    else:
                        own = buffer
                    kept = _KeptBuffer(module, name, own)
                elif kept.may_have_changed():
                    again.append(kept)
                current[id(module), name] = kept
        if again:
            with torch.no_grad():
                torch._foreach_copy_([kept.copy for kept in again], [kept.entries for kept in again])
        for kept in current.values():
            kept.version = version_of(kept.buffer)
        self._kept, self._empty = current, empty

    @torch.no_grad()
    def set_aside(self) -> None:
        """Let the model go on with other copies until :meth:`restore`: what graphs have saved of its buffers isn't touched."""
        others: dict[int, Tensor] = {}
        for kept in self._kept.values():
            if id(kept.buffer) not in others:
                others[id(kept.buffer)] = kept.buffer.clone()
            buffers_of(kept.module)[kept.name] = others[id(kept.buffer)]

    @torch.no_grad()
    def restore(self) -> None:
        """Put the copies back."""
        for kept in self._kept.values():
            if not kept.fits(kept.module, kept.buffer):
                # It was given other memory, `buffer.data = ...`.
                kept.buffer.data = kept.place
        changed = [kept for kept in self._kept.values() if kept.may_have_changed()]
        if changed:
            torch._foreach_copy_([kept.writable for kept in changed], [kept.copy for kept in changed])
        for kept in self._kept.values():
            kept.version = version_of(kept.buffer)
            buffers = buffers_of(kept.module)
            if buffers.get(kept.name) is not kept.buffer:
                buffers[kept.name] = kept.buffer
        for module, name, buffer in self._empty:
            buffers_of(module)[name] = buffer


class _KeptBuffer:
    """One buffer of one module, and its copy."""

    SMALL = 100_000

    def __init__(self, module: nn.Module, name: str, buffer: Tensor) -> None:
        self.module = module
        self.name = name
        self.buffer = buffer
        self.place = buffer.detach()
        self.entries = _distinct(self.place)
        self.copy = self.entries.clone()
        self.version = version_of(buffer)

    def fits(self, module: nn.Module, buffer: Tensor) -> bool:
        """Whether this is still the buffer of that place, and of the same kind."""
        same = self.module is module and self.buffer is buffer
        return same and (buffer.shape, buffer.dtype, buffer.device, buffer.data_ptr()) == (
            self.place.shape,
            self.place.dtype,
            self.place.device,
            self.place.data_ptr(),
        )

    @property
    def writable(self) -> Tensor:
        """The entries, to be written so that the version counter tells of it only if it has told of a change."""
        return self.entries if version_of(self.buffer) != self.version else self.entries.data

    def may_have_changed(self) -> bool:
        """Whether the buffer can differ from what it was when the version was noted."""
        return self.buffer.numel() <= self.SMALL or version_of(self.buffer) != self.version


def _distinct(tensor: Tensor) -> Tensor:
    """A view of the elements that lie in different places, as those of an expanded tensor don't."""
    for dim, stride in enumerate(tensor.stride()):
        if stride == 0:
            tensor = tensor.narrow(dim, 0, min(1, tensor.shape[dim]))
    return tensor


@contextmanager
def undisturbed(model: nn.Module, seed: int | None = None) -> Iterator[None]:
    """Buffers of the model (norm statistics) and the random states of torch, numpy and Python are afterwards as before.

    Args:
        model: The module whose buffers are kept, with its devices' random states.
        seed: What all of them begin with inside, so that the model's code draws the same whenever it runs.
    """
    kept = BufferSnapshot(model)
    kept.take()
    tensors = (*model.parameters(), *model.buffers())
    devices = sorted({tensor.device.index for tensor in tensors if tensor.device.type == "cuda"})
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - models draw from it
    with torch.random.fork_rng(devices=devices):
        try:
            if seed is not None:
                for generator in (
                    torch.default_generator,
                    *(torch.cuda.default_generators[index] for index in devices),
                ):
                    generator.manual_seed(seed)
                random.seed(seed)
                np.random.seed(seed)  # noqa: NPY002 - models draw from it
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002
            kept.restore()
