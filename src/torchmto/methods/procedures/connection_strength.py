"""Connection strength: learn which task each channel serves, then conserve it."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from torchmto.checks import check_choice, check_flag, check_integer, check_number, found
from torchmto.gradients.ranks import is_sharded
from torchmto.methods.method import Cost, GradientCombiner, Method, Procedure, Properties
from torchmto.methods.procedures.sequential import one_task_at_a_time
from torchmto.methods.registry import make_method, register
from torchmto.problem import Losses, Network, Problem, StepInfo, TaskGradients
from torchmto.structure import (
    Recording,
    SplitNorm,
    StructuredLayer,
    find_norm_pairs,
    group_coefficients,
    has_split_norms,
    normalized_strength,
    record_dataflow,
    top_priority,
)

Measure = Literal["parameters", "gradients", "saliency"]
Degenerate = Literal["sum", "project"]


class ChannelPriorities:
    """The structured layers of a model and the task that leads each of their channels."""

    def __init__(self, tasks: Sequence[str], measure: Measure, pairs: Sequence[tuple[str, str]] | None) -> None:
        self.tasks = tuple(tasks)
        self.measure = measure
        self.pairs = pairs
        self.recording: Recording | None = None
        self._layers: list[StructuredLayer] | None = None

    @property
    def found(self) -> bool:
        """Whether the layers have been looked for."""
        return self._layers is not None

    def layers(self, network: Network) -> list[StructuredLayer]:
        """The conv and linear layers whose norm is task-specific, found on the first call."""
        if self._layers is None:
            found_layers = find_norm_pairs(network.model, pairs=self.pairs, recording=self.recording)
            self._layers = [
                layer
                for layer in found_layers
                if isinstance(layer.norm_out, SplitNorm) or isinstance(layer.norm_in, SplitNorm)
            ]
            self.recording = None
        return self._layers

    def shared_layers(self, network: Network) -> list[StructuredLayer]:
        """The layers whose parameters several tasks have reached: a head's layers have no priority."""
        shared = {id(p) for p in network.parameters if network.roles.is_shared(network.name(p))}
        return [layer for layer in self.layers(network) if all(id(p) in shared for p in layer.parameters)]

    def top(self, layer: StructuredLayer, indices: Sequence[int], gradients: TaskGradients | None = None) -> Tensor:
        """The leading task of each channel as a position in ``indices``, -1 for none, int64 [C]."""
        names = [self.tasks[i] for i in indices]
        views = None if gradients is None or self.measure == "parameters" else gradients.view(layer.weight)
        strengths = layer.strengths(names, measure=self.measure, task_grads=views)
        return top_priority(normalized_strength(strengths))


class PriorityProjection(GradientCombiner):
    """Phase 2: within the channels a task leads, the others' conflicting gradients are projected off its gradient.

    A part of :class:`ConnectionStrength`, which describes it.
    """

    def __init__(self, *, measure: Measure, degenerate: Degenerate, pairs: Sequence[tuple[str, str]] | None) -> None:
        super().__init__(heads="unit")
        self.measure = measure
        self.degenerate = degenerate
        self.pairs = pairs
        self.network: Network | None = None
        self.priorities: ChannelPriorities | None = None
        self.tops: list[tuple[str, Tensor]] = []

    def attach(self, network: Network) -> None:
        """Remember the network whose layers are structured."""
        self.network = network
        self.priorities = ChannelPriorities(self.tasks, self.measure, self.pairs)

    def refusal(self, network: Network) -> str:
        """With FSDP every rank has whole channels; with ``shard_gradients`` it has any columns."""
        if network.sharded and self.measure != "parameters":
            return f"needs whole rows for measure={self.measure!r}"
        return "groups the rows by channel in phase 2" if network.shard_gradients else ""

    def combine(self, task_grads: TaskGradients) -> Tensor:
        """The sum of the rows, except that each leading task's channels are scaled up by what the others lose, [P]."""
        assert self.network is not None
        assert self.priorities is not None
        flat, views = task_grads.rows.combined()
        torch.sum(task_grads.matrix, dim=0, out=flat)
        self.tops = []
        for layer in self.priorities.layers(self.network):
            if not all(task_grads.has(parameter) for parameter in layer.parameters):
                continue
            rows = [task_grads.view(parameter) for parameter in layer.parameters]
            top = self.priorities.top(layer, task_grads.indices, task_grads)
            self.tops.append((layer.name, top))
            coefficients = self._coefficients(layer, rows, top)
            for parameter, combined in zip(layer.parameters, layer.combine(rows, coefficients), strict=True):
                views[task_grads.rows.position[id(parameter)]].copy_(combined)
        return flat

    def _coefficients(self, layer: StructuredLayer, rows: Sequence[Tensor], top: Tensor) -> Tensor:
        """The multipliers of the channels this rank has: all of them, unless FSDP shards the layer."""
        assert self.network is not None
        if not is_sharded(layer.weight):
            return layer.coefficients(rows, top, degenerate=self.degenerate)
        if layer.transposed:
            raise ValueError(
                f"Layer {layer.name} is a transposed convolution, whose output channels FSDP doesn't shard: phase 2 can't "
                "group them. Leave it out of `fully_shard`."
            )
        ranks = self.network.ranks
        start = min(len(top), ranks.rank * -(-len(top) // ranks.size))
        own = slice(start, start + rows[0].shape[1])
        dots = rows[0].new_zeros(len(rows[0]), len(top), dtype=torch.float64)
        dots[:, own] = layer.dots(rows, top[own]).to(dots)
        return group_coefficients(ranks.sum_(dots), top, degenerate=self.degenerate)[:, own]


@register("connection_strength")
class ConnectionStrength(Procedure):
    r"""Connection strength-based optimisation, in two phases.

    The model's norms are task-specific (:func:`torchmto.structure.split_norms`, called before the optimizer is built), all
    other layers shared. How strongly task t uses output channel p of a layer is
    :math:`S[t,p] = \sum_q W[p,q]^2 \gamma[t,p]^2 / (\sigma^2[t,p] + \epsilon)`, divided by its sum over the layer's
    channels; the task with the largest share leads the channel.

    *Phase 1* learns priorities: forward, backward and optimizer step for one task after the other. *Phase 2* conserves them:
    per layer, channels are grouped by the task i that leads them; where the gradient of another task j conflicts with i's over
    the whole group, :math:`G_{ij} \leftarrow G_{ij} - \langle G_{ii}, G_{ij} \rangle / \|G_{ii}\|^2 \, G_{ii}`; then all are
    summed. Equivalently the leading row is multiplied by
    :math:`1 + \sum_j \max(0, -\langle G_{ii}, G_{ij} \rangle) / \|G_{ii}\|^2`. Channels without a unique leader, and parameters
    outside structured layers, are summed plainly. Strengths are read after the step's forwards.

    Cost per batch: phase 1 K forwards, K backwards, K optimizer steps; phase 2 K forwards (one per task, since norms differ),
    K backwards, 1 step. Scale: sum. Heads: their own task's gradient. Random: the phase, from :attr:`generator`. On a model
    without task-specific norms phase 2 is the plain sum, and a warning says so once.

    Args:
        total_steps: Length of the training in steps, for the progress of "mix" and "sequence". A trainer that knows it sets
            the attribute. Without it, "mix" draws both phases with probability 1/2.
        schedule: "mix": phase 1 where a draw from U(0, 1) is at least the progress, else phase 2; "phase1" or "phase2" only;
            "sequence": phase 1 up to the progress ``switch``, then phase 2.
        draw: Draw the phase per "step" (as the released example does) or per "epoch" (as the paper says; an epoch ends at
            ``mt.end_window()``).
        switch: Progress at which "sequence" changes phase.
        shuffle: Shuffle the order of the tasks in phase 1.
        phase2: "priority", or any other method (name or object) to use as the second phase.
        measure: "parameters" (the paper's), "gradients" (:math:`\sum g^2`) or "saliency" (:math:`\sum |w g|`).
        degenerate: Where one task leads every channel of a layer: "sum", as released; "project", the formula as printed.
        pairs: Explicit (layer, norm) paths, if they aren't to be found.
        record_layers: Record the leading shares of every layer, not only overall.

    Raises:
        ValueError: If an option is unknown, or "sequence" has no ``total_steps``.

    Deviations: norms other than BatchNorm, layers other than convolutions and the measures "gradients" and "saliency" are our
    generalisation.

    Source: Jeong & Yoon, Quantifying Task Priority for Multi-Task Optimization, CVPR 2024 (arXiv 2406.02996).

    Example:
        >>> import torchmto
        >>> torchmto.make_method("connection_strength", total_steps=1000).schedule
        'mix'
    """

    source = "Jeong & Yoon, CVPR 2024, arXiv 2406.02996"
    use = "Dense prediction with normalisation layers, where channels can specialise and K forwards are affordable."
    properties = Properties(homogeneity=None, equivariant=False, pareto=False)
    second: Method
    num_steps: int
    drawn: int

    def __init__(
        self,
        *,
        total_steps: int | None = None,
        schedule: str = "mix",
        draw: str = "step",
        switch: float = 0.5,
        shuffle: bool = False,
        phase2: str | Method = "priority",
        measure: Measure = "parameters",
        degenerate: Degenerate = "sum",
        pairs: Sequence[tuple[str, str]] | None = None,
        record_layers: bool = True,
    ) -> None:
        super().__init__()
        self.total_steps = None if total_steps is None else check_integer("total_steps", total_steps, minimum=1)
        self.schedule = check_choice("schedule", schedule, ("mix", "phase1", "phase2", "sequence"))
        if schedule == "sequence" and total_steps is None:
            raise ValueError(found("total_steps", "a positive int for schedule='sequence'", total_steps))
        self.draw = check_choice("draw", draw, ("step", "epoch"))
        self.switch = check_number("switch", switch, minimum=0, maximum=1)
        self.shuffle = check_flag("shuffle", shuffle)
        check_choice("measure", measure, ("parameters", "gradients", "saliency"))
        check_choice("degenerate", degenerate, ("sum", "project"))
        if phase2 == "priority":
            second: Method = PriorityProjection(measure=measure, degenerate=degenerate, pairs=pairs)
        else:
            second = make_method(phase2) if isinstance(phase2, str) else phase2
        if not isinstance(second, Method):
            raise TypeError(found("phase2", "'priority' or a method", phase2))
        self.measure = measure
        self.pairs = pairs
        self.record_layers = check_flag("record_layers", record_layers)
        self.add_state("second", second)
        self.add_state("num_steps", 0)
        self.add_state("drawn", 0)
        self._network: Network | None = None
        self._priorities: ChannelPriorities | None = None

    def bind(self, tasks: tuple[str, ...]) -> None:
        """Bind the second phase too."""
        self.second.bind(tasks)
        super().bind(tasks)

    def attach(self, network: Network) -> None:
        """Look for task-specific norms."""
        self._network = network
        self.second.attach(network)
        if isinstance(self.second, PriorityProjection):
            self._priorities = self.second.priorities
        else:
            self._priorities = ChannelPriorities(self.tasks, "parameters", self.pairs)
        if len(self.tasks) > 1 and not has_split_norms(network.model):
            warnings.warn(
                "connection_strength: the model has no task-specific norms, so no channel has a priority and phase 2 is the "
                "plain sum. Call `torchmto.structure.split_norms(model, tasks)` before building the optimizer.",
                stacklevel=3,
            )

    def cost(self, num_tasks: int) -> Cost:
        """K forwards and backwards; K optimizer steps in phase 1, one in phase 2.

        Phase 2 needs a single forward where norms aren't split.
        """
        if self.schedule == "phase2":
            return self.second.cost(num_tasks)
        return Cost(num_tasks, num_tasks, num_tasks)

    @property
    def progress(self) -> float:
        """Steps done over total steps, at most 1; 1/2 where the total isn't known."""
        return 0.5 if self.total_steps is None else min(1.0, self.num_steps / self.total_steps)

    def _phase(self) -> int:
        if self.schedule in ("phase1", "phase2"):
            return int(self.schedule[-1])
        if self.schedule == "sequence":
            return 1 if self.progress < self.switch else 2
        if self.draw == "epoch" and self.drawn:
            return self.drawn
        uniform = float(torch.rand((), generator=self.generator, dtype=torch.float64))
        self.drawn = 1 if uniform >= self.progress else 2
        return self.drawn

    def end_window(self) -> None:
        """An epoch ends: the next phase is drawn anew."""
        self.drawn = 0
        self.second.end_window()

    def report(self, performance: Mapping[str, float]) -> None:
        """Pass on to the second phase."""
        self.second.report(performance)

    def step(self, problem: Problem) -> StepInfo:
        """One batch in phase 1 or 2."""
        phase = self._phase()
        with self._recording(problem):
            if phase == 1:
                one_task_at_a_time(problem, self.generator if self.shuffle else None)
                info = problem.info(records=self._records(problem, phase))
            else:
                info = self._second_phase(problem)
        self.num_steps += 1
        return info

    def _recording(self, problem: Problem) -> contextlib.AbstractContextManager[Any]:
        """Record the dataflow of the first step, by which layers that torch.fx can't trace are paired with norms.

        Pairs aren't part of the state, so a resumed training records its own first step and finds the same ones.
        """
        stack = contextlib.ExitStack()
        assert self._priorities is not None
        known = self._priorities.found or self._priorities.recording is not None
        if not known and self.pairs is None and problem.network.split:
            self._priorities.recording = stack.enter_context(record_dataflow(problem.network.model))
        return stack

    def _second_phase(self, problem: Problem) -> StepInfo:
        second = self.second
        if not isinstance(second, PriorityProjection):
            info: StepInfo = second.step(problem)
            return problem.info(records={**info.records, **self._records(problem, 2)})
        gradients = problem.gradients()
        problem.combine(gradients, vector=second.combine(gradients))
        problem.apply()
        tops = [(name, top, gradients.indices) for name, top in second.tops]
        return problem.info(gradients=gradients, records=self._records(problem, 2, tops))

    def after_step(self, losses: Losses, problem: Problem) -> None:
        """Nothing: the phases keep their own state."""

    def _records(
        self, problem: Problem, phase: int, tops: list[tuple[str, Tensor, tuple[int, ...]]] | None = None
    ) -> dict[str, Any]:
        """The phase, and the share of channels that each task leads, overall and per layer."""
        records: dict[str, Any] = {"phase": phase}
        assert self._priorities is not None
        if tops is None and (self.measure == "parameters"):
            everyone = tuple(range(len(self.tasks)))
            layers = self._priorities.shared_layers(problem.network)
            tops = [(layer.name, self._priorities.top(layer, everyone), everyone) for layer in layers]
        if not tops:
            return records
        counts = torch.stack([torch.bincount(top + 1, minlength=len(indices) + 1) for _, top, indices in tops]).tolist()
        total: dict[str, int] = dict.fromkeys(self.tasks, 0)
        by_layer: dict[str, dict[str, float]] = {}
        for (name, top, indices), row in zip(tops, counts, strict=True):
            led = {self.tasks[i]: count for i, count in zip(indices, row[1:], strict=True)}
            by_layer[name] = {task: count / len(top) for task, count in led.items()}
            for task, count in led.items():
                total[task] += count
        channels = sum(len(top) for _, top, _ in tops)
        records["priority_shares"] = {task: count / channels for task, count in total.items()}
        if self.record_layers:
            records["layer_priority_shares"] = by_layer
        return records
