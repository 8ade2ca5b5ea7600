"""Whose folder it is, for all verbs; what is exported can be evaluated; damaged files are named."""

import errno
import json
import os
import shutil

import numpy as np
import pytest
import yaml
from PIL import Image

from torchmto.cli import main
from torchmto.lab.data.files import load_rgb, read_names
from torchmto.lab.run.checkpoint import CheckpointFolder
from torchmto.lab.run.logs import make_loggers

SMALL = ["--data.options", "{train: 32, validation: 16, test: 16}", "--batch-size", "16", "--epochs", "1"]
SMALL += ["--model.options", "{widths: [4, 4]}"]
TRAIN = ["train", *SMALL, "--loggers", "csv"]
COMPARE = ["compare", *SMALL, "--methods", "gd", "--seeds", "1", "--jobs", "1"]


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    out = tmp_path_factory.mktemp("folders") / "comparison"
    assert main([*COMPARE, "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("folders") / "trained"
    assert main([*TRAIN, "--checkpoint_every", "1", "--keep", "10", "--out", str(out)]) == 0
    return out


def test_nobody_writes_into_anothers_folder(tmp_path, comparison, trained, capsys):
    for source, command in ((comparison, TRAIN), (trained, COMPARE)):
        out = tmp_path / source.name
        shutil.copytree(source, out)
        (out / "results.json").unlink()  # also where it isn't finished
        before = contents(out)
        capsys.readouterr()
        assert main([*command, "--out", str(out)]) == 2
        assert contents(out) == before
        assert "--out" in capsys.readouterr().err


@pytest.mark.parametrize("where", ["runs", "."])
def test_file_browsers_notes_are_nobodys(tmp_path, comparison, where):
    out = tmp_path / "copy"
    shutil.copytree(comparison, out)
    (out / where / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    assert main([*COMPARE, "--out", str(out)]) == 0


@pytest.mark.parametrize("name", ["notes.txt", "step-abc.ckpt"])
def test_a_run_goes_on_beside_a_stray_file(tmp_path, trained, name):
    out = tmp_path / "run"
    shutil.copytree(trained, out)
    (out / "results.json").unlink()
    CheckpointFolder(str(out / "checkpoints")).last().unlink()
    (out / "checkpoints" / name).write_bytes(b"not a checkpoint")
    assert main(["train", "--resume", "--out", str(out)]) == 0
    first, second = (json.loads((folder / "results.json").read_text())["test"] for folder in (trained, out))
    assert first == second


def test_exported_weights_can_be_evaluated(tmp_path, trained):
    out = tmp_path / "run"
    shutil.copytree(trained, out)
    tables = []
    for weights in ("best", str(out / "model.safetensors")):
        assert main(["evaluate", "--run", str(out), "--weights", weights]) == 0
        tables.append(json.loads((out / "evaluation-test.json").read_text())["metrics"])
    assert tables[0] == tables[1]


@pytest.mark.parametrize(("verb", "name"), [("evaluate", "run"), ("evaluate", "out"), ("predict", "out")])
def test_a_file_says_which_run_is_meant(tmp_path, trained, verb, name, capsys):
    (tmp_path / "c.yaml").write_text(f"{name}: {trained}\nsplit: validation\n")
    assert main([verb, "--config", str(tmp_path / "c.yaml")]) == 0
    assert "validation" in capsys.readouterr().out
    assert main([verb, "--config", str(tmp_path / "c.yaml"), "--out", str(tmp_path / "none")]) == 2


@pytest.mark.parametrize("name", ["config.yaml", "environment.json", "metrics.csv"])
def test_damaged_records_are_replaced_and_damaged_settings_named(tmp_path, trained, name, capsys):
    out = tmp_path / "run"
    shutil.copytree(trained, out)
    (out / "results.json").unlink()
    (out / name).write_bytes(b"3" if name.endswith("json") else b"\xff\xfe\x00 garbage\n1,2\n")
    before = (out / name).read_bytes()
    capsys.readouterr()
    code = main(["train", "--resume", "--out", str(out)])
    error = capsys.readouterr().err
    assert "Traceback" not in error
    if code:
        assert name in error
        assert (out / name).read_bytes() == before
    else:
        assert name != "config.yaml"


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_damaged_picture_is_named(tmp_path, kind):
    path = tmp_path / f"a.{kind.lower()}"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 20, 3), dtype=np.uint8)).save(path, format=kind)
    assert load_rgb(path, "celeba").shape == (1, 3, 30, 20)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match=rf"{path.name}` isn't a readable picture"):
        load_rgb(path, "celeba")


def test_a_mistake_doesnt_take_the_folder(tmp_path):
    assert main([*TRAIN, "--method.weights", "{middle: 1.0}", "--out", str(tmp_path / "x")]) == 2
    assert not (tmp_path / "x").exists()


PREDICT = ["predict", "--count", "2"]
DIAGNOSE = ["diagnose", *SMALL, "--batches", "2"]
BENCH = ["bench", "--models", "pinn", "--tasks", "2", "--methods", "gd", "--repeats", "1", "--no-peers", "--no-memory"]
REPRODUCE = ["reproduce", "theory", "--budget", "0.001"]


@pytest.mark.parametrize(
    "command", [TRAIN, COMPARE, PREDICT, ["evaluate"], DIAGNOSE, BENCH, REPRODUCE, ["report"]], ids=lambda c: c[0]
)
def test_a_full_disk_is_said_in_a_line_by_every_verb(tmp_path, trained, command, monkeypatch, capsys):
    out = tmp_path / "out"
    if command[0] in {"predict", "evaluate", "report"}:
        shutil.copytree(trained, out)

    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        capsys.readouterr()
        assert main([*command, *([str(out)] if command == ["report"] else ["--out", str(out)])]) in {1, 2}
    error = capsys.readouterr().err
    assert "No space left on device" in error
    assert str(out) in error
    assert ".tmp" not in error, "nobody knows a temporary file's name"
    assert "Traceback" not in error
    assert len(error.strip().splitlines()) <= 2
    if command == COMPARE:  # and there is nothing to clean up before the next try
        assert main([*command, "--out", str(out)]) == 0


def test_a_folder_under_a_file_is_refused(tmp_path, capsys):
    (tmp_path / "file").touch()
    for command in (TRAIN, COMPARE, DIAGNOSE, BENCH, REPRODUCE):
        capsys.readouterr()
        assert main([*command, "--out", str(tmp_path / "file" / "out")]) in {1, 2}
        error = capsys.readouterr().err
        assert "Not a directory" in error
        assert "Traceback" not in error


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../b", "C:\\secret", "..\\secret"])
def test_lists_of_names_dont_lead_out_of_their_folder(tmp_path, name):
    (tmp_path / "list.txt").write_text(f"0001\n{name}\n")
    with pytest.raises(ValueError, match="inside the data set's folder"):
        read_names(tmp_path / "list.txt", "nyuv2")
    (tmp_path / "list.txt").write_text("0001\nsub/0002\n")
    assert read_names(tmp_path / "list.txt", "nyuv2") == ["0001", "sub/0002"]


@pytest.mark.parametrize("verb", [["evaluate"], ["predict"], ["train", "--resume"]])
@pytest.mark.parametrize("section", ["data", "model"])
def test_a_folders_own_settings_run_no_file_but_the_one_it_was_made_with(tmp_path, capsys, verb, section):
    other = tmp_path / "other.py"
    other.write_text("raise SystemExit('other.py was run')\n")
    for name, options in ((f"{other}:f", {}), ("torchmto.lab.reproduce.copies:copies", {"of": f"{other}:f"})):
        (tmp_path / "config.yaml").write_text(yaml.safe_dump({section: {"name": name, "options": options}}))
        assert main([*verb, "--out", str(tmp_path)]) == 2
        assert "another version of the file" in capsys.readouterr().err


@pytest.mark.slow  # MLflow sets up its database
def test_mlflow_keeps_its_files_in_the_runs_folder(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert main([*TRAIN[:-1], "csv,mlflow", "--out", "run"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/run/mlflow.db")
    run = client.get_run((tmp_path / "run" / ".mlflow-run").read_text())
    assert run.info.status == "FINISHED"
    assert {"lr", "loss/left", "validation/score"} <= set(run.data.metrics)


@pytest.mark.slow
def test_wandb_goes_on_with_the_run_it_began(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for step in (1, 2):
        (logger,) = make_loggers(["wandb"], tmp_path, {"epochs": 1}, resume_step=step - 1 or None)
        logger.log_metrics({"loss": 0.5}, step)
        logger.finalize("success")
    files = list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert {file.name for file in files} == {f"run-{(tmp_path / '.wandb-run').read_text()}.wandb"}
