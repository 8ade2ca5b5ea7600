"""`torchmto compare` as a user meets it: files, exit codes, interruption, foreign folders."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from torchmto import cli

TINY = ["--epochs", "1", "--data.options.train", "64", "--data.options.validation", "200", "--data.options.test", "200"]


def compare(out, *more):
    return cli.main(["compare", "--out", str(out), "--jobs", "1", *TINY, *more])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("compare") / "new" / "folder"
    assert compare(out, "--methods", "gd,wpcgrad(mode=pairwise)", "--seeds", "2") == 0
    return out


def contents(path):
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def test_writes_results_and_plots(folder):
    results = json.loads((folder / "results.json").read_text())
    assert results["schema_version"] == 2
    assert list(results["methods"]) == ["gd", "wpcgrad(mode=pairwise)"]
    delta = results["methods"]["gd"]["delta_m"]
    assert delta["mean"] == pytest.approx(sum(delta["per_seed"]) / 2)
    assert delta["ci95"] > 0
    assert set(results["single_task"]["tasks"]) == {"left", "right", "offset"}
    assert results["versions"]["torch"]
    assert results["config"]["epochs"] == 1
    assert (
        (folder / "results.csv").read_text().startswith("method,task,quantity,mean,spread,spread_is\nsingle_task,left,")
    )
    assert (folder / "results.md").read_text().startswith("| method | Δm % |")
    assert (folder / "plots" / "learning_curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_same_command_again_does_nothing_twice(folder, capsys):
    runs = {p: p.stat().st_mtime_ns for p in (folder / "runs").iterdir()}
    results = (folder / "results.json").read_bytes()
    assert compare(folder, "--methods", "gd,wpcgrad(mode=pairwise)", "--seeds", "2") == 0
    assert {p: p.stat().st_mtime_ns for p in (folder / "runs").iterdir()} == runs
    assert (folder / "results.json").read_bytes() == results
    assert "single-task" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["runs[/v2]", "[v2]", ":fire:", "a\\"])
def test_a_folders_name_is_no_markup(folder, tmp_path, name, capsys):
    out = tmp_path / name
    shutil.copytree(folder, out)
    assert compare(out, "--methods", "gd,wpcgrad(mode=pairwise)", "--seeds", "2") == 0
    assert f"{out}/results.json" in capsys.readouterr().out


def test_a_file_has_the_verbs_own_options_too(tmp_path, capsys):
    file, out = tmp_path / "c.yaml", tmp_path / "out"
    options = ["methods: [gd, 'wpcgrad(mode=pairwise, priority=uw)']", "seeds: 7", "jobs: 1", f"out: {out}"]
    settings = ["data: {name: digits, options: {train: 64}}", "epochs: 1", "lr: 0.01"]
    file.write_text("\n".join([*options, *settings]))
    assert cli.main(["compare", "--config", str(file), "--seeds", "1"]) == 0
    config = json.loads((out / "results.json").read_text())["config"]
    assert config["methods"] == ["gd", "wpcgrad(mode=pairwise, priority=uw)"]
    assert (config["seeds"], config["epochs"], config["optimizer"]["lr"]) == (1, 1, 0.01)
    for line, words in (
        ("sedes: 2", "no setting `sedes`"),
        ("config: c.yaml", "no setting `config`"),
        ("seeds: x", "seeds"),
    ):
        file.write_text(line)
        assert cli.main(["compare", "--config", str(file)]) == 2
        assert words in capsys.readouterr().err


def test_one_seed_has_no_interval(tmp_path):
    assert compare(tmp_path / "x", "--methods", "gd", "--seeds", "1") == 0
    results = json.loads((tmp_path / "x" / "results.json").read_text())
    assert results["methods"]["gd"]["delta_m"]["ci95"] is None


def test_tuning_with_bars_runs_the_winner_once_more_where_it_is_kept(tmp_path, capsys):
    pytest.importorskip("optuna")
    assert compare(tmp_path / "x", "--methods", "gd", "--seeds", "1", "--tune", "2", "--tasks=[left,right]") == 0
    assert "3 of 3  gd, seed 0" in capsys.readouterr().out


def test_other_settings_are_refused_and_nothing_is_touched(folder, capsys):
    before = contents(folder)
    assert compare(folder, "--methods", "gd", "--seeds", "2") == 2
    assert "methods is ['gd', 'wpcgrad(mode=pairwise)'] there and ['gd'] here" in capsys.readouterr().err
    assert contents(folder) == before


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("runs/gd-seed0-*.json", "{", "is broken"),
        ("runs/gd-seed0-*.json", None, "checksum"),
        ("runs/notes.txt", "mine", "doesn't belong"),
        ("config.json", "", "is broken"),
    ],
)
def test_broken_and_foreign_files_are_named_and_kept(folder, name, text, message, capsys):
    before = contents(folder)
    path = next(iter(folder.glob(name)), folder / name)
    try:
        path.write_text(path.read_text().replace('"accuracy": 0.', '"accuracy": 1.') if text is None else text)
        damaged = contents(folder)
        assert compare(folder, "--methods", "gd,wpcgrad(mode=pairwise)", "--seeds", "2") == 2
        error = capsys.readouterr().err
        assert message in error
        assert path.name in error
        assert contents(folder) == damaged
    finally:
        if str(path.relative_to(folder)) in before:
            path.write_bytes(before[str(path.relative_to(folder))])
        else:
            path.unlink()


def test_a_folder_of_something_else_is_refused(tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("mine")
    assert compare(tmp_path, "--methods", "gd") == 2
    assert "isn't empty" in capsys.readouterr().err
    assert contents(tmp_path) == {"thesis.tex": b"mine"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "no_such"], "Unknown method `no_such`"),
        (["--methods", ""], "Methods should look like"),
        (["--methods", "gd(c=1)"], "Method `gd`"),
        (["--methods", "cagrad(c=-1)"], "Found `c = -1`"),
        (["--methods", "wpcgrad(priority={middle: 1.0})"], "Unknown task `middle`"),
        (["--data", "no_such"], "should be one of digits"),
        (["--data", "digts"], "Did you mean `digits`?"),
        (["--model", "convnt"], "Did you mean `convnet`?"),
        (["--epoch", "1"], "Did you mean `--epochs`?"),
        (["--method", "gd"], "method"),
        (["--data-option", "train=3"], "no option `--data-option`"),
        (["--executor", "cloud"], "should be one of local, ray, slurm"),
        (["--problem", "no_such.py:farm"], "There is no file `no_such.py`"),
        (["--problem", "digits", "--problem.trian", "64"], "Did you mean `train`?"),
        (["--data", "digits:somewhere"], "takes no path"),
        (["--data", "nyuv2:/no/such/file.npz"], "/no/such/file.npz"),
        (["--data.options.size", "3"], "has no option `size`"),
        (["--seeds", "0"], "seeds"),
        (["--epochs", "x"], "epochs"),
        (["--learning-rate", "-1"], "optimizer.lr"),
        (["--device", "abacus"], "device of this machine"),
        (["--model", "no_such"], "should be one of"),
        (["--data.options.train", "abc"], "takes an int for `train`"),
        (["--model.options.widths", "3"], "an iterable"),
    ],
)
def test_wrong_usage_ends_with_2_before_anything_is_written(tmp_path, arguments, message, capsys):
    out = tmp_path / "x"
    assert cli.main(["compare", "--out", str(out), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


def test_ctrl_c_keeps_finished_runs_and_says_how_to_go_on(tmp_path, capsys):
    out = tmp_path / "x"
    arguments = ["compare", "--out", str(out), "--methods", "gd,sequential", "--seeds", "2", *TINY]
    arguments[arguments.index("64")] = "640"
    process = subprocess.Popen(
        [sys.executable, "-m", "torchmto", *arguments, "--jobs", "2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    try:
        while not list(out.glob("runs/*.json")):
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate()
    finally:
        process.kill()
    assert process.returncode == 130, error
    assert "what is finished is kept" in error
    assert f"torchmto compare --out {out}" in error
    assert "Traceback" not in error
    finished = {p.name: p.read_bytes() for p in (out / "runs").iterdir()}
    assert 1 <= len(finished) < 10
    assert not (out / "results.json").exists()
    while _alive(process.pid):  # no worker outlives the command
        time.sleep(0.1)

    capsys.readouterr()
    assert cli.main([*arguments, "--jobs", "1"]) == 0
    assert f"{len(finished)} of 10 runs are finished already" in capsys.readouterr().out
    assert {name: (out / "runs" / name).read_bytes() for name in finished} == finished
    assert len(list((out / "runs").iterdir())) == 10
    assert (out / "results.json").exists()


def _alive(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
