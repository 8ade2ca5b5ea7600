"""Tuning: the same budget for all, a plan drawn beforehand, chosen on validation, resumable."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from torchmto import lab
from torchmto.lab.grid.tuning import Sampled, edges
from torchmto.lab.references import load_problem
from torchmto.lab.run.config import ConfigError
from torchmto.lab.run.loop import Trainer

pytest.importorskip("optuna")
FARM = str(Path(__file__).parents[1] / "farm.py")
SETTINGS = {"seeds": 2, "epochs": 1, "batch_size": 16, "progress": False, "jobs": 1}


def test_the_random_plan_is_the_same_for_all_and_for_every_start():
    first, second = Sampled(3), Sampled(3)
    plans = [
        [plan.settings(who, number) for number in range(3)] for plan in (first, second) for who in ("gd", "cagrad")
    ]
    assert plans[:2] == plans[2:]
    for plain, own in zip(*plans[:2], strict=True):
        # cagrad's own hyper-parameter takes nothing from what is the same for all.
        assert own == plain | {"method.options": own["method.options"]}
        assert 0 <= own["method.options"]["c"] < 1
    assert len({entry["optimizer.lr"] for entry in plans[0]}) == 3
    assert all(1e-4 <= entry["optimizer.lr"] <= 1e-1 for entry in plans[0])


def test_tpe_draws_by_each_ones_own_scores():
    plan = Sampled(12, "tpe")
    for number in range(12):
        for who, sign in (("gd", 1), ("cagrad", -1)):
            plan.tell(who, number, sign * plan.settings(who, number)["optimizer.lr"])
    last = {who: [plan.settings(who, number) for number in (10, 11)] for who in ("gd", "cagrad")}
    assert last["gd"] != last["cagrad"]


def test_edges_name_what_lies_at_the_end_of_the_offer():
    offers = [{"lr": lr, "name": name} for lr in (0.01, 0.1) for name in ("sgd", "adam")]
    assert edges({"lr": 0.1, "name": "sgd"}, offers) == ["largest lr"]
    assert edges({"lr": 0.01, "name": "adam"}, offers) == ["smallest lr"]
    assert edges({"lr": 0.01}, [{"lr": 0.01}]) == []


def test_edges_look_into_a_methods_own_options_and_know_that_nothing_is_below_0():
    offers = [{"weight_decay": decay, "method.options": {"c": c, "on": c > 1}} for decay, c in ((0.0, 0.5), (0.1, 0.7))]
    assert edges(offers[0], offers) == ["smallest method.options.c"]
    assert edges(offers[1], offers) == ["largest weight_decay", "largest method.options.c"]


def test_each_runs_at_its_best_settings_and_goes_on(tmp_path, monkeypatch):
    result = lab.compare(f"{FARM}:farm", ["gd", "cagrad"], tune=2, out=tmp_path / "x", **SETTINGS)
    tuning = result.results["tuning"]
    assert set(tuning["chosen"]) == {"gd", "cagrad", "single-task crop", "single-task yield"}
    for who, tried in tuning["tried"].items():
        assert len(tried) == 2
        best = max(tried, key=lambda entry: entry["score"])
        assert tuning["chosen"][who] == best["settings"]
    assert len(result.table()) == 8
    assert result.report().is_file()
    runs = [json.loads(path.read_text())["content"] for path in (tmp_path / "x" / "runs").glob("gd-*.json")]
    assert {run["config"]["optimizer"]["lr"] for run in runs} == {tuning["chosen"]["gd"]["optimizer.lr"]}
    monkeypatch.setattr(Trainer, "fit", None)  # everything is there already
    again = lab.compare(f"{FARM}:farm", ["gd", "cagrad"], tune=2, out=tmp_path / "x", **SETTINGS)
    assert again.table().equals(result.table())


def rare(size, seed):
    """A regression of larger numbers beside what validation has no example of, so that its f1 is 0."""
    x = torch.randn(size, 4, generator=torch.Generator().manual_seed(seed))
    return [(row, {"fraud": float(row[0] > (1 if seed == 0 else 9)), "price": 10 * row.sum()}) for row in x]


@pytest.mark.parametrize("baselines", [False, True])
def test_settings_are_compared_by_the_runs_own_score(tmp_path, baselines):
    problem = lab.Problem(
        tasks=[lab.Task("fraud", "binary", 1), lab.Task("price", "regression", 1)],
        train=rare(64, 0),
        validation=rare(32, 1),
        test=rare(32, 2),
        model="mlp",
        primary={"fraud": ("f1", True)},
    )
    out = tmp_path / "x"
    result = lab.compare(problem, ["gd"], tune=2, baselines=baselines, out=out, **{**SETTINGS, "seeds": 1})
    tuning = result.results["tuning"]
    assert tuning["measure"].startswith("mean validation score")  # single-task f1 is 0 where there is one
    files = sorted((out / "tuning").glob("methods-*/runs/gd-*.json"))
    own = [json.loads(path.read_text())["content"]["result"]["score"] for path in files]
    assert [entry["score"] for entry in tuning["tried"]["gd"]] == own
    assert all(-1 < score < 1 for score in own)  # relative to the untrained network's error
    assert len(set(own)) == 2


def test_a_method_without_a_score_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "_measure", property(lambda self: None))
    with pytest.raises(lab.grid.FailedRunsError, match=r"(?s)single-task crop: no setting .*'NoneType' object"):
        lab.compare(f"{FARM}:farm", ["gd"], tune=1, out=tmp_path / "x", **SETTINGS)


def test_tuning_needs_a_validation_split(tmp_path):
    with pytest.raises(ValueError, match="has none"):
        lab.compare(f"{FARM}:pinn", ["gd"], tune=2, out=tmp_path / "x", **SETTINGS)


def test_tuning_refuses_what_it_would_ignore(tmp_path):
    own = replace(load_problem(f"{FARM}:farm", {}), optimizer=lambda model: torch.optim.SGD(model.parameters(), 0.1))
    for problem, settings, message in (
        (own, {"tune": 1}, "brings its own"),
        (f"{FARM}:farm", {"tune": 1, "lr": 0.1}, "`optimizer.lr` has no effect here: tuning"),
        (f"{FARM}:farm", {"tune_by": "tpe"}, "needs `tune`"),
    ):
        with pytest.raises(ConfigError, match=message):
            lab.compare(problem, ["gd"], out=tmp_path / "x", **SETTINGS | settings)
        assert not (tmp_path / "x").exists()


def test_a_changed_source_goes_on_in_the_middle_of_tuning(tmp_path, monkeypatch):
    file, settings = tmp_path / "own.py", {**SETTINGS, "seeds": 1, "tune": 1, "out": tmp_path / "x"}
    file.write_text(Path(FARM).read_text())
    lab.compare(f"{file}:farm", ["gd"], **settings)
    file.write_text(Path(FARM).read_text() + "# a remark\n")
    with pytest.raises(lab.grid.FolderError, match="another version of the file"):
        lab.compare(f"{file}:farm", ["gd"], **settings)
    monkeypatch.setattr(Trainer, "fit", None)  # everything is there already
    lab.compare(f"{file}:farm", ["gd"], changed_source=True, **settings)
