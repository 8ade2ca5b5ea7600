"""The network being trained: its parameters and their roles, its buffers, its optimizer."""

import contextlib
import itertools
import operator
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from torchmto.checks import found, warn
from torchmto.gradients.backwards import run_hooks
from torchmto.gradients.engine import Engine
from torchmto.gradients.finite import FEW, dtype_of_gradient, like, plain, real
from torchmto.gradients.ranks import Ranks, fingerprint, is_sharded, local, sharded_like
from torchmto.gradients.reach import (
    gradients_below,
    is_recomputed,
    reach_of,
    refuse_hidden,
    refuse_reentrant,
    run_unreached,
)
from torchmto.gradients.regions import Regions
from torchmto.gradients.roles import Agreement, Roles
from torchmto.gradients.rows import Rows
from torchmto.gradients.sharded import ShardedRows
from torchmto.gradients.torch_private import gradient_hooks, hooks_made, uncompiled
from torchmto.step.losses import Chunk
from torchmto.step.optimizers import Optimizers
from torchmto.step.surroundings import random_state, set_random_state
from torchmto.step.wrappers import check_wrappers, replicas, shards_of, unwrapped
from torchmto.task_norms import has_split_norms
from torchmto.undo import BufferSnapshot

Heads = dict[int, tuple[Tensor, dict[int, Tensor]]]
"""The ``id`` of a parameter outside the shared ones -> it, and the gradient of each task that reached it."""


@dataclass(frozen=True)
class Place:
    """Where the gradients belong that one backward of a task gives, in the order of the trained parameters.

    Attributes:
        key: As long as what holds: the parameters with a gradient, what is known of roles, the number of columns.
        shared: Which go to the task's row.
        positions: At which places there.
        others: Which go to heads.
        heads: The parameters of these.
    """

    key: tuple[list[bool], int, int]
    shared: list[bool]
    positions: list[int]
    others: list[bool]
    heads: list[Tensor]


AGAIN = 0.05
"""How much a function's gradient may differ, relatively, when it is computed again: what rounding doesn't explain."""

TF32 = 2.0**-10
"""The machine precision of TensorFloat-32."""


def multiplies_in_tf32() -> bool:
    """Whether PyTorch may multiply matrices of float32 in less precision on a GPU."""
    matmul = torch.backends.cuda.matmul
    # Where PyTorch has the newer setting, reading the older one raises if the newer was used.
    return bool(matmul.fp32_precision == "tf32") if hasattr(matmul, "fp32_precision") else bool(matmul.allow_tf32)


class Network:
    """A model and its optimizer, as a step sees them.

    Args:
        model: Any module; a ``DistributedDataParallel`` wrapper, compiled or not, is looked through.
        optimizers: The optimizers; their parameters are the ones that are trained.
        num_tasks: K.
        shared: The shared parameters, or None to find them from the autograd graph.
        scaler: A ``torch.amp.GradScaler``, or None.
        clip: The largest allowed global norm of the gradient, or None.
        ranks: The processes that train together.
        stacked: The closure runs several tasks through split norms by itself.
        shard_gradients: Every rank holds a part of the gradient matrix' columns only.
        engine: What computes Gramians without the gradient matrix; None for the matrix.
        sparse: Leave the sparse gradients of ``nn.Embedding(sparse=True)`` sparse, where one process alone trains.

    Attributes:
        parameters: Those that are trained now, in the model's order.
        sizes: Whether tasks get a backward each, and the tasks -> the sizes of the graphs that have been looked at; forgotten
            when other parameters are trained.
        counts: Tasks, and numbers of parameters that had a gradient of these, that have been looked at.
        places: Task -> where its gradients belong, as its last backward has shown.
        nodes_made: How many graph nodes there had been at the last look.
        few: Whether the trained parameters are few numbers, on the CPU.
        differentiates: Whether closures differentiate by themselves, so that forwards without a backward need a graph, too.
        recomputes: Whether backwards may run parts of the forward again (checkpointing).
        compiled: Whether there have been compiled regions.
        opaque: Whether there have been some that hide which of their outputs depends on which parameter.
        regions: What is known of what these hide.
        replicas: The ``DistributedDataParallel`` wrappers; one that isn't in the model is found before the first step.
        shards: The modules that FSDP2 shards.
        untold: Whether other parameters may be trained than those that the roles were told of.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
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
        self.replicas = replicas(model)
        self.model = unwrapped(model)
        self.scaler = scaler if scaler is not None and scaler.is_enabled() else None
        self.optimizers = Optimizers(optimizers, self.scaler)
        self.clip = clip
        self.ranks = ranks
        self.rows: list[Rows | ShardedRows] = []
        self._names: dict[int, str] = {}
        self._by_name: dict[str, Tensor] = {}
        self._known: list[Tensor] = []
        self._trained: list[bool] | None = None
        self.has_complex = False
        self.few = False
        self._hooked: tuple[int, list[Tensor]] = (-1, [])
        self._precisions: dict[str, float] = {}
        self.untold = True
        self.parameters: list[Tensor] = []
        self.sizes: dict[tuple[int, ...], set[int]] = {}
        self.counts: set[tuple[tuple[int, ...], int]] = set()
        self.places: dict[int, Place] = {}
        self.nodes_made = 0
        self._functions = False
        self._repeatable: set[str] = set()
        self._beyond: tuple[int, dict[tuple[int, ...], list[Tensor]]] = (-1, {})
        self.refresh()
        check_wrappers(model, optimizers, self.parameters)
        self.roles = Roles(num_tasks, self._given_names(shared))
        self.regions = Regions(self.roles)
        self.num_tasks = num_tasks
        self._scaler_before: dict[str, Any] | None = None
        self.moved: list[tuple[Tensor, Tensor]] = []
        self.buffers = BufferSnapshot(self.model)
        self.room = BufferSnapshot(self.model)
        self._after_forward = BufferSnapshot(self.model)
        self.split = has_split_norms(self.model) and not stacked
        self.compiled = False
        self.opaque = False
        self.recomputes = False
        self.warned: set[str] = set()
        self.differentiates = False
        self.sparse = sparse and ranks.size == 1
        self._warned_untrained = False
        self._warned_unreached = False
        self._warned_taken = False
        self._warned_unshared = False
        self.shard_gradients = shard_gradients and ranks.size > 1
        self.sharded = self._check_sharding()
        self.shards = shards_of(model) if self.sharded else []
        self.engine = engine
        self.agreement = Agreement(ranks, self.roles)

    def _check_sharding(self) -> bool:
        """Whether FSDP shards parameters; raise where the step couldn't be exact."""
        sharded = [p for p in self.parameters if is_sharded(p)]
        if not sharded:
            return False
        for parameter in sharded:
            if parameter.is_complex():
                raise ValueError(f"Parameter {self.name(parameter)} is complex, which can't be sharded (FSDP) here.")
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
        several = isinstance(shared, Iterable) and not isinstance(shared, Tensor)
        given = list(shared) if several else []
        if not several or not all(isinstance(p, Tensor) for p in given):
            raise TypeError(found("shared", "an iterable of parameters", shared))
        unknown = [p for p in given if id(p) not in self._names]
        if unknown:
            raise ValueError(
                f"Parameter `shared` should hold parameters that the optimizer trains. Found {len(unknown)} others, the "
                f"first of shape {list(unknown[0].shape)}."
            )
        if not given:
            raise ValueError("Parameter `shared` should hold at least one parameter. Found none: no shared parameters.")
        chosen = set(map(id, given))
        return [self._names[id(p)] for p in self._in_order(self._known) if id(p) in chosen]

    def _in_order(self, parameters: Iterable[Tensor]) -> list[Tensor]:
        """In the model's order, which ranks have in common (an optimizer may have been given a set); others come last."""
        places = {id(p): place for place, p in enumerate(self.model.parameters())}
        return sorted(parameters, key=lambda p: places.get(id(p), len(places)))

    def refresh(self) -> bool:
        """Look up which parameters are trained now: groups may have been added, parameters frozen.

        Returns:
            Whether there are parameters no more whose gradients would be combined with those of the others.
        """
        everything = self.optimizers.parameters()
        gone = False
        if len(everything) != len(self._known) or not all(map(operator.is_, everything, self._known)):
            any_complex = any(p.is_complex() for p in everything)
            if self.scaler is not None and any_complex:
                raise ValueError(
                    "Parameter `scaler` should be None with complex parameters: a GradScaler can't unscale complex gradients."
                )
            if any(map(is_lazy, everything)):
                raise ValueError("The model has parameters without a shape (a lazy module). Run it once before.")
            in_model = {id(p): name for name, p in self._in_model().items()}
            before = {id(p): self._names[id(p)] for p in self._known}
            names: dict[int, str] = {}
            by_name = dict(self._by_name)
            groups = [group for optimizer in self.optimizers.all for group in optimizer.param_groups]
            for g, group in enumerate(groups):
                for i, p in enumerate(group["params"]):
                    name = in_model.get(id(p)) or before.get(id(p)) or f"param_groups.{g}.{i}"
                    while id(p) not in in_model and by_name.get(name, p) is not p:
                        # The place of another one, before groups left the optimizer.
                        name += "'"
                    if by_name.get(name, p).shape != p.shape:
                        raise ValueError(
                            f"Parameter `{name}` was replaced by one of another shape, {list(p.shape)} after "
                            f"{list(by_name[name].shape)}, which what the method knows doesn't fit. Build a new MultiTask."
                        )
                    names[id(p)], by_name[name] = name, p
            # A parameter whose name is another one now, since two were tied, has one column: its former name is nobody's, or
            # that of the column of the one that it has taken the place of.
            renamed = [(old, names[key]) for key, old in before.items() if names.get(key, old) != old]
            renamed = [(old, new) for old, new in renamed if by_name[old] is by_name[new]]
            for old, new in renamed:
                if self.roles.rename(old, new):
                    del by_name[old]
                else:
                    by_name[old] = self._by_name[new]
            # The rows have columns for parameters that were replaced.
            replaced = any(by_name.get(name) is not p for name, p in self._by_name.items())
            gone = replaced or not before.keys() <= names.keys()
            rows = [] if replaced else self.rows
            if gone:
                self.regions.forget()
            # At once, as `_trained` comes last below: an interrupt leaves nothing half known.
            self.has_complex, self.rows = any_complex, rows
            self._names, self._by_name, self._known, self._trained = names, by_name, everything, None
        trained = [p.requires_grad for p in everything]
        if trained != self._trained:
            self.parameters = self._in_order(itertools.compress(everything, trained))
            self._marked = fingerprint(self.names())
            self.sizes, self.places = {}, {}
            self._beyond = (-1, {})
            self.few = all(p.is_cpu and p.numel() <= FEW for p in self.parameters)
            self._hooked = (-1, [])
            self.untold = True
            self._trained = trained
        return gone

    def check_trained(self, error: RuntimeError) -> None:
        """Raise if a parameter was frozen in the step, which may be the cause of an error.

        Raises:
            ValueError: If so.
        """
        frozen = [self.name(p) for p in self.parameters if not p.requires_grad]
        if frozen:
            raise ValueError(
                f"Parameter `{frozen[0]}` ({len(frozen)} such in all) was frozen while mt.step trained it. Call "
                "`requires_grad_(False)` before the step, or let the closure set it free again before it returns."
            ) from error

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a copy, whose parameters are others; the next step looks them up."""
        self.__dict__.update(state)
        self._known, self._names, self.rows = [], {}, []

    def _in_model(self) -> dict[str, Tensor]:
        """The model's parameters by the names that they have uncompiled."""
        return {uncompiled(name): p for name, p in self.model.named_parameters()}

    def everything(self) -> dict[str, Tensor]:
        """The parameters of the model and of the optimizer by name, in the model's order."""
        return {**self._in_model(), **{self.name(p): p for p in self._in_order(self._known)}}

    def name(self, parameter: Tensor) -> str:
        """The name of a parameter of the optimizer: its name in the model, else its place in the optimizer."""
        return self._names[id(parameter)]

    def names(self) -> list[str]:
        """The names of the parameters trained now, in the order of :attr:`parameters`."""
        return [self._names[id(p)] for p in self.parameters]

    def note_precision(self, leaves: Mapping[int, float]) -> None:
        """Remember the machine precision of parameters' gradients, by ``id``, where a graph shows it."""
        for parameter in self.parameters:
            if id(parameter) in leaves:
                name = self.name(parameter)
                self._precisions[name] = max(leaves[id(parameter)], self._precisions.get(name, 0.0))

    def precision(self, parameters: Sequence[Tensor]) -> float:
        """The machine precision of the gradients of these parameters, the coarsest of them.

        That of the parameters' types, or of what the forward has converted them to (as first seen; a compiled or FSDP model
        doesn't show it). Where matrices of float32 are multiplied in TensorFloat-32 on a GPU, that of its 10 bits.
        """
        found = [torch.finfo(dtype).eps for dtype in {torch.float64, *(p.dtype for p in parameters)}]
        found += [self._precisions.get(self._names.get(id(p), ""), 0.0) for p in parameters]
        if any(p.is_cuda and p.dtype == torch.float32 for p in parameters) and multiplies_in_tf32():
            found.append(TF32)
        return max(found)

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
            rows.grow([self._by_name[name] for name in layout[len(rows.parameters) :]])
        for key in [key for key in heads if key in rows.position]:
            parameter, held = heads.pop(key)
            for task, gradient in held.items():
                rows.put(task, parameter, gradient)

    def load_roles(self, state: Mapping[str, Any]) -> None:
        """Take over saved roles; the columns of the gradient matrices are laid out anew.

        Shared parameters that have left the optimizer keep their columns, to which methods' states belong.
        """
        roles = Roles(self.num_tasks, self.roles.declared)
        roles.load_state_dict(state)
        known = {**self._in_model(), **self._by_name}
        for path, parameter in self.model.named_parameters(remove_duplicate=False):
            # Tied before or after the state was saved: as in `refresh`.
            name, own = uncompiled(path), self._names.get(id(parameter))
            if own is not None and name not in known and not roles.rename(name, own):
                known[name] = torch.empty_like(parameter)
        missing = [name for name in roles.layout if name not in known]
        if missing:
            raise ValueError(
                f"The saved state has a shared parameter `{missing[0]}` that neither the optimizer nor the model has."
            )
        self._by_name = known
        self.roles = roles
        self.rows = []
        self.sizes, self.places = {}, {}
        self.regions = Regions(roles)
        self.untold = True
        self.agreement = Agreement(self.ranks, roles)

    def mark(self) -> None:
        """Remember buffers and roles for :meth:`undo`."""
        self._scaler_before = None
        self.buffers.take()
        self.roles.mark()

    def tell_trained(self) -> None:
        """Tell the roles which parameters are trained now; after :meth:`mark`, since an error undoes it."""
        self.roles.look(self.names())
        self.untold = False

    def undo(self, *, keep_buffers: bool) -> None:
        """Put buffers and roles back to where they were at :meth:`mark`; drop the gradients and their graphs."""
        self.put_back()
        self.zero_grad()
        if self.engine is not None:
            self.engine.forget()
        if not keep_buffers:
            self.buffers.restore()
            if self.scaler is not None and self._scaler_before is not None:
                self.scaler.load_state_dict(self._scaler_before)
        self.untold = True
        if self.roles.undo():
            self.rows = []
            self.agreement.shrink()

    @torch.no_grad()
    def put_back(self) -> None:
        """Give parameters that a method has moved their values back; an error's undoing repeats what was interrupted."""
        for parameter, value in self.moved:
            parameter.copy_(value)
        self.moved = []

    def by_role(self, parameters: Sequence[Tensor] | None = None) -> tuple[list[Tensor], list[Tensor]]:
        """The shared ones of ``parameters`` and the others, each in their order; default all that are trained."""
        given = self.parameters if parameters is None else parameters
        parts: tuple[list[Tensor], list[Tensor]] = [], []
        for parameter in given:
            parts[not self.roles.is_shared(self.name(parameter))].append(parameter)
        return parts

    @property
    def divided(self) -> bool:
        """Whether every rank holds a part of the gradient matrix' columns only."""
        return self.sharded or self.shard_gradients

    @property
    def fingerprint(self) -> str:
        """What the ranks must have in common for their collectives to fit."""
        trained = f"{len(self.parameters)} parameters ({self._marked:05x})"
        return f"{trained}, {self.agreement.columns} of them known to be shared"

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

    def scale(self, device: torch.device) -> Tensor | None:
        """The scaler's factor as a scalar tensor, None without a scaler."""
        return None if self.scaler is None else self.scaler.scale(torch.ones((), device=device))

    def seed(self, loss: Tensor, factor: float) -> Tensor | None:
        """The cotangent of a loss: its factor times the scaler's scale; None for 1."""
        if self.scaler is None and factor == 1:
            return None
        scale, seed = self.scale(loss.device), torch.ones_like(loss) * factor
        return seed if scale is None else seed * scale.to(seed)

    def reaches(self, task: int, parameter: Tensor) -> bool:
        """Whether a gradient belongs to ``task``: a compiled model gives zeros, too, for parameters it doesn't reach."""
        return not self.regions.zeros or self.regions.reached((task,), self.name(parameter))

    def gradients(self, parameters: Sequence[Tensor] | None = None) -> list[Tensor]:
        """The gradients that are set, as real numbers that can be changed in place; of sparse ones their entries.

        Args:
            parameters: Whose; default all that are trained.
        """
        given = self.parameters if parameters is None else parameters
        if self.has_complex:
            for parameter in given:
                if parameter.grad is not None and parameter.grad.is_conj():
                    parameter.grad = parameter.grad.resolve_conj()
        gradients = [gradient for p in given if (gradient := p.grad) is not None]
        if True in [gradient.is_sparse for gradient in gradients]:
            self.tidy_sparse()
            set_now = [gradient for p in given if (gradient := p.grad) is not None]
            gradients = [gradient.values() if gradient.is_sparse else gradient for gradient in set_now]
        return [real(gradient) for gradient in gradients] if self.has_complex else gradients

    def look(self, chunk: Chunk, *, again: bool = False) -> None:
        """Look at the graph of a forward for what the tasks' roles can't be read from.

        Args:
            chunk: The forward.
            again: Whether there will be several backwards through it.

        Raises:
            ValueError: If it hides parameters that are trained, or can't be gone through again.
        """
        found = reach_of(chunk.losses.values())
        refuse_reentrant(found)
        self.warn_of_untrained(found.leaves)
        self.compiled = self.compiled or found.compiled
        self.opaque = self.opaque or bool(found.opaque)
        self.recomputes = self.recomputes or is_recomputed(chunk.losses.values())
        if found.functions:
            self._functions = True
            with chunk.activated():
                refuse_hidden(list(map(self.name, run_unreached(found, chunk.losses.values(), self.parameters))))
                if again:
                    self._check_again(chunk.losses.values())

    @contextlib.contextmanager
    def buffers_as_before(self) -> Iterator[None]:
        """For backwards that run checkpointed parts of the forward again, once per task: norms see a batch once."""
        if not self.recomputes:
            yield
            return
        self._after_forward.take()
        try:
            yield
        finally:
            self._after_forward.restore()

    def _check_again(self, losses: Collection[Tensor]) -> None:
        """Raise if a function that several tasks go through gives another gradient the second time.

        Its backward may write over what the forward has saved; a kernel's writing shows in no version counter.

        Raises:
            ValueError: If so.
        """
        times = Counter(node for loss in losses for node in reach_of([loss]).functions)
        for name, node in {node.name(): node for node, number in times.items() if number > 1}.items():
            if name in self._repeatable:
                continue
            random = random_state()
            found: list[list[Tensor]] = []
            for _ in range(2):
                found.append(gradients_below(node))
                set_random_state(random)
            if any(bool((one - other).norm() > AGAIN * one.norm()) for one, other in zip(*found, strict=False)):
                raise ValueError(
                    f"{name} gives another gradient the second time: it writes over what its forward has saved, as fused "
                    "kernels do (Liger's, `use_liger_kernel`), so every task after the first would get garbage. Leave it out, "
                    "or use a loss weighting, which takes one backward."
                )
            self._repeatable.add(name)

    def without_gradient(self, tasks: tuple[int, ...]) -> list[Tensor]:
        """The parameters without a gradient, as far as a backward of ``tasks`` may set one that has to be explained.

        They are those that the tasks aren't known to reach; all, where functions may hide some.
        """
        if self.sharded:
            return []
        if self._beyond[0] != self.roles.changes:
            self._beyond = (self.roles.changes, {})
        if tasks not in self._beyond[1]:
            self._beyond[1][tasks] = [p for p in self.parameters if not self._known_to_reach(tasks, p)]
        return [p for p in (self.parameters if self._functions else self._beyond[1][tasks]) if p.grad is None]

    def _known_to_reach(self, tasks: Collection[int], parameter: Tensor) -> bool:
        return not self.roles.tasks_of(self.name(parameter)).isdisjoint(tasks)

    def explain(self, chunk: Chunk, tasks: Collection[int], before: Sequence[Tensor]) -> None:
        """Learn of parameters that had no gradient ``before`` a backward of ``tasks`` and that it was the first to reach.

        Raises:
            ValueError: If the graph doesn't reach them.
        """
        new = [p for p in before if p.grad is not None]
        if new:
            leaves = {index: reach_of([chunk.losses[index]]).leaves for index in tasks}
            everything = set().union(*leaves.values())
            refuse_hidden([self.name(p) for p in new if id(p) not in everything])
            if not all(self._known_to_reach(tasks, p) for p in new):
                for index, reached in leaves.items():
                    own = [p for p in self.parameters if id(p) in reached and self.reaches(index, p)]
                    self.roles.observe(index, map(self.name, own))

    def refuse_hidden(self, allowed: Sequence[Tensor] = (), losses: Iterable[Tensor] = ()) -> None:
        """Raise if ``.grad`` has been set by a backward that doesn't do so.

        Args:
            allowed: The parameters whose gradients it does set, if ``losses`` reach them.
            losses: What it started from.

        Raises:
            ValueError: If ``.grad`` of another parameter is there.
        """
        found = [p for p in self.parameters if p.grad is not None]
        if found:
            known = set(map(id, allowed))
            if self._functions and known:
                known.intersection_update(reach_of(losses).leaves)
            refuse_hidden([self.name(p) for p in found if id(p) not in known])

    def tidy_sparse(self) -> None:
        """Add up the entries that sparse gradients hold several times; where they mayn't stay sparse, make them dense."""
        for parameter in self.parameters:
            gradient = parameter.grad
            if gradient is not None and gradient.is_sparse:
                parameter.grad = gradient.coalesce() if self.sparse else like(plain(gradient), parameter)

    def warn_of_untrained(self, leaves: Collection[int] | None = None) -> None:
        """Warn once if losses reach parameters of the model that the optimizer doesn't have, or nothing that is trained.

        Args:
            leaves: The ``id`` of every leaf that the losses reach; any, where they reach none of the optimizer's.
        """
        if self._warned_untrained:
            return
        left = [
            name
            for name, p in self.model.named_parameters()
            if p.requires_grad and (leaves is None or id(p) in leaves) and id(p) not in self._names
        ]
        if left:
            self._warned_untrained = True
            warn(
                f"The losses reach parameter `{left[0]}` ({len(left)} such in all), which isn't in the optimizer, so mt.step "
                "computes no gradient for it. Add it to the optimizer, in a group of its own if need be; or call "
                "`requires_grad_(False)` on it if it isn't to be trained.",
            )
        elif leaves is None and not self._warned_unreached:
            self._warned_unreached = True
            warn(
                "The losses reach none of the trained parameters, so nothing is updated. Does the closure run another model "
                "than the one that MultiTask was given, such as a copy, or one that was built anew?",
            )

    def warn_of_replaced(self, *, none: bool) -> None:
        """Warn if parameters were replaced in the model, but not in the optimizer; or if ``none`` has a gradient."""
        in_model = self._in_model()
        replaced = [in_model.get(self.name(p), p) for p in self.parameters]
        self.warn_of_untrained(None if none else {id(p) for p in replaced})

    def unshared(self) -> str:
        """Why no parameter is shared once all tasks have been seen; empty if one is."""
        if not self.roles.unshared:
            return ""
        frozen = sum(not p.requires_grad for p in self.model.parameters())
        found = f"; {frozen} parameters of the model are frozen now" if frozen else ""
        return (
            "The tasks share no parameters: the losses of no two tasks reach the same trained parameter. The cause may be a "
            f"frozen trunk (`requires_grad_(False)`, until it is set free{found}), a trunk outside the optimizer, detached "
            "features, placeholders instead of losses, an inner backward (a reentrant checkpoint, a function that calls "
            "`backward()`), or a model compiled as a whole: then give `shared=`."
        )

    def warn_of_unshared(self) -> None:
        """Warn once if all tasks have been seen and share no parameter."""
        if not self._warned_unshared and (reason := self.unshared()):
            self._warned_unshared = True
            warn(f"{reason} Each task trains its own parameters.")

    def set_gradients(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Set ``.grad`` of parameters to real numbers (pairs for complex ones), in their type and layout, on their device."""
        for parameter, gradient in pairs:
            # As `dtype_of_gradient`: a call less for every parameter.
            kind = getattr(parameter, "grad_dtype", None) or parameter.dtype
            given = (gradient.dtype, gradient.device, gradient.stride())
            fits = not self.sharded and given == (kind, parameter.device, parameter.stride())
            # A tensor of its own: `model.half()` and the like give the very tensor in `.grad` other memory, which a view that
            # serves the next step, too, must keep.
            own = gradient.detach() if fits else like(gradient, parameter)
            parameter.grad = sharded_like(own, parameter) if self.sharded and is_sharded(parameter) else own

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
        if gradients:
            torch._foreach_mul_([local(g) for g in gradients], factor)

    @torch.no_grad()
    def exact_norm(self, gradients: Sequence[Tensor]) -> Tensor:
        """The global norm of finite gradients whose squares leave the range of their type; called by all ranks together."""
        wide = torch.float32 if self.device.type == "mps" else torch.float64
        apart, alike = (
            [local(g) for g in gradients if is_sharded(g) == sharded and g.numel()] for sharded in (True, False)
        )
        largest = torch.tensor([max([float(g.abs().max()) for g in apart + alike], default=0.0)], dtype=wide)
        if self.sharded:
            largest = self.ranks.max_(largest.to(self.device))
        least = torch.finfo(wide).tiny
        total, rest = (
            sum(
                [(g.to(wide) / max(float(largest), least)).square().sum().to(largest) for g in part],
                torch.zeros_like(largest),
            )
            for part in (apart, alike)
        )
        if self.sharded:
            self.ranks.sum_(total)
        return ((total + rest).sqrt() * largest).clamp_max(torch.finfo(wide).max).squeeze(0)

    @torch.no_grad()
    def clip_gradients(self, norm: Tensor) -> None:
        """Scale the gradients down to the norm ``clip``, given their present norm."""
        if self.clip is not None:
            if self.sharded:
                self.multiply(self.gradients(), float((self.clip / (norm + 1e-6)).clamp(max=1)))
            else:
                nn.utils.clip_grads_with_norm_(self.parameters, self.clip, norm)

    # ------------------------------------------------------------------ hooks and the scaler

    def hooked(self) -> list[Tensor]:
        """The parameters with post-accumulate-grad hooks: a hook has a handle, and all handles of a process are counted."""
        number, hooked = self._hooked
        if number != hooks_made():
            hooked = [p for p in self.parameters if gradient_hooks(p)]
            self._hooked = (hooks_made(), hooked)
        return hooked

    def run_hooks(self) -> bool:
        """Run the parameters' post-accumulate-grad hooks on what the step has set; return whether there are any."""
        hooked = self.hooked()
        if not hooked:
            return False
        hooked = run_hooks(hooked)
        taken = [parameter for parameter in hooked if parameter.grad is None]
        if taken and not self._warned_taken:
            self._warned_taken = True
            warn(
                f"A post-accumulate-grad hook of parameter `{self.name(taken[0])}` has taken its gradient away ({len(taken)} "
                "such in all), so the optimizer of mt.step doesn't move it. A hook that takes an optimizer step of its own "
                "does so before the gradient is checked and clipped. This warning isn't repeated.",
            )
        return bool(hooked)

    def show_overflow(self) -> None:
        """Show the scaler an infinite gradient, so that it lowers its scale by itself."""
        assert self.scaler is not None
        # Here, where it waits for the device anyway.
        self._scaler_before = self._scaler_before or self.scaler.state_dict()
        self.optimizers.forget_scaling()
        self.set_infinite()
        with self.optimizers.scaling():
            self.optimizers.unscale()
            self.optimizers.num_stepped = 0
            self.optimizers.step()
        self.zero_grad()

    def set_infinite(self) -> None:
        """Make every gradient infinite: what a scaler sees of a step that overflowed."""
        for parameter in self.parameters:
            parameter.grad = torch.full_like(parameter, float("inf"), dtype=dtype_of_gradient(parameter))

    @contextlib.contextmanager
    def gradients_aside(self) -> Iterator[None]:
        """Inside no gradient is set; afterwards ``.grad`` is as before."""
        # Copies: those of the last batch may lie in the memory of the rows.
        before = [None if parameter.grad is None else parameter.grad.clone() for parameter in self._known]
        self.zero_grad()
        try:
            yield
        finally:
            for parameter, gradient in zip(self._known, before, strict=True):
                parameter.grad = gradient
