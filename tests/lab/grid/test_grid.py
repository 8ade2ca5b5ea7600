"""The grid of a comparison: selection, figures, folder."""

import copy
import math
import shutil

import pytest
import torch
from scipy import stats

from torchmto.lab.atomic import plain, read_json, write_json
from torchmto.lab.data import load_data
from torchmto.lab.data.base import Task
from torchmto.lab.folders import locked
from torchmto.lab.grid import Experiment, FailedRunsError, FolderError, GridFolder, outputs, run_grid, summarize
from torchmto.lab.grid import executors as executors_module
from torchmto.lab.grid.executors import Outcome
from torchmto.lab.grid.experiment import is_single_task, method_label, run_label
from torchmto.lab.grid.folder import SCHEMA_VERSION
from torchmto.lab.grid.identity import run_key
from torchmto.lab.grid.plan import compare
from torchmto.lab.grid.plots import picture, plots
from torchmto.lab.grid.tables import csv_text, main_table, markdown, task_table, versus_table
from torchmto.lab.methods import make
from torchmto.lab.problem import Problem
from torchmto.lab.run.build import problem_of
from torchmto.lab.run.config import config_of
from torchmto.lab.run.loop import Trainer
from torchmto.lab.run.pictures import draw_predictions
from torchmto.lab.run.scores import measure_of
from torchmto.lab.specs import parse_method
from torchmto.lab.statistics import confidence95, std
from torchmto.lab.versions import RESULTS_VERSION

SETTINGS = {"epochs": 1, "batch_size": 32, "lr": 3e-3, "model.options": {"widths": [8]}, "threads": 1}


@pytest.fixture(scope="module")
def problem():
    return load_data("digits", train=64, validation=200, test=200)


def experiment_of(problem, methods, seeds=1, **settings):
    _, config = problem_of(config_of({**SETTINGS, **settings}), problem)
    return Experiment(tuple(methods), seeds, config)


@pytest.fixture(scope="module")
def finished(problem, tmp_path_factory):
    experiment = experiment_of(problem, ("gd", "connection_strength", "task_groups"), 2)
    folder = GridFolder(tmp_path_factory.mktemp("grid"), experiment.settings)
    return experiment, folder, run_grid(experiment, folder, problem)


def trained(problem, baseline=None, **settings):
    chosen, config = problem_of(config_of({**SETTINGS, **settings}), problem)
    return Trainer(config, chosen, baseline=baseline).fit()


def test_confidence_interval_is_students():
    values = [1.0, 4.0, 2.5, 7.0]
    low, high = stats.t.interval(0.95, 3, loc=sum(values) / 4, scale=stats.sem(values))
    assert confidence95(values) == pytest.approx((high - low) / 2)
    assert confidence95([1.0]) is None
    assert std([1.0]) == 0.0


def test_the_test_split_is_measured_once_and_the_best_epoch_chosen(problem, monkeypatch):
    splits, scores = [], iter([1.0, 3.0, 2.0])
    evaluate = Trainer.evaluate
    monkeypatch.setattr(Trainer, "evaluate", lambda self, split: splits.append(split) or evaluate(self, split))
    monkeypatch.setattr(Trainer, "_measure", property(lambda self: Scripted(scores)))
    result = trained(problem, {"left": 1, "right": 1, "offset": 1}, epochs=3)
    assert splits == ["validation"] * 3 + ["test"]
    assert result["selected_epoch"] == 1
    assert result["validation"] == result["history"][1]["validation"]


class Scripted:
    """A measure whose scores are known beforehand."""

    name = description = "scripted"

    def __init__(self, scores):
        self.scores = scores

    def __call__(self, _):
        return next(self.scores)


def test_without_a_score_the_last_epoch_counts(problem, monkeypatch):
    monkeypatch.setattr(Trainer, "_measure", property(lambda self: Scripted(iter([None, None]))))
    assert trained(problem, epochs=2)["selected_epoch"] == 1


@pytest.mark.parametrize(
    ("scores", "epoch"),
    [([0.0] * 3, 2), ([None] * 3, 2), ([0.0, 0.5, 0.5], 1), ([0.5, 0.5, 0.0], 1), ([None, 0.0, None], 1)],
)
def test_where_no_score_tells_epochs_apart_the_last_one_counts(problem, monkeypatch, scores, epoch):
    scripted = Scripted(iter(scores))
    monkeypatch.setattr(Trainer, "_measure", property(lambda self: scripted))
    assert trained(problem, epochs=3)["selected_epoch"] == epoch


def test_runs_whose_epoch_couldnt_be_chosen_are_named(finished, problem):
    experiment, _, results = finished
    assert summarize(experiment, problem, results)["undecided"] == {}  # one epoch is no choice
    scores = dict.fromkeys(results, (0.1, 0.2))
    scores |= {run_key(config): (0.0, 0.0) for config in experiment.single_task_runs(["left"])}
    scores[run_key(experiment.method_runs("gd")[1])] = (None, None)
    changed = {
        key: {**result, "history": [{**result["history"][0], "score": score} for score in scores[key]]}
        for key, result in results.items()
    }
    summary = summarize(experiment, problem, changed)
    assert summary["undecided"] == {"single:left": [0, 1], "gd": [1]}
    assert "so the last one counts: single-task left (seeds 0, 1), gd (seed 1)." in markdown(summary)


def test_scores(problem):
    left, right, offset = problem.task_list
    assert measure_of((left,), None)({"left": 0.25}) == 0.25
    assert measure_of((offset,), None)({"offset": 2.0}) == -2.0
    pair = {"left": 0.5, "right": 0.5}
    assert measure_of((left, right), {"left": 0.4, "right": 0.5})(pair) == pytest.approx(12.5)
    assert measure_of((left, right), {"left": 0.0, "right": 0.5})(pair) is None
    assert measure_of((left, right), {"left": None, "right": 0.5})(pair) is None
    assert measure_of((left, right), {"left": 0.1, "right": 0.5})({"left": 0.5, "right": math.nan}) is None
    for value in (None, math.nan, math.inf, -math.inf):
        for task in (left, offset):
            assert measure_of((task,), None)({task.name: value}) is None


@pytest.mark.parametrize("values", [[math.nan, 2.0, 1.0, 3.0], [2.0, math.inf, 1.0, math.nan]], ids=["first", "later"])
def test_epochs_without_a_finite_score_are_never_chosen_over_others(problem, monkeypatch, values):
    left = iter(values)
    monkeypatch.setattr(Trainer, "evaluate", lambda *_: {"offset": {"rmse": next(left, 0.0)}})
    assert trained(problem, epochs=4, tasks=["offset"])["selected_epoch"] == 2


def test_results_have_the_documented_form(finished, problem):
    experiment, _, results = finished
    summary = summarize(experiment, problem, results)
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
    assert summary["config"]["epochs"] == 1


def test_a_single_task_value_of_zero_gives_a_reason(finished, problem):
    experiment, _, results = finished
    (config,) = [c for c in experiment.single_task_runs(["left"]) if c.seed == 0]
    key = run_key(config)
    zero = {**results[key], "test": {"left": {"accuracy": 0.0, "f1": 0.0}}}
    summary = summarize(experiment, problem, {**results, key: zero})
    assert summary["methods"]["gd"]["delta_m"] is None
    reason = "left's accuracy is 0 in the single-task run of seed 0: no change is relative to that."
    assert summary["methods"]["gd"]["reason"] == reason
    assert "No Δm for gd" in markdown(summary)
    assert main_table(summary).rows[1][1] == "-"


@pytest.mark.parametrize("whose", ["run", "single-task run"])
@pytest.mark.parametrize("value", [None, math.nan, math.inf])
def test_a_value_that_isnt_finite_is_named(finished, problem, whose, value):
    experiment, _, results = finished
    runs = experiment.method_runs() if whose == "run" else experiment.single_task_runs(["offset"])
    (config,) = [c for c in runs if c.seed == 1 and (is_single_task(c) or method_label(c) == "gd")]
    changed = copy.deepcopy(results[run_key(config)])
    changed["test"]["offset"]["rmse"] = value
    summary = summarize(experiment, problem, {**results, run_key(config): changed})
    assert summary["methods"]["gd"]["delta_m"] is None
    assert summary["methods"]["gd"]["reason"] == f"offset's rmse isn't a finite number in the {whose} of seed 1."


def test_tables_agree_with_the_figures(finished, problem):
    experiment, _, results = finished
    summary = summarize(experiment, problem, results)
    assert main_table(summary).header[:5] == ["method", "Δm %", "left accuracy ↑", "right accuracy ↑", "offset rmse ↓"]
    assert [row[0] for row in main_table(summary).rows] == ["single-task", *experiment.methods]
    mean = summary["methods"]["gd"]["delta_m"]["mean"]
    assert main_table(summary).rows[1][1].startswith(f"{mean:+.2f} ± ")
    assert f"gd,,delta_m,{mean}" in csv_text(summary)
    gd, strength, _ = versus_table(summary).rows
    assert gd[:3] == ["gd", "-", "-"]
    assert strength[1].startswith(f"{summary['methods']['connection_strength']['delta_m']['mean'] - mean:+.2f} ± ")
    assert "Δm minus gd" in markdown(summary)


def test_many_tasks_have_a_table_of_their_own(finished, problem, monkeypatch):
    experiment, _, results = finished
    summary = summarize(experiment, problem, results)
    monkeypatch.setattr("torchmto.lab.grid.tables.MOST_COLUMNS", 2)
    assert main_table(summary).header == ["method", "Δm %", "forwards", "backwards", "steps", "ms/batch", "peak MB"]
    assert task_table(summary).header == ["task", "single-task", *experiment.methods]
    assert [row[0] for row in task_table(summary).rows] == ["left accuracy ↑", "right accuracy ↑", "offset rmse ↓"]
    assert markdown(summary).count("| --- |") == 3


def test_plots_show_what_the_methods_record(finished, problem):
    experiment, _, results = finished
    images = plots(summarize(experiment, problem, results), results)
    assert set(images) == {
        "learning_curves.png",
        "priority_shares-connection_strength.png",
        "affinity-task_groups.png",
        "groups-task_groups.png",
    }
    assert all(image.startswith(b"\x89PNG") for image in images.values())


def named(names):
    """A problem with tasks of these names."""

    def samples(size):
        return [(row, dict(zip(names, row[:2], strict=True))) for row in torch.randn(size, 4)]

    tasks = [Task(name, "regression", 1) for name in names]
    return Problem(tasks, samples(16), samples(8), samples(8), model="mlp")


def test_names_are_drawn_letter_by_letter(tmp_path, monkeypatch):
    names = ["cost_$ per hour_$", r"\foo ($) x^{ ($)"]
    problem = named(names)
    settings = {"seeds": 1, "epochs": 1, "batch_size": 8, "jobs": 1, "progress": False}
    methods = ["gd", "connection_strength", "task_groups"]
    monkeypatch.setattr(outputs, "plots", lambda *_: {}["no picture"])
    with pytest.raises(KeyError, match="no picture"):
        compare(problem, methods, out=tmp_path, **settings)
    assert {path.suffix for path in tmp_path.glob("results.*")} == {".json", ".csv", ".md"}
    monkeypatch.undo()
    result = compare(problem, methods, out=tmp_path, **settings)
    pictures = {path.stem.partition("-")[0] for path in (tmp_path / "plots").iterdir()}
    assert pictures == {"learning_curves", "priority_shares", "affinity", "groups"}
    assert picture(result.figure(names[0]), "svg")
    draw_predictions(
        tmp_path / "p.png",
        {"input": torch.rand(1, 3, 4, 4), "targets": {names[0]: torch.rand(1, 1)}},
        {names[0]: torch.rand(1, 1)},
        [Task(names[0], "regression", 1)],
    )


def test_a_second_call_finds_everything_finished(finished, problem, monkeypatch):
    experiment, folder, results = finished
    monkeypatch.setattr(executors_module, "execute", None)
    assert run_grid(experiment, GridFolder(folder.path, experiment.settings), problem) == results


def test_the_history_counts_batches_and_optimizer_steps(finished):
    experiment, _, results = finished
    by_method = {method_label(config): results[run_key(config)] for config in experiment.method_runs()}
    (epoch,) = by_method["task_groups"]["history"]
    assert (epoch["batches"], epoch["optimizer_steps"]) == (2, 6)
    assert epoch["seconds"] == pytest.approx(2 * by_method["task_groups"]["cost"]["seconds_per_batch"])


def test_runs_whose_results_mean_something_else_are_refused(finished, problem, monkeypatch):
    experiment, folder, _ = finished
    monkeypatch.setattr("torchmto.lab.grid.folder.RESULTS_VERSION", RESULTS_VERSION + 1)
    versions = f"version {RESULTS_VERSION}; this torchmto has {RESULTS_VERSION + 1}"
    with pytest.raises(FolderError, match=rf"mean something else \({versions}\)"):
        run_grid(experiment, GridFolder(folder.path, experiment.settings), problem)


def test_runs_without_a_version_of_their_results_are_refused(finished, problem, tmp_path):
    experiment, folder, _ = finished
    shutil.copytree(folder.path, tmp_path / "old")
    for path in (tmp_path / "old" / "runs").iterdir():
        content = read_json(path, "torchmto compare run", SCHEMA_VERSION)
        assert content.pop("results_version") == RESULTS_VERSION
        write_json(path, "torchmto compare run", SCHEMA_VERSION, content)
    with pytest.raises(FolderError, match="version 1;"):
        run_grid(experiment, GridFolder(tmp_path / "old", experiment.settings), problem)


def test_a_failed_run_leaves_the_others(problem, tmp_path, monkeypatch):
    experiment = experiment_of(problem, ("gd", "pcgrad"))
    folder = GridFolder(tmp_path / "x", experiment.settings)
    execute = executors_module.execute

    def sometimes(job, *arguments):
        if job.config.method.name == "gd" and not is_single_task(job.config):
            return Outcome(None, "out of memory")
        return execute(job, *arguments)

    monkeypatch.setattr(executors_module, "execute", sometimes)
    with pytest.raises(FailedRunsError, match="gd, seed 0: out of memory"):
        run_grid(experiment, folder, problem)
    assert len(list((tmp_path / "x" / "runs").iterdir())) == 4
    monkeypatch.undo()
    assert len(run_grid(experiment, folder, problem)) == 5


def test_stages_of_a_comparison(problem, tmp_path, monkeypatch):
    experiment = experiment_of(problem, ("gd",))
    folder = GridFolder(tmp_path / "x", experiment.settings)
    given = []

    def execute(job, *_):
        given.append(job.baseline)
        if job.config.data.tasks == ["left"]:
            return Outcome(None, "out of memory")
        values = {"right": {"accuracy": 0.5}, "offset": {"rmse": math.inf}}
        return Outcome({"validation": values, "test": values, "seconds": 0.0})

    monkeypatch.setattr(executors_module, "execute", execute)
    with pytest.raises(FailedRunsError) as failed:
        run_grid(experiment, folder, problem, stages=["single-task"])
    assert [(config.data.tasks, text) for config, text in failed.value.failures] == [(["left"], "out of memory")]
    assert given == [None] * 3
    baseline = {"left": 0.1, "right": 0.2, "offset": 0.3}
    assert len(run_grid(experiment, folder, problem, stages=["methods"], baseline=baseline)) == 3
    assert given[3:] == [baseline]


def test_validation_baselines_reach_wpcgrad(problem):
    baseline = {"left": 0.5, "right": 0.5, "offset": 1.0}
    method = {"method.name": "wpcgrad", "method.options": {"priority": "performance"}}
    assert trained(problem, baseline, **method)["cost"]["num_backward"] == 3


def test_experiments_are_checked_before_anything_runs(problem, tmp_path):
    with pytest.raises(ValueError, match="seeds"):
        Experiment(seeds=0)
    for method in ("wpcgrad(priority=[1.0])", "gd(c=1)"):
        with pytest.raises(ValueError, match=r"wpcgrad|gd|priority"):
            compare(problem, [method], out=tmp_path / "x", config=SETTINGS)
    assert not (tmp_path / "x").exists()


def test_checkpoints_of_a_run_let_it_go_on_in_the_middle(problem, tmp_path, monkeypatch):
    experiment = experiment_of(problem, ("gd",), checkpoint_every=1, epochs=2)
    straight = run_grid(experiment, GridFolder(tmp_path / "straight", experiment.settings), problem)
    folder = GridFolder(tmp_path / "halted", experiment.settings)
    began = []
    with monkeypatch.context() as patch:
        end_epoch = Trainer._end_epoch

        def stop(self):
            if self.problem.task_names != ("left",) and self.progress.epoch == 1:
                raise KeyboardInterrupt
            end_epoch(self)

        patch.setattr(Trainer, "_end_epoch", stop)
        with pytest.raises(KeyboardInterrupt):
            run_grid(experiment, folder, problem)
    assert list((folder.path / "runs").glob("single-right*/step-*.ckpt"))
    monkeypatch.setattr(Trainer, "on_step", None, raising=False)
    step = Trainer._log_step

    def count(self, info):
        began.append(self.progress.step)
        step(self, info)

    monkeypatch.setattr(Trainer, "_log_step", count)
    resumed = run_grid(experiment, folder, problem)
    assert began[0] > 1
    for key, result in straight.items():
        assert resumed[key]["test"] == result["test"]
        assert [entry["losses"] for entry in resumed[key]["history"]] == [e["losses"] for e in result["history"]]
        assert plain(resumed[key]["trace"]) == result["trace"]
    assert not [path for path in (folder.path / "runs").iterdir() if path.is_dir()]


def test_two_processes_dont_share_a_folder(tmp_path):
    folder = GridFolder(tmp_path / "x", {"a": 1})
    with (
        folder.locked(),
        pytest.raises(FolderError, match="Another process"),
        GridFolder(folder.path, {"a": 1}).locked(),
    ):
        pass


def test_a_folder_in_use_gets_no_settings(tmp_path):
    with locked(tmp_path / "x"), pytest.raises(FolderError, match="Another process"):
        GridFolder(tmp_path / "x", {"epochs": 3})
    assert [path.name for path in (tmp_path / "x").iterdir()] == [".lock"]


def test_only_a_task_alone_without_a_method_is_called_single_task():
    run = config_of({"data.tasks": ["left"]})
    assert run_label(run) == "single-task left, seed 0"
    assert run_label(config_of({"method": "cagrad(c=0.3)"}, run)) == "cagrad(c=0.3), seed 0"
    assert run_label(config_of({"method.weights": {"left": 2.0}}, run)) == "gd, seed 0"


def test_a_missing_single_task_value_is_named(problem):
    spec = parse_method("wpcgrad(priority=performance)")
    with pytest.raises(ValueError, match="There is none for `right`"):
        make(spec, total_steps=1, tasks=problem.task_list, baseline={"left": 0.5})


def test_folders_of_something_else_are_left_alone(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("mine")
    (tmp_path / "trained").mkdir()
    (tmp_path / "trained" / "config.yaml").write_text("epochs: 1")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / ".DS_Store").write_bytes(b"Bud1")
    GridFolder(tmp_path / "other", {"epochs": 3})
    GridFolder(tmp_path / "hidden", {"epochs": 3})
    for name, message in (
        ("file", "is a file"),
        ("full", "isn't empty"),
        ("trained", "belongs to `torchmto train`"),
        ("broken", "is broken"),
        ("other", "epochs is 3 there and 4 here"),
    ):
        with pytest.raises(FolderError, match=message):
            GridFolder(tmp_path / name, {"epochs": 4})
    assert sorted(p.name for p in (tmp_path / "full").iterdir()) == ["thesis.tex"]
    assert (tmp_path / "broken" / "config.json").read_text() == "{"


def test_a_changed_source_is_told_from_other_settings(tmp_path):
    GridFolder(tmp_path / "x", {"epochs": 3, "free": {"source": "a"}})
    with pytest.raises(FolderError, match="--changed-source"):
        GridFolder(tmp_path / "x", {"epochs": 3, "free": {"source": "b"}})
    GridFolder(tmp_path / "x", {"epochs": 3, "free": {"source": "b"}}, changed_source=True)
