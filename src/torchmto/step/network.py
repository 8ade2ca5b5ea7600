"""The network being trained: its parameters and their roles, its buffers, its optimizer."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from torchmto.checks import found
from torchmto.gradients import Agreement, Engine, Ranks, Roles, Rows, ShardedRows, dense
from torchmto.gradients.ranks import is_sharded, local, sharded_like
from torchmto.task_norms import has_split_norms
from torchmto.undo import BufferSnapshot

Heads = dict[int, tuple[Tensor, dict[int, Tensor]]]
"""The ``id`` of a parameter outside the shared ones -> it, and the gradient of each task that reached it."""


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
        shard_gradients: Every rank holds a part of the gradient matrix' columns only.
        engine: What computes Gramians without the gradient matrix; None for the matrix.
        sparse: Leave the sparse gradients of ``nn.Embedding(sparse=True)`` sparse, where one process alone trains.
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
        shard_gradients: bool = False,
        engine: Engine | None = None,
        sparse: bool = False,
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
        self.rows: list[Rows | ShardedRows] = []
        self.buffers = BufferSnapshot(self.model)
        self.room = BufferSnapshot(self.model)
        self.split = has_split_norms(self.model) and not stacked
        self.compiled = False
        self.walked: set[int] = set()
        self.warned_unasked = False
        self.sparse = sparse and ranks.size == 1
        self._warned_untrained = False
        self.shard_gradients = shard_gradients and ranks.size > 1
        self.sharded = self._check_sharding()
        self.engine = engine
        self.agreement = Agreement(ranks, self.roles)

    def _check_sharding(self) -> bool:
        """Whether FSDP shards parameters; raise where the step couldn't be exact."""
        sharded = [p for p in self.parameters if is_sharded(p)]
        if not sharded:
            return False
        for parameter in sharded:
            mesh, placements = parameter.device_mesh, parameter.placements  # type: ignore[attr-defined]
            if mesh.ndim != 1 or mesh.size() != self.ranks.size or not all(p.is_shard(0) for p in placements):
                raise ValueError(
                    f"Parameter {self.name(parameter)} is a DTensor placed as {placements} on a mesh of shape "
                    f"{tuple(mesh.shape)}. Gradients of tasks are exact for `fully_shard` over a one-dimensional mesh of "
                    f"the {self.ranks.size} ranks of the process group: hybrid sharding would count shards twice, tensor "
                    "parallelism brings other placements."
                )
        if self.scaler is not None:
            raise ValueError(
                "Parameter `scaler` should be None with sharded parameters: an overflow would be seen by the rank that "
                "holds it only. Use bfloat16, which needs no scaler."
            )
        if self.shard_gradients:
            raise ValueError(
                "Parameter `shard_gradients` should be False with sharded parameters: rows are sharded then."
            )
        return True

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
        if list(map(id, everything)) != list(map(id, self._known)):
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

    def rows_of(self, source: int) -> Rows | ShardedRows:
        """The gradient matrix of one independent batch."""
        while len(self.rows) <= source:
            rows = ShardedRows(self.num_tasks, self.ranks) if self.shard_gradients else Rows(self.num_tasks, self.ranks)
            self.rows.append(rows)
        return self.rows[source]

    def lay_out(self, rows: Rows | ShardedRows, heads: Heads) -> None:
        """Give every shared parameter its columns; gradients of parameters that turned shared move from the heads there.

        Among several ranks only parameters that all of them know to be shared get columns.
        """
        layout = self.roles.layout if self.ranks.size == 1 else self.roles.layout[: self.agreement.columns]
        if len(rows.parameters) < len(layout):
            by_name = {self._names[id(p)]: p for p in self._known}
            rows.grow([by_name[name] for name in layout[len(rows.parameters) :]])
        for key in [key for key in heads if key in rows.position]:
            parameter, held = heads.pop(key)
            for task, gradient in held.items():
                rows.put(task, parameter, gradient)

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
        self.agreement = Agreement(self.ranks, roles)

    def mark(self) -> None:
        """Remember buffers and roles for :meth:`undo`."""
        self.buffers.take()
        self.roles.mark()

    def undo(self, *, keep_buffers: bool) -> None:
        """Put buffers and roles back to where they were at :meth:`mark`; drop the gradients and their graphs."""
        self.zero_grad()
        if self.engine is not None:
            self.engine.forget()
        if not keep_buffers:
            self.buffers.restore()
        if self.roles.undo():
            self.rows = []
            self.agreement.shrink()
        self.walked &= self.roles.seen

    @property
    def divided(self) -> bool:
        """Whether every rank holds a part of the gradient matrix' columns only."""
        return self.sharded or self.shard_gradients

    @property
    def fingerprint(self) -> str:
        """What the ranks must have in common for their collectives to fit."""
        return f"{len(self.parameters)} parameters, {self.agreement.columns} of them known to be shared"

    def agree(self) -> None:
        """Share with all ranks which task reaches which parameter. Called by all ranks together."""
        self.agreement.reach(self.names(), self.device)

    @property
    def device(self) -> torch.device:
        """Where the first trained parameter is."""
        return self.parameters[0].device if self.parameters else torch.device("cpu")

    def zero_grad(self) -> None:
        """Set every gradient to None."""
        # What `optimizer.zero_grad()` does, without its hooks for profilers, which take ten times as long.
        for parameter in self._known:
            parameter.grad = None
        if self.sharded:
            # Their backwards can't be restricted to the parameters that are trained.
            self.model.zero_grad(set_to_none=True)

    def no_sync(self) -> contextlib.AbstractContextManager[Any]:
        """Keep a DDP wrapper from reducing gradients: the step reduces them itself."""
        if isinstance(self.wrapper, DistributedDataParallel):
            # Its first forward would broadcast the buffers, but a rank without labels may not run the model at all.
            self.wrapper.require_forward_param_sync = False
            return self.wrapper.no_sync()
        return contextlib.nullcontext()

    def scale(self, device: torch.device) -> Tensor | None:
        """The scaler's factor as a scalar tensor, None without a scaler."""
        return None if self.scaler is None else self.scaler.scale(torch.ones((), device=device))

    def seed(self, loss: Tensor, factor: float) -> Tensor | None:
        """The cotangent of a loss: its factor times the scaler's scale; None for 1."""
        scale = self.scale(loss.device)
        if scale is None and factor == 1:
            return None
        seed = torch.ones_like(loss) * factor
        return seed if scale is None else seed * scale.to(seed)

    def reaches(self, task: int, parameter: Tensor) -> bool:
        """Whether a gradient belongs to ``task``: a compiled model reports zeros, too, for parameters it doesn't reach."""
        return not self.compiled or task in self.roles.tasks_of(self.name(parameter))

    def gradients(self) -> list[Tensor]:
        """The gradients that are set; of sparse ones their entries, which can be changed in place."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        return [gradient.values() if gradient.is_sparse else gradient for gradient in gradients]

    @torch.no_grad()
    def tidy_sparse(self) -> None:
        """Add up the entries that sparse gradients hold several times; where they mayn't stay sparse, make them dense."""
        for parameter in self.parameters:
            gradient = parameter.grad
            if gradient is not None and gradient.is_sparse:
                parameter.grad = gradient.coalesce() if self.sparse else dense(gradient)

    def warn_of_untrained(self, leaves: Collection[int]) -> None:
        """Warn once if losses reach parameters of the model that the optimizer doesn't have.

        Args:
            leaves: The ``id`` of every leaf that the losses reach.
        """
        if self._warned_untrained:
            return
        left = [
            name
            for name, p in self.model.named_parameters()
            if p.requires_grad and id(p) in leaves and id(p) not in self._names
        ]
        if left:
            self._warned_untrained = True
            warnings.warn(
                f"The losses reach parameter `{left[0]}` ({len(left)} such in all), which isn't in the optimizer, so mt.step "
                "computes no gradient for it. Add it to the optimizer, in a group of its own if need be; or call "
                "`requires_grad_(False)` on it if it isn't to be trained.",
                stacklevel=2,
            )

    @torch.no_grad()
    def set_gradients(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Set ``.grad`` of parameters, converted to their dtype and device."""
        for parameter, gradient in pairs:
            converted = gradient.to(device=parameter.device, dtype=parameter.dtype)
            parameter.grad = sharded_like(converted, parameter) if is_sharded(parameter) else converted

    def norm(self, gradients: Sequence[Tensor] | None = None) -> Tensor:
        """The global norm of gradients, a scalar tensor; default those that are set."""
        gradients = self.gradients() if gradients is None else gradients
        if not gradients:
            return torch.zeros(())
        return self.norm_of(gradients) if self.sharded else nn.utils.get_total_norm(gradients)

    @torch.no_grad()
    def norm_of(self, gradients: Sequence[Tensor]) -> Tensor:
        """The global norm of gradients of which some are sharded, a scalar tensor."""
        apart = [local(g) for g in gradients if is_sharded(g)]
        alike = [g for g in gradients if not is_sharded(g)]
        square = self.ranks.sum_(nn.utils.get_total_norm(apart).to(self.device, torch.float64).square().reshape(1))
        return (square + nn.utils.get_total_norm(alike).to(square).square()).sqrt().squeeze(0)

    @staticmethod
    def multiply(gradients: Sequence[Tensor], factor: float) -> None:
        """Multiply gradients, of which some may be sharded, in place."""
        torch._foreach_mul_([local(g) for g in gradients], factor)

    @torch.no_grad()
    def clip_gradients(self, norm: Tensor) -> None:
        """Scale the gradients down to the norm ``clip``, given their present norm."""
        if self.clip is not None:
            if self.sharded:
                self.multiply(self.gradients(), float((self.clip / (norm + 1e-6)).clamp(max=1)))
            else:
                nn.utils.clip_grads_with_norm_(self.parameters, self.clip, norm)
