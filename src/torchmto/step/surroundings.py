"""What surrounds a closure's forwards: the caller's modes, and random states, so that a forward can be repeated."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor

from torchmto.undo import BufferSnapshot

State = tuple[Tensor, list[Tensor]]


def random_state() -> State:
    """That of torch's generators now."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    return torch.get_rng_state(), cuda


def set_random_state(state: State) -> None:
    """Put an earlier one back."""
    torch.set_rng_state(state[0])
    if state[1]:
        torch.cuda.set_rng_state_all(state[1])


class Surroundings:
    """Modes of the caller that closures are to be run in, and nothing else of a step.

    In bfloat16 a Gramian is too coarse for any method, and what K numbers decide is computed on the CPU.
    """

    def __init__(self) -> None:
        self._casts = [(kind, torch.get_autocast_dtype(kind)) for kind in _kinds() if torch.is_autocast_enabled(kind)]
        self._device = torch.empty(0).device
        self.neutral = not self._casts and self._device.type == "cpu" and torch.is_grad_enabled()
        self._restored = contextlib.ExitStack()
        if not self.neutral and torch.is_inference_mode_enabled():
            raise RuntimeError(
                "A multi-task step can't be taken inside `torch.inference_mode()`, where nothing has a gradient."
            )

    def keep_out(self, stack: contextlib.ExitStack) -> None:
        """Until ``stack`` ends none of them has an effect."""
        self._enter(stack, enabled=False)
        stack.enter_context(torch.enable_grad())
        # What an interrupt on its way out has left restored ends before what was around it.
        stack.callback(self._restored.close)

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """Inside they are as the caller has them, the mode of gradients apart."""
        try:
            self._enter(self._restored, enabled=True)
            yield
        finally:
            self._restored.close()

    def _enter(self, stack: contextlib.ExitStack, *, enabled: bool) -> None:
        for kind, dtype in self._casts:
            stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled))
            # What it has kept of parameters would be old after an optimizer step.
            stack.callback(torch.clear_autocast_cache)
        if self._device.type != "cpu":
            stack.enter_context(self._device if enabled else torch.device("cpu"))


@functools.cache
def _kinds() -> tuple[str, ...]:
    """The types of devices that there are."""
    accelerator = torch.accelerator.current_accelerator()
    return ("cpu",) if accelerator is None else ("cpu", accelerator.type)


class Noise:
    """Saves the random state before each micro-batch's first forward and puts it back for repeats.

    Args:
        buffers: Room for copies of the model's buffers.
        same: Give all forwards of a micro-batch the same random state (``same_noise=True``).
        keep: Save states even if ``same`` is off, because the method repeats forwards.
    """

    def __init__(self, buffers: BufferSnapshot, *, same: bool, keep: bool) -> None:
        self._buffers = buffers
        self._same = same
        self._keep = keep or same
        self._states: dict[tuple[int, int], State] = {}
        self._states_of: dict[tuple[tuple[int, int], tuple[str, ...]], State] = {}
        self._newest: dict[tuple[tuple[int, int], tuple[str, ...]], State] = {}
        self._replaying: bool | Literal["newest"] = False

    def before(self, key: tuple[int, int], names: tuple[str, ...]) -> None:
        """Called before the forward of micro-batch ``key``, (source, number), for the tasks ``names``.

        A repeat gets the state of the first forward (or the newest) for the same tasks, or else of the micro-batch's first one.
        """
        known = self._states.get(key)
        if known is not None and self._same:
            set_random_state(known)
        elif known is not None and self._replaying:
            states = self._newest if self._replaying == "newest" else self._states_of
            set_random_state(states.get((key, names), known))
        elif self._keep and not self._replaying:
            state = self._newest[key, names] = random_state()
            self._states_of.setdefault((key, names), state)
            self._states.setdefault(key, state)

    @contextlib.contextmanager
    def extra(self, *, replay: bool | Literal["newest"] = True) -> Iterator[None]:
        """Forwards inside leave the buffers as they were.

        Args:
            replay: They replay the step's own noise, where it was kept (that of the first forward, or of the newest), and the
                random state is put back; else they draw new noise.
        """
        replaying, self._replaying = self._replaying, replay
        try:
            with self.rehearsal(keep_random_state=not replay):
                yield
        finally:
            self._replaying = replaying

    @contextlib.contextmanager
    def rehearsal(self, *, keep_random_state: bool = False) -> Iterator[None]:
        """Forwards inside leave no trace, so that running them again gives the same losses."""
        with self.attempt() as undo:
            try:
                yield
            finally:
                undo(keep_random_state)

    @contextlib.contextmanager
    def attempt(self) -> Iterator[Callable[..., None]]:
        """Gives a function that puts buffers and random state back to where they were at the start."""
        self._buffers.take()
        state = random_state()

        def undo(keep_random_state: bool = False) -> None:
            self._buffers.restore()
            if not keep_random_state:
                set_random_state(state)

        yield undo
