"""Selective task groups: groups of tasks formed from their affinity, updated one after the other within each batch."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from torchmto.checks import check_choice, found, unknown_task
from torchmto.methods import Cost, Domain, GramianWeighting, Procedure, Properties, hyper, register_method, states
from torchmto.methods.registry import gramian_method
from torchmto.step import Losses, StepContext, StepInfo
from torchmto.structure import ProximalAffinity
from torchmto.structure.affinity import Attribution, Cluster, Normalization

GROUPINGS = ("adaptive", "heterogeneous", "random", "per_task", "joint")
SINGLE = ("measure", "twice", "once")


def _partition(name: str, given: Any) -> str | list[list[str]]:
    if isinstance(given, str):
        return check_choice(name, given, GROUPINGS)
    groups = [list(group) for group in given]
    members = [task for group in groups for task in group]
    if not groups or not all(groups) or len(set(members)) != len(members):
        raise ValueError(found(name, "a partition of the tasks: non-empty groups, each task once", groups))
    return groups


def _inner(name: str, given: Any) -> GramianWeighting | None:
    made = None if given is None else gramian_method(name, given)
    if made is not None and made.refresh_every > 1:
        raise ValueError(found(f"{name}.refresh_every", "1: groups don't keep their weights", made.refresh_every))
    return made


@register_method("task_groups")
class TaskGroups(Procedure):
    r"""Selective task group updates.

    Per batch, for each group in shuffled order: forward of all tasks, backward of the group's summed losses, optimizer step.
    A group's step changes the loss of task k by :math:`1 - L_k(\text{after}) / L_k(\text{before})`; these *proximal inter-task
    affinities* are tracked in a K x K moving average (:class:`torchmto.ProximalAffinity`), from which the groups are formed
    anew. The losses "after" one group's step are those of the next group's forward, so tracking costs nothing.

    With M groups a batch costs M forwards, M backwards and M optimizer steps (plus one forward without gradient where
    ``measure_last`` or a single group needs it): compare methods by ``StepInfo``'s counters, and step schedulers once per
    batch. Scale: sum within a group. Heads: their own task's gradient, once per batch (twice where ``single="twice"`` updates
    the only group twice). Random: the order of the groups, and random groups, from :attr:`generator`.

    Args:
        groups: "adaptive": from the affinities; a fixed partition (a list of lists of names); or a baseline of the paper's
            ablation: "joint", "per_task", "random" (``num_groups`` of nearly equal sizes, drawn for every batch),
            "heterogeneous" (like adaptive, but tasks of *low* mutual affinity together; our reading: the partition that
            maximises the summed negated affinity inside groups).
        warmup: Batches in which every task is its own group, before affinities are used; under ``attribution="official"`` one
            more, as in the released code, which counts from 0 and compares with "at most".
        decay: Of the moving average, the paper's beta.
        attribution: "actor": a change is credited to the group whose step caused it; "official": to the *next* group, as in
            the released code, whose losses are taken before the step. That is a defect there, kept to reproduce its numbers;
            so are one more batch of warm-up, and groups from affinity propagation that hasn't converged.
        normalization: "paper": the printed formula; "official": the released code divides by a view of the element it
            overwrites, so only the upper triangle is normalised.
        cluster: "affinity_propagation" (the paper's; for three tasks its own noise decides) or "correlation" (the partition
            with the largest summed normalised affinity inside groups; deterministic and independent of the tasks' order).
        measure_last: Also credit the last group of a batch, by one extra forward without gradient that leaves no trace.
        single: With one group only, nothing would be measured and the groups would stay joint for ever. "measure": one extra
            forward without gradient measures its step; "twice": the released code's choice, the group is updated twice per
            batch; "once": neither. Default: "measure", under ``attribution="official"`` "twice".
        regroup_every: Form new groups every n batches; the released code does so every batch.
        num_groups: Number of random groups; default half the number of tasks, rounded up.
        random_state: Seed of affinity propagation.
        inner: A Gramian method (name or object) that combines the gradients inside a group; default their sum. Then a batch
            costs K backwards. A task on its own gets its plain gradient; the method is told its loss. To its windows of
            losses every group's update is a step. What it records is in ``records["inner"]``, group by group.
        noise_floor: Record, at the cost of one extra forward per batch, the affinity of a step that changes nothing: how much
            losses move between two forwards of one batch by dropout and the like.

    Source: Jeong & Yoon, Selective Task Group Updates for Multi-Task Optimization, ICLR 2025 (arXiv 2502.11986).

    Example:
        >>> import torchmto
        >>> torchmto.make_method("task_groups", groups=[["seg", "depth"], ["normals"]]).cost(3).num_optimizer_steps
        2
    """

    use = (
        "Several tasks of unknown relation, where heads should learn undisturbed and M steps per batch are affordable."
    )
    properties = Properties(homogeneity=None, equivariant=False, pareto=False)
    domain = Domain(
        corners="The affinity of a loss that isn't positive isn't tracked: a relative change has no meaning there. Of an inner "
        "method its own domain holds."
    )
    grouping: str | list[list[str]] = hyper.called(
        "groups", hyper.given("adaptive", _partition, str | Sequence[Sequence[str]])
    )
    warmup: int = hyper.integer(100, minimum=0)
    decay: float = hyper.number(0.001, above=0, maximum=1, search=("log", 1e-4, 1e-1))
    attribution: Attribution = hyper.choice("actor", "official")
    normalization: Normalization = hyper.choice("paper", "official")
    cluster: Cluster = hyper.choice("affinity_propagation", "correlation")
    measure_last: bool = hyper.flag(False)
    single: str = hyper.given(None, kind=str | None)
    regroup_every: int = hyper.integer(1, minimum=1)
    num_groups: int | None = hyper.integer(None, minimum=1)
    random_state: int = hyper.integer(0, minimum=0)
    inner: GramianWeighting | None = hyper.given(None, _inner, str | GramianWeighting | None)
    noise_floor: bool = hyper.flag(False)
    num_batches: int = states.count()
    affinity: ProximalAffinity
    current: list[list[str]]

    def __post_init__(self) -> None:
        """What the released code does in other ways has other defaults."""
        official = self.attribution == "official"
        self._last_warmup = self.warmup + official
        self.single = check_choice("single", self.single or ("twice" if official else "measure"), SINGLE)
        self.add_state("inner", self.inner)

    def bind(self, tasks: tuple[str, ...]) -> None:
        """Start with every task its own group, and check a fixed partition."""
        if not isinstance(self.grouping, str):
            members = [name for group in self.grouping for name in group]
            unknown = [name for name in members if name not in tasks]
            if unknown:
                raise ValueError(unknown_task(unknown[0], tasks, "in `groups`"))
            if set(members) != set(tasks):
                raise ValueError(found("groups", f"a partition of all tasks {list(tasks)}", self.grouping))
        if self.num_groups is not None and self.num_groups > len(tasks):
            raise ValueError(found("num_groups", f"at most the number of tasks, {len(tasks)}", self.num_groups))
        known = bool(self.tasks)
        super().bind(tasks)
        if not known:
            self.add_state("affinity", ProximalAffinity(tasks, self.decay, self.attribution, self.normalization))
            self.add_state("current", self._first_groups(tasks))

    def _first_groups(self, tasks: tuple[str, ...]) -> list[list[str]]:
        if self.grouping == "joint":
            return [list(tasks)]
        if isinstance(self.grouping, str):
            return [[name] for name in tasks]
        return [list(group) for group in self.grouping]

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a saved state; groups that never change stay as they were given."""
        super().load_state_dict(state)
        if self.grouping != "random" and not self._tracks():
            self.current = self._first_groups(self.tasks)

    def cost(self, num_tasks: int) -> Cost:
        """M of everything for M groups, with an inner method K backwards; adaptive groups start with M = K."""
        num_groups = num_tasks
        if self.grouping == "joint" or num_tasks == 1:
            num_groups = 1
        elif self.grouping == "random":
            num_groups = self.num_groups or math.ceil(num_tasks / 2)
        elif not isinstance(self.grouping, str):
            num_groups = len(self.grouping)
        alone = num_groups == 1 and num_tasks > 1 and self._tracks()
        times = 2 if alone and self.single == "twice" else 1
        substeps = times * num_groups
        last = self.measure_last or (alone and self.single == "measure")
        num_backward = substeps if self.inner is None else times * num_tasks
        return Cost(substeps + last + self.noise_floor, num_backward, substeps)

    def _tracks(self) -> bool:
        """Whether the grouping uses affinities."""
        return self.grouping in ("adaptive", "heterogeneous")

    @property
    def _alone(self) -> bool:
        """Whether a single group would leave the affinities it is formed from unmeasured."""
        return len(self.current) == 1 and self.num_tasks > 1 and self._tracks()

    def step(self, context: StepContext) -> StepInfo:
        """Update group after group, tracking affinities; then form the groups of the next batch."""
        if self.grouping == "random":
            self.current = self._random_groups()
        records: dict[str, Any] = {"groups": [list(group) for group in self.current]}
        order = torch.randperm(len(self.current), generator=self.generator).tolist()
        groups = [self.current[i] for i in order]
        if self._alone and self.single == "twice":
            groups = groups * 2
        self.affinity.new_batch()
        still = context.losses(replay=False) if self.noise_floor else None
        told: list[dict[str, Any]] = []
        for number, group in enumerate(groups):
            steps = context.num_optimizer_steps
            losses = self._update(context, group, told)
            if number == 0 and still is not None and losses is not None:
                records["noise_floor"] = _named(context, losses, 1 - losses.raw / still.raw)
            # A group that was left out has moved nothing: the losses after the step before it are those before the next.
            if losses is not None and context.num_optimizer_steps > steps:
                before = _named(context, losses, losses.raw)
                self.affinity.update([name for name in group if name in before], before)
        measure = self.measure_last or (self._alone and self.single == "measure")
        if measure and context.num_optimizer_steps:
            after = context.losses(replay="newest")
            values = _named(context, after, after.raw)
            if all(math.isfinite(value) for value in values.values()):
                self.affinity.finish(values)
        self.num_batches += 1
        if self._tracks() and self.num_batches >= self._last_warmup and self.num_batches % self.regroup_every == 0:
            self.current = self._regroup()
        records.update(order=[list(group) for group in groups], affinity=self.affinity.matrix)
        if self.inner is not None:
            records["inner"] = told
        return context.info(num_fallbacks=sum(entry["num_fallbacks"] for entry in told), records=records)

    def _update(self, context: StepContext, group: list[str], told: list[dict[str, Any]]) -> Losses | None:
        """One group's optimizer step; returns the losses of all tasks before it, None if it was left out.

        What the inner method has to tell about its step is added to ``told``.
        """
        inner, steps = self.inner, context.num_optimizer_steps
        if inner is None or len(group) == 1:
            losses = context.descend(group, forward=context.asked)
            if inner is not None and context.num_optimizer_steps > steps:
                inner.after_step(losses.only({context.tasks.index(name) for name in group}), context)
            return losses
        kept = inner.snapshot()
        taken = False
        try:
            with context.leaving_out():
                gradients = context.gradients(group, forward=context.asked)
                inner.descend(context, gradients)
                taken = True
                told.append({"group": group, "num_fallbacks": inner.num_fallbacks, **inner.records()})
                return gradients.all_losses
        finally:
            if not taken:
                inner.restore(kept)
        return None

    def _regroup(self) -> list[list[str]]:
        if self.grouping == "adaptive":
            return self.affinity.groups(self.random_state, self.cluster)
        return self.affinity.heterogeneous_groups()

    def _random_groups(self) -> list[list[str]]:
        count = self.num_groups or math.ceil(self.num_tasks / 2)
        order = torch.randperm(self.num_tasks, generator=self.generator).tolist()
        return [[self.tasks[i] for i in sorted(order[start::count])] for start in range(count)]


def _named(context: StepContext, losses: Losses, values: Tensor) -> dict[str, float]:
    """Task -> number, of one number per loss."""
    return dict(zip((context.tasks[i] for i in losses.indices), values.tolist(), strict=True))
