"""One step's work on a network: the facade that methods see."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor

from torchmto.checks import shown
from torchmto.gradients.engine import Engine
from torchmto.gradients.finite import finite_mark, real
from torchmto.gradients.torch_private import flattened
from torchmto.step.agreement import agreement
from torchmto.step.finite import (
    SkippedError,
    check_losses,
    check_weights,
    fail,
    fail_with_gradient,
    in_one_transfer,
    is_finite,
)
from torchmto.step.forwards import forwards
from torchmto.step.info import StepInfo
from torchmto.step.losses import Losses, Weigh, empty_batch
from torchmto.step.network import Heads
from torchmto.step.parts import Parts, Request
from torchmto.step.reduction import agree, over_ranks, summed
from torchmto.step.task_gradients import (
    TaskGradients,
    combine_graphs,
    combine_rows,
    gradients_with_rows,
    gradients_without_rows,
    inner_products,
    keep_rows,
    set_heads,
)
from torchmto.step.weighted import accumulate, finish, weighted_backward


class StepContext:
    """One step of multi-task training, as a method sees it.

    A method asks it for losses, per-task gradients or a weighted backward, and tells it what to apply; only here are
    closures called, gradients computed and optimizers stepped, so only here is anything counted.

    Args:
        parts: What the step works with.
    """

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self.network = parts.network
        self.tasks = parts.tasks
        self.asked = parts.asked
        self.stepping = parts.stepping
        self.num_optimizer_steps = 0
        self.skipped = False
        self.reason = ""
        # What `.grad` holds before `apply`: the losses it comes from, whether one of them is of the tasks that are to move,
        # whether they are still to be checked, and whether the scaler's scale is in it.
        self._losses: Losses | None = None
        self._moving = True
        self._unchecked = False
        self._scaled = False

    @property
    def num_sources(self) -> int:
        """How many independent batches this step has: 1, or more if ``mt.step(..., independent=)`` gave them."""
        return len(self._parts.sources)

    @property
    def overflowed(self) -> bool:
        """Whether the scaler has found an overflow and lowered its scale."""
        return self._parts.overflowed

    def _request(self, tasks: Sequence[str] | None, forward: Sequence[str] | None, source: int) -> Request:
        """Gradients of those of ``tasks`` (default all) that this step is about, from a forward of ``forward`` (the same)."""
        asked = names = self.asked
        if tasks is not None:
            names = tuple(name for name in tasks if name in asked)
        called = names if forward is None else tuple(name for name in forward if name in asked)
        return Request(called, frozenset(map(self.tasks.index, names)), source)

    # ------------------------------------------------------------------ losses

    def check_present(self) -> None:
        """Raise if no loss has been seen in this step.

        Raises:
            ValueError: If none has.
        """
        if self._parts.first is None or not self._parts.first.indices:
            raise empty_batch(self.asked)

    def losses(
        self, tasks: Sequence[str] | None = None, *, source: int = 0, replay: bool | Literal["newest"] = True
    ) -> Losses:
        """The losses of ``tasks`` by an extra forward without gradient that leaves the model's buffers as they were.

        Averaged over micro-batches and ranks.

        Args:
            tasks: Default all this step asks for.
            source: Which independent batch.
            replay: Replay the random state of the step's own forward (the first of these tasks, or the "newest"), so that
                dropout masks are the same, and put the random state back; else draw new noise (unless ``same_noise`` is on).
        """
        parts = self._parts
        parts.doing = "losses"
        with parts.noise.extra(replay=replay):
            chunks = list(forwards(parts, self._request(tasks, None, source), grad=False))
        return over_ranks(parts, chunks)

    def unweighted(self) -> Losses:
        """End the user's loss weighting for this step, and return the losses it weighted: the first of every task."""
        self._parts.weigh = None
        recorded, first = self._parts.recorded, self._parts.first
        indices = tuple(sorted(recorded))
        like = torch.zeros(0, device=self.network.device) if first is None else first.raw
        values = like.new_tensor([recorded[index] for index in indices])
        return Losses(indices, values, values, dict.fromkeys(indices, 1.0))

    # ------------------------------------------------------------------ per-task gradients

    def present(self) -> frozenset[int] | None:
        """Which tasks the batch has, on any rank; the next :meth:`gradients` or :meth:`backward` goes on from its forward.

        None for several micro-batches, whose graphs would have to be kept all at once.
        """
        parts, engine = self._parts, self._engine()
        if parts.carried is not None or len(parts.sources[0]) > 1:
            return None
        if engine is not None:
            engine.begin()
        parts.doing = "which tasks there are"
        parts.held = list(forwards(parts, self._request(None, None, 0), apart=True))
        return frozenset(summed(parts, parts.held).totals)

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
        # A gradient that is there afterwards has appeared by itself.
        self.network.zero_grad()
        compute = gradients_with_rows if self._engine() is None else gradients_without_rows
        return compute(self._parts, self._request(tasks, forward, source))

    def _engine(self) -> Engine | None:
        """What per-task gradients are left to; None for the rows."""
        parts, engine = self._parts, self.network.engine
        rows = engine is None or parts.carried is not None or not engine.suits(parts.sources, self.network.parameters)
        return None if rows else engine

    @contextlib.contextmanager
    def moved(self, shifts: Sequence[tuple[Tensor, Tensor]]) -> Iterator[None]:
        """Inside, parameters are moved, and forwards leave the model's buffers as they were; afterwards all are back.

        Bit for bit, after an error too. Forwards inside draw new noise (unless ``same_noise`` is on). Where the user's
        weighting weighs tasks against each other, which may come one by one there, its weights of the step's first losses stay.

        Args:
            shifts: Parameters, and what is added to each: a tensor of its shape, of pairs of reals for a complex one.
        """
        parts, weigh = self._parts, self._parts.weigh
        self.network.moved = [(parameter, parameter.detach().clone()) for parameter, _ in shifts]
        try:
            if not parts.weigh_apart and parts.first is not None and parts.first.factors is not None:
                known = dict(zip(parts.first.indices, parts.first.factors.tolist(), strict=True))
                parts.weigh = lambda values, indices: values.new_tensor([known[index] for index in indices])
            with parts.noise.extra(replay=False):
                with torch.no_grad():
                    for parameter, shift in shifts:
                        real(parameter.detach()).add_(shift)
                yield
        finally:
            parts.weigh = weigh
            self.network.put_back()

    def inner_products(self, first: TaskGradients, second: TaskGradients) -> Tensor:
        """Inner products between the rows of two batches, float64 on the CPU, [k1, k2].

        Columns that only one batch knows, because a parameter became shared in between, are left out.

        Raises:
            ValueError: If there are such columns and the columns are divided among the ranks.
        """
        return inner_products(self.network, first, second)

    def agreement(self, gradients: TaskGradients, weights: Tensor) -> Heads:
        r"""How every head can make its task's gradient agree with the weighted sum of all tasks'.

        For every task i by itself, with :math:`\delta_j` the gradient of task j's loss by what i's own part of the model reads
        of the results that tasks share (each an input of its own, whatever it is computed from): the derivatives of
        :math:`\langle \delta_i, \sum_j w_j \delta_j \rangle` by the parameters of i's own part, the sum being constant. One
        more forward, with the noise of the first, and two backwards per task down to these results; one more per task for
        each further choice of results, where the tasks' own parts read different ones. Which results are shared is found in
        every micro-batch by itself: where they differ in their tasks the result isn't that of one batch (a warning).

        Args:
            gradients: What :meth:`gradients` returned, combined already.
            weights: One weight per present task, [k].

        Returns:
            The ``id`` of a head's parameter -> the parameter, and task -> derivative; empty where nothing is shared.

        Raises:
            ValueError: If the model is compiled.
        """
        tasks = [self.tasks[index] for index in gradients.indices]
        return agreement(self._parts, self._request(tasks, self.asked, 0), gradients, weights)

    def combine(
        self,
        gradients: TaskGradients,
        weights: Tensor | None = None,
        *,
        vector: Tensor | None = None,
        heads: str = "unit",
        head_weights: Tensor | None = None,
    ) -> None:
        """Set ``.grad``: ``weights @ J`` or a ready ``vector`` on the shared parameters, own gradients on the heads.

        Args:
            gradients: What :meth:`gradients` returned.
            weights: One weight per present task, [k].
            vector: The combined gradient, [P]; instead of, or besides, weights (then the weights only matter to heads).
            heads: "unit": a head gets its own task's gradient; otherwise times the task's weight.
            head_weights: The weights of the heads, where they differ from ``weights``, [k].

        Raises:
            ValueError: If the weights or the vector have another shape.
            NonFiniteError: If the weights aren't finite (see ``on_nonfinite``).
        """
        network = self.network
        network.zero_grad()
        number = len(gradients.indices)
        if (weights is not None or vector is None) and not (isinstance(weights, Tensor) and weights.shape == (number,)):
            raise _wrong_shape("weights", "one number per present task", weights, number)
        if vector is not None and not (isinstance(vector, Tensor) and vector.shape == gradients.matrix.shape[1:]):
            raise _wrong_shape("combined gradient", "one per column of the rows", vector, gradients.matrix.shape[1])
        if self._parts.several:
            weights = agree(self._parts, weights)
        if weights is not None and any(value - value != 0 for value in weights.tolist()):
            fail(self._parts, "A method's weights aren't finite.")
        if gradients.graph is None:
            combine_rows(self._parts, gradients, weights, vector)
        else:
            combine_graphs(self._parts, gradients, weights)
        set_heads(network, gradients, None if heads == "unit" else weights if head_weights is None else head_weights)
        self._losses, self._moving, self._unchecked, self._scaled = gradients.reduced, True, False, False

    def fail(self, gradients: TaskGradients, message: str) -> NoReturn:
        """Give up a step whose gradients a method can't take, as if they weren't finite (see ``on_nonfinite``)."""
        fail_with_gradient(self._parts, gradients.reduced, message)

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

        Several micro-batches may need two forwards each: :func:`~torchmto.step.weighted.weighted_backward`.

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
        self.network.zero_grad()
        parts, request = self._parts, self._request(tasks, forward, source)
        if parts.held and (engine := self._engine()) is not None:
            engine.forget()
        if parts.carried is not None and not parts.summed:
            request.combined = False
            gradients = gradients_with_rows(parts, request)
            parts.network.warn_of_unshared()
            self.combine(gradients, weigh(gradients.losses, gradients.indices), heads=heads)
            return gradients.all_losses
        if parts.summed:
            accumulate(parts, request, weigh, heads=heads)
            losses = finish(parts, request)
        else:
            losses = weighted_backward(parts, request, weigh, fixed=fixed, heads=heads)
        self.network.warn_of_unshared()
        self._losses, self._moving = losses, not request.wanted.isdisjoint(losses.indices)
        self._unchecked, self._scaled = True, self.network.scaler is not None
        return losses

    def check(self, losses: Losses) -> None:
        """Check and record the losses of a :meth:`backward` whose gradient isn't applied, as :meth:`apply` would.

        Raises:
            ValueError: If no task was present.
            NonFiniteError: If a loss isn't finite (see ``on_nonfinite``).
        """
        if not losses.indices:
            raise empty_batch(self.asked)
        self._losses, self._unchecked = None, False
        check_losses(self._parts, losses, losses.raw.tolist())

    def keep(self, weigh: Weigh | None) -> None:
        """Take one micro-batch, which isn't the last, of a batch that is accumulated over several calls.

        Its rows are kept, or the gradient of its weighted losses where these weights are fixed; ``.grad`` stays as it is.

        Args:
            weigh: The fixed weights, for a weighted sum.
        """
        parts = self._parts
        with self.network.gradients_aside():
            for source in range(self.num_sources):
                request = self._request(None, None, source)
                if parts.summed and weigh is not None:
                    accumulate(parts, request, weigh, heads="weighted")
                else:
                    keep_rows(parts, request)
        sums = parts.left_by_earlier_calls(0).sums
        parts.recorded = {i: float(sums.weighted[i]) / sums.totals[i] for i in sorted(sums.totals)}

    @torch.no_grad()
    def bound(self, largest: float, *, heads: str) -> float:
        """Shorten what :meth:`backward` has set, so that its norm on the shared parameters is at most ``largest``.

        Args:
            largest: The bound.
            heads: "unit": the heads' gradients stay; "weighted": they are shortened too, as by smaller weights.

        Returns:
            The factor; 1 if the gradient is short enough.
        """
        network = self.network
        shared = network.gradients(network.by_role()[0])
        norm = network.norm(shared)
        if not bool(norm.isfinite()) and is_finite(self._parts, shared, float("inf")):
            norm = network.exact_norm(shared)
        scale = network.scale(norm.device) if self._scaled else None
        if scale is not None:
            norm = norm / scale
        factor = float((largest / norm).clamp_max(1))
        if factor < 1:
            network.multiply(network.gradients() if heads == "weighted" else shared, factor)
        return factor

    # ------------------------------------------------------------------ the optimizer step

    def apply(self) -> bool:
        """Check, unscale, clip and take one optimizer step; return whether it was taken.

        Where a trainer takes the step (``mt.backward``) the checked gradient is left, neither unscaled nor clipped.

        Raises:
            ValueError: If no task was present.
            NonFiniteError: If a loss or gradient isn't finite (see ``on_nonfinite``).
        """
        network, losses = self.network, self._losses
        unchecked = losses is not None and self._unchecked
        self._losses, self._unchecked = None, False
        if unchecked and losses is not None and not losses.indices:
            raise empty_batch(self.asked)
        parts = self._parts
        with network.optimizers.scaling() if network.scaler is not None else contextlib.nullcontext():
            gradients = self._final_gradients()
            if losses is not None and self._moving and (losses.indices, len(gradients)) not in network.counts:
                network.counts.add((losses.indices, len(gradients)))
                network.warn_of_replaced(none=not gradients)
            if not gradients:
                if unchecked and losses is not None:
                    check_losses(parts, losses, losses.raw.tolist())
                return False
            norm = network.norm(gradients) if network.clip is not None or network.sharded else None
            mark = norm if norm is not None else flattened(gradients).sum() if network.few else finite_mark(gradients)
            if unchecked and losses is not None:
                values, weights, (total,) = in_one_transfer(losses.raw, parts.weights, mark)
                check_losses(parts, losses, values)
                check_weights(parts, losses, weights)
            else:
                total = float(mark)
            if total - total != 0:
                if not is_finite(parts, gradients, total):
                    fail_with_gradient(parts, losses, f"The {'' if unchecked else 'combined '}gradient isn't finite.")
                norm = None if norm is None else network.exact_norm(gradients)
            if parts.several:
                agree(parts)
            if not self.stepping:
                return True
            if norm is not None:
                network.clip_gradients(norm)
            # Here, since an interrupt before the first optimizer's step must not find the count of the last one.
            network.optimizers.num_stepped = 0
            try:
                network.optimizers.step()
            finally:
                # One of several that has stepped can't be undone.
                self.num_optimizer_steps += network.optimizers.num_stepped > 0
        return True

    def _final_gradients(self) -> list[Tensor]:
        """The gradients that are set, as hooks of parameters leave them: what the optimizer will see, or a trainer's scaler."""
        network = self.network
        gradients = network.gradients()
        if network.scaler is not None and gradients:
            scale = network.scale(network.device)
            if scale is not None and not self._scaled:
                torch._foreach_mul_(gradients, scale)
            if self.stepping:
                network.optimizers.unscale()
        return network.gradients() if network.run_hooks() else gradients

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
        names = {index: self.tasks[index] for index in sorted(self._parts.recorded)}
        by_name = None
        if weights is not None:
            owners = tuple(names) if indices is None else tuple(indices)
            by_name = {self.tasks[i]: w for i, w in zip(owners, weights.tolist(), strict=True)}
        return StepInfo(
            losses={name: self._parts.recorded[index] for index, name in names.items()},
            weights=by_name,
            skipped=self.skipped,
            reason=self.reason,
            num_forward=self._parts.num_forward,
            num_backward=self._parts.num_backward,
            num_optimizer_steps=self.num_optimizer_steps,
            engine=self._parts.engine,
            num_fallbacks=num_fallbacks,
            records=dict(records or {}),
            gramian=None if gradients is None else gradients.gramian,
            precision=0.0 if gradients is None else gradients.precision,
        )

    def recounted(self, info: StepInfo) -> StepInfo:
        """A report with the passes that came after it."""
        return dataclasses.replace(info, num_forward=self._parts.num_forward, num_backward=self._parts.num_backward)


def _wrong_shape(what: str, about: str, given: object, length: int) -> ValueError:
    """The error of a method that gives something else than a tensor [length]."""
    shape = f"one of shape {list(given.shape)}" if isinstance(given, Tensor) else shown(given)
    return ValueError(f"A method's {what} should be a tensor of shape [{length}], {about}. Found {shape}.")
