"""From numbers to advice: every rule, by tables."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import pytest

from torchmto.lab.diagnosis import Diagnosis, Layer, Margins, Measurements, Plan, advise
from torchmto.lab.diagnosis.text import as_json, as_text
from torchmto.methods import methods

TASKS = ("a", "b", "c")


def matrix(value: float, *, diagonal: float = 1.0, **entries: float) -> tuple[tuple[float, ...], ...]:
    """``value`` everywhere but on the diagonal, with pairs such as ``ab=-0.5`` set symmetrically."""
    rows = [[diagonal if i == j else value for j in range(3)] for i in range(3)]
    for pair, entry in entries.items():
        i, j = (TASKS.index(name) for name in pair)
        rows[i][j] = rows[j][i] = entry
    return tuple(tuple(row) for row in rows)


HARMONY = Measurements(
    tasks=TASKS,
    num_batches=20,
    losses={"a": 1.0, "b": 2.0, "c": 1.5},
    gradient_norms={"a": 1.0, "b": 1.2, "c": 0.9},
    cosines=matrix(0.3),
    cosine_errors=matrix(0.02, diagonal=0.0),
    conflict_shares=matrix(0.05, diagonal=0.0),
    sum_cosines=dict.fromkeys(TASKS, 0.6),
    sum_shares=dict.fromkeys(TASKS, 1 / 3),
    condition_number=12.0,
    affinity=matrix(0.01, diagonal=0.05),
    affinity_errors=matrix(0.001, diagonal=0.001),
    noise_floor=dict.fromkeys(TASKS, 0.0005),
    num_shared=1000,
    gradient_bytes=12000,
    seconds={"gd": 0.01, "gramian": 0.02, "sequential": 0.025},
)
LAYERS = tuple(Layer(f"trunk.{i}", 10, 0.5, part) for i, part in enumerate((0.85, 0.1, 0.03, 0.02)))
SPREAD = tuple(Layer(f"trunk.{i}", 10, 0.5, 0.25) for i in range(4))
CONFLICT: dict[str, Any] = {"cosines": matrix(0.3, ab=-0.2), "conflict_shares": matrix(0.05, ab=0.9)}
UNCLEAR = Margins(num_channels=100, num_batches=20, median=0.001, ambiguous_share=0.9, stable_share=0.6)


def topics(diagnosis: Diagnosis, kind: str) -> set[str]:
    return {finding.topic for finding in diagnosis.findings if finding.kind == kind}


def suggested(diagnosis: Diagnosis) -> set[str]:
    return {suggestion.method for suggestion in diagnosis.suggestions}


def test_in_harmony_the_plain_sum_is_fine_and_said_so() -> None:
    diagnosis = advise(HARMONY)
    assert diagnosis.plain_sum_is_fine
    assert topics(diagnosis, "warning") == set()
    assert diagnosis.suggestions[0].method == "gd"
    assert "Plain summing (gd) is fine" in as_text(HARMONY, diagnosis)


@pytest.mark.parametrize(
    ("changes", "topic", "kind", "methods_that_suit"),
    [
        (CONFLICT, "conflict", "warning", {"wpcgrad", "pcgrad", "cagrad"}),
        ({"cosines": matrix(0.3, ab=-0.6)}, "conflict", "warning", {"wpcgrad", "upgrad", "cagrad"}),
        ({"cosines": matrix(0.3, ab=-0.2), "cosine_errors": matrix(0.15)}, "conflict", "fine", {"gd"}),
        ({"cosines": matrix(0.3, ab=-0.03)}, "conflict", "fine", {"gd"}),
        ({**CONFLICT, "layers": LAYERS}, "layers", "note", {"connection_strength", "cagrad"}),
        ({**CONFLICT, "layers": SPREAD}, "layers", "note", {"cagrad"}),
        ({"cosines": matrix(0.3, bc=0.99)}, "duplicates", "note", {"gd"}),
        ({"gradient_norms": {"a": 30.0, "b": 1.0, "c": 2.0}}, "norms", "warning", {"imtl_g", "nash_mtl", "uw"}),
        ({"gradient_norms": {"a": 5.0, "b": 1.0, "c": 2.0}}, "norms", "note", {"gd"}),
        ({"gradient_norms": {"a": 0.0, "b": 1.0, "c": 2.0}}, "norms", "warning", set()),
        ({"losses": {"a": 100.0, "b": 1.0, "c": 2.0}}, "losses", "warning", {"si", "imtl_l", "uw"}),
        ({"losses": {"a": -1.0, "b": 1.0, "c": 2.0}}, "positive", "note", {"gd"}),
        ({"condition_number": 1e9}, "condition", "note", {"aligned_mtl"}),
        ({"condition_number": None}, "condition", "note", {"aligned_mtl"}),
        ({"sum_ratio": 0.001}, "cancelled", "warning", {"wpcgrad"}),
        ({"sum_shares": {"a": 0.9, "b": 0.05, "c": 0.05}}, "dominance", "warning", {"imtl_g", "fairgrad"}),
        ({"sum_cosines": {"a": 0.9, "b": -0.1, "c": 0.5}}, "harmed", "warning", {"upgrad", "cagrad", "sequential"}),
        ({"affinity": matrix(0.01, ab=-0.02)}, "affinity", "warning", {"task_groups", "sequential"}),
        ({"affinity": matrix(0.01, ab=-0.02), "affinity_errors": matrix(0.01)}, "affinity_noise", "note", {"gd"}),
        ({"noise_floor": dict.fromkeys(TASKS, 0.1)}, "affinity_noise", "note", {"gd"}),
    ],
)
def test_each_rule(changes: Mapping[str, Any], topic: str, kind: str, methods_that_suit: set[str]) -> None:
    diagnosis = advise(dataclasses.replace(HARMONY, **changes))
    assert topic in topics(diagnosis, kind)
    assert methods_that_suit <= suggested(diagnosis)
    assert ("gd" in suggested(diagnosis)) == diagnosis.plain_sum_is_fine
    assert suggested(diagnosis) <= set(methods())
    assert all(finding.evidence for finding in diagnosis.findings)
    assert all(suggestion.reasons for suggestion in diagnosis.suggestions)


def test_methods_that_are_warned_of_arent_suggested() -> None:
    apart = dataclasses.replace(HARMONY, gradient_norms={"a": 30.0, "b": 1.0, "c": 2.0})
    unstable = {"nash_mtl", "imtl_g"}
    assert unstable <= suggested(advise(apart))
    assert not unstable & suggested(advise(dataclasses.replace(apart, condition_number=None)))


def test_tasks_that_are_equal_in_all_are_named_apart() -> None:
    even = dict.fromkeys(TASKS, 1.0)
    diagnosis = advise(dataclasses.replace(HARMONY, gradient_norms=even, losses=even))
    evidence = [finding.evidence for finding in diagnosis.findings if finding.topic in {"norms", "losses"}]
    assert evidence == ["c 1, a 1: 1.0 times"] * 2


def test_conflicts_in_few_layers_speak_for_connection_strength_only_where_there_are_norms() -> None:
    measured = dataclasses.replace(HARMONY, **CONFLICT, layers=LAYERS)
    assert "connection_strength" in suggested(advise(measured))
    assert "connection_strength" not in suggested(advise(measured, Plan(has_norms=False)))


def test_many_tasks_speak_for_one_backward() -> None:
    names = tuple(f"t{i}" for i in range(10))
    even = dict.fromkeys(names, 1.0)
    flat = tuple(tuple(1.0 if i == j else 0.2 for j in range(10)) for i in range(10))
    measured = Measurements(
        names,
        5,
        even,
        even,
        flat,
        flat,
        flat,
        even,
        even,
        5.0,
        seconds={"gd": 0.01, "gramian": 0.06, "sequential": 0.1},
    )
    assert "famo" in suggested(advise(measured))


@pytest.mark.parametrize(
    ("plan", "changes", "topic"),
    [
        (Plan("connection_strength", {}, 10_000, True), {"margins": UNCLEAR}, None),
        (Plan("connection_strength", {}, 1000, True), {"margins": UNCLEAR}, "margins"),
        (Plan("connection_strength", {}, 300, True), {}, "phase1"),
        (Plan("connection_strength", {"schedule": "phase2"}, 10_000, True), {}, "phase1"),
        (Plan("connection_strength", {"schedule": "sequence", "switch": 0.01}, 10_000, True), {}, "phase1"),
        (Plan("connection_strength", {"schedule": "phase1"}, 300, True), {}, None),
        (Plan("connection_strength", {}, 10_000, False), {}, "norm_layers"),
        (Plan("wpcgrad", {"priority": {"a": 0.5, "b": 0.5, "c": 0.0}}), CONFLICT, "high_priorities"),
        (Plan("wpcgrad", {"priority": [0.5, 0.5, 0.0]}), CONFLICT, "high_priorities"),
        (Plan("wpcgrad", {"priority": {"a": 0.5, "b": 0.0, "c": 0.5}}), CONFLICT, None),
        (Plan("wpcgrad", {"priority": "loss"}), CONFLICT, None),
        (Plan("task_groups", {}, 150), {}, "warmup"),
        (Plan("task_groups", {"warmup": 10}, 150), {}, None),
        (Plan("task_groups"), {"noise_floor": dict.fromkeys(TASKS, 0.1)}, "affinity_noise"),
        (Plan("mgda"), {"gradient_norms": {"a": 30.0, "b": 1.0, "c": 2.0}}, "method"),
    ],
)
def test_known_signs_of_failure_in_the_plan(plan: Plan, changes: Mapping[str, Any], topic: str | None) -> None:
    about_plan = topics(advise(dataclasses.replace(HARMONY, **changes), plan), "warning") - {"conflict", "norms"}
    assert about_plan == (set() if topic is None else {topic})


def test_missing_numbers_are_no_trouble() -> None:
    nothing = matrix(math.nan, diagonal=math.nan)
    none = dict.fromkeys(TASKS, math.nan)
    measured = Measurements(
        TASKS, 1, {}, none, nothing, nothing, nothing, none, none, None, affinity=nothing, affinity_errors=nothing
    )
    assert not re.search(r"\bnan\b", as_text(measured, advise(measured)))


def test_text_and_json_hold_the_numbers_and_no_control_characters() -> None:
    measured = dataclasses.replace(HARMONY, tasks=("a\x1b[31m", "b", "c"), margins=UNCLEAR, **CONFLICT)
    names = dict(zip(TASKS, measured.tasks, strict=True))
    renamed = {
        key: {names[name]: value for name, value in getattr(measured, key).items()}
        for key in ("losses", "gradient_norms", "sum_cosines", "sum_shares", "noise_floor")
    }
    measured = dataclasses.replace(measured, **renamed)
    plan = Plan("connection_strength", {"schedule": "mix"}, 100, True)
    diagnosis = advise(measured, plan)
    text = as_text(measured, diagnosis)
    assert "\x1b" not in text
    assert "-0.20" in text
    narrow = as_text(measured, diagnosis, 60)
    assert max(map(len, narrow.splitlines())) <= 60
    assert sorted(set(narrow.split())) == sorted(set(text.split()))
    content = as_json(measured, plan, diagnosis)
    assert content["measurements"]["cosines"][0][1] == -0.2
    assert content["measurements"]["margins"]["median"] == 0.001
    assert content["plan"]["method"] == "connection_strength"
    assert {finding["topic"] for finding in content["diagnosis"]["findings"]} >= {"margins", "conflict"}


def test_the_same_numbers_give_the_same_advice() -> None:
    assert advise(HARMONY) == advise(HARMONY)
