"""Experiments end to end at toy size: files, resuming, budgets, tuning."""

import json
import math
import re
import shutil
import textwrap
from dataclasses import replace

import pytest
from matplotlib.figure import Figure

from torchmto.cli import main
from torchmto.lab import atomic, memory
from torchmto.lab.folders import FolderError
from torchmto.lab.grid import executors, outputs
from torchmto.lab.grid.executors import Outcome
from torchmto.lab.grid.experiment import is_single_task, method_label
from torchmto.lab.grid.tuning import edges
from torchmto.lab.reproduce import RecipeError, load_recipe, reproduce, theory, with_methods
from torchmto.lab.reproduce.arms import Context, run_arms
from torchmto.lab.reproduce.budget import Budget
from torchmto.lab.reproduce.findings import claim_folder
from torchmto.lab.reproduce.tables import STUDIES, cosine_statistics, settings

RUN = """
run:
  data: digits
  data.options: {train: 32, validation: 16, test: 16}
  epochs: 1
  batch_size: 16
  learning_rate: 0.01
  model.options: {widths: [4, 4]}
"""


def recipe(tmp_path, text, name="tiny"):
    path = tmp_path / f"{name}.yaml"
    path.write_text(textwrap.dedent(text) + RUN)
    return path


PHASES = """
study: phases
summary: toy
arms:
  a: {methods: [gd, connection_strength(schedule=mix)]}
  b: {methods: [gd], method_run: {epochs: 2}}
"""


@pytest.fixture(autouse=True, scope="module")
def quick():
    """Without what costs more than these trainings and is tested elsewhere: arms' plots, exact memory, power cuts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(outputs, "plots", lambda *_: {})
        patch.setattr(memory.gc, "collect", lambda: 0)
        patch.setattr(atomic.os, "fsync", lambda _: None)
        yield


@pytest.fixture
def no_figures(monkeypatch):
    monkeypatch.setattr(Figure, "savefig", lambda *_, **__: None)


@pytest.fixture(scope="module")
def phases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("phases")
    path = recipe(folder, PHASES)
    assert main(["reproduce", str(path), "--seeds", "2", "--out", str(folder / "out")]) == 0
    return path, folder / "out"


def test_results(phases):
    _, out = phases
    results = json.loads((out / "results.json").read_text())
    assert results["complete"]
    arm = results["numbers"]["arms"]["a"]["methods"]["connection_strength(schedule=mix)"]
    compared = json.loads((out / "arms" / "a" / "results.json").read_text())
    assert arm["delta_m"] == compared["methods"]["connection_strength(schedule=mix)"]["delta_m"]
    difference = arm["difference"]
    gd = compared["methods"]["gd"]["delta_m"]["per_seed"]
    assert difference["mean"] == pytest.approx(arm["delta_m"]["mean"] - sum(gd) / 2)
    assert sum(arm["wins_ties_losses"]) == 6
    titles = [table["title"] for table in results["tables"]]
    assert "Equal budgets, arm a" in titles, "its methods take different numbers of optimizer steps"
    assert "Equal budgets, arm b" not in titles
    assert {row["arm"] for row in results["numbers"]["across_arms"]} == {"b"}
    singles = [{path.name for path in (out / "arms" / arm / "runs").glob("single*")} for arm in "ab"]
    assert singles[0] == singles[1]
    assert '"title":"Arm a"' in (out / "report.html").read_text()
    page = (out / "results.md").read_text()
    assert "Smoke run" in page
    for image in (out / "plots").iterdir():
        assert image.stat().st_size > 1000
        assert f"plots/{image.name}" in page


def test_without_single_task_models_there_are_no_equal_budgets(tmp_path, no_figures):
    text = "study: comparison\nsummary: toy\narms: {a: {methods: [gd, sequential], baselines: false}}\n"
    findings = reproduce(load_recipe(str(recipe(tmp_path, text))), tmp_path / "o", seeds=1, say=lambda _: None)
    assert not [table.title for table in findings.tables if "budgets" in table.title], "no score of theirs is a Δm"
    assert "budgets" not in findings.numbers


def test_a_second_call_trains_nothing(phases, monkeypatch):
    path, out = phases
    monkeypatch.setattr(executors, "execute", None)
    assert main(["reproduce", str(path), "--seeds", "2", "--out", str(out)]) == 0


def test_an_added_method_is_all_that_trains(phases, tmp_path, no_figures, monkeypatch, capsys):
    path, out = phases
    shutil.copytree(out, tmp_path / "out")
    trained = []
    execute = executors.execute
    monkeypatch.setattr(
        executors, "execute", lambda run, *rest, **more: trained.append(run) or execute(run, *rest, **more)
    )
    command = ["reproduce", str(path), "--seeds", "2", "--out", str(tmp_path / "out"), "--add"]
    assert main([*command, "pcgrad,gd"]) == 0
    assert len(trained) == 2
    arms = json.loads((tmp_path / "out" / "results.json").read_text())["numbers"]["arms"]
    assert list(arms["a"]["methods"]) == ["gd", "connection_strength(schedule=mix)", "pcgrad"]
    assert list(arms["b"]["methods"]) == ["gd"]
    for typo, words in (("pcgrat", "Did you mean `pcgrad`?"), ("cagrad(d=1)", "no hyper-parameter `d`")):
        assert main([*command, typo]) == 2
        assert words in capsys.readouterr().err
    # Whoever comes next adds to what is there, and the recipe alone goes on with all of it.
    assert main([*command, "imtl_g"]) == main(command[:-1]) == 0
    assert len(trained) == 4
    arms = json.loads((tmp_path / "out" / "results.json").read_text())["numbers"]["arms"]
    assert set(arms["a"]["methods"]) == {"gd", "connection_strength(schedule=mix)", "pcgrad", "imtl_g"}
    with pytest.raises(RecipeError, match="no arm"):
        with_methods(load_recipe("theory"), "gd")


def test_an_interrupted_experiment_goes_on(phases, tmp_path, no_figures):
    path, out = phases
    whole = load_recipe(str(path))
    loaded = replace(whole, study="comparison", arms=whole.arms[:1])
    first = reproduce(loaded, tmp_path / "o", seeds=2, minutes=1e-9, say=lambda _: None)
    assert not first.complete
    assert not list((tmp_path / "o" / "arms").glob("*/runs/*.json"))
    runs = sorted((out / "arms" / "a" / "runs").iterdir())
    target = tmp_path / "o" / "arms" / "a" / "runs"
    for run in runs[:-1]:
        (target / run.name).write_bytes(run.read_bytes())
    said = []
    again = reproduce(loaded, tmp_path / "o", seeds=2, say=said.append)
    assert again.complete
    assert any(f"{len(runs) - 1} of {len(runs)} runs are finished" in line for line in said)
    before = json.loads((out / "results.json").read_text())["numbers"]["arms"]["a"]["methods"]
    for method, entry in again.numbers["arms"]["a"]["methods"].items():
        assert entry["delta_m"] == before[method]["delta_m"]


def test_more_seeds_later(tmp_path, no_figures):
    loaded = load_recipe(str(recipe(tmp_path, "study: comparison\nsummary: x\narms: {a: {methods: [gd]}}\n")))
    one = reproduce(loaded, tmp_path / "o", seeds=1, say=lambda _: None)
    two = reproduce(loaded, tmp_path / "o", seeds=2, say=lambda _: None)
    seeds = [f.numbers["arms"]["a"]["methods"]["gd"]["delta_m"]["per_seed"] for f in (one, two)]
    assert seeds[0] == seeds[1][:1]
    assert len(seeds[1]) == 2


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"experiment.json": "{}"}, "isn't a file of this program"),
        ({"experiment.json": "{"}, "is broken"),
        ({"results.json": "[1]"}, "isn't one of `torchmto reproduce`"),
        ({"config.json": "{}", "runs/gd.json": "{}"}, "belongs to `torchmto compare`"),
        ({"config.yaml": "", "checkpoints/last": ""}, "belongs to `torchmto train`"),
        ({"results.md": "mine"}, "isn't one of `torchmto reproduce`"),
    ],
    ids=["marker", "broken", "list", "compare", "train", "document"],
)
def test_folders_of_something_else_are_left_alone(tmp_path, monkeypatch, capsys, files, message):
    monkeypatch.setattr(executors, "execute", None)
    out = tmp_path / "o"
    for name, text in files.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(text)
    assert main(["reproduce", str(recipe(tmp_path, PHASES)), "--out", str(out)]) == 2
    assert message in capsys.readouterr().err
    assert {str(p.relative_to(out)): p.read_text() for p in out.rglob("*") if p.is_file()} == files


def test_folders_of_the_same_experiment_go_on_and_others_are_left_alone(tmp_path):
    (tmp_path / ".DS_Store").write_bytes(b"Bud1")
    claim_folder(tmp_path, load_recipe("theory"))
    (tmp_path / "results.json").write_text("{}")
    claim_folder(tmp_path, load_recipe("theory"))
    with pytest.raises(FolderError, match="results of the experiment 'theory', not of 'cost'"):
        claim_folder(tmp_path, load_recipe("cost"))


def test_every_method_is_tuned_on_the_same_grid(tmp_path, no_figures):
    text = """
    study: comparison
    summary: toy
    tune: [{optimizer: sgd, learning_rate: 0.1}, {optimizer: adamw, learning_rate: 0.01}]
    tune_run: {weight_decay: 0.125}
    arms: {a: {methods: [gd, sequential]}}
    """
    loaded = load_recipe(str(recipe(tmp_path, text)))
    findings = reproduce(loaded, tmp_path / "o", seeds=1, say=lambda _: None)
    folder = tmp_path / "o" / "arms"
    rounds = [f"a-tuning-{stage}-{number}" for stage in ("single-task", "methods") for number in (0, 1)]
    configs = [json.loads((folder / name / "config.json").read_text())["content"] for name in (*rounds, "a")]
    assert [config["optimizer"]["weight_decay"] == 0.125 for config in configs] == [True] * 4 + [False]
    trials = [{p.name.rpartition("-")[0] for p in (folder / name / "runs").iterdir()} for name in rounds]
    singles = {f"single-{task}-seed0" for task in ("left", "right", "offset")}
    assert trials[:2] == [singles] * 2
    assert [trial - singles for trial in trials[2:]] == [{"gd-seed0", "sequential-seed0"}] * 2
    for entry in findings.numbers["arms"]["a"]["methods"].values():
        assert entry["settings"] in [dict(settings) for settings in loaded.tune]
    assert "each at its chosen settings, seeds 0 to 0" in findings.tables[0].notes[0]
    (chosen,) = [table for table in findings.tables if table.title == "Chosen settings, arm a"]
    assert [row[0] for row in chosen.rows][-2:] == ["gd", "sequential"]


@pytest.mark.parametrize(("tuned", "limit"), [(True, 1), (True, 3), (False, 1)], ids=["tuning", "seeds", "untuned"])
def test_what_is_finished_stays_while_a_method_is_added(tmp_path, monkeypatch, no_figures, tuned, limit):
    offers = "tune: [{learning_rate: 0.1}, {learning_rate: 0.3}]\n" * tuned
    loaded = load_recipe(
        str(recipe(tmp_path, f"study: comparison\nsummary: x\n{offers}arms: {{a: {{methods: [gd]}}}}\n"))
    )
    asked = []

    def execute(job, problem, _):
        return trained(job.config, job.config.data.tasks or problem.task_names, asked, wrong=lambda _: None)

    monkeypatch.setattr(executors, "execute", execute)
    more = {"seeds": 2, "say": lambda _: None}
    before = reproduce(loaded, tmp_path / "o", **more).numbers["arms"]
    most = len(asked) + limit
    monkeypatch.setattr(Budget, "spent", property(lambda _: len(asked) >= most))
    cut = reproduce(with_methods(loaded, "pcgrad"), tmp_path / "o", **more)
    assert not cut.complete
    assert cut.numbers["arms"] == before
    monkeypatch.setattr(Budget, "spent", property(lambda _: False))
    whole = reproduce(loaded, tmp_path / "o", **more)
    assert whole.complete
    assert list(whole.numbers["arms"]["a"]["methods"]) == ["gd", "pcgrad"]


def test_an_arm_with_more_seeds_runs_only_those(tmp_path, monkeypatch, no_figures):
    text = "study: comparison\nsummary: x\narms: {a: {methods: [gd, pcgrad], seeds: 1}, b: {methods: [gd]}}\n"
    asked = []

    def execute(job, problem, _):
        return trained(job.config, job.config.data.tasks or problem.task_names, asked, wrong=lambda _: None)

    monkeypatch.setattr(executors, "execute", execute)
    found = reproduce(load_recipe(str(recipe(tmp_path, text))), tmp_path / "o", seeds=2, say=lambda _: None)
    assert [len(found.numbers["arms"][arm]["methods"]["gd"]["delta_m"]["per_seed"]) for arm in "ab"] == [1, 2]
    methods = [(method_label(config), config.seed) for config in asked if not is_single_task(config)]
    assert methods == [("gd", 0), ("pcgrad", 0), ("gd", 1)]
    assert len(asked) == len(methods) + 2 * 3


TUNED = """
study: comparison
summary: toy
tune: [{learning_rate: 0.1}, {learning_rate: 0.3}]
arms: {a: {methods: [gd, 'wpcgrad(priority=performance)']}}
"""


def trained(config, tasks, asked, *, wrong):
    """What a run might give, the higher learning rate the better; ``wrong(config)``: an error, or the value of offset."""
    asked.append(config)
    found = wrong(config)
    if isinstance(found, str):
        return Outcome(None, found)
    rate = config.optimizer.lr
    values = {t: {"rmse": 0.5 - rate} if t == "offset" else {"accuracy": rate} for t in tasks}
    if found is not None:
        values["offset"]["rmse"] = found
    epoch = {"epoch": 0, "losses": dict.fromkeys(tasks, 1.0), "validation": values, "score": 0.0}
    cost = {"num_forward": 1, "num_backward": 1, "num_optimizer_steps": 1, "seconds_per_batch": 1.0}
    result = {
        "history": [{**epoch, "batches": 1, "optimizer_steps": 1, "seconds": 1.0}],
        "trace": [],
        "selected_epoch": 0,
        "score": rate if found is None else None,
        "validation": values,
        "test": values,
        "cost": {**cost, "peak_memory_bytes": None},
        "seconds": 1.0,
    }
    return Outcome(result)


@pytest.mark.parametrize("found", ["loss isn't finite", math.inf, math.nan], ids=["error", "inf", "nan"])
@pytest.mark.parametrize("whose", ["offset", "gd"])
def test_every_method_tries_every_setting_whatever_fails(tmp_path, monkeypatch, whose, found):
    asked, baselines = [], []

    def wrong(config):
        return found if config.optimizer.lr == 0.3 and config.data.tasks == ["offset"] else None

    def wrong_method(config):
        return (
            found
            if config.optimizer.lr == 0.3 and method_label(config) == "gd" and not is_single_task(config)
            else None
        )

    def execute(job, problem, _):
        config = job.config
        if not is_single_task(config):
            baselines.append(job.baseline)
        tasks = config.data.tasks or problem.task_names
        return trained(config, tasks, asked, wrong=wrong if whose == "offset" else wrong_method)

    monkeypatch.setattr(executors, "execute", execute)
    loaded = load_recipe(str(recipe(tmp_path, TUNED)))
    context = Context(loaded, tmp_path, tmp_path, 1, Budget(None), executors.Here(), lambda _: None)
    arms, complete = run_arms(context)
    assert complete
    tried = [(method_label(config), config.optimizer.lr) for config in asked if not is_single_task(config)]
    assert {*tried} == {(method, rate) for method in arms["a"].experiment.methods for rate in (0.1, 0.3)}
    assert all(math.isfinite(value) for baseline in baselines for value in baseline.values())
    assert all(set(baseline) == {"left", "right", "offset"} for baseline in baselines)
    hurt = "single-task offset" if whose == "offset" else "gd"
    assert {name: chosen["learning_rate"] for name, chosen in arms["a"].experiment.chosen.items()} == {
        name: 0.1 if name == hurt else 0.3 for name in arms["a"].experiment.chosen
    }
    (line,) = arms["a"].failed
    assert f"{hurt}, seed 0, learning_rate 0.3: " in line
    assert line in settings(arms["a"], loaded).notes[-1]
    again, _ = run_arms(context)
    assert again["a"].experiment == arms["a"].experiment
    assert again["a"].failed == arms["a"].failed


def test_what_fails_at_every_setting_ends_the_experiment_in_words(tmp_path, monkeypatch, capsys):
    def execute(job, problem, _):
        tasks = job.config.data.tasks or problem.task_names
        return trained(job.config, tasks, [], wrong=lambda c: "loss isn't finite" if c.data.tasks == ["left"] else None)

    monkeypatch.setattr(executors, "execute", execute)
    assert main(["reproduce", str(recipe(tmp_path, TUNED)), "--seeds", "1", "--out", str(tmp_path / "o")]) == 1
    assert "error: some runs failed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("study: oracle\narms: {a: {methods: [gd], run: {model: nothing}}}", "arm a: .*nothing"),
        ("arms: {a: {methods: [gd]}, b: {methods: [gd], run: {model: nothing}}}", "arm b: .*nothing"),
        ("arms: {a: {methods: [gd]}, b: {methods: [gd], run: {epochs: many}}}", "arm b: .*epochs.*'many'"),
        ("arms: {a: {methods: [gd]}, b: {methods: [gd], method_run: {epochs: 0}}}", "arm b: .*epochs.*0"),
        ("arms: {a: {methods: [gd, 'pcgrad(c=1)']}}", "arm a: .*pcgrad"),
        ("arms: {a: {methods: [gd, pcgrat]}}", "arm a: .*pcgrad"),
        ("arms: {a: {methods: [gd], run: {seed: 3}}}", "arm a: .*`seed` has no effect"),
        ("arms: {a: {methods: [gd], method_run: {devices: 2}}}", "arm a: .*`devices` has no effect"),
        ("arms: {a: {methods: [gd], added: [gd]}}", "no entry `added`"),
        ("arms: {a: {methods: [gd], reference: pcgrad}}", "`reference` should be one of 'gd'"),
        ("arms: {a: {methods: [gd]}}\ntune: [{optimizer: sgd}, {optimizer: lion}]", "arm a: .*lion"),
    ],
    ids=["study", "model", "epochs", "method_run", "method", "name", "seed", "devices", "added", "reference", "tune"],
)
def test_wrong_arms_are_refused_before_anything_is_trained(tmp_path, monkeypatch, capsys, text, message):
    monkeypatch.setattr(executors, "execute", None)
    study = "" if "study" in text else "study: comparison\n"
    path = recipe(tmp_path, f"{study}summary: toy\n{text}\n")
    assert main(["reproduce", str(path), "--out", str(tmp_path / "o")]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error)
    assert "Traceback" not in error
    assert not [path for path in tmp_path.glob("o/**/*.json") if path.name != "experiment.json"]


@pytest.mark.parametrize(
    ("rate", "named"), [(0.1, ["smallest rate"]), (0.3, []), (1.0, ["largest rate"])], ids=["least", "middle", "most"]
)
def test_a_choice_at_the_edge_of_the_grid_is_named(rate, named):
    offers = [{"optimizer": name, "rate": value} for name in ("sgd", "adamw") for value in (0.1, 0.3, 1.0)]
    assert edges({"optimizer": "sgd", "rate": rate, "epochs": 9}, [*offers, {"optimizer": "lion"}]) == named


def test_cosines_are_of_each_third_of_training():
    def step(ab, ac, bc, names="abc"):
        return {"losses": dict.fromkeys(names, 1.0), "cosines": [[1.0, ab, ac], [ab, 1.0, bc], [ac, bc, 1.0]]}

    without = {"losses": {"a": 1.0}, "cosines": None}
    runs = [[step(0.5, -0.5, 0.0), without, step(1.0, 0.5, -0.1)]] * 2
    found = cosine_statistics([*runs, [step(0.5, -0.5, 0.3), without, step(-1.0, 0.5, -0.2)]])
    assert found["first"]["mean"] == pytest.approx(0.1 / 3)
    assert found["first"]["negative_share"] == pytest.approx(1 / 3)
    assert found["last"]["pairs"] == pytest.approx({"a, b": 1 / 3, "a, c": 0.5, "b, c": -0.4 / 3})
    assert cosine_statistics([[without]]) is None


ORACLE = """
arms:
  a: &arm
    methods: [connection_strength]
    baselines: false
    run: &run
      data: torchmto.lab.reproduce.oracle:probed
      data.options: &data {train: 32, validation: 16, test: 16, channels: 2, probe: 8, tasks: [left, offset], num_tasks: 4}
  b:
    <<: *arm
    run:
      <<: *run
      data.options: {<<: *data, order: 1}
"""
COPIES = """
arms:
  a:
    methods: {}
    baselines: false
    run:
      data: torchmto.lab.reproduce.copies:copies
      data.options: {{train: 32, validation: 16, test: 16, num_tasks: 5, noise: 0.5}}
"""


@pytest.mark.parametrize(
    ("study", "more"),
    [
        ("priorities", "arms: {a: {methods: [pcgrad, 'wpcgrad(priority={left: 1.0})'], reference: pcgrad}}"),
        ("groups", "arms: {a: {methods: [gd, 'task_groups(warmup=1, noise_floor=True)']}}"),
        ("oracle", ORACLE),
        ("many_tasks", COPIES.format("[task_groups, connection_strength]")),
        ("cost", COPIES.format("[gd, pcgrad]")),
    ],
)
def test_other_studies(tmp_path, study, more, no_figures):
    loaded = load_recipe(str(recipe(tmp_path, f"study: {study}\nsummary: toy\n{more}\n")))
    findings = reproduce(loaded, tmp_path / "o", seeds=1, say=lambda _: None)
    assert findings.complete
    assert set(findings.numbers) >= set(STUDIES[study])
    titles = [table.title for table in findings.tables]
    assert titles[0] == "Arm a"
    assert all(table.rows for table in findings.tables)
    if study == "oracle":
        assert titles == [
            "Arm a",
            "Strength and oracle, arm a",
            "Arm b",
            "Strength and oracle, arm b",
            "Stability of priorities",
        ]
        (same,) = findings.numbers["stability"].values()
        assert 0 <= same["agreement"] <= 1
    # another machine: settings and results of runs only
    other = tmp_path / "elsewhere"
    for path in [
        tmp_path / "o" / "experiment.json",
        *(tmp_path / "o" / "arms").glob("*/config.json"),
        *tmp_path.glob("o/arms/*/runs/*.json"),
    ]:
        (other / path.relative_to(tmp_path / "o")).parent.mkdir(parents=True, exist_ok=True)
        (other / path.relative_to(tmp_path / "o")).write_bytes(path.read_bytes())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(executors, "execute", None)
        again = reproduce(loaded, other, seeds=1, say=lambda _: None)
    assert [table.rows for table in again.tables] == [table.rows for table in findings.tables]


def test_theory(tmp_path, monkeypatch):
    monkeypatch.setattr(theory, "MARKS", (1, 4))
    loaded = load_recipe("theory")
    small = replace(loaded, options={"problems": 3, "batches": 4, "long": 6})
    findings = reproduce(small, tmp_path, say=lambda _: None)
    assert findings.numbers["affinities"]["0.001"]["agreement"] == 1.0
    said = []
    again = reproduce(small, tmp_path, say=said.append)
    assert said == []
    assert [table.rows for table in again.tables] == [table.rows for table in findings.tables]
    other = replace(small, options={**small.options, "problems": 2})
    assert not reproduce(other, tmp_path, minutes=1e-9, say=said.append).complete
    monkeypatch.setattr(theory, "RESULTS_VERSION", 0)
    monkeypatch.setattr(theory, "CHECKS", {"affinities": theory.CHECKS["affinities"]})
    reproduce(small, tmp_path, say=said.append)
    assert [line.partition(":")[0].strip() for line in said] == ["affinities"], (
        "what means something else is done again"
    )


def test_theory_of_one_problem_has_no_intervals(tmp_path, monkeypatch):
    monkeypatch.setattr(theory, "MARKS", (1, 4))
    one = replace(load_recipe("theory"), options={"problems": 1, "batches": 4, "long": 6})
    findings = reproduce(one, tmp_path, say=lambda _: None)
    assert findings.complete
    cells = [cell for table in findings.tables if "equal batches" in table.title for row in table.rows for cell in row]
    assert cells
    assert not [cell for cell in cells if "±" in str(cell)]


@pytest.mark.parametrize(
    ("name", "flags", "why"),
    [
        *(("theory", flags, "trains nothing") for flags in ("--seeds 2", "--jobs 2", "--executor slurm:local")),
        *((name, "--data-root x", "says `{data}`") for name in ("theory", "phases")),
    ],
)
def test_what_has_no_effect_is_refused(name, flags, why, tmp_path, capsys):
    assert main(["reproduce", name, *flags.split(), "--out", str(tmp_path / "o")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "has no effect" in error
    assert why in error
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("options", [{"problem": 3}, {"problems": 0}, {"kinship": 2}, {"long": "far"}])
def test_options_of_theory_are_checked(tmp_path, options):
    with pytest.raises(RecipeError, match=next(iter(options))):
        reproduce(replace(load_recipe("theory"), options=options), tmp_path / "o")


def test_exit_codes(tmp_path, capsys):
    assert main(["reproduce"]) == 0
    assert "fair-grid" in capsys.readouterr().out
    assert main(["reproduce", "nothing"]) == 2
    assert main(["reproduce", "theory", "--seeds", "0", "--out", str(tmp_path)]) == 2
    assert main(["reproduce", "theory", "--budget", "-1", "--out", str(tmp_path)]) == 2
    assert main(["reproduce", "groups", "--data-root", str(tmp_path / "none"), "--out", str(tmp_path / "o")]) == 2
