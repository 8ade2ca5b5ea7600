"""One optimizer or several, stepped together, through a scaler if there is one."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from torchmto.checks import shown
from torchmto.gradients.torch_private import scaler_states, version_of

_LEAVE_THE_STEP = (
    "Use `mt.backward(closure)` in place of `loss.backward()`, and leave the step to the trainer; or give mt.step the "
    "optimizer itself."
)


class Optimizers:
    """The optimizers of one model, with different parameters each.

    Args:
        optimizers: One or more.
        scaler: A ``torch.amp.GradScaler``, or None.

    Attributes:
        num_stepped: How many of them have stepped since the caller of :meth:`step` set it to 0.

    Raises:
        ValueError: If two have a parameter in common, or the wrapper of one has another scaler.
    """

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer], scaler: torch.amp.GradScaler | None) -> None:
        self.all = tuple(optimizers)
        self.num_stepped = 0
        self._scaler = scaler
        self._wrapped = any(map(_wraps, self.all))
        theirs = [own for own in map(_scaler_of, self.all) if own is not None]
        self._scaled = bool(theirs)
        if any(own is not scaler for own in theirs):
            raise ValueError(
                "Parameter `scaler` should be the one of the optimizer's wrapper, which divides every gradient by its scale "
                f"(accelerate's is `accelerator.scaler`). Found `scaler = {shown(scaler)}`."
            )
        parameters = self.parameters()
        if len(set(map(id, parameters))) < len(parameters) and len(self.all) > 1:
            raise ValueError(
                "Parameter `optimizer` should hold optimizers with different parameters. Found one in two of them."
            )

    def parameters(self) -> list[Tensor]:
        """All parameters, in order."""
        return [p for optimizer in self.all for group in optimizer.param_groups for p in group["params"]]

    def step(self) -> None:
        """Every optimizer's step, one after the other; the scaler then updates its scale.

        Raises:
            RuntimeError: If a wrapper of an optimizer swallows the step, or takes it through a scaler itself.
        """
        if self._scaled:
            raise RuntimeError(f"The optimizer's wrapper steps through the scaler by itself. {_LEAVE_THE_STEP}")
        for optimizer in self.all:
            first = next((p for group in optimizer.param_groups for p in group["params"] if p.grad is not None), None)
            before = 0 if first is None else version_of(first)
            try:
                with self._noticed(optimizer) if self._wrapped else contextlib.nullcontext():
                    if self._scaler is None or first is None:
                        optimizer.step()
                    else:
                        self._scaler.step(optimizer)
            except BaseException as error:
                # A hook after the step may fail, too.
                self.num_stepped += first is not None and version_of(first) != before
                if self.num_stepped:
                    error.add_note(
                        f"{self.num_stepped} of {len(self.all)} optimizers had stepped already, which isn't undone."
                    )
                raise
            self.num_stepped += 1
        if self._scaler is not None:
            self._update(self._scaler)

    @contextlib.contextmanager
    def _noticed(self, optimizer: Any) -> Iterator[None]:
        """Raise if a wrapper has not handed its step on, as while gradients are accumulated."""
        fired: list[Any] = []
        inner = optimizer.optimizer if _wraps(optimizer) else optimizer
        hook = inner.register_step_post_hook(lambda *_: fired.append(inner))
        try:
            yield
        finally:
            hook.remove()
        if not fired and self._scaler is None and not getattr(optimizer, "step_was_skipped", False):
            raise RuntimeError(
                f"`{type(optimizer).__name__}.step()` didn't step the optimizer it wraps, as wrappers do while they accumulate "
                f"gradients, so nothing was updated. {_LEAVE_THE_STEP}"
            )

    # ------------------------------------------------------------------ the scaler

    @property
    def _states(self) -> dict[int, dict[str, Any]]:
        """What the scaler knows of each optimizer."""
        return scaler_states(self._scaler)

    def unscale(self) -> None:
        """Divide all gradients by the scaler's scale, as it does itself."""
        assert self._scaler is not None
        for optimizer in self.all:
            # Without a gradient there is nothing a scaler could check, which it takes for a mistake.
            if any(p.grad is not None for group in optimizer.param_groups for p in group["params"]):
                self._scaler.unscale_(optimizer)

    def forget_scaling(self) -> None:
        """Make the scaler forget what it knows of the optimizers since its last update."""
        for optimizer in self.all:
            self._states.pop(id(optimizer), None)

    @contextlib.contextmanager
    def scaling(self) -> Iterator[None]:
        """After an error inside the scaler knows as much of the optimizers as before, so that the step can be repeated."""
        if self._scaler is None:
            yield
            return
        keys = [id(optimizer) for optimizer in self.all]
        kept = {key: dict(self._states[key]) for key in keys if key in self._states}
        try:
            yield
        except BaseException:
            self.forget_scaling()
            self._states.update(kept)
            raise

    def _update(self, scaler: torch.amp.GradScaler) -> None:
        # Gradients of the user's other optimizers that are unscaled already mustn't be unscaled again.
        states = self._states
        others = {key: state for key, state in states.items() if state["stage"].name == "UNSCALED"}
        for key in others:
            del states[key]
        try:
            scaler.update()
        finally:
            self._states.update(others)


def _wraps(optimizer: Any) -> bool:
    """Whether an optimizer hands its work to another, as those that accelerate prepares do."""
    return isinstance(getattr(optimizer, "optimizer", None), torch.optim.Optimizer)


def _scaler_of(optimizer: Any) -> torch.amp.GradScaler | None:
    """The scaler that an optimizer's wrapper steps through; None where there is none."""
    own = getattr(optimizer, "scaler", None) if _wraps(optimizer) else None
    return own if isinstance(own, torch.amp.GradScaler) and own.is_enabled() else None
