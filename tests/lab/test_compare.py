"""The grid of a comparison: selection, figures, folder."""

import copy
import math
import shutil
from dataclasses import replace

import pytest
from scipy import stats

from torchmto.lab.atomic import read_json, write_json
from torchmto.lab.compare import (
    Experiment,
    FailedRunsError,
    FolderError,
    RunFolder,
    compare,
    default_experiment,
    summarize,
)
from torchmto.lab.compare import single as single_module
from torchmto.lab.compare.folder import run_key
from torchmto.lab.compare.plots import plots
from torchmto.lab.compare.single import train_and_measure, validation_score
from torchmto.lab.compare.tables import csv_text, header, markdown, rows, task_header, task_rows, versus_rows
from torchmto.lab.data import load_data
from torchmto.lab.statistics import confidence95, std
from torchmto.lab.training import RunConfig
from torchmto.lab.versions import RESULTS_VERSION

RUN = RunConfig(epochs=1, batch_size=32, model_options={"widths": [8]})


@pytest.fixture(scope="module")
def bundle():
    return load_data("digits", train=64, validation=200, test=200)


@pytest.fixture(scope="module")
def finished(bundle, tmp_path_factory):
    experiment = Experiment(("gd", "connection_strength", "task_groups"), 2, replace(RUN, model="convnet"))
    folder = RunFolder(tmp_path_factory.mktemp("grid"), experiment.settings)
    return experiment, folder, compare(experiment, folder, bundle)


def test_confidence_interval_is_students():
    values = [1.0, 4.0, 2.5, 7.0]
    low, high = stats.t.interval(0.95, 3, loc=sum(values) / 4, scale=stats.sem(values))
    assert confidence95(values) == pytest.approx((high - low) / 2)
    assert confidence95([1.0]) is None
    assert std([1.0]) == 0.0


def test_the_test_split_is_measured_once_and_the_best_epoch_chosen(bundle, monkeypatch):
    splits, scores = [], iter([1.0, 3.0, 2.0])
    evaluate = single_module.evaluate
    monkeypatch.setattr(single_module, "evaluate", lambda *a, **k: splits.append(a[2]) or evaluate(*a, **k))
    monkeypatch.setattr(single_module, "validation_score", lambda *_: next(scores))
    result = train_and_measure(replace(RUN, epochs=3), bundle, baseline={"left": 1, "right": 1, "offset": 1})
    assert splits == ["validation"] * 3 + ["test"]
    assert result["selected_epoch"] == 1
    assert result["validation"] == result["history"][1]["validation"]


def test_without_a_score_the_last_epoch_counts(bundle, monkeypatch):
    monkeypatch.setattr(single_module, "validation_score", lambda *_: None)
    assert train_and_measure(replace(RUN, epochs=2), bundle)["selected_epoch"] == 1


def test_validation_score(bundle):
    left, right, offset = bundle.tasks
    assert validation_score({"left": 0.25}, (left,), None) == 0.25
    assert validation_score({"offset": 2.0}, (offset,), None) == -2.0
    assert validation_score({"left": 0.5, "right": 0.5}, (left, right), {"left": 0.4, "right": 0.5}) == pytest.approx(
        12.5
    )
    assert validation_score({"left": 0.5, "right": 0.5}, (left, right), {"left": 0.0, "right": 0.5}) is None
    assert validation_score({"left": 0.5, "right": math.nan}, (left, right), {"left": 0.1, "right": 0.5}) is None
    for value in (None, math.nan, math.inf, -math.inf):
        for task in (left, offset):
            assert validation_score({task.name: value}, (task,), None) is None


@pytest.mark.parametrize("values", [[math.nan, 2.0, 1.0, 3.0], [2.0, math.inf, 1.0, math.nan]], ids=["first", "later"])
def test_epochs_without_a_finite_score_are_never_chosen_over_others(bundle, monkeypatch, values):
    left = iter(values)
    monkeypatch.setattr(single_module, "evaluate", lambda *_, **__: {"offset": {"rmse": next(left, 0.0)}})
    config = replace(RUN, epochs=4, tasks=("offset",))
    assert train_and_measure(config, bundle)["selected_epoch"] == 2


def test_results_have_the_documented_form(finished, bundle):
    experiment, _, results = finished
    summary = summarize(experiment, bundle, results)
    assert set(summary) >= {"schema_version", "methods", "single_task", "versions", "config"}
    assert list(summary["methods"]) == ["gd", "connection_strength", "task_groups"]
    for method in summary["methods"].values():
        assert set(method["delta_m"]) == {"mean", "ci95", "per_seed"}
        assert len(method["delta_m"]["per_seed"]) == 2
        assert set(method["tasks"]["left"]["accuracy"]) == {"mean", "std"}
        assert set(method["cost"]) == {
            "num_forward",
            "num_backward",
            "num_optimizer_steps",
            "seconds_per_batch",
            "peak_memory_bytes",
        }
    versus = summary["versus"]
    gd, groups = (summary["methods"][name]["delta_m"]["mean"] for name in ("gd", "task_groups"))
    assert versus["methods"]["task_groups"]["delta_m"]["mean"] == pytest.approx(groups - gd)
    assert versus["ranks"]["tasks"]["blocks"] == 6
    assert versus["budgets"]["batches"]["limit"] == 2
    cost = summary["methods"]["task_groups"]["cost"]
    assert (cost["num_forward"], cost["num_optimizer_steps"]) == (3, 3)
    assert summary["single_task"]["cost"]["num_forward"] == 3
    assert summary["config"]["data"] == "digits"


def test_a_single_task_value_of_zero_gives_a_reason(finished, bundle):
    experiment, _, results = finished
    (config,) = [c for c in experiment.single_task_runs(["left"]) if c.seed == 0]
    key = run_key(config)
    zero = {**results[key], "test": {"left": {"accuracy": 0.0, "f1": 0.0}}}
    summary = summarize(experiment, bundle, {**results, key: zero})
    assert summary["methods"]["gd"]["delta_m"] is None
    assert "non-zero" in summary["methods"]["gd"]["reason"]
    assert "No Δm for gd" in markdown(summary)
    assert rows(summary)[1][1] == "-"


@pytest.mark.parametrize("whose", ["run", "single-task run"])
@pytest.mark.parametrize("value", [None, math.nan, math.inf])
def test_a_value_that_isnt_finite_is_named(finished, bundle, whose, value):
    experiment, _, results = finished
    runs = experiment.method_runs() if whose == "run" else experiment.single_task_runs(["offset"])
    (config,) = [c for c in runs if c.seed == 1 and c.method == "gd"]
    changed = copy.deepcopy(results[run_key(config)])
    changed["test"]["offset"]["rmse"] = value
    summary = summarize(experiment, bundle, {**results, run_key(config): changed})
    assert summary["methods"]["gd"]["delta_m"] is None
    assert summary["methods"]["gd"]["reason"] == f"offset's rmse isn't a finite number in the {whose} of seed 1."


def test_tables_agree_with_the_figures(finished, bundle):
    experiment, _, results = finished
    summary = summarize(experiment, bundle, results)
    assert header(summary)[:5] == ["method", "Δm %", "left accuracy ↑", "right accuracy ↑", "offset rmse ↓"]
    assert [row[0] for row in rows(summary)] == ["single-task", *experiment.methods]
    mean = summary["methods"]["gd"]["delta_m"]["mean"]
    assert rows(summary)[1][1].startswith(f"{mean:+.2f} ± ")
    assert f"gd,,delta_m,{mean}" in csv_text(summary)
    gd, strength, _ = versus_rows(summary)
    assert gd[:3] == ["gd", "-", "-"]
    assert strength[1].startswith(f"{summary['methods']['connection_strength']['delta_m']['mean'] - mean:+.2f} ± ")
    assert "Δm minus gd" in markdown(summary)


def test_many_tasks_have_a_table_of_their_own(finished, bundle, monkeypatch):
    experiment, _, results = finished
    summary = summarize(experiment, bundle, results)
    monkeypatch.setattr("torchmto.lab.compare.tables.MOST_COLUMNS", 2)
    assert header(summary) == ["method", "Δm %", "forwards", "backwards", "steps", "ms/batch", "peak MB"]
    assert task_header(summary) == ["task", "single-task", *experiment.methods]
    assert [row[0] for row in task_rows(summary)] == ["left accuracy ↑", "right accuracy ↑", "offset rmse ↓"]
    assert markdown(summary).count("| --- |") == 3


def test_plots_show_what_the_methods_record(finished, bundle):
    experiment, _, results = finished
    images = plots(experiment, summarize(experiment, bundle, results), results)
    assert set(images) == {
        "learning_curves.png",
        "priority_shares-connection_strength.png",
        "affinity-task_groups.png",
        "groups-task_groups.png",
    }
    assert all(image.startswith(b"\x89PNG") for image in images.values())


def test_a_second_call_finds_everything_finished(finished, bundle, monkeypatch):
    experiment, folder, results = finished
    monkeypatch.setattr("torchmto.lab.compare.runner.train_and_measure", None)
    assert compare(experiment, RunFolder(folder.path, experiment.settings), bundle) == results


def test_the_history_counts_batches_and_optimizer_steps(finished):
    experiment, _, results = finished
    by_method = {config.method: results[run_key(config)] for config in experiment.method_runs()}
    (epoch,) = by_method["task_groups"]["history"]
    assert (epoch["batches"], epoch["optimizer_steps"]) == (2, 6)
    assert epoch["seconds"] == pytest.approx(2 * by_method["task_groups"]["cost"]["seconds_per_batch"])


def test_runs_whose_results_mean_something_else_are_refused(finished, bundle, monkeypatch):
    experiment, folder, _ = finished
    monkeypatch.setattr("torchmto.lab.compare.folder.RESULTS_VERSION", RESULTS_VERSION + 1)
    versions = f"version {RESULTS_VERSION}; this torchmto has {RESULTS_VERSION + 1}"
    with pytest.raises(FolderError, match=rf"mean something else \({versions}\)"):
        compare(experiment, RunFolder(folder.path, experiment.settings), bundle)


def test_runs_of_before_results_had_versions_have_the_first(finished, bundle, tmp_path, monkeypatch):
    experiment, folder, results = finished
    shutil.copytree(folder.path, tmp_path / "old")
    for path in (tmp_path / "old" / "runs").iterdir():
        content = read_json(path, "torchmto compare run", 1)
        assert content.pop("results_version") == RESULTS_VERSION
        write_json(path, "torchmto compare run", 1, content)
    monkeypatch.setattr("torchmto.lab.compare.folder.RESULTS_VERSION", 1)
    monkeypatch.setattr("torchmto.lab.compare.runner.train_and_measure", None)
    assert compare(experiment, RunFolder(tmp_path / "old", experiment.settings), bundle) == results


def test_a_failed_run_leaves_the_others(bundle, tmp_path, monkeypatch):
    experiment = Experiment(("gd", "pcgrad"), 1, replace(RUN, model="convnet"))
    folder = RunFolder(tmp_path / "x", experiment.settings)
    train = train_and_measure

    def sometimes(config, *arguments, **options):
        if config.method == "gd" and not config.tasks:
            raise RuntimeError("out of memory")
        return train(config, *arguments, **options)

    monkeypatch.setattr("torchmto.lab.compare.runner.train_and_measure", sometimes)
    with pytest.raises(FailedRunsError, match="gd, seed 0: out of memory"):
        compare(experiment, folder, bundle)
    assert len(list((tmp_path / "x" / "runs").iterdir())) == 4
    monkeypatch.undo()
    assert len(compare(experiment, folder, bundle)) == 5


def test_stages_of_a_comparison(bundle, tmp_path, monkeypatch):
    experiment = Experiment(("gd",), 1, RUN)
    folder = RunFolder(tmp_path / "x", experiment.settings)
    given = []

    def train(config, *_, baseline, **__):
        given.append(baseline)
        if config.tasks == ("left",):
            raise RuntimeError("out of memory")
        return {"validation": {"right": {"accuracy": 0.5}, "offset": {"rmse": math.inf}}}

    monkeypatch.setattr("torchmto.lab.compare.runner.train_and_measure", train)
    with pytest.raises(FailedRunsError) as failed:
        compare(experiment, folder, bundle, stages=["single-task"])
    assert [(config.tasks, text) for config, text in failed.value.failures] == [(("left",), "out of memory")]
    assert given == [None] * 3
    stand_ins = {"left": 0.1, "right": 0.2, "offset": 0.3}
    assert len(compare(experiment, folder, bundle, stages=["methods"], stand_ins=stand_ins)) == 3
    assert given[3:] == [{"left": 0.1, "right": 0.5, "offset": 0.3}]


def test_validation_baselines_reach_wpcgrad(bundle):
    config = replace(RUN, method="wpcgrad(priority=performance)")
    baseline = {"left": 0.5, "right": 0.5, "offset": 1.0}
    assert train_and_measure(config, bundle, baseline=baseline)["cost"]["num_backward"] == 3


def test_experiments_are_checked_before_anything_runs(bundle):
    with pytest.raises(ValueError, match="seeds"):
        Experiment(seeds=0)
    for method, error in (("wpcgrad(priority=[1.0])", ValueError), ("gd(c=1)", TypeError)):
        with pytest.raises(error):
            default_experiment(bundle, data="digits", methods=[method]).check(bundle)


def test_two_processes_dont_share_a_folder(tmp_path):
    folder = RunFolder(tmp_path / "x", {"a": 1})
    with (
        folder.locked(),
        pytest.raises(FolderError, match="Another process"),
        RunFolder(folder.path, {"a": 1}).locked(),
    ):
        pass


def test_folders_of_something_else_are_left_alone(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("mine")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    RunFolder(tmp_path / "other", {"epochs": 3})
    for name, message in (
        ("file", "is a file"),
        ("full", "isn't empty"),
        ("broken", "is broken"),
        ("other", "epochs is 3 there and 4 here"),
    ):
        with pytest.raises(FolderError, match=message):
            RunFolder(tmp_path / name, {"epochs": 4})
    assert sorted(p.name for p in (tmp_path / "full").iterdir()) == ["thesis.tex"]
    assert (tmp_path / "broken" / "config.json").read_text() == "{"
