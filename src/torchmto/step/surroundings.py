"""What the caller's surroundings would do to a step's own arithmetic: autocast, a default device, no gradient."""

import contextlib
import functools
from collections.abc import Iterator

import torch


class Surroundings:
    """Modes of the caller that closures are to be run in, and nothing else of a step.

    In bfloat16 a Gramian is too coarse for any method, and what K numbers decide is computed on the CPU.
    """

    def __init__(self) -> None:
        self._casts = [(kind, torch.get_autocast_dtype(kind)) for kind in _kinds() if torch.is_autocast_enabled(kind)]
        self._device = torch.empty(0).device
        self.neutral = not self._casts and self._device.type == "cpu" and torch.is_grad_enabled()

    @contextlib.contextmanager
    def kept_out(self) -> Iterator[None]:
        """Inside none of them has an effect."""
        with self._modes(enabled=False), torch.enable_grad():
            yield

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """Inside they are as the caller has them, the mode of gradients apart."""
        with self._modes(enabled=True):
            yield

    def _modes(self, *, enabled: bool) -> contextlib.ExitStack:
        stack = contextlib.ExitStack()
        for kind, dtype in self._casts:
            stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled))
            # What it has kept of parameters would be old after an optimizer step.
            stack.callback(torch.clear_autocast_cache)
        if self._device.type != "cpu":
            stack.enter_context(self._device if enabled else torch.device("cpu"))
        return stack


@functools.cache
def _kinds() -> tuple[str, ...]:
    """The types of devices that there are."""
    accelerator = torch.accelerator.current_accelerator()
    return ("cpu",) if accelerator is None else ("cpu", accelerator.type)
