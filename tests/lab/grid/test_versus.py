"""Methods against a reference: differences, wins, ranks, and equal budgets, on made-up runs."""

import numpy as np
import pytest
from scipy import stats

from torchmto.lab.grid.versus import paired_changes, versus

TASKS = {"a": ("accuracy", True), "b": ("rmse", False)}


def run(a, b, *, scores=(1.0, 2.0), steps=1.0, seconds=0.1):
    return {
        "test": {"a": {"accuracy": a}, "b": {"rmse": b}},
        "history": [
            {"score": score, "batches": end, "optimizer_steps": end * steps, "seconds": end * seconds}
            for score, end in zip(scores, (5, 10), strict=True)
        ],
    }


RUNS = {
    "gd": [run(0.5, 2.0), run(0.6, 2.0), run(0.4, 2.5)],
    "x": [run(0.6, 1.0, steps=2.0), run(0.6, 1.5, steps=2.0), run(0.5, 3.0, steps=2.0)],
    "y": [run(0.4, 2.0, scores=(5.0, None))] * 3,
}
DELTA = {"gd": [1.0, 2.0, 3.0], "x": [4.0, 5.0, 8.0], "y": [0.0, 2.5, 1.0]}


def test_differences_are_paired_and_corrected():
    found = versus(RUNS, DELTA, TASKS)
    assert found["reference"] == "gd"
    assert found["methods"]["gd"]["delta_m"] is None
    p = {name: stats.ttest_rel(DELTA[name], DELTA["gd"]).pvalue for name in "xy"}
    x, y = (found["methods"][name]["delta_m"] for name in "xy")
    assert (x["mean"], x["p"], y["p"]) == pytest.approx((11 / 3, p["x"], p["y"]))
    assert x["p_holm"] == pytest.approx(min(2 * p["x"], 1))
    assert y["p_holm"] == pytest.approx(max(p["y"], 2 * p["x"]))


def test_tasks_follow_their_metrics_directions():
    x = versus(RUNS, DELTA, TASKS)["methods"]["x"]
    assert x["tasks"]["a"]["wins_ties_losses"] == [2, 1, 0]
    assert x["tasks"]["b"]["wins_ties_losses"] == [2, 0, 1]
    assert x["wins_ties_losses"] == [4, 1, 1]
    assert x["tasks"]["b"]["change"]["mean"] == pytest.approx((50 + 25 - 20) / 3)
    assert x["tasks"]["a"]["change"]["mean"] == pytest.approx((20 + 0 + 25) / 3)


def test_ranks():
    ranks = versus(RUNS, DELTA, TASKS)["ranks"]
    assert ranks["seeds"]["average"] == {"gd": pytest.approx(7 / 3), "x": 1.0, "y": pytest.approx(8 / 3)}
    theirs = stats.friedmanchisquare(*DELTA.values())
    assert ranks["seeds"]["friedman"] == {
        "statistic": pytest.approx(theirs.statistic),
        "p": pytest.approx(theirs.pvalue),
    }
    assert (ranks["seeds"]["blocks"], ranks["tasks"]["blocks"]) == (3, 6)
    assert np.mean(list(ranks["tasks"]["average"].values())) == pytest.approx(2.0)


def test_without_an_average_change_the_tasks_remain():
    found = versus(RUNS, {**DELTA, "y": None}, TASKS, reference="y")
    assert found["methods"]["x"]["delta_m"] is None
    assert found["ranks"]["seeds"] is None
    assert found["ranks"]["tasks"]["blocks"] == 6
    broken = {**RUNS, "x": [run(float("nan"), 1.0), *RUNS["x"][1:]]}
    found = versus(broken, DELTA, TASKS)
    assert found["methods"]["x"]["tasks"]["a"]["change"] is None
    assert found["methods"]["x"]["tasks"]["a"]["wins_ties_losses"] == [1, 1, 0]
    assert found["ranks"]["tasks"]["blocks"] == 5
    assert paired_changes([1.0], [0.0], True) is None


def test_one_method_and_one_seed():
    found = versus({"x": [run(0.5, 1.0)]}, {"x": [1.0]}, TASKS)
    assert found["reference"] == "x"
    assert found["ranks"]["seeds"] == {
        "blocks": 1,
        "average": {"x": 1.0},
        "friedman": None,
        "critical_difference": None,
    }


def test_equal_budgets():
    budgets = versus(RUNS, DELTA, TASKS)["budgets"]
    assert {unit: entry["limit"] for unit, entry in budgets.items()} == {
        "batches": 10,
        "optimizer_steps": 10.0,
        "seconds": 1.0,
    }
    # Within ten optimizer steps the method that takes two per batch has done one of its two epochs.
    assert budgets["batches"]["methods"]["x"]["per_seed"] == [2.0, 2.0, 2.0]
    assert budgets["optimizer_steps"]["methods"]["x"]["per_seed"] == [1.0, 1.0, 1.0]
    assert budgets["batches"]["methods"]["y"]["mean"] == 5.0
    # Timings are averaged over seeds: one slow run of the thriftiest method doesn't lose its last epoch.
    timed = {"gd": [run(0.5, 2.0, seconds=0.1), run(0.5, 2.0, seconds=0.3)], "x": [run(0.5, 2.0, seconds=0.5)] * 2}
    seconds = versus(timed, {"gd": [1.0, 2.0], "x": [1.0, 2.0]}, TASKS)["budgets"]["seconds"]
    assert seconds["limit"] == pytest.approx(2.0)
    assert seconds["methods"]["gd"]["per_seed"] == [2.0, 2.0]
    assert seconds["methods"]["x"] is None
    slow = versus({**RUNS, "x": [run(0.6, 1.0, steps=3.0)] * 3}, DELTA, TASKS)["budgets"]
    assert slow["optimizer_steps"]["methods"]["x"] is None


@pytest.mark.parametrize("measure", ["mean validation score: over tasks", "accuracy on the validation split"])
def test_only_a_delta_m_counts_within_equal_budgets(measure):
    other = [{**one, "measure": measure} for one in RUNS["x"]]
    stated = [{**one, "measure": "delta_m: mean relative improvement"} for one in RUNS["gd"]]
    for within in versus({"gd": stated, "x": other}, DELTA, TASKS)["budgets"].values():
        assert within["methods"]["gd"]["mean"] == 2.0
        assert within["methods"]["x"] is None
