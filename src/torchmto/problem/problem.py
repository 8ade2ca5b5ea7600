"""One step's work on a network: forwards, per-task gradients, weighted backwards, optimizer steps."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from torchmto.gradients import Rows, ShardedRows, gramian, reached_parameters
from torchmto.problem.exchange import Exchange
from torchmto.problem.info import StepInfo
from torchmto.problem.losses import Chunk, Losses, NonFiniteError, Source, detached, parse, stack
from torchmto.problem.network import Heads, Network
from torchmto.problem.noise import Noise
from torchmto.structure import active_task

Weigh = Callable[[Tensor, tuple[int, ...]], Tensor]
"""(losses [k], indices of the present tasks) -> one weight per present task, [k]."""


class SkippedError(Exception):
    """Raised inside a step to leave it out: under ``on_nonfinite="skip"``, or when the scaler found an overflow."""

    def __init__(self, reason: str, *, overflow: bool = False, absent: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.overflow = overflow
        self.absent = absent


class TaskGradients:
    """The present tasks' gradients: rows on the shared parameters, and each head's own.

    Attributes:
        indices: The present tasks, ascending; row i of everything below belongs to task ``indices[i]``.
        losses: Their losses, [k].
        gramian: G = J Jᵀ, float64 on the CPU, [k, k].
        heads: Parameters outside the shared ones -> the gradient of each task that reached them.
        reduced: The losses of the rows' tasks, with counts.
        all_losses: The losses of all tasks of the forward, more where more were asked for.
        graph: Where the rows aren't kept: the present tasks' losses with graph, and the shared parameters.
    """

    def __init__(
        self,
        rows: Rows | ShardedRows,
        losses: Losses,
        gramian: Tensor,
        heads: Heads,
        everything: Losses,
        *,
        graph: tuple[list[Tensor], list[Tensor]] | None = None,
    ) -> None:
        self.rows = rows
        self.indices = losses.indices
        self.losses = losses.values
        self.reduced = losses
        self.all_losses = everything
        self.gramian = gramian
        self.heads = heads
        self.graph = graph

    @property
    def matrix(self) -> Tensor:
        """J, the gradients of the present tasks on the shared parameters as rows, [k, P]. The live buffer, no copy."""
        return self.rows.matrix

    @property
    def parameters(self) -> list[Tensor]:
        """The shared parameters, in the order of their columns."""
        return self.rows.parameters

    def has(self, parameter: Tensor) -> bool:
        """Whether ``parameter`` is one of the shared parameters."""
        return id(parameter) in self.rows.position

    def columns(self, parameter: Tensor) -> slice:
        """The columns of one shared parameter."""
        return self.rows.slices[self.rows.position[id(parameter)]]

    def view(self, parameter: Tensor) -> Tensor:
        """The gradients of one shared parameter, a view [k, *parameter.shape] of the matrix."""
        assert isinstance(self.rows, Rows), "methods that need whole rows are refused where rows are divided"
        return self.rows.view(parameter)


@dataclass
class _Sums:
    """Losses summed over chunks, weighted by their counts."""

    totals: dict[int, float]
    weighted: dict[int, Tensor]
    chunks: int = 0

    def merge(self, other: _Sums) -> None:
        for index, total in other.totals.items():
            known = index in self.totals
            self.weighted[index] = self.weighted[index] + other.weighted[index] if known else other.weighted[index]
            self.totals[index] = self.totals[index] + total if known else total

    def add(self, chunk: Chunk) -> None:
        for index, loss in chunk.losses.items():
            count = chunk.counts[index]
            value = detached(loss)
            if index in self.totals:
                self.weighted[index] = self.weighted[index] + value * count
                self.totals[index] += count
            else:
                self.weighted[index] = value * count if count != 1 else value
                self.totals[index] = count


def _shape(micro_batches: Sequence[Source], chunks: Sequence[Chunk]) -> list[object]:
    """The number of micro-batches, and the tasks and counts of each chunk: what must be the same for equal shares."""
    return [len(micro_batches), *(sorted(chunk.counts.items()) for chunk in chunks)]


class UnitHeads:
    """Takes the tasks' weights out of the heads' gradients after a weighted backward.

    The weighted sum multiplies a head's gradient by its task's weight; dividing by it gives the task's own gradient back.
    Where that would lose precision (a weight a thousand times smaller than the largest, or zero) or where a parameter
    outside the shared ones belongs to several tasks, its gradient comes from a backward of its own, which only runs
    through the head.
    """

    def __init__(self, network: Network) -> None:
        self._network = network
        self._own: dict[int, tuple[Tensor, Tensor]] = {}

    def _heads_of(self, task: int) -> list[tuple[Tensor, frozenset[int]]]:
        roles, name = self._network.roles, self._network.name
        candidates = [(p, roles.tasks_of(name(p))) for p in self._network.parameters if not roles.is_shared(name(p))]
        return [(parameter, owners) for parameter, owners in candidates if task in owners]

    @staticmethod
    def _divisible(weights: Mapping[int, Tensor]) -> dict[int, float]:
        values = {task: float(weight) for task, weight in weights.items()}
        least = 1e-3 * max(abs(value) for value in values.values())
        return {task: value for task, value in values.items() if abs(value) > least}

    def before(
        self, losses: Mapping[int, Tensor], weights: Mapping[int, Tensor], seeds: Mapping[int, Tensor | float]
    ) -> None:
        """Compute, before the weighted backward, the gradients that can't be had by division."""
        divisible = self._divisible(weights)
        for task, seed in seeds.items():
            wanted = [p for p, owners in self._heads_of(task) if len(owners) > 1 or task not in divisible]
            if not wanted:
                continue
            gradients = torch.autograd.grad(
                losses[task], wanted, torch.ones_like(losses[task]) * seed, retain_graph=True, allow_unused=True
            )
            for parameter, gradient in zip(wanted, gradients, strict=True):
                if gradient is not None:
                    _, before = self._own.get(id(parameter), (parameter, None))
                    self._own[id(parameter)] = (
                        parameter,
                        gradient.clone() if before is None else before + gradient,
                    )

    @torch.no_grad()
    def finish(self, weights: Mapping[int, Tensor]) -> None:
        """Replace or divide the heads' gradients."""
        for task, value in self._divisible(weights).items() if weights else ():
            for parameter, owners in self._heads_of(task):
                if len(owners) == 1 and parameter.grad is not None and id(parameter) not in self._own:
                    parameter.grad.div_(value)
        for parameter, gradient in self._own.values():
            parameter.grad = gradient


class Problem:
    """One step of multi-task training, as a method sees it.

    A method asks it for losses, per-task gradients or a weighted backward, and tells it what to apply; only here are
    closures called, gradients computed and optimizers stepped, so only here is anything counted.

    Args:
        network: The model, its optimizer and everything that lives longer than a step.
        tasks: The names of all tasks.
        sources: For every independent batch the list of its micro-batches, each a closure or ready losses.
        asked: The tasks this step is about.
        on_nonfinite: "raise" or "skip".
        weigh: The user's loss weights: a callable from losses and indices to factors [k]; None for 1.
        weigh_fixed: Whether these factors depend neither on the losses nor on which tasks are present.
        noise: Random states of the step's forwards, for those that are repeated.
        fingerprint: What must be the same on all ranks, besides the tasks.
    """

    def __init__(
        self,
        network: Network,
        tasks: tuple[str, ...],
        sources: Sequence[Sequence[Source]],
        *,
        asked: tuple[str, ...],
        on_nonfinite: str = "raise",
        weigh: Weigh | None = None,
        weigh_fixed: bool = True,
        noise: Noise,
        fingerprint: str = "",
    ) -> None:
        self.network = network
        self.tasks = tasks
        self.asked = asked
        self.num_forward = 0
        self.num_backward = 0
        self.num_optimizer_steps = 0
        self.skipped = False
        self.reason = ""
        self.overflowed = False
        self._sources = sources
        self._on_nonfinite = on_nonfinite
        self._weigh = weigh
        self._weigh_fixed = weigh_fixed
        self._noise = noise
        self._consumed: set[int] = set()
        self._recorded: dict[int, float] = {}
        self._pending: Losses | None = None
        self._loss_weights: dict[int, Tensor] = {}
        self._scaled = False
        self.first_losses: Losses | None = None
        self.last_losses: dict[str, float] = {}
        about = f"of {', '.join(asked)} on {len(sources)} batches with {network.fingerprint}, {fingerprint}"
        self._exchange = Exchange(network.ranks, len(tasks), about)
        self._doing = ""

    # ------------------------------------------------------------------ forwards

    @property
    def num_sources(self) -> int:
        """How many independent batches this step has: 1, or more if ``mt.step(..., independent=)`` gave them."""
        return len(self._sources)

    def _names(self, tasks: Sequence[str] | None) -> tuple[str, ...]:
        if tasks is None:
            return self.asked
        return tuple(name for name in tasks if name in self.asked)

    def _call(self, closure: Source, names: tuple[str, ...], *, grad: bool) -> Chunk:
        """Run one closure (or read ready losses) for the tasks ``names``."""
        if isinstance(closure, Mapping):
            if id(closure) in self._consumed:
                raise ValueError(
                    "This method runs the model more than once per step, so it needs a closure: pass "
                    "`mt.step(closure)` with `closure(tasks) -> losses` instead of ready losses."
                )
            self._consumed.add(id(closure))
            self.num_forward += 1
            chunk, _ = parse(
                {name: loss for name, loss in closure.items() if name in names or name not in self.tasks},
                self.tasks,
                names,
                needs_graph=grad,
                active=None,
            )
            return chunk
        active = names[0] if len(names) == 1 else None
        with contextlib.ExitStack() as contexts:
            if active is not None:
                contexts.enter_context(active_task(active))
            contexts.enter_context(torch.set_grad_enabled(grad))
            result = closure(names)
        self.num_forward += 1
        chunk, unasked = parse(result, self.tasks, names, needs_graph=grad, active=active)
        if unasked is not None and not self.network.warned_unasked:
            self.network.warned_unasked = True
            warnings.warn(
                f"The closure returned a loss for task `{unasked}`, which wasn't asked for; it is ignored. A closure gets the "
                "tuple of wanted task names and may compute only those. This warning isn't repeated.",
                stacklevel=2,
            )
        return chunk

    def _groups(self, closure: Source, names: tuple[str, ...]) -> list[tuple[str, ...]]:
        """Task-specific norms need one forward per task."""
        if self.network.split and not isinstance(closure, Mapping):
            return [(name,) for name in names]
        return [names]

    def _forward(self, names: tuple[str, ...], source: int, *, grad: bool = True) -> Iterator[Chunk]:
        for number, closure in enumerate(self._sources[source]):
            for group in self._groups(closure, names):
                try:
                    self._noise.before((source, number), group)
                    chunk = self._call(closure, group, grad=grad)
                    if grad:
                        self._observe(chunk, closure, group)
                except Exception as error:
                    if self.network.ranks.size > 1:
                        self._tell(_Sums({}, {}), failure=error)
                    raise
                if self.network.sharded:
                    self._check_same(chunk, len(self._sources[source]))
                yield chunk

    def _observe(self, chunk: Chunk, closure: Source, names: tuple[str, ...]) -> None:
        """Find the roles of the parameters that tasks seen for the first time reach."""
        roles = self.network.roles
        new = [index for index in chunk.losses if index not in self.network.walked]
        if not new or self.network.sharded:
            # FSDP gives the graph other tensors than the optimizer's: roles then come from the gradients.
            return
        found = {index: reached_parameters(chunk.losses[index]) for index in new}
        if any(compiled for _, compiled in found.values()):
            self.network.compiled = True
            if not (roles.given and isinstance(closure, Mapping)):
                found = self._probe_eagerly(closure, names, new)
        self.network.walked.update(new)
        by_id = {id(p): self.network.name(p) for p in self.network.parameters}
        columns = len(roles.layout)
        for index, (leaves, _) in found.items():
            roles.observe(index, [name for key, name in by_id.items() if key in leaves])
        if self.network.ranks.size == 1:
            # As several ranks do it, whose methods then draw the same random numbers for the same columns.
            roles.sort(columns, list(by_id.values()))
            roles.check()

    def _probe_eagerly(
        self, closure: Source, names: tuple[str, ...], new: list[int]
    ) -> dict[int, tuple[set[int], bool]]:
        """Roles of a compiled model: its graph shows one opaque node, so the forward is run once without compiling."""
        if isinstance(closure, Mapping):
            raise ValueError(
                "The model is compiled, which hides which parameters a loss reaches. Give `shared=`, or pass a closure so "
                "that they can be found by one eager forward."
            )
        with self._noise.extra(), torch.compiler.set_stance("force_eager"):
            self._noise.before((0, 0), names)
            chunk = self._call(closure, names, grad=True)
        return {index: reached_parameters(chunk.losses[index]) for index in new}

    def losses(self, tasks: Sequence[str] | None = None, *, source: int = 0, replay: bool = True) -> Losses:
        """The losses of ``tasks`` by an extra forward without gradient that leaves the model's buffers as they were.

        Averaged over micro-batches and ranks.

        Args:
            tasks: Default all this step asks for.
            source: Which independent batch.
            replay: Replay the random state of the step's own forward, so that dropout masks are the same, and put the random
                state back; else draw new noise (unless ``same_noise`` is on).
        """
        sums = _Sums({}, {})
        self._doing = "losses"
        with self._noise.extra(replay=replay):
            for chunk in self._forward(self._names(tasks), source, grad=False):
                sums.add(chunk)
        return self._reduce(sums)

    # ------------------------------------------------------------------ reduction

    @property
    def _device(self) -> torch.device:
        return self.network.device

    def _tell(
        self, sums: _Sums, *, counts: Sequence[object] | None = None, failure: Exception | None = None
    ) -> tuple[_Sums, bool]:
        """Sum losses over the ranks and agree on roles; also, whether all ranks have the same ``counts``."""
        network = self.network
        told = self._exchange(
            sums.totals,
            sums.weighted,
            doing=self._doing,
            device=self._device,
            disagree=network.agree_needed(),
            counts=counts,
            failure=failure,
        )
        if told.disagree:
            network.agree()
        return _Sums(told.totals, told.weighted), told.even

    def _check_same(self, chunk: Chunk, num_micro_batches: int) -> None:
        """With sharded parameters all ranks take part in every forward and backward."""
        _, same = self._tell(_Sums({}, {}), counts=[num_micro_batches, *sorted(chunk.losses)])
        if not same:
            raise ValueError(
                "With sharded parameters (FSDP) every rank takes part in every backward, so every rank should return losses "
                "for the same tasks in as many micro-batches. A task without labels on one rank can be returned as a zero "
                "loss with graph, with a small count: `(0 * output.sum(), 1e-6)`."
            )

    def _reduce(self, sums: _Sums) -> Losses:
        """Average losses over chunks and ranks."""
        if self.network.ranks.size > 1:
            sums, _ = self._tell(sums)
        return self._reduced(sums)

    def _reduced(self, sums: _Sums) -> Losses:
        losses = self._average(sums)
        if not self.any_losses:
            self.first_losses = losses
        return losses

    def _average(self, sums: _Sums) -> Losses:
        """Divide summed losses by their counts and apply the user's loss weights."""
        indices = tuple(sorted(sums.totals))
        if not indices:
            empty = torch.zeros(0, device=self._device)
            return Losses((), empty, empty, {})
        raw = stack([sums.weighted[i] / sums.totals[i] if sums.totals[i] != 1 else sums.weighted[i] for i in indices])
        if self._weigh is None:
            return Losses(indices, raw, raw, sums.totals)
        factors = self._weigh(raw, indices).detach().to(raw)
        self._loss_weights = dict(zip(indices, factors.unbind(), strict=True))
        return Losses(indices, raw * factors, raw, sums.totals, factors)

    @property
    def any_losses(self) -> bool:
        """Whether any loss has been seen in this step."""
        return self.first_losses is not None and bool(self.first_losses.indices)

    def unweighted(self) -> Losses:
        """End the user's loss weighting for this step, and return the losses it weighted: the first of every task."""
        self._weigh = None
        indices = tuple(sorted(self._recorded))
        like = torch.zeros(0, device=self._device) if self.first_losses is None else self.first_losses.raw
        values = like.new_tensor([self._recorded[index] for index in indices])
        return Losses(indices, values, values, dict.fromkeys(indices, 1.0))

    def _require(self, losses: Losses) -> None:
        if not losses.indices:
            self.raise_empty()

    def raise_empty(self) -> NoReturn:
        """Raise the error of a batch without any loss."""
        raise ValueError(
            f"Empty batch: no loss was returned for any of the tasks {', '.join(self.asked)}. A step needs the loss of "
            "at least one task."
        )

    # ------------------------------------------------------------------ finite checks

    def _check_losses(self, losses: Losses, values: Sequence[float]) -> None:
        for index, value in zip(losses.indices, values, strict=True):
            if value - value != 0:
                self._not_finite(f"The loss of task `{self.tasks[index]}` is {value}.")
        self.last_losses = {self.tasks[i]: value for i, value in zip(losses.indices, values, strict=True)}
        for index, value in zip(losses.indices, values, strict=True):
            self._recorded.setdefault(index, value)

    def _check_weights(self, losses: Losses) -> None:
        """Tell weights that aren't finite from gradients: a method of logarithms has met a loss that isn't positive."""
        if not all(bool(weight.isfinite()) for weight in self._loss_weights.values()):
            values = zip(losses.indices, losses.raw.tolist(), strict=True)
            named = ", ".join(f"`{self.tasks[index]}` {value:g}" for index, value in values)
            self._not_finite(f"The method's loss weights aren't finite. The losses are {named}.")

    def _not_finite(self, message: str) -> NoReturn:
        self.network.zero_grad()
        if self._on_nonfinite == "skip":
            raise SkippedError(message)
        raise NonFiniteError(f"{message} Nothing was updated; pass `on_nonfinite='skip'` to leave such steps out.")

    def _gradient_not_finite(self, message: str) -> NoReturn:
        scaler = self.network.scaler
        if scaler is None:
            self._not_finite(message)
        self.network.zero_grad()
        parameter = self.network.parameters[0]
        parameter.grad = torch.full_like(parameter, float("inf"))
        scaler.unscale_(self.network.optimizer)
        scaler.step(self.network.optimizer)
        scaler.update()
        self.network.zero_grad()
        self.overflowed = True
        raise SkippedError(f"{message} The scaler lowered its scale.", overflow=True)

    # ------------------------------------------------------------------ per-task gradients

    def gradients(
        self, tasks: Sequence[str] | None = None, *, forward: Sequence[str] | None = None, source: int = 0
    ) -> TaskGradients:
        """Forward, then one backward per task: the rows of J, the Gramian and the heads' gradients.

        Micro-batches and ranks are averaged here, before any combination; gradients are unscaled.

        Args:
            tasks: The tasks whose gradients are wanted; default all this step asks for.
            forward: The tasks the closure is asked for, if more.
            source: Which independent batch.

        Raises:
            ValueError: If no task is present, or all tasks have been seen and share no parameter.
            NonFiniteError: If a loss or gradient isn't finite (see ``on_nonfinite``).
        """
        network = self.network
        names = self._names(tasks)
        wanted = {self.tasks.index(name) for name in names}
        if network.engine is not None:
            return self._gradients_without_rows(names if forward is None else self._names(forward), wanted, source)
        rows = network.rows_of(source)
        network.finish_rows(rows)
        rows.begin()
        heads: Heads = {}
        asked = names if forward is None else self._names(forward)
        collect = self._collect if network.ranks.size == 1 else self._collect_from_ranks
        if network.sharded:
            collect = self._collect_from_shards
        sums = collect(asked, wanted, source, rows, heads)
        everything = self._reduced(sums)
        losses = everything.only(wanted)
        if everything.indices and not losses.indices:
            raise SkippedError("None of the tasks of this sub-step is present.", absent=True)
        self._require(losses)
        self._rescale(rows, heads, losses)
        matrix_gramian = self._gramian(rows)
        self._check_losses(everything, everything.raw.tolist())
        self._check_gradients(losses, matrix_gramian, heads)
        return TaskGradients(rows, losses, matrix_gramian, heads, everything)

    def _gradients_without_rows(self, asked: tuple[str, ...], wanted: set[int], source: int) -> TaskGradients:
        """The Gramian and the heads' gradients by an engine that doesn't keep the rows; the graph stays for `combine`."""
        network, engine = self.network, self.network.engine
        assert engine is not None
        if len(self._sources[source]) > 1:
            raise ValueError(
                f'gradients="{engine.name}" works on one micro-batch: the Gramian of a sum of gradients needs the sums, which '
                'it doesn\'t keep. Use gradients="parameters".'
            )
        engine.begin()
        (chunk,) = self._forward(asked, source)
        sums = _Sums({}, {})
        sums.add(Chunk(chunk.losses, dict.fromkeys(chunk.counts, 1.0)))
        everything = self._reduced(sums)
        losses = everything.only(wanted)
        if everything.indices and not losses.indices:
            raise SkippedError("None of the tasks of this sub-step is present.", absent=True)
        self._require(losses)
        present = {index: chunk.losses[index] for index in losses.indices}
        reached = engine.read(present)
        roles = network.roles
        if not network.compiled:
            for index in present:
                names = [network.name(p) for p in network.parameters if reached.get(id(p), 0) >> index & 1]
                roles.observe(index, names)
        heads: Heads = {}

        def take(task: int, parameter: Tensor, gradient: Tensor) -> None:
            if self._reaches(task, parameter):
                _, held = heads.setdefault(id(parameter), (parameter, {}))
                held[task] = held[task] + gradient if task in held else gradient.clone()

        shared = [p for p in network.parameters if roles.is_shared(network.name(p))]
        others = [p for p in network.parameters if not roles.is_shared(network.name(p))]
        seeds = {index: self._seed(loss, 1.0) for index, loss in present.items()}
        product = engine.gramian(present, seeds, shared=shared, others=others, take=take)
        self.num_backward += len(present)
        product = product.to(device="cpu", dtype=torch.float64)
        factors = self._factors(losses)
        if factors is not None:
            product = product * torch.outer(factors, factors)
            self._rescale_heads(heads, losses, factors)
        self._check_losses(everything, everything.raw.tolist())
        self._check_gradients(losses, product, heads)
        return TaskGradients(Rows(0), losses, product, heads, everything, graph=(list(present.values()), shared))

    def _combine_by_backward(self, gradients: TaskGradients, weights: Tensor) -> None:
        """``weights @ J`` by one more backward through the graph of the task gradients."""
        network, engine = self.network, self.network.engine
        assert engine is not None
        assert gradients.graph is not None
        losses, shared = gradients.graph
        gradients.graph = None
        factors = gradients.reduced.factors
        if factors is not None:
            weights = weights * factors.to(weights)
        scale = network.scale(self._device)
        if scale is not None:
            weights = weights.to(scale) * scale
        cotangents = [weight.to(loss) for weight, loss in zip(weights.unbind(), losses, strict=True)]
        engine.backward(losses, cotangents, shared)
        self.num_backward += bool(shared)
        if scale is not None:
            torch._foreach_div_([p.grad for p in shared if p.grad is not None], scale)

    def _collect(
        self, asked: tuple[str, ...], wanted: set[int], source: int, rows: Rows | ShardedRows, heads: Heads
    ) -> _Sums:
        """Forwards and one backward per task, on one process; gradients are sums over the micro-batches."""
        network = self.network
        sums = _Sums({}, {})
        averaged = len(self._sources[source]) > 1
        for chunk in self._forward(asked, source):
            network.lay_out(rows, heads)
            todo = [index for index in chunk.losses if index in wanted]
            counts = chunk.counts if averaged else dict.fromkeys(chunk.counts, 1.0)
            for index in todo:
                gradients = self._gradients_of(chunk, index, counts[index], last=index == todo[-1])
                self._place(rows, heads, index, gradients)
                del gradients
            sums.add(Chunk(chunk.losses, counts))
        network.lay_out(rows, heads)
        rows.sort()
        return sums

    def _collect_from_ranks(
        self, asked: tuple[str, ...], wanted: set[int], source: int, rows: Rows | ShardedRows, heads: Heads
    ) -> _Sums:
        """Forwards and one backward per task, on several processes; gradients are sums over micro-batches and ranks.

        With one micro-batch a task's row is on its way while the next task's backward runs. Rows that are divided among the
        ranks travel after every micro-batch, others once, after the last.
        """
        network = self.network
        micro_batches = self._sources[source]
        streamed = len(micro_batches) == 1 or isinstance(rows, ShardedRows)
        # Where there is more than one exchange per list, all ranks need lists of one length.
        fixed = isinstance(rows, ShardedRows) or network.split
        number = f" by {len(micro_batches)} micro-batches" if fixed else ""
        self._doing = f"gradients {sorted(wanted)} of batch {source}{number}"
        sums = _Sums({}, {})
        failure: Exception | None = None
        for position, chunk in enumerate(self._forward(asked, source)):
            todo = [index for index in chunk.losses if index in wanted]
            last = todo[-1] if todo else None
            own = _Sums({}, {})
            own.add(chunk)
            if streamed:
                own, _ = self._tell(own)
                todo = [index for index in own.totals if index in wanted]
            if position == 0:
                network.lay_out(rows, heads)
            for index in todo:
                if failure is None and index in chunk.losses:
                    try:
                        gradients = self._gradients_of(chunk, index, chunk.counts[index], last=index == last)
                        self._place(rows, heads, index, gradients)
                        del gradients
                    except Exception as error:  # noqa: BLE001 - raised on all ranks, once they have met again
                        failure = error
                if streamed:
                    network.start_row(rows, index)
            sums.merge(own)
        if not streamed:
            sums, _ = self._tell(sums, failure=failure)
            network.lay_out(rows, heads)
            for index in sums.totals:
                if index in wanted:
                    network.start_row(rows, index)
        network.finish_rows(rows)
        rows.sort()
        network.reduce_heads(rows, heads, tuple(index for index in sums.totals if index in wanted), failure)
        return sums

    def _collect_from_shards(
        self, asked: tuple[str, ...], wanted: set[int], source: int, rows: Rows | ShardedRows, heads: Heads
    ) -> _Sums:
        """The same where FSDP shards parameters: it averages gradients over the ranks within each backward."""
        network = self.network
        self._doing = f"gradients {sorted(wanted)} of batch {source}"
        sums = _Sums({}, {})
        network.lay_out(rows, heads)
        for chunk in self._forward(asked, source):
            todo = [index for index in chunk.losses if index in wanted]
            for index in todo:
                loss = chunk.losses[index]
                network.zero_grad()
                with self._active(chunk):
                    torch.autograd.backward(
                        [loss],
                        [torch.ones_like(loss) * (chunk.counts[index] * network.ranks.size)],
                        retain_graph=index != todo[-1],
                    )
                self.num_backward += 1
                self._place(rows, heads, index, network.take_gradients())
            sums.add(chunk)
        sums, _ = self._tell(sums)
        rows.sort()
        network.settle(rows, heads)
        return sums

    def _gradients_of(self, chunk: Chunk, index: int, factor: float, *, last: bool) -> tuple[Tensor | None, ...]:
        """One task's backward: ``factor`` times the gradients of all trained parameters."""
        loss = chunk.losses[index]
        with self._active(chunk):
            gradients: tuple[Tensor | None, ...] = torch.autograd.grad(
                loss,
                self.network.parameters,
                grad_outputs=self._seed(loss, factor),
                retain_graph=not last,
                allow_unused=True,
            )
        self.num_backward += 1
        return gradients

    def _gramian(self, rows: Rows | ShardedRows) -> Tensor:
        """The Gramian of the rows; every rank computes that of its part of the columns, and they are summed."""
        matrix, ranks = rows.matrix, self.network.ranks
        if ranks.size == 1:
            return gramian(matrix)
        total = torch.zeros(len(matrix), len(matrix), dtype=torch.float64)
        for columns in self.network.own_columns(rows):
            total += gramian(matrix[:, columns])
        return ranks.sum_(total.to(self._device)).cpu()

    def _active(self, chunk: Chunk) -> contextlib.AbstractContextManager[Any]:
        """Keep the forward's task active: checkpointed regions run their forward again inside the backward."""
        return contextlib.nullcontext() if chunk.active is None else active_task(chunk.active)

    def _seed(self, loss: Tensor, factor: float | Tensor) -> Tensor | None:
        """The cotangent of a loss: its factor times the scaler's scale; None for 1."""
        scale = self.network.scale(loss.device)
        if scale is None and isinstance(factor, float) and factor == 1:
            return None
        seed = torch.ones_like(loss) * factor
        return seed if scale is None else seed * scale.to(seed)

    def _reaches(self, task: int, parameter: Tensor) -> bool:
        """Whether a gradient belongs to ``task``: a compiled model reports zeros, too, for parameters it doesn't reach."""
        network = self.network
        return not network.compiled or task in network.roles.tasks_of(network.name(parameter))

    def _place(
        self,
        rows: Rows | ShardedRows,
        heads: Heads,
        task: int,
        gradients: Sequence[Tensor | None],
    ) -> None:
        """Write one task's gradients: shared ones into its row, others to its head; follow parameters that turn shared."""
        network = self.network
        shared: list[tuple[Tensor, Tensor]] = []
        others: list[tuple[Tensor, Tensor]] = []
        for parameter, gradient in zip(network.parameters, gradients, strict=True):
            if gradient is None or not self._reaches(task, parameter):
                continue
            if id(parameter) in rows.position:
                shared.append((parameter, gradient))
            else:
                others.append((parameter, gradient))
        grown = not network.compiled and network.roles.observe(task, [network.name(p) for p, _ in others])
        if grown and network.ranks.size == 1:
            network.lay_out(rows, heads)
            shared += [pair for pair in others if id(pair[0]) in rows.position]
            others = [pair for pair in others if id(pair[0]) not in rows.position]
        rows.add(task, shared)
        for parameter, gradient in others:
            _, held = heads.setdefault(id(parameter), (parameter, {}))
            # A copy, because autograd may hand out one tensor for two parameters, or an expanded one.
            held[task] = held[task] + gradient if task in held else gradient.clone()

    def _rescale(self, rows: Rows | ShardedRows, heads: Heads, losses: Losses) -> None:
        """Turn sums into means, undo the scaler's scale and apply the user's loss weights, in one factor per task."""
        factors = self._factors(losses)
        if factors is not None:
            rows.matrix.mul_(factors.to(rows.matrix).unsqueeze(1))
            self._rescale_heads(heads, losses, factors)

    def _factors(self, losses: Losses) -> Tensor | None:
        """What every present task's gradient has to be multiplied by, float64 [k]; None for 1."""
        if losses.factors is None and self.network.scaler is None and all(t == 1 for t in losses.totals.values()):
            return None
        factors = torch.tensor([1.0 / losses.totals[i] for i in losses.indices], dtype=torch.float64)
        scale = self.network.scale(self._device)
        if scale is not None:
            factors = factors / scale.to(factors)
        if losses.factors is not None:
            factors = factors * losses.factors.to(factors)
        return None if bool((factors == 1).all()) else factors

    @staticmethod
    def _rescale_heads(heads: Heads, losses: Losses, factors: Tensor) -> None:
        by_task = dict(zip(losses.indices, factors.tolist(), strict=True))
        for parameter, held in heads.values():
            heads[id(parameter)] = (
                parameter,
                {task: g * by_task[task] for task, g in held.items() if task in by_task},
            )

    def _check_gradients(self, losses: Losses, matrix_gramian: Tensor, heads: Heads) -> None:
        finite = matrix_gramian.diagonal().isfinite().tolist()
        for index, good in zip(losses.indices, finite, strict=True):
            if not good:
                self._check_weights(losses)
                self._gradient_not_finite(f"The gradient of task `{self.tasks[index]}` isn't finite.")
        own = [gradient for _, held in heads.values() for gradient in held.values()]
        if self.network.sharded:
            worst = torch.tensor([0.0 if all(bool(g.isfinite().all()) for g in own) else 1.0], device=self._device)
            if self.network.ranks.max_(worst).item():
                self._gradient_not_finite("The gradient of a head isn't finite.")
            return
        if own and not bool(torch.nn.utils.get_total_norm(own).isfinite()):
            self._gradient_not_finite("The gradient of a head isn't finite.")

    def inner_products(self, first: TaskGradients, second: TaskGradients) -> Tensor:
        """Inner products between the rows of two batches, float64 on the CPU, [k1, k2].

        Columns that only one batch knows, because a parameter became shared in between, are left out.

        Raises:
            ValueError: If there are such columns and the columns are divided among the ranks.
        """
        network = self.network
        if network.shard_gradients and len(first.parameters) != len(second.parameters):
            raise ValueError(
                "A parameter became shared between two independent batches, which divides the columns differently. With "
                "shard_gradients=True give the shared parameters as `shared=`."
            )
        narrow = min(first.rows, second.rows, key=lambda rows: rows.matrix.shape[1])
        total = torch.zeros(len(first.indices), len(second.indices), dtype=torch.float64)
        for columns in network.own_columns(narrow):
            total += (first.matrix[:, columns] @ second.matrix[:, columns].T).to(total)
        return network.ranks.sum_(total.to(self._device)).cpu()

    def combine(
        self,
        gradients: TaskGradients,
        weights: Tensor | None = None,
        *,
        vector: Tensor | None = None,
        heads: str = "unit",
    ) -> None:
        """Set ``.grad``: ``weights @ J`` or a ready ``vector`` on the shared parameters, own gradients on the heads.

        Args:
            gradients: What :meth:`gradients` returned.
            weights: One weight per present task, [k].
            vector: The combined gradient, [P]; instead of, or besides, weights (then the weights only matter to heads).
            heads: "unit": a head gets its own task's gradient; "weighted": times the task's weight.
        """
        network = self.network
        network.zero_grad()
        if weights is not None:
            weights = network.ranks.first(weights, self._device)
        if weights is not None and not bool(weights.isfinite().all()):
            self._not_finite("A method's weights aren't finite.")
        if gradients.graph is None:
            self._combine_rows(gradients.rows, weights, vector)
        else:
            assert weights is not None, "only Gramian methods do without rows"
            self._combine_by_backward(gradients, weights)
        by_task = dict.fromkeys(gradients.indices, 1.0)
        if heads == "weighted" and weights is not None:
            by_task = dict(zip(gradients.indices, weights.tolist(), strict=True))
        for parameter, held in gradients.heads.values():
            total: Tensor | None = None
            for task, gradient in held.items():
                part = gradient if by_task[task] == 1 else gradient * by_task[task]
                total = part if total is None else total + part
            if total is not None:
                network.set_gradients([(parameter, total)])
        self._scaled = False
        self._pending = None

    def _combine_rows(self, rows: Rows | ShardedRows, weights: Tensor | None, vector: Tensor | None) -> None:
        """``weights @ J``, or a ready vector, into ``.grad`` of the shared parameters that some task reached."""
        if vector is None and isinstance(rows, Rows):
            assert weights is not None, "either weights or a vector"
            views = rows.weighted_sum_(weights)
        else:
            flat, views = rows.combined()
            if vector is None:
                assert weights is not None, "either weights or a vector"
                torch.mv(rows.matrix.T, weights.to(flat), out=flat)
            elif vector is not flat:
                flat.copy_(vector)
        if isinstance(rows, ShardedRows):
            rows.gather()
        self.network.set_gradients(
            [(rows.parameters[i], views[i]) for i in rows.reached() if rows.parameters[i].requires_grad]
        )

    # ------------------------------------------------------------------ one weighted backward

    def backward(
        self,
        weigh: Weigh,
        *,
        tasks: Sequence[str] | None = None,
        forward: Sequence[str] | None = None,
        source: int = 0,
        fixed: bool = False,
        heads: str = "weighted",
    ) -> Losses:
        """Forward and one backward of the weighted sum of the losses into ``.grad``.

        With several micro-batches the weights need all their losses first. So unless the weights are ``fixed`` (independent
        of the losses and of which tasks are present) and every micro-batch brings the same tasks and counts, the losses are
        read by a forward without gradient, and then every micro-batch is run again, with the same random state.

        Args:
            weigh: (losses [k], indices) -> weights [k].
            tasks: The tasks whose losses are summed; default all this step asks for.
            forward: The tasks the closure is asked for, if more.
            source: Which independent batch.
            fixed: Whether ``weigh`` gives the same weights whatever the losses and the present tasks.
            heads: "weighted": heads get their gradient times the task's weight, as the sum says; "unit": without it.

        Returns:
            The reduced losses of all tasks the closure was asked for.
        """
        network = self.network
        network.zero_grad()
        names = self._names(tasks)
        asked = names if forward is None else self._names(forward)
        wanted = {self.tasks.index(name) for name in names}
        micro_batches = self._sources[source]
        self._scaled = network.scaler is not None
        unit = UnitHeads(network) if heads == "unit" else None
        held = len(micro_batches) == 1 or all(isinstance(entry, Mapping) for entry in micro_batches)
        self._doing = f"one gradient {sorted(wanted)} of batch {source}"
        several = network.ranks.size > 1
        known: Losses | None = None
        if not held and fixed and self._weigh_fixed:
            known, done = self._backward_evenly(weigh, asked, wanted, source, unit)
            if known is not None and done:
                self._pending = known
                return known
        single = len(micro_batches) == 1 and network.ranks.size == 1
        sums = _Sums({}, {})
        chunks: list[Chunk] = []
        if held:
            for chunk in self._forward(asked, source):
                counts = dict.fromkeys(chunk.counts, 1.0) if single else chunk.counts
                chunks.append(Chunk(chunk.losses, counts, chunk.active))
                sums.add(chunks[-1])
        elif known is None:
            with self._noise.rehearsal():
                for chunk in self._forward(asked, source, grad=False):
                    sums.add(chunk)
        if known is None and several:
            sums, _ = self._tell(sums, counts=_shape(self._sources[source], chunks))
        losses = self._reduced(sums) if known is None else known
        weights, factors = self._weights_by_task(weigh, losses, wanted)
        failure: Exception | None = None
        for chunk in chunks if held else self._forward(asked, source):
            shares = {
                i: self._share(factors.get(i), chunk.counts[i] / losses.totals[i])
                for i in chunk.losses
                if i in weights and chunk.counts[i]
            }
            try:
                self._backward_chunk(chunk, weights, shares, unit)
            except Exception as error:
                if not several:
                    raise
                failure = error
                break
        if unit is not None and failure is None:
            unit.finish(weights)
        network.reduce_gradients(failure)
        self._pending = losses
        return losses

    def _weights_by_task(
        self, weigh: Weigh, losses: Losses, wanted: set[int]
    ) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """The method's weight of every present wanted task, and the user's factors if there are any."""
        losses = losses.only(wanted)
        indices = losses.indices
        if not indices:
            return {}, {}
        weights = weigh(losses.values, indices).detach().to(losses.values)
        by_task = dict(zip(indices, weights.unbind(), strict=True))
        if losses.factors is None:
            self._loss_weights = by_task
            return by_task, {}
        factors = losses.factors.to(weights)
        self._loss_weights = dict(zip(indices, (weights * factors).unbind(), strict=True))
        return by_task, dict(zip(indices, factors.unbind(), strict=True))

    def _share(self, factor: Tensor | None, share: float) -> Tensor | float:
        """A task's part in the sum beside its weight: the user's factor times its share of the counts."""
        return share if factor is None else factor if share == 1 else factor * share

    def _backward_chunk(
        self,
        chunk: Chunk,
        weights: Mapping[int, Tensor],
        shares: Mapping[int, Tensor | float],
        unit: UnitHeads | None,
    ) -> None:
        """Backward of the sum of weight times share times loss."""
        if not shares:
            return
        network = self.network
        scale = network.scale(next(iter(chunk.losses.values())).device)
        parts = shares if scale is None else {i: scale.to(weights[i]) * share for i, share in shares.items()}
        if network.sharded:
            # FSDP averages over the ranks what is to be summed.
            parts = {index: part * network.ranks.size for index, part in parts.items()}
        inputs: list[Tensor] | None = None if network.sharded else network.parameters
        if network.compiled and inputs is not None:
            inputs = [p for p in inputs if any(self._reaches(index, p) for index in parts)]
        with self._active(chunk):
            if unit is not None:
                unit.before(chunk.losses, weights, parts)
            torch.autograd.backward(
                [chunk.losses[index] for index in parts],
                [
                    (weights[index] if isinstance(part, float) and part == 1 else weights[index] * part).to(
                        chunk.losses[index]
                    )
                    for index, part in parts.items()
                ],
                inputs=inputs,
            )
        self.num_backward += 1

    def _backward_evenly(
        self, weigh: Weigh, asked: tuple[str, ...], wanted: set[int], source: int, unit: UnitHeads | None
    ) -> tuple[Losses | None, bool]:
        """One pass over micro-batches that all bring the same tasks and counts, on all ranks.

        Returns:
            The losses, as far as they are known; and whether the gradients are computed. If not, nothing has happened.
        """
        network = self.network
        several = network.ranks.size > 1
        share = 1.0 / (len(self._sources[source]) * network.ranks.size)
        # Fixed weights don't depend on the losses, so those of all tasks are known before the first forward.
        indices = tuple(sorted(wanted))
        ones = torch.ones(len(indices), dtype=torch.float64, device=self._device)
        shape = Losses(indices, ones, ones, {}, None if self._weigh is None else self._weigh(ones, indices))
        all_weights, all_factors = self._weights_by_task(weigh, shape, wanted)
        sums = _Sums({}, {})
        chunks: list[Chunk] = []
        failure: Exception | None = None
        per_source = len(self._groups(self._sources[source][0], asked))
        with self._noise.attempt() as undo:
            even = True
            for chunk in self._forward(asked, source):
                first = chunks[len(chunks) % per_source] if len(chunks) >= per_source else chunk
                even = even and (chunk.counts, chunk.active) == (first.counts, first.active)
                if not even and not several:
                    break
                chunks.append(Chunk({}, chunk.counts, chunk.active))
                sums.add(chunk)
                shares = {i: self._share(all_factors.get(i), share) for i in chunk.losses if i in wanted}
                try:
                    if even:
                        self._backward_chunk(chunk, all_weights, shares, unit)
                except Exception as error:
                    if not several:
                        raise
                    failure = error
                    break
            if several:
                counts = _shape(self._sources[source], chunks) if even else None
                sums, even = self._tell(sums, counts=counts, failure=failure)
            losses = self._reduced(sums) if several or even else None
            if not even:
                network.zero_grad()
                undo()
                return losses, False
        if unit is not None:
            unit.finish(all_weights)
        network.reduce_gradients()
        return losses, True

    # ------------------------------------------------------------------ the optimizer step

    def apply(self) -> bool:
        """Check, unscale, clip and take one optimizer step; return whether it was taken.

        Raises:
            ValueError: If no task was present.
            NonFiniteError: If a loss or gradient isn't finite (see ``on_nonfinite``).
        """
        network, scaler = self.network, self.network.scaler
        pending, self._pending = self._pending, None
        if pending is not None:
            self._require(pending)
        if not network.gradients():
            if pending is not None:
                self._check_losses(pending, pending.raw.tolist())
            return False
        norm = None
        if pending is not None or network.clip is not None or scaler is not None:
            norm = network.norm()
        if pending is not None:
            assert norm is not None
            *values, total = torch.cat([pending.raw, norm.to(pending.raw).reshape(1)]).tolist()
            self._check_losses(pending, values)
            if total - total != 0:
                self._check_weights(pending)
                self._gradient_not_finite("The gradient isn't finite.")
        if scaler is not None:
            assert norm is not None
            scale = network.scale(norm.device)
            assert scale is not None
            if self._scaled:
                norm = norm / scale
            else:
                torch._foreach_mul_(network.gradients(), scale)
            scaler.unscale_(network.optimizer)
        if norm is not None:
            network.clip_gradients(norm)
        if scaler is not None:
            scaler.step(network.optimizer)
            scaler.update()
        else:
            network.optimizer.step()
        self.num_optimizer_steps += 1
        return True

    def descend(self, tasks: Sequence[str], *, forward: Sequence[str] | None = None) -> Losses:
        """One plain sub-step of a procedure: forward, backward of the tasks' summed losses, optimizer step.

        A sub-step none of whose tasks is present takes no optimizer step. Non-finite values under ``on_nonfinite="skip"``
        leave out this sub-step alone.

        Args:
            tasks: The tasks whose losses are summed.
            forward: The tasks the closure is asked for, if more.

        Returns:
            The losses of the sub-step's forward (all tasks of ``forward``), before its optimizer step.
        """
        losses = self.backward(lambda values, _: torch.ones_like(values), tasks=tasks, forward=forward, fixed=True)
        with self.leaving_out():
            if losses.indices:
                self.apply()
        return losses

    @contextlib.contextmanager
    def leaving_out(self) -> Iterator[None]:
        """What is skipped inside leaves out this sub-step of a procedure, not the whole step."""
        try:
            yield
        except SkippedError as skipped:
            if not skipped.absent:
                self.note_skip(skipped.reason)

    def note_skip(self, reason: str) -> None:
        """Record that an optimizer step was left out."""
        self.skipped = True
        self.reason = reason

    # ------------------------------------------------------------------ the report

    def info(
        self,
        *,
        weights: Tensor | None = None,
        gradients: TaskGradients | None = None,
        num_fallbacks: int = 0,
        records: Mapping[str, Any] | None = None,
        indices: Sequence[int] | None = None,
    ) -> StepInfo:
        """What this step did, as a :class:`StepInfo`.

        Args:
            weights: One weight per present task, [k].
            gradients: The task gradients, if computed: their conflicts are reported.
            num_fallbacks: Solves that used a fallback.
            records: What the method records besides.
            indices: The tasks the weights belong to; default the present tasks.
        """
        names = {index: self.tasks[index] for index in sorted(self._recorded)}
        by_name = None
        if weights is not None:
            owners = tuple(names) if indices is None else tuple(indices)
            by_name = {self.tasks[i]: w for i, w in zip(owners, weights.tolist(), strict=True)}
        cosines = None
        conflicts = None
        if gradients is not None:
            values = gradients.gramian.numpy()
            norms = np.sqrt(values.diagonal().clip(0))
            product = np.outer(norms, norms)
            table = np.divide(values, product, out=np.zeros_like(values), where=product > 0)
            cosines = torch.from_numpy(table)
            conflicts = int(np.count_nonzero(np.triu(table, 1) < 0))
        return StepInfo(
            losses=MappingProxyType({name: self._recorded[index] for index, name in names.items()}),
            weights=None if by_name is None else MappingProxyType(by_name),
            skipped=self.skipped,
            reason=self.reason,
            num_forward=self.num_forward,
            num_backward=self.num_backward,
            num_optimizer_steps=self.num_optimizer_steps,
            num_conflicts=conflicts,
            cosines=cosines,
            num_fallbacks=num_fallbacks,
            records=MappingProxyType(dict(records or {})),
        )
