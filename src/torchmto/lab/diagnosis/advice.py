"""From measured numbers to findings and methods that suit: a pure function, whose rules are all here."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torchmto.lab.diagnosis.measurements import Margins, Measurements

Kind = Literal["fine", "note", "warning"]


@dataclass(frozen=True)
class Thresholds:
    """Where the rules draw their lines. Ours, by experience and rounded: evidence is printed with every verdict.

    Attributes:
        conflict: Mean cosine below which a pair conflicts, if it is also two standard errors below 0.
        strong_conflict: Mean cosine below which a conflict is strong.
        duplicate: Mean cosine above which two tasks pull the same way.
        norm_ratio: Largest over smallest gradient norm that unbalances the sum.
        mild_norm_ratio: Such a ratio that is worth a note.
        loss_ratio: Largest over smallest loss that calls for scaling.
        condition: Condition number of the cosines beyond which solutions of K x K systems are noise.
        cancelled: Squared norm of the sum over the sum of squared norms below which the gradients cancel.
        harmed: Cosine with the sum below which the sum works against a task.
        few_layers: Share of layers that, if it holds 80 % of all conflict, makes the conflict local.
        margin: Expected median lead of a channel's task below which priorities are arbitrary.
        phase1_steps: Steps of phase 1 below which priorities are hardly learnt.
        many_tasks: Number of tasks from which K backwards are a burden.
    """

    conflict: float = -0.05
    strong_conflict: float = -0.3
    duplicate: float = 0.95
    norm_ratio: float = 10.0
    mild_norm_ratio: float = 3.0
    loss_ratio: float = 30.0
    condition: float = 1e6
    cancelled: float = 1e-2
    harmed: float = -0.02
    few_layers: float = 0.34
    margin: float = 0.05
    phase1_steps: int = 200
    many_tasks: int = 8


@dataclass(frozen=True)
class Plan:
    """What is going to be trained, as far as it is known.

    Attributes:
        method: The method's name.
        options: Its hyper-parameters.
        total_steps: Batches of the whole training.
        has_norms: Whether the shared part has normalisation layers; None if unknown.
    """

    method: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    total_steps: int | None = None
    has_norms: bool | None = None


@dataclass(frozen=True)
class Finding:
    """One thing that was found.

    Attributes:
        kind: How grave it is.
        topic: A word for the rule.
        text: What it means.
        evidence: The numbers it rests on.
        methods: Methods it speaks for, with the reason.
        against: Methods it warns of, which aren't suggested then, whatever else speaks for them.
    """

    kind: Kind
    topic: str
    text: str
    evidence: str
    methods: Mapping[str, str] = field(default_factory=dict)
    against: tuple[str, ...] = ()


@dataclass(frozen=True)
class Suggestion:
    """A method that suits.

    Attributes:
        method: Its name, with hyper-parameters where they matter.
        reasons: Why, with evidence.
    """

    method: str
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Diagnosis:
    """What `advise` says.

    Attributes:
        findings: Warnings first.
        suggestions: The best supported first.
        plain_sum_is_fine: Whether nothing speaks against summing the losses.
    """

    findings: tuple[Finding, ...]
    suggestions: tuple[Suggestion, ...]
    plain_sum_is_fine: bool


Rule = Callable[[Measurements, Plan, Thresholds], Iterator[Finding]]


def advise(measured: Measurements, plan: Plan | None = None, thresholds: Thresholds | None = None) -> Diagnosis:
    """Judge measurements.

    Args:
        measured: From `torchmto.lab.diagnosis.probe`.
        plan: What is to be trained.
        thresholds: Where the lines are.

    Returns:
        Findings with their evidence, and methods that suit with reasons; the same for the same numbers.
    """
    plan, thresholds = plan or Plan(), thresholds or Thresholds()
    findings = [finding for rule in RULES for finding in rule(measured, plan, thresholds)]
    warned_of = {method for finding in findings for method in finding.against}
    reasons: dict[str, list[str]] = {}
    for finding in findings:
        for method, reason in finding.methods.items():
            if method not in warned_of:
                reasons.setdefault(method, []).append(reason)
    against = {"conflict", "norms", "losses", "cancelled", "dominance", "harmed", "affinity"}
    fine = not any(finding.kind == "warning" and finding.topic in against for finding in findings)
    if fine:
        text = "Plain summing (gd) is fine here: the tasks neither fight nor drown each other."
        findings.append(Finding("fine", "sum", text, f"no warning about {', '.join(sorted(against))}"))
        why = "nothing measured speaks against the plain sum, and nothing is cheaper"
        reasons = {"gd": [why], **{name: given for name, given in reasons.items() if name != "gd"}}
    order = {"warning": 0, "note": 1, "fine": 2}
    names = sorted(reasons, key=lambda name: (not (fine and name == "gd"), -len(reasons[name])))
    return Diagnosis(
        tuple(sorted(findings, key=lambda finding: order[finding.kind])),
        tuple(Suggestion(name, tuple(reasons[name])) for name in names),
        fine,
    )


# ------------------------------------------------------------------------------------------------------- gradients


def _pairs(tasks: Sequence[str]) -> Iterator[tuple[int, int]]:
    return ((i, j) for i in range(len(tasks)) for j in range(i + 1, len(tasks)))


def _conflicting(m: Measurements, t: Thresholds) -> list[tuple[int, int]]:
    """Pairs whose mean cosine is clearly negative, the worst first."""
    found = []
    for i, j in _pairs(m.tasks):
        cosine, error = m.cosines[i][j], m.cosine_errors[i][j]
        if cosine < t.conflict and not cosine + 2 * (error if math.isfinite(error) else 0.0) >= 0:
            found.append((i, j))
    return sorted(found, key=lambda pair: m.cosines[pair[0]][pair[1]])


def _pair_text(m: Measurements, i: int, j: int) -> str:
    error = m.cosine_errors[i][j]
    spread = f" ± {error:.2f}" if math.isfinite(error) else ""
    negative = f"negative in {m.conflict_shares[i][j]:.0%} of batches"
    return f"{m.tasks[i]} / {m.tasks[j]}: cosine {m.cosines[i][j]:+.2f}{spread}, {negative}"


def _listed(texts: Sequence[str], most: int = 5) -> str:
    more = f"; and {len(texts) - most} more" if len(texts) > most else ""
    return "; ".join(texts[:most]) + more


def _conflicts(m: Measurements, plan: Plan, t: Thresholds) -> Iterator[Finding]:
    pairs = _conflicting(m, t)
    known = [(m.cosines[i][j], i, j) for i, j in _pairs(m.tasks) if math.isfinite(m.cosines[i][j])]
    if not pairs:
        if known:
            _, i, j = min(known)
            yield Finding("fine", "conflict", "No pair of tasks conflicts clearly.", f"lowest: {_pair_text(m, i, j)}")
        return
    evidence = _listed([_pair_text(m, i, j) for i, j in pairs])
    i, j = pairs[0]
    worst = f"{m.tasks[i]} and {m.tasks[j]} conflict (cosine {m.cosines[i][j]:+.2f})"
    strong = m.cosines[i][j] < t.strong_conflict
    text = f"{len(pairs)} of {len(known)} pairs of tasks conflict{', strongly' if strong else ''}."
    methods = {"wpcgrad": f"{worst}; a priority decides who gives way", "cagrad": worst}
    methods |= {"upgrad": f"{worst}, and its update harms no task to first order"} if strong else {"pcgrad": worst}
    yield Finding("warning", "conflict", text, evidence, methods)
    yield from _where(m, plan, t)


def _where(m: Measurements, plan: Plan, t: Thresholds) -> Iterator[Finding]:
    if len(m.layers) < 3:
        return
    collected, holding = 0.0, []
    for layer in m.layers:
        holding.append(layer)
        collected += layer.conflict_part
        if collected >= 0.8:
            break
    names = _listed([f"{layer.name} {layer.conflict_part:.0%}" for layer in holding])
    evidence = f"parts of all negative inner products: {names}"
    if len(holding) <= max(1, math.floor(t.few_layers * len(m.layers))):
        text = f"{len(holding)} of {len(m.layers)} layers hold {collected:.0%} of the conflict."
        reason = f"the conflict sits in {len(holding)} of {len(m.layers)} layers, and it settles conflicts channel by channel"
        methods = {} if plan.has_norms is False else {"connection_strength": reason}
        yield Finding("note", "layers", text, evidence, methods)
    else:
        text = (
            f"The conflict is spread: it takes {len(holding)} of {len(m.layers)} layers to hold {collected:.0%} of it."
        )
        yield Finding("note", "layers", text, evidence)


def _duplicates(m: Measurements, _plan: Plan, t: Thresholds) -> Iterator[Finding]:
    pairs = [(i, j) for i, j in _pairs(m.tasks) if m.cosines[i][j] > t.duplicate]
    if pairs:
        text = "Some tasks pull the same way nearly always, so together they count several times in a sum."
        yield Finding("note", "duplicates", text, _listed([_pair_text(m, i, j) for i, j in pairs]))


def _extremes(values: Mapping[str, float]) -> tuple[str, str, float] | None:
    """The names of the largest and the smallest value, and their ratio; None unless all are positive."""
    known = {name: value for name, value in values.items() if math.isfinite(value)}
    if len(known) < 2 or min(known.values()) <= 0:
        return None
    low, *_, high = sorted(known, key=known.__getitem__)
    return high, low, known[high] / known[low]


def _norms(m: Measurements, plan: Plan, t: Thresholds) -> Iterator[Finding]:
    silent = [name for name, value in m.gradient_norms.items() if value == 0]
    if silent:
        text = "Some tasks don't move the shared parameters at all."
        yield Finding("warning", "norms", text, f"gradient norm 0: {', '.join(silent)}")
    found = _extremes(m.gradient_norms)
    if found is None:
        return
    high, low, ratio = found
    evidence = f"{high} {m.gradient_norms[high]:.3g}, {low} {m.gradient_norms[low]:.3g}: {ratio:.1f} times"
    if ratio >= t.norm_ratio:
        reason = f"{high}'s gradient is {ratio:.0f} times {low}'s, and it makes no difference to this method"
        methods = dict.fromkeys(("imtl_g", "nash_mtl"), reason)
        methods["uw"] = f"{high}'s gradient is {ratio:.0f} times {low}'s; learnt weights balance it for one backward"
        yield Finding("warning", "norms", f"In a sum {high} outweighs {low}.", evidence, methods)
        if plan.method == "mgda":
            text = f"mgda's update follows the smallest gradient, here that of {low}."
            yield Finding("warning", "method", f"{text} Try normalize='l2'.", evidence)
    elif ratio >= t.mild_norm_ratio:
        yield Finding("note", "norms", "Gradient norms differ somewhat.", evidence)
    else:
        yield Finding("fine", "norms", "Gradient norms are alike.", evidence)


def _losses(m: Measurements, _plan: Plan, t: Thresholds) -> Iterator[Finding]:
    found = _extremes(m.losses)
    if found is None:
        low = [f"{name} {value:.3g}" for name, value in m.losses.items() if value <= 0]
        if low:
            text = "Some losses aren't positive: methods that take logarithms or ratios of losses don't apply."
            yield Finding("note", "positive", text, _listed(low))
        return
    high, low_name, ratio = found
    evidence = f"{high} {m.losses[high]:.3g}, {low_name} {m.losses[low_name]:.3g}: {ratio:.1f} times"
    if ratio >= t.loss_ratio:
        reason = f"losses differ {ratio:.0f} times in scale, and it doesn't depend on their scale"
        text = "The losses' scales are far apart."
        yield Finding("warning", "losses", text, evidence, {"si": reason, "imtl_l": reason, "uw": reason})
    else:
        yield Finding("fine", "losses", "The losses' scales are comparable.", evidence)


def _condition(m: Measurements, _plan: Plan, t: Thresholds) -> Iterator[Finding]:
    """The cosines decide, not the Gramian: these methods aren't troubled by scales, which `_norms` looks at."""
    if m.condition_number is not None and m.condition_number < t.condition:
        evidence = f"condition number of the cosines {m.condition_number:.3g}"
        yield Finding("fine", "condition", "The gradients' directions are well conditioned.", evidence)
        return
    found = "the cosines are singular" if m.condition_number is None else f"condition number {m.condition_number:.3g}"
    unstable = ("nash_mtl", "imtl_g", "config")
    text = f"The gradients' directions are ill conditioned: {', '.join(unstable)}, which solve K x K systems, may be unstable."
    reason = f"it works on the well-conditioned part of the gradients ({found})"
    yield Finding("note", "condition", text, found, {"aligned_mtl": reason}, unstable)


def _cancelled(m: Measurements, _plan: Plan, t: Thresholds) -> Iterator[Finding]:
    if m.sum_ratio < t.cancelled:
        evidence = f"the sum's squared norm is {m.sum_ratio:.1e} times the tasks' squared norms together"
        reason = "in the plain sum the gradients cancel; a priority decides whose is kept"
        text = "The tasks' gradients cancel: hardly anything of them is left in their sum."
        yield Finding("warning", "cancelled", text, evidence, {"wpcgrad": reason})


def _dominance(m: Measurements, _plan: Plan, t: Thresholds) -> Iterator[Finding]:
    number = len(m.tasks)
    limit = 0.5 + 0.5 / number
    lead = max(m.sum_shares, key=lambda name: m.sum_shares[name] if math.isfinite(m.sum_shares[name]) else -math.inf)
    if number > 1 and m.sum_shares[lead] > limit:
        evidence = f"its part of the sum's squared norm is {m.sum_shares[lead]:.0%}; equal parts were {1 / number:.0%}"
        reason = f"{lead} makes up {m.sum_shares[lead]:.0%} of the summed gradient"
        methods = {"imtl_g": reason, "fairgrad": reason}
        yield Finding("warning", "dominance", f"{lead} dominates the sum.", evidence, methods)
    harmed = [f"{name} {value:+.2f}" for name, value in m.sum_cosines.items() if value < t.harmed]
    if harmed:
        reason = f"the plain sum works against {_listed(harmed)} (cosine with the sum)"
        text = "A step along the sum raises the loss of some tasks."
        methods = {"upgrad": reason, "cagrad": reason, "sequential": f"{reason}; here each task gets its own step"}
        yield Finding("warning", "harmed", text, f"cosine with the sum: {_listed(harmed)}", methods)


# ------------------------------------------------------------------------------------------------- affinity, costs


def _affinity(m: Measurements, plan: Plan, _t: Thresholds) -> Iterator[Finding]:
    if m.affinity is None or m.affinity_errors is None or len(m.tasks) < 2:
        return
    helps: list[tuple[float, str]] = []
    harms: list[tuple[float, str]] = []
    for i, source in enumerate(m.tasks):
        for j, target in enumerate(m.tasks):
            value, error = m.affinity[i][j], m.affinity_errors[i][j]
            floor = m.noise_floor.get(target, 0.0)
            if i != j and math.isfinite(error) and abs(value) > max(3 * error, floor):
                (helps if value > 0 else harms).append((abs(value), f"{source} on {target} {value:+.1e}"))
    floor = max(m.noise_floor.values(), default=0.0)
    against = f"noise floor {floor:.1e}"
    texts = {name: [text for _, text in sorted(found, reverse=True)] for name, found in (("+", helps), ("-", harms))}
    if harms:
        reason = f"single steps harm others measurably ({texts['-'][0]})"
        methods = {"task_groups": f"{reason}; it keeps such tasks in separate groups", "sequential": reason}
        text = "Some tasks' steps raise other tasks' losses."
        yield Finding("warning", "affinity", text, f"{_listed(texts['-'])}; {against}", methods)
    if helps:
        yield Finding("fine", "affinity+", "Some tasks' steps help others.", f"{_listed(texts['+'])}; {against}")
    if not helps and not harms:
        text = "No task's step changes another's loss beyond the noise: task_groups would group by chance."
        if floor > 0:
            text += " same_noise=True gives all forwards of a batch the same noise."
        kind: Kind = "warning" if plan.method == "task_groups" else "note"
        yield Finding(kind, "affinity_noise", text, against)


def _costs(m: Measurements, _plan: Plan, t: Thresholds) -> Iterator[Finding]:
    if not m.seconds.get("gd"):
        return
    per_task, steps = (m.seconds.get(kind, 0.0) / m.seconds["gd"] for kind in ("gramian", "sequential"))
    evidence = (
        f"per batch: one backward {m.seconds['gd'] * 1e3:.3g} ms, {len(m.tasks)} backwards {per_task:.1f} times that, "
        f"{len(m.tasks)} optimizer steps {steps:.1f} times; gradients of {m.num_shared:,} shared parameters "
        f"take {m.gradient_bytes / 2**20:.3g} MiB"
    )
    if len(m.tasks) >= t.many_tasks and per_task >= 3:
        reason = f"with {len(m.tasks)} tasks K backwards cost {per_task:.1f} times one, and it needs only one"
        text = "Methods that need every task's gradient are expensive here."
        yield Finding("note", "cost", text, evidence, {"famo": reason})
    else:
        yield Finding("fine", "cost", "Every task's gradient is affordable.", evidence)


# -------------------------------------------------------------------------------------- known signs of failure to be


def _priorities(m: Measurements, plan: Plan, t: Thresholds) -> Iterator[Finding]:
    planned = plan.method == "connection_strength"
    if planned and plan.has_norms is False:
        text = "connection_strength finds no norms in the shared part: phase 2 would be the plain sum."
        yield Finding("warning", "norm_layers", text, "no normalisation layer reached by several tasks")
    if m.margins is not None:
        yield from _margins(m.margins, plan, t)
    if not planned:
        return
    if plan.options.get("schedule") == "phase2":
        text = "Without phase 1 there are no priorities that phase 2 could conserve."
        yield Finding("warning", "phase1", text, "schedule=phase2")
    elif (steps := _phase1_steps(plan)) is not None and steps < t.phase1_steps:
        text = f"Phase 1 is short: priorities are hardly learnt in fewer than {t.phase1_steps} steps."
        schedule = plan.options.get("schedule", "mix")
        yield Finding("warning", "phase1", text, f"about {steps} of {plan.total_steps} steps, schedule={schedule}")


def _margins(margins: Margins, plan: Plan, t: Thresholds) -> Iterator[Finding]:
    """Margins grow about in proportion to the steps of phase 1, so that a short probing tells what to expect."""
    evidence = (
        f"after {margins.num_batches} steps of phase 1 half of the {margins.num_channels} channels lead by less than "
        f"{margins.median:.1%}; {1 - margins.stable_share:.0%} changed their leader in the second half"
    )
    steps = _phase1_steps(plan) if plan.method == "connection_strength" else None
    if steps is None:
        if margins.median < t.margin:
            needed = math.ceil(margins.num_batches * t.margin / max(margins.median, 1e-9))
            text = f"Channels find their leading task slowly: about {needed:,} steps of phase 1 for clear margins."
            yield Finding("note", "margins", text, evidence)
        return
    expected = min(1.0, margins.median * steps / margins.num_batches)
    evidence += f"; in proportion, {expected:.1%} after about {steps} steps"
    if expected < t.margin:
        text = (
            "Most channels will have no clear leading task, and their priorities will be arbitrary: lengthen phase 1."
        )
        yield Finding("warning", "margins", text, evidence)
    else:
        yield Finding("fine", "margins", "Phase 1 is long enough for channels to find their leading task.", evidence)


def _phase1_steps(plan: Plan) -> int | None:
    """The steps of phase 1 to expect, None where the training's length isn't known."""
    if plan.total_steps is None:
        return None
    match plan.options.get("schedule", "mix"):
        case "phase1":
            return plan.total_steps
        case "phase2":
            return 0
        case "sequence":
            return int(float(plan.options.get("switch", 0.5)) * plan.total_steps)
        case _:
            return plan.total_steps // 2


def _high_priorities(m: Measurements, plan: Plan, t: Thresholds) -> Iterator[Finding]:
    given = plan.options.get("priority")
    if plan.method != "wpcgrad" or not isinstance(given, Mapping | list | tuple):
        return
    named = given if isinstance(given, Mapping) else dict(zip(m.tasks, given, strict=False))
    high = {name for name, value in named.items() if value > 1 / len(m.tasks) + 1e-9}
    pairs = [pair for pair in _conflicting(m, t) if {m.tasks[pair[0]], m.tasks[pair[1]]} <= high]
    if pairs:
        text = "Tasks of high priority conflict with each other: whoever is drawn first wins, so neither is protected."
        yield Finding("warning", "high_priorities", text, _listed([_pair_text(m, i, j) for i, j in pairs]))


def _warmup(_m: Measurements, plan: Plan, _t: Thresholds) -> Iterator[Finding]:
    if plan.method != "task_groups" or plan.total_steps is None or plan.options.get("groups", "adaptive") != "adaptive":
        return
    warmup = int(plan.options.get("warmup", 100))
    if warmup * 2 >= plan.total_steps:
        text = "Much of the training is task_groups' warm-up, in which every task is its own group."
        yield Finding("warning", "warmup", text, f"warmup={warmup} of {plan.total_steps} steps")


RULES: tuple[Rule, ...] = (
    _conflicts,
    _duplicates,
    _norms,
    _losses,
    _condition,
    _cancelled,
    _dominance,
    _affinity,
    _costs,
    _priorities,
    _high_priorities,
    _warmup,
)
