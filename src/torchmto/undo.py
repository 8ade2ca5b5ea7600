"""Copies of a model's buffers, to undo what a forward has done to them."""

import torch
from torch import Tensor, nn

from torchmto.gradients.torch_private import buffers_of, children_of, version_of


class BufferSnapshot:
    """A copy of a model's buffers that can be put back, buffers that a forward replaced by new tensors included.

    Batch-norm kernels write running statistics without raising the tensors' version counters, so small buffers are copied
    every time. Large ones are copied only if their version counter says that they changed.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._kept: dict[tuple[int, str], _KeptBuffer] = {}

    def take(self) -> None:
        """Copy the buffers."""
        current: dict[tuple[int, str], _KeptBuffer] = {}
        again: list[_KeptBuffer] = []
        # Like `model.modules()`, but several times as fast; a reused module comes more than once.
        stack: list[nn.Module | None] = [self._model]
        while stack:
            module = stack.pop()
            if module is None:
                continue
            stack.extend(children_of(module).values())
            for name, buffer in buffers_of(module).items():
                if buffer is None:
                    continue
                kept = self._kept.get((id(module), name))
                if kept is None or not kept.fits(module, buffer):
                    kept = _KeptBuffer(module, name, buffer, buffer.detach().clone())
                elif kept.may_have_changed():
                    again.append(kept)
                current[id(module), name] = kept
        if again:
            with torch.no_grad():
                torch._foreach_copy_([kept.copy for kept in again], [kept.buffer for kept in again])
        for kept in current.values():
            kept.version = version_of(kept.buffer)
        self._kept = current

    @torch.no_grad()
    def restore(self) -> None:
        """Put the copies back."""
        changed = [kept for kept in self._kept.values() if kept.may_have_changed()]
        if changed:
            torch._foreach_copy_([kept.buffer for kept in changed], [kept.copy for kept in changed])
        for kept in self._kept.values():
            kept.version = version_of(kept.buffer)
            buffers = buffers_of(kept.module)
            if buffers.get(kept.name) is not kept.buffer:
                buffers[kept.name] = kept.buffer


class _KeptBuffer:
    """One buffer of one module, and its copy."""

    SMALL = 100_000

    def __init__(self, module: nn.Module, name: str, buffer: Tensor, copy: Tensor) -> None:
        self.module = module
        self.name = name
        self.buffer = buffer
        self.copy = copy
        self.version = version_of(buffer)

    def fits(self, module: nn.Module, buffer: Tensor) -> bool:
        """Whether this is still the buffer of that place, and of the same kind."""
        same = self.module is module and self.buffer is buffer
        return same and (buffer.shape, buffer.dtype, buffer.device) == (
            self.copy.shape,
            self.copy.dtype,
            self.copy.device,
        )

    def may_have_changed(self) -> bool:
        """Whether the buffer can differ from what it was when the version was noted."""
        return self.buffer.numel() <= self.SMALL or version_of(self.buffer) != self.version
