"""The report without a browser: what is in the file, and what isn't."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from report_folders import METHODS, TASKS, comparison, experiment, training
from torchmto.cli import main
from torchmto.lab import report
from torchmto.lab.report import ReportError, page, read_studies
from torchmto.lab.report.comparisons import warnings
from torchmto.lab.report.page import MAX_BYTES, _fitting
from torchmto.metrics import delta_m

HOSTILE = "</script><img src=x onerror=alert(1)>"


class Reader(HTMLParser):
    """Tags with their attributes, and the text of scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.tags[-1:] and self.tags[-1][0] == "script" and not self.scripts[-1]:
            self.scripts[-1] = data


def embedded(text: str) -> list[dict[str, Any]]:
    (data,) = re.findall(r'<script type="application/json" id="report-data">(.*?)</script>', text, re.DOTALL)
    studies: list[dict[str, Any]] = json.loads(data)["studies"]
    return studies


def test_the_values_are_those_of_the_json(tmp_path: Path) -> None:
    results = comparison(tmp_path / "run")
    assert main(["report", str(tmp_path / "run")]) == 0
    text = (tmp_path / "run" / "report.html").read_text()
    (study,) = embedded(text)
    assert study["results"] == results
    assert study["method_names"] == list(METHODS)
    assert len(text.encode()) < MAX_BYTES
    run = next(r for r in study["runs"] if r["method"] == "task_groups" and r["task"] is None)
    saved = json.loads((tmp_path / "run" / "runs" / "run3-seed0.json").read_text())["content"]["result"]
    assert [p["records"]["affinity"] for p in run["trace"]] == [p["records"]["affinity"] for p in saved["trace"]]
    assert [h["losses"] for h in run["history"]] == [h["losses"] for h in saved["history"]]


def test_nothing_is_loaded_and_no_text_becomes_markup(tmp_path: Path) -> None:
    folder = tmp_path / ("<b onclick=alert(1)>&" + "x" * 20)
    comparison(folder, methods=(HOSTILE, "<!--", "gd\u2028"), tasks=(HOSTILE, "__proto__", "0"))
    text = page(read_studies([folder]))
    reader = Reader(text)
    kinds = [tag for tag, _ in reader.tags]
    assert kinds.count("script") == 4
    assert not {"img", "link", "iframe", "b", "object", "base"} & set(kinds)
    assert not [a for _, a in reader.tags if {"src", "onclick", "onerror"} & set(a)]
    policy = next(a["content"] for _, a in reader.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert next(iter(embedded(text)[0]["results"]["methods"])) == HOSTILE
    data = reader.scripts[0]
    assert not set("<>&\u2028") & set(data)


def test_training_runs_on_the_same_data_share_a_table(tmp_path: Path) -> None:
    for name, method in (("a", "pcgrad"), ("b", "gd"), ("c", "gd")):
        results = training(tmp_path / name, method=method)
    (study,) = read_studies([tmp_path / "a", tmp_path / "b", tmp_path / "c"])
    assert study["method_names"] == ["pcgrad", "gd", "gd (c)"]
    assert study["results"]["methods"]["pcgrad"]["tasks"]["left"]["accuracy"]["mean"] == 0.5
    assert study["results"]["methods"]["pcgrad"]["cost"]["num_backward"] == 3
    assert study["results"]["tasks"]["offset"]["metrics"]["rmse"]["higher_is_better"] is False
    first, last = study["runs"][0], study["runs"][-1]
    for ours, theirs in zip(last["history"], results["history"], strict=True):
        assert ours["at"] == theirs["epoch"] + 1
        assert {key: ours[key] for key in ("losses", "optimizer_steps")} == {
            key: theirs[key] for key in ("losses", "optimizer_steps")
        }
        assert ours["validation"]["left"] == {"accuracy": theirs["validation"]["left"]["accuracy"]}
    assert [point["step"] for point in first["trace"]] == [1, 10, 20]
    assert first["trace"][0]["cosines"]
    assert study["made"][0] == ["Date", "2026-03-04"]
    assert study["made"][3] == ["Wall time", "7.5 s in 3 runs"]
    assert study["notes"] == []


def test_a_training_of_an_older_version_has_no_curves_or_is_named(tmp_path: Path) -> None:
    results = training(tmp_path / "run")
    older = {key: results[key] for key in results if key not in {"history", "trace", "versions", "made"}}
    (tmp_path / "run" / "results.json").write_text(json.dumps(older))
    (study,) = embedded(page(read_studies([tmp_path / "run"])))
    assert study["results"]["methods"]["pcgrad"]["tasks"]["left"]["accuracy"]["mean"] == 0.5
    assert study["runs"][0]["history"] == study["runs"][0]["trace"] == []
    assert study["notes"] == ["The curves of run are missing: its results.json has none."]
    (tmp_path / "run" / "results.json").write_text(json.dumps({**older, "version": 1}))
    with pytest.raises(ReportError, match="has version 1; this torchmto reads version 2"):
        read_studies([tmp_path / "run"])


def test_only_a_score_that_is_delta_m_is_drawn_as_one(tmp_path: Path) -> None:
    results = training(tmp_path / "run")
    (study,) = read_studies([tmp_path / "run"])
    assert [entry["score"] for entry in study["runs"][0]["history"]] == [None, None]
    results["measure"] = "delta_m: mean relative improvement over the given single-task values"
    (tmp_path / "run" / "results.json").write_text(json.dumps(results))
    (study,) = read_studies([tmp_path / "run"])
    assert [entry["score"] for entry in study["runs"][0]["history"]] == [h["score"] for h in results["history"]]


def test_single_task_runs_are_the_baselines_of_the_others(tmp_path: Path) -> None:
    training(tmp_path / "joint", value=0.6)
    training(tmp_path / "other", value=0.6, seed=1)
    for task in TASKS:
        training(tmp_path / f"{task}0", tasks=[task], method="gd", value=0.5)
        training(tmp_path / f"{task}7", tasks=[task], method="gd", value=0.7, seed=7)
    (study,) = read_studies(sorted(tmp_path.iterdir()))
    methods = study["results"]["methods"]
    assert study["method_names"] == ["pcgrad", "pcgrad (other)"]
    # Two tasks of accuracy and one of rmse: 20 % better, 20 % better, 20 % worse than the run of the same seed.
    assert methods["pcgrad"]["delta_m"]["mean"] == pytest.approx(20 / 3)
    # No baseline has seed 1: the mean of both, 0.6, is the reference.
    assert methods["pcgrad (other)"]["delta_m"]["mean"] == pytest.approx(0)
    assert study["results"]["single_task"]["tasks"]["left"]["accuracy"]["mean"] == pytest.approx(0.6)
    assert "the run left0" in study["baseline"]
    assert [run["task"] for run in study["runs"]].count("left") == 2
    joint = study["runs"][0]["history"][-1]
    assert (joint["at"], joint["batches"], joint["optimizer_steps"]) == (2, 20, 20)
    assert [run["trace"] for run in study["runs"] if run["task"]] == [[]] * 6


def test_without_baselines_the_page_says_which_are_missing(tmp_path: Path) -> None:
    training(tmp_path / "joint")
    training(tmp_path / "left", tasks=["left"])
    (study,) = read_studies([tmp_path / "joint", tmp_path / "left"])
    method = study["results"]["methods"]["pcgrad"]
    assert method["delta_m"] is None
    assert method["reason"] == "no single-task run of right, offset on this data is among the folders"
    (alone,) = read_studies([tmp_path / "left"])
    assert alone["results"]["methods"]["pcgrad"]["reason"] == "it is a single-task run itself"


@pytest.mark.parametrize("kind", ["content", "source"])
def test_other_files_are_other_data(tmp_path: Path, kind: str) -> None:
    training(tmp_path / "joint", value=0.6, **{kind: "one"})
    for task in TASKS:
        training(tmp_path / task, tasks=[task], **{kind: "other" if task == "right" else "one"})
    joint, _ = read_studies([tmp_path / "joint", *(tmp_path / task for task in TASKS)])
    reason = joint["results"]["methods"]["pcgrad"]["reason"]
    assert reason == "no single-task run of right on this data is among the folders"


def test_a_metrics_direction_is_its_tasks(tmp_path: Path) -> None:
    for name, tasks, value in (("joint", ["left", "right"], 0.6), ("l", ["left"], 0.5), ("r", ["right"], 0.5)):
        results = training(tmp_path / name, tasks=tasks, value=value)
        results["higher_is_better"] = {task: {"accuracy": task == "left"} for task in tasks}
        (tmp_path / name / "results.json").write_text(json.dumps(results))
    (study,) = read_studies([tmp_path / name for name in ("joint", "l", "r")])
    assert study["results"]["methods"]["pcgrad"]["delta_m"]["mean"] == pytest.approx(0)
    better = [study["results"]["tasks"][task]["metrics"]["accuracy"]["higher_is_better"] for task in ("left", "right")]
    assert better == [True, False]


def test_a_comparisons_single_task_values_serve_training_runs_on_the_same_data(tmp_path: Path) -> None:
    results = comparison(tmp_path / "compared")
    training(tmp_path / "run", method="gd")
    _, study = read_studies([tmp_path / "run", tmp_path / "compared"])
    singles = {t: results["single_task"]["tasks"][t][a["primary_metric"]]["mean"] for t, a in results["tasks"].items()}
    expected = delta_m(dict.fromkeys(TASKS, 0.5), singles, {"left": True, "right": True, "offset": False})
    assert study["results"]["methods"]["gd"]["delta_m"]["mean"] == pytest.approx(expected)
    assert study["baseline"] == "the comparison compared"


def test_missing_runs_are_said(tmp_path: Path) -> None:
    comparison(tmp_path / "run")
    (tmp_path / "run" / "runs" / "run0-seed0.json").unlink()
    (study,) = read_studies([tmp_path / "run"])
    assert "1 runs have no file" in study["notes"][0]


def test_one_page_for_several_folders(tmp_path: Path) -> None:
    comparison(tmp_path / "one")
    training(tmp_path / "two")
    assert main(["report", str(tmp_path / "one"), str(tmp_path / "two")]) == 0
    texts = [(tmp_path / name / "report.html").read_text() for name in ("one", "two")]
    assert texts[0] == texts[1]
    assert len(embedded(texts[0])) == 2
    assert main(["report", str(tmp_path / "two"), "--out", str(tmp_path / "page.html")]) == 0
    assert len(embedded((tmp_path / "page.html").read_text())) == 1


def test_a_folder_given_twice_counts_once(tmp_path: Path) -> None:
    training(tmp_path / "run")
    training(tmp_path / "single", tasks=("left",))
    experiment(tmp_path / "found")
    (tmp_path / "link").symlink_to(tmp_path / "run")
    once = [tmp_path / "run", tmp_path / "single", tmp_path / "found"]
    again = [tmp_path / "single" / ".", tmp_path / "link", *(tmp_path / "found" / "arms").iterdir()]
    assert read_studies([*once, *again]) == read_studies(once)


def test_an_experiment_shows_its_tables_its_plots_and_its_comparisons(tmp_path: Path) -> None:
    experiment(tmp_path / "found", text=HOSTILE)
    whole, arm = embedded(page(read_studies([tmp_path / "found"])))
    assert (whole["title"], arm["title"]) == ("found", "found: first")
    assert whole["tables"][0]["rows"] == [[HOSTILE, "1.0"]]
    assert [(name, bool(svg)) for name, _, svg in whole["plots"]] == [("dot", True)]
    assert "Not complete" in whole["notes"][0]
    assert "Smoke run: 2 seeds." in whole["notes"]
    assert whole["notes"][-1] == "More plots are in found/plots: other.png."
    assert arm["method_names"] == list(METHODS[:2])


def test_large_pages_lose_points_of_curves_but_never_the_table(tmp_path: Path) -> None:
    results = comparison(tmp_path / "run", points=100)
    studies = read_studies([tmp_path / "run"])
    room = 60_000
    text = _fitting(studies, room)
    (study,) = json.loads(text)["studies"]
    assert len(text.encode()) <= room
    assert study["results"] == results
    assert "fewer points" in study["notes"][0]
    trace = next(run["trace"] for run in study["runs"] if run["trace"])
    assert 3 <= len(trace) < 100
    assert (trace[0]["step"], trace[-1]["step"]) == (1, 100)
    (bare,) = json.loads(_fitting(studies, len(json.dumps(results)) + 2000))["studies"]
    assert (bare["runs"], bare["results"]) == ([], results)
    with pytest.raises(ValueError, match="too many methods"):
        _fitting(studies, 100)


def _break(folder: Path, what: str) -> None:
    match what:
        case "not JSON":
            (folder / "results.json").write_text("{")
        case "foreign":
            (folder / "results.json").write_text('{"a": 1}')
        case "unfinished":
            (folder / "results.json").unlink()
        case "another version":
            text = (folder / "results.json").read_text()
            (folder / "results.json").write_text(text.replace('"schema_version": 1', '"schema_version": 3'))
        case "no figures":
            (folder / "results.json").write_text(
                '{"schema_version": 1, "methods": {"gd": {}}, "tasks": {}, "config": {}}'
            )
        case "broken run":
            path = folder / "runs" / "run0-seed0.json"
            path.write_text(path.read_text().replace('"epoch": 0', '"epoch": 7'))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("not JSON", "is broken: it isn't JSON"),
        ("foreign", "holds neither a comparison nor a training run nor an experiment"),
        ("unfinished", "has no results.json: it isn't finished"),
        ("another version", "has version 3; this torchmto reads versions 1 and 2"),
        ("no figures", "doesn't hold what it should: KeyError"),
        ("broken run", "its checksum doesn't match"),
    ],
)
def test_broken_folders_are_named(tmp_path: Path, what: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    comparison(tmp_path / "run")
    _break(tmp_path / "run", what)
    with pytest.raises(ReportError, match=re.escape(message)):
        read_studies([tmp_path / "run"])
    assert main(["report", str(tmp_path / "run")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run" / "report.html").exists()


def test_a_folder_that_is_missing_or_empty(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="There is no folder"):
        read_studies([tmp_path / "nowhere"])
    with pytest.raises(ReportError, match="isn't a run's folder"):
        read_studies([tmp_path])
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "no" / "page.html")]) == 2


def test_the_page_says_when_and_where_its_runs_were_made(tmp_path: Path) -> None:
    comparison(tmp_path / "old")
    assert [text for _, text in read_studies([tmp_path / "old"])[0]["made"]] == ["not recorded"] * 4
    made = {"date": "2026-03-04T05:06:07+00:00", "machine": "Linux x86_64, 2 cores", "revision": "abc"}
    comparison(tmp_path / "new", made=made)
    assert read_studies([tmp_path / "new"])[0]["made"] == [
        ["Date", "2026-03-04"],
        ["Machine", "Linux x86_64, 2 cores"],
        ["Revision", "abc"],
        ["Wall time", "7.0 min in 14 runs"],
    ]


def settled(results: dict[str, Any], p: float) -> dict[str, Any]:
    """The same results with one difference of this corrected p value, and no other."""
    changed: dict[str, Any] = json.loads(json.dumps(results))
    for entry in changed["versus"]["methods"].values():
        for difference in (entry["delta_m"], *(task["change"] for task in entry["tasks"].values())):
            if difference:
                difference["p_holm"] = 1.0
    changed["versus"]["methods"]["pcgrad"]["tasks"]["left"]["change"]["p_holm"] = p
    return changed


def test_a_warning_is_in_the_page(tmp_path: Path) -> None:
    results = settled(comparison(tmp_path / "run", seeds=3), 0.06)
    for entry in (*results["methods"].values(), results["single_task"]):
        entry["tasks"]["right"]["accuracy"] = {"mean": 0.11, "std": 0.004}
    results["tasks"]["right"]["metrics"]["accuracy"]["chance"] = 0.1
    (tmp_path / "run" / "results.json").write_text(json.dumps(results))
    assert main(["report", str(tmp_path / "run")]) == 0
    (study,) = embedded((tmp_path / "run" / "report.html").read_text())
    guessed, unsettled = study["warnings"]
    assert (
        guessed == "Every method is at chance in right: nobody has learnt anything there, and differences mean nothing."
    )
    assert unsettled.startswith(
        "Nothing is settled: after correction no method differs significantly from gd over 3 seeds"
    )


@pytest.mark.parametrize(
    ("mean", "std", "guessed"),
    [
        (0.02, 0.0, True),
        (0.11, 0.01, True),
        (0.1, None, True),
        (0.13, 0.0, False),
        (0.5, 0.57, False),
        (None, None, False),
    ],
)
def test_a_seed_that_has_learnt_is_not_at_chance(tmp_path: Path, mean: float, std: float, guessed: bool) -> None:
    results = settled(comparison(tmp_path / "run"), 0.04)
    results["single_task"] = None
    results["tasks"]["left"]["metrics"]["accuracy"]["chance"] = 0.1
    for method in results["methods"].values():
        method["tasks"]["left"]["accuracy"] = {"mean": mean, "std": std}
    assert bool(warnings(results)) is guessed


def test_a_warning_where_nothing_is_settled_or_learnt(tmp_path: Path) -> None:
    results = settled(comparison(tmp_path / "run"), 0.04)
    assert warnings(results) == []
    assert "Nothing is settled" in warnings(settled(results, 0.06))[0]
    results["config"]["seeds"] = 1
    assert warnings(results)[0].startswith("One seed")
    results["config"]["seeds"] = 2
    for task, chance in (("left", 0.5), ("right", 0.1)):
        results["tasks"][task]["metrics"]["accuracy"]["chance"] = chance
        for method, value in zip(results["methods"].values(), (0.2, 0.505, 0.49, 0.51), strict=True):
            method["tasks"][task]["accuracy"] = {"mean": value, "std": 0.004}
    alone = results["single_task"]["tasks"]["left"]["accuracy"]
    alone["mean"] = 0.9
    assert warnings(results) == [
        "Every method is at chance in left: the single-task models aren't, and differences between methods mean nothing there."
    ]
    alone["mean"] = 0.5
    assert warnings(results) == [
        "Every method is at chance in left: nobody has learnt anything there, and differences mean nothing."
    ]
    results["methods"]["gd"]["tasks"]["left"]["accuracy"]["mean"] = 0.52
    assert warnings(results) == []


def test_what_is_vendored_has_its_licence_and_is_what_its_readme_says() -> None:
    vendor = Path(report.__file__).parent / "vendor"
    readme = (vendor / "README.md").read_text()
    scripts = {path.name.removesuffix(".min.js") for path in vendor.glob("*.js")}
    assert (
        scripts
        == {path.stem for path in vendor.glob("*.LICENSE")}
        == set(re.findall(r"^\| `([\w-]+)\.min", readme, re.MULTILINE))
    )
    version = re.search(r"plotly\.js-cartesian-dist-min` ([\d.]+)", readme)
    assert version is not None
    assert f"v{version[1]}" in (vendor / "plotly-cartesian.min.js").read_text()[:200]
