"""The network being trained: its parameters and their roles, its buffers, its optimizer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from torchmto.checks import found
from torchmto.gradients import Ranks, Roles, Rows
from torchmto.structure import has_split_norms


class BufferSnapshot:
    """A copy of a model's buffers that can be put back, buffers that a forward replaced by new tensors included.

    Batch-norm kernels write running statistics without raising the tensors' version counters, so small buffers are copied
    every time. Large ones are copied only if their version counter says that they changed.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._kept: dict[tuple[int, str], _KeptBuffer] = {}

    @torch.no_grad()
    def take(self) -> None:
        """Copy the buffers."""
        current: dict[tuple[int, str], _KeptBuffer] = {}
        again: list[_KeptBuffer] = []
        for module in self._model.modules():
            for name, buffer in module._buffers.items():  # noqa: SLF001 - the public name hides in which module it is
                if buffer is None:
                    continue
                kept = self._kept.get((id(module), name))
                if kept is None or not kept.fits(module, buffer):
                    kept = _KeptBuffer(module, name, buffer, buffer.detach().clone())
                elif kept.may_have_changed():
                    again.append(kept)
                current[id(module), name] = kept
        if again:
            torch._foreach_copy_([kept.copy for kept in again], [kept.buffer for kept in again])
        for kept in current.values():
            kept.version = kept.buffer._version  # noqa: SLF001 - no public name
        self._kept = current

    @torch.no_grad()
    def restore(self) -> None:
        """Put the copies back."""
        changed = [kept for kept in self._kept.values() if kept.may_have_changed()]
        if changed:
            torch._foreach_copy_([kept.buffer for kept in changed], [kept.copy for kept in changed])
        for kept in self._kept.values():
            kept.version = kept.buffer._version  # noqa: SLF001
            if kept.module._buffers.get(kept.name) is not kept.buffer:  # noqa: SLF001
                kept.module._buffers[kept.name] = kept.buffer  # noqa: SLF001


class _KeptBuffer:
    """One buffer of one module, and its copy."""

    SMALL = 100_000

    def __init__(self, module: nn.Module, name: str, buffer: Tensor, copy: Tensor) -> None:
        self.module = module
        self.name = name
        self.buffer = buffer
        self.copy = copy
        self.version = buffer._version  # noqa: SLF001

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
        return self.buffer.numel() <= self.SMALL or self.buffer._version != self.version  # noqa: SLF001


class Network:
    """A model and its optimizer, as a step sees them.

    Args:
        model: Any module; a ``DistributedDataParallel`` wrapper is looked through.
        optimizer: The optimizer; its parameters are the ones that are trained.
        num_tasks: K.
        shared: The shared parameters, or None to find them from the autograd graph.
        scaler: A ``torch.amp.GradScaler``, or None.
        clip: The largest allowed global norm of the gradient, or None.
        ranks: The processes that train together.
        stacked: The closure runs several tasks through split norms by itself.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        num_tasks: int,
        shared: Iterable[Tensor] | None = None,
        scaler: torch.amp.GradScaler | None = None,
        clip: float | None = None,
        ranks: Ranks,
        stacked: bool = False,
    ) -> None:
        self.wrapper = model
        self.model: nn.Module = model.module if isinstance(model, DistributedDataParallel) else model
        self.optimizer = optimizer
        self.scaler = scaler if scaler is not None and scaler.is_enabled() else None
        self.clip = clip
        self.ranks = ranks
        self._names: dict[int, str] = {}
        self._known: list[Tensor] = []
        self.parameters: list[Tensor] = []
        self.refresh()
        self.roles = Roles(num_tasks, self._given_names(shared))
        self.num_tasks = num_tasks
        self.rows: list[Rows] = []
        self.buffers = BufferSnapshot(self.model)
        self.room = BufferSnapshot(self.model)
        self.split = has_split_norms(self.model) and not stacked
        self.compiled = False
        self.walked: set[int] = set()
        self.warned_unasked = False
        self._agreed: list[tuple[str, frozenset[int]]] = []

    def _given_names(self, shared: Iterable[Tensor] | None) -> list[str] | None:
        if shared is None:
            return None
        if isinstance(shared, Tensor):
            raise TypeError("Parameter `shared` should be an iterable of parameters. Found a single tensor.")
        given = list(shared)
        if not all(isinstance(p, Tensor) for p in given):
            raise TypeError(found("shared", "an iterable of parameters", given))
        unknown = [p for p in given if id(p) not in self._names]
        if unknown:
            raise ValueError(
                f"Parameter `shared` should hold parameters that the optimizer trains. Found {len(unknown)} others, the "
                f"first of shape {list(unknown[0].shape)}."
            )
        names = list(dict.fromkeys(self._names[id(p)] for p in given))
        if not names:
            raise ValueError("Parameter `shared` should hold at least one parameter. Found none: no shared parameters.")
        return names

    def refresh(self) -> None:
        """Look up which parameters are trained now: groups may have been added, parameters frozen."""
        everything = [p for group in self.optimizer.param_groups for p in group["params"]]
        if len(everything) != len(self._known) or any(a is not b for a, b in zip(everything, self._known, strict=True)):
            names = {id(p): name for name, p in self.model.named_parameters()}
            self._names = {}
            for g, group in enumerate(self.optimizer.param_groups):
                for i, p in enumerate(group["params"]):
                    self._names[id(p)] = names.get(id(p), f"param_groups.{g}.{i}")
            self._known = everything
        self.parameters = [p for p in everything if p.requires_grad]

    def name(self, parameter: Tensor) -> str:
        """The name of a parameter of the optimizer: its name in the model, else its place in the optimizer."""
        return self._names[id(parameter)]

    def names(self) -> list[str]:
        """The names of the parameters trained now, in the optimizer's order."""
        return [self._names[id(p)] for p in self.parameters]

    def rows_of(self, source: int) -> Rows:
        """The gradient matrix of one independent batch."""
        while len(self.rows) <= source:
            self.rows.append(Rows(self.num_tasks))
        return self.rows[source]

    def lay_out(self, rows: Rows, heads: dict[int, tuple[Tensor, dict[int, Tensor]]]) -> None:
        """Give every shared parameter its columns; gradients of parameters that turned shared move from the heads there."""
        if len(rows.parameters) < len(self.roles.layout):
            by_name = {self._names[id(p)]: p for p in self._known}
            rows.grow([by_name[name] for name in self.roles.layout[len(rows.parameters) :]])
        for key in [key for key in heads if key in rows.position]:
            parameter, held = heads.pop(key)
            for task, gradient in held.items():
                rows.row_of(task)
                rows.add(task, [(parameter, gradient)])

    def load_roles(self, state: Mapping[str, Any]) -> None:
        """Take over saved roles; the columns of the gradient matrices are laid out anew."""
        roles = Roles(self.num_tasks)
        roles.load_state_dict(state)
        known = set(self._names.values())
        missing = [name for name in roles.layout if name not in known]
        if missing:
            raise ValueError(f"The saved state has a shared parameter `{missing[0]}` that the optimizer doesn't train.")
        self.roles = roles
        self.rows = []
        self.walked = set()

    def mark(self) -> None:
        """Remember buffers and roles for :meth:`undo`."""
        self.buffers.take()
        self.roles.mark()

    def undo(self, *, keep_buffers: bool) -> None:
        """Put buffers and roles back to where they were at :meth:`mark`; drop the gradients."""
        self.zero_grad()
        if not keep_buffers:
            self.buffers.restore()
        if self.roles.undo():
            self.rows = []
        self.walked &= self.roles.seen

    def owned(self, rows: Rows, tasks: set[int]) -> list[int]:
        """Positions of the shared parameters that some of the ``tasks`` have reached, by the roles all ranks agree on."""
        reached = [self.roles.tasks_of(self.name(p)) for p in rows.parameters]
        return [i for i, owners in enumerate(reached) if owners & tasks]

    # ------------------------------------------------------------------ across ranks

    def _roles_now(self) -> list[tuple[str, frozenset[int]]]:
        return [
            *((name, self.roles.tasks_of(name)) for name in self.names()),
            ("", frozenset(self.roles.seen)),
        ]

    def agree_needed(self) -> bool:
        """Whether this rank knows of roles that the ranks haven't agreed on."""
        return self._roles_now() != self._agreed

    def agree(self) -> None:
        """Share with all ranks which task reaches which parameter. Called by all ranks together."""
        names = self.names()
        matrix = self.ranks.max_(self.roles.matrix(names).to(self.parameters[0].device))
        order = {name: i for i, name in enumerate(names)}
        self.roles.merge(names, matrix.cpu())
        # Ranks may have found shared parameters in different orders.
        laid_out = max((len(rows.parameters) for rows in self.rows), default=0)
        self.roles.layout[laid_out:] = sorted(self.roles.layout[laid_out:], key=order.__getitem__)
        self._agreed = self._roles_now()

    @torch.no_grad()
    def reduce_rows(
        self, rows: Rows, heads: dict[int, tuple[Tensor, dict[int, Tensor]]], tasks: tuple[int, ...]
    ) -> None:
        """Bring rows into the order of the tasks, and sum rows and heads' gradients over the ranks."""
        if self.ranks.size > 1:
            for task in tasks:
                rows.row_of(task)
        rows.sort()
        if self.ranks.size == 1:
            return
        self.ranks.sum_(rows.matrix)
        present = set(tasks)
        for parameter in self.parameters:
            if id(parameter) in rows.position:
                continue
            for task in sorted(self.roles.tasks_of(self.name(parameter)) & present):
                _, held = heads.setdefault(id(parameter), (parameter, {}))
                held[task] = self.ranks.sum_(held.get(task, torch.zeros_like(parameter)).contiguous())

    @torch.no_grad()
    def reduce_gradients(self) -> None:
        """Sum ``.grad`` over the ranks; a parameter that no rank reached keeps None."""
        if self.ranks.size == 1 or not self.parameters:
            return
        device = self.parameters[0].device
        reached = torch.tensor([p.grad is not None for p in self.parameters], dtype=torch.uint8, device=device)
        for parameter, needed in zip(self.parameters, self.ranks.max_(reached).tolist(), strict=True):
            if needed:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                self.ranks.sum_(parameter.grad)

    def zero_grad(self) -> None:
        """Set every gradient to None."""
        self.optimizer.zero_grad(set_to_none=True)

    def no_sync(self) -> contextlib.AbstractContextManager[Any]:
        """Keep a DDP wrapper from reducing gradients: the step reduces them itself."""
        if isinstance(self.wrapper, DistributedDataParallel):
            return self.wrapper.no_sync()
        return contextlib.nullcontext()

    def scale(self, device: torch.device) -> Tensor | None:
        """The scaler's factor as a scalar tensor, None without a scaler."""
        return None if self.scaler is None else self.scaler.scale(torch.ones((), device=device))

    def gradients(self) -> list[Tensor]:
        """The gradients that are set."""
        return [p.grad for p in self.parameters if p.grad is not None]

    @torch.no_grad()
    def set_gradients(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Set ``.grad`` of parameters, converted to their dtype and device."""
        for parameter, gradient in pairs:
            parameter.grad = gradient.to(device=parameter.device, dtype=parameter.dtype)

    def norm(self) -> Tensor:
        """The global norm of the gradients that are set, a scalar tensor."""
        gradients = self.gradients()
        if not gradients:
            return torch.zeros(())
        return nn.utils.get_total_norm(gradients)

    @torch.no_grad()
    def clip_gradients(self, norm: Tensor) -> None:
        """Scale the gradients down to the norm ``clip``, given their present norm."""
        if self.clip is not None:
            nn.utils.clip_grads_with_norm_(self.parameters, self.clip, norm)
