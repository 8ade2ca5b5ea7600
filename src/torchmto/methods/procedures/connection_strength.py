"""Connection strength: learn which task each channel serves, then conserve it."""

import contextlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from torchmto import structure
from torchmto.checks import found, nearest, warn
from torchmto.gradients.ranks import is_sharded
from torchmto.methods import Cost, Domain, Procedure, Properties, hyper, register_method, states
from torchmto.methods.method import GradientCombiner, Method
from torchmto.methods.procedures.sequential import one_task_at_a_time
from torchmto.methods.registry import make_method, methods
from torchmto.solvers.unit import rounding_error
from torchmto.step import Network, StepContext, StepInfo, TaskGradients
from torchmto.structure.pairing import Pairs, PairSearch
from torchmto.structure.priority import Degenerate
from torchmto.structure.strength import Measure


class ChannelPriorities:
    """The structured layers of a model and the task that leads each of their channels.

    Which norm goes with which layer is found from the forwards of the first steps, until every task has had one. What is
    found is state, so that a resumed training has the same layers.

    Args:
        measure: What the strengths are read from.
        pairs: Explicit (layer, norm) paths; then nothing is searched.

    Attributes:
        layers: The conv and linear layers known so far whose norm is task-specific.
    """

    def __init__(self, measure: Measure, pairs: Sequence[tuple[str, str]] | None) -> None:
        self.measure = measure
        self.explicit = pairs
        self.tasks: tuple[str, ...] = ()
        self.layers: list[structure.StructuredLayer] = []
        self._network: Network | None = None
        self._parameters: Sequence[Tensor] = ()
        self._pairs: Pairs = {}
        self._seen: list[str] = []
        self._searching = False
        self._recording: structure.Recording | None = None

    def attach(self, network: Network, tasks: tuple[str, ...]) -> None:
        """Take a model; what is known of a former one is forgotten."""
        if self._network is not None:
            self._pairs, self._seen = {}, []
        self._network, self._parameters, self.tasks = network, network.parameters, tasks
        search = PairSearch(network.model)
        if self.explicit is not None:
            search.take(self.explicit)
        else:
            search.recall(self._pairs)
        self._searching = self.explicit is None and structure.has_split_norms(network.model)
        self._take(search)

    def follow(self, network: Network) -> None:
        """Where others are trained than before, layers and norms may have been replaced: take those of the same names."""
        if network is self._network:
            if network.parameters is self._parameters:
                return
            search = PairSearch(network.model)
            with contextlib.suppress(ValueError):
                search.recall(self._pairs)
                self._parameters, self.layers = network.parameters, []
                self._take(search)
                return
        # Others: they are found anew.
        self.attach(network, self.tasks)

    @property
    def network(self) -> Network:
        """The network that was attached."""
        assert self._network is not None
        return self._network

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Record the forwards inside, as long as a task hasn't been seen; an error drops what was recorded."""
        if not self._searching or len(self._seen) == len(self.tasks):
            yield
            return
        with structure.record_dataflow(self.network.model) as recording:
            self._recording = recording
            try:
                yield
            finally:
                self._recording = None

    def learn(self, present: Collection[str]) -> None:
        """Pair layers with norms by the forwards recorded in this step, of the tasks ``present``; on all ranks together."""
        if self._recording is None:
            return
        reached = self._reached()

        def serves(weight: nn.Parameter, norm: nn.Module) -> bool:
            return reached.get(id(weight), frozenset()) <= self._running([norm], reached)

        search = PairSearch(self.network.model, serves)
        # The order of the modules is for layers that no graph holds yet.
        search.recall({name: pair for name, pair in self._pairs.items() if pair[-1] != "module order"})
        search.read(self._recording.nodes, "recorded")
        if not self._seen:
            search.trace()
        ranks = self.network.ranks
        if ranks.size > 1:
            found = ranks.objects(search.pairs())
            search = PairSearch(self.network.model, serves)
            for pairs in found:
                search.recall(pairs)
        search.guess_by_order()
        self._seen = [task for task in self.tasks if task in present or task in self._seen]
        self._take(search)
        if len(self._seen) == len(self.tasks) > 1 and not self.shared_layers():
            warn(
                "connection_strength: no layer that tasks share goes with a task-specific norm, so no channel has a priority "
                "and phase 2 is the plain sum. Layers whose weight is computed (`weight_norm`, `spectral_norm` and other "
                "parametrizations) have no channels of their own; where a norm wasn't found, name it by `pairs=`.",
            )

    def _take(self, search: PairSearch) -> None:
        pairs = search.pairs()
        if pairs != self._pairs or not self.layers:
            self._pairs = pairs
            self.layers = [
                layer
                for layer in search.result()
                if isinstance(layer.norm_out, structure.SplitNorm) or isinstance(layer.norm_in, structure.SplitNorm)
            ]

    def state_dict(self) -> dict[str, Any]:
        """The pairs known so far, by name, and the tasks whose forwards they come from."""
        return {"pairs": self._pairs, "seen": self._seen}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over saved pairs; explicit ones stay.

        Raises:
            ValueError: If the model has no such layer or norm.
        """
        pairs, seen = dict(state["pairs"]), [task for task in self.tasks if task in state["seen"]]
        if self.explicit is not None:
            return
        if self._network is not None and pairs != self._pairs:
            search = PairSearch(self.network.model)
            search.recall(pairs)
            self._take(search)
        self._pairs, self._seen = pairs, seen

    def shared_layers(self) -> list[tuple[structure.StructuredLayer, set[int]]]:
        """The layers whose weight is trained and was reached by several tasks; and the tasks that can lead their channels.

        These are the tasks that reach the layer and their copies of its norms: a copy that never ran says nothing. A head's
        layers have no priority.
        """
        roles, reached = self.network.roles, self._reached()
        return [
            (layer, self._running((layer.norm_out, layer.norm_in), reached) & reached[id(layer.weight)])
            for layer in self.layers
            if id(layer.weight) in reached and roles.is_shared(self.network.name(layer.weight))
        ]

    def top(
        self,
        layer: structure.StructuredLayer,
        candidates: Collection[int],
        indices: Sequence[int],
        gradients: TaskGradients | None = None,
    ) -> Tensor:
        """Which of the ``candidates`` leads each channel, as a position in ``indices``, -1 for none, int64 [C]."""
        views = None if gradients is None or self.measure == "parameters" else gradients.view(layer.weight)
        strengths = layer.strengths([self.tasks[i] for i in indices], measure=self.measure, task_grads=views)
        tie = 1e-12 if views is None or gradients is None else rounding_error(gradients.precision)
        rows = [row for row, index in enumerate(indices) if index in candidates]
        if not rows:
            return torch.full((layer.num_channels,), -1, device=strengths.device)
        top = structure.top_priority(structure.normalized_strength(strengths[rows]), tie=tie)
        return torch.tensor([*rows, -1], device=top.device)[top]

    def _reached(self) -> dict[int, frozenset[int]]:
        """The ``id`` of every trained parameter -> the tasks that have reached it."""
        network = self.network
        return {id(p): network.roles.tasks_of(network.name(p)) for p in network.parameters}

    def _running(self, norms: Iterable[nn.Module | None], reached: Mapping[int, frozenset[int]]) -> set[int]:
        """The tasks that run all ``norms``, as far as the norms have trained parameters to tell by."""
        running = set(range(len(self.tasks)))
        for norm in norms:
            for index in list(running):
                copy = norm.copy_for(self.tasks[index]) if isinstance(norm, structure.SplitNorm) else norm
                known = [] if copy is None else [reached[id(p)] for p in copy.parameters() if id(p) in reached]
                if known and not any(index in tasks for tasks in known):
                    running.remove(index)
        return running


class PriorityProjection(GradientCombiner):
    """Phase 2: within the channels a task leads, the others' conflicting gradients are projected off its gradient.

    A part of :class:`ConnectionStrength`, which describes it.
    """

    def __init__(self, priorities: ChannelPriorities, *, degenerate: Degenerate) -> None:
        super().__init__()
        self.priorities = priorities
        self.degenerate = degenerate
        self.tops: list[tuple[str, Tensor]] = []

    def refusal(self, network: Network) -> str:
        """With FSDP every rank has whole channels; with ``shard_gradients`` it has any columns."""
        measure = self.priorities.measure
        if network.sharded and measure != "parameters":
            return f"needs whole rows for {measure=!r}"
        return "groups the rows by channel in phase 2" if network.shard_gradients else ""

    def combine(self, task_grads: TaskGradients) -> Tensor:
        """The sum of the rows, except that each leading task's channels are scaled up by what the others lose, [P]."""
        flat, views = task_grads.rows.combined()
        torch.sum(task_grads.matrix, dim=0, out=flat)
        self.tops = []
        for layer, candidates in self.priorities.shared_layers():
            # A bias may be frozen.
            parameters = [parameter for parameter in layer.parameters if task_grads.has(parameter)]
            rows = [task_grads.view(parameter) for parameter in parameters]
            top = self.priorities.top(layer, candidates, task_grads.indices, task_grads)
            self.tops.append((layer.name, top))
            coefficients = self._coefficients(layer, rows, top)
            for parameter, combined in zip(parameters, layer.combine(rows, coefficients), strict=True):
                views[task_grads.rows.position[id(parameter)]].copy_(combined)
        return flat

    def _coefficients(self, layer: structure.StructuredLayer, rows: Sequence[Tensor], top: Tensor) -> Tensor:
        """The multipliers of the channels this rank has: all of them, unless FSDP shards the layer."""
        if not is_sharded(layer.weight):
            return layer.coefficients(rows, top, degenerate=self.degenerate)
        if layer.transposed:
            raise ValueError(
                f"Layer {layer.name} is a transposed convolution, whose output channels FSDP doesn't shard: phase 2 can't "
                "group them. Leave it out of `fully_shard`."
            )
        ranks = self.priorities.network.ranks
        start = min(len(top), ranks.rank * -(-len(top) // ranks.size))
        own = slice(start, start + rows[0].shape[1])
        dots = rows[0].new_zeros(len(rows[0]), len(top), dtype=torch.float64)
        dots[:, own] = layer.dots(rows, top[own]).to(dots)
        return structure.group_coefficients(ranks.sum_(dots), top, degenerate=self.degenerate)[:, own]


def _second(name: str, given: Any) -> Any:
    """What the argument ``phase2`` means, but for "priority" itself."""
    if isinstance(given, str) and given != "priority":
        if given not in methods():
            known = ("priority", *methods())
            raise ValueError(f"Unknown method `{given}` as `{name}`: 'priority' or a method.{nearest(given, known)}")
        return make_method(given)
    if given != "priority" and not isinstance(given, Method):
        raise TypeError(found(name, "'priority' or a method", given))
    return given


@register_method("connection_strength")
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

    A layer has priorities if its weight is trained, several tasks reach it and a task-specific norm goes with it, one that all
    of these tasks run (:func:`torchmto.structure.find_norm_pairs`, from the forwards of the first steps, until every task has
    had one). A trained bias follows its weight's channels. Only tasks that reach the layer and run its norm can lead a channel.

    Cost per batch: phase 1 K forwards, K backwards, K optimizer steps; phase 2 K forwards (one per task, since norms differ),
    K backwards, 1 step. Scale: sum. Heads: their own task's gradient. Random: the phase, from :attr:`generator`. On a model
    without task-specific norms, or none of whose shared layers goes with one, phase 2 is the plain sum, and a warning says so
    once; a layer whose weight is computed (``weight_norm``, ``spectral_norm``, other parametrizations) never does.

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
        pairs: Explicit (layer, norm) paths, if they aren't to be found: where channels change places in between, say.
        record_layers: Record the leading shares of every layer, not only overall. They are those among all tasks: of a batch
            without some, what the norms say, and with the other measures none.

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

    use = "Dense prediction with normalisation layers, where channels can specialise and K forwards are affordable."
    norms = "per task"
    properties = Properties(homogeneity=None, equivariant=False, pareto=False)
    domain = Domain(
        corners="A channel whose leading gradient is 0 is summed plainly. Of another method as `phase2` its own domain holds "
        "in the second phase."
    )
    total_steps: int | None = hyper.integer(None, minimum=1)
    schedule: str = hyper.choice("mix", "phase1", "phase2", "sequence", search=("choice", "mix", "sequence"))
    draw: str = hyper.choice("step", "epoch")
    switch: float = hyper.number(0.5, minimum=0, maximum=1, search=("linear", 0.2, 0.8))
    shuffle: bool = hyper.flag(False)
    second: Method = hyper.called("phase2", hyper.given("priority", _second, str | Method))
    measure: Measure = hyper.choice("parameters", "gradients", "saliency")
    degenerate: Degenerate = hyper.choice("sum", "project")
    pairs: Sequence[tuple[str, str]] | None = hyper.given(None)
    record_layers: bool = hyper.flag(True)
    num_steps: int = states.count()
    drawn: int = states.count()
    priorities: ChannelPriorities
    _now = 0

    def __post_init__(self) -> None:
        """The second phase is a method; this one's own works on priorities that both know."""
        if self.schedule == "sequence" and self.total_steps is None:
            raise ValueError(found("total_steps", "a positive int for schedule='sequence'", None))
        own = not isinstance(self.second, Method)
        priorities = ChannelPriorities(self.measure if own else "parameters", self.pairs)
        second = PriorityProjection(priorities, degenerate=self.degenerate) if own else self.second
        self.add_state("second", second)
        self.add_state("priorities", priorities)

    def attach(self, network: Network) -> None:
        """Look for task-specific norms."""
        super().attach(network)
        self.priorities.attach(network, self.tasks)
        if len(self.tasks) > 1 and not structure.has_split_norms(network.model):
            warn(
                "connection_strength: the model has no task-specific norms, so no channel has a priority and phase 2 is the "
                "plain sum. Call `torchmto.structure.split_norms(model, tasks)` before building the optimizer.",
            )

    def cost(self, num_tasks: int) -> Cost:
        """K forwards and backwards; K optimizer steps in phase 1, one in phase 2.

        Phase 2 needs a single forward where norms aren't split.
        """
        if self.schedule == "phase2":
            return self.second.cost(num_tasks)
        return Cost(num_tasks, num_tasks, num_tasks)

    @property
    def one_by_one(self) -> bool:
        """In phase 1."""
        return self.schedule != "phase2"

    def no_backward(self, num_sources: int) -> str:
        """Phase 2 alone takes one step."""
        if self.schedule == "phase2":
            return self.second.no_backward(num_sources)
        return f"takes one optimizer step per task in phase 1 (schedule={self.schedule!r})"

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
        super().end_window()

    def outside(self, losses: Tensor, indices: Sequence[int]) -> str:
        """What the second phase says in the second phase."""
        return super().outside(losses, indices) if self._now == 2 else ""

    def step(self, context: StepContext) -> StepInfo:
        """One batch in phase 1 or 2."""
        phase = self._now = self._phase()
        self.priorities.follow(context.network)
        with self.priorities.watching():
            if phase == 1:
                one_task_at_a_time(context, self.generator if self.shuffle else None)
                self.priorities.learn(context.info().losses)
                info = context.info(records=self._records(phase))
            else:
                info = self._second_phase(context)
        self.num_steps += 1
        return info

    def _second_phase(self, context: StepContext) -> StepInfo:
        second = self.second
        if not isinstance(second, PriorityProjection):
            info: StepInfo = second.step(context)
            self.priorities.learn(info.losses)
            return replace(info, records={**info.records, **self._records(2)})
        gradients = context.gradients()
        self.priorities.learn(context.info().losses)
        context.combine(gradients, vector=second.combine(gradients))
        context.apply()
        # In a batch without some tasks others lead what these do otherwise: that is no priority.
        tops = second.tops if len(gradients.indices) == len(self.tasks) else None
        return context.info(gradients=gradients, records=self._records(2, tops))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a saved state; older ones hold no pairs of layers and norms, which are then found anew."""
        super().load_state_dict({"priorities": {"pairs": {}, "seen": []}, **state})

    def _records(self, phase: int, tops: Sequence[tuple[str, Tensor]] | None = None) -> dict[str, Any]:
        """The phase, and the share of channels that each task leads, overall and per layer."""
        records: dict[str, Any] = {"phase": phase}
        if tops is None and self.measure == "parameters":
            layers, everyone = self.priorities.shared_layers(), range(len(self.tasks))
            tops = [(layer.name, self.priorities.top(layer, candidates, everyone)) for layer, candidates in layers]
        if not tops:
            return records
        counts = torch.stack([torch.bincount(top + 1, minlength=len(self.tasks) + 1)[1:] for _, top in tops])

        def shares(led: Tensor, channels: int) -> dict[str, float]:
            return {task: count / channels for task, count in zip(self.tasks, led.tolist(), strict=True)}

        records["priority_shares"] = shares(counts.sum(0), sum(len(top) for _, top in tops))
        if self.record_layers:
            records["layer_priority_shares"] = {
                name: shares(led, len(top)) for (name, top), led in zip(tops, counts.cpu(), strict=True)
            }
        return records
