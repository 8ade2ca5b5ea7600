"""The dispatcher: verbs, exit codes, what reaches the terminal."""

import importlib
import io
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest

from torchmto import __version__, cli
from torchmto.cli import methods as methods_verb
from torchmto.cli._errors import UsageError, wrong_usage
from torchmto.lab.run import single
from torchmto.lab.run.config import RunConfig


def test_help_lists_every_verb_with_its_first_line(capsys):
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    for verb in cli.verbs():
        assert f"  {verb}" in text
    assert "List all methods with family, cost per batch and source." in text
    assert "130 interrupted" in text


def test_no_verb_and_unknown_verbs_are_wrong_usage(capsys):
    assert cli.main([]) == 2
    assert cli.main(["frobnicate"]) == 2
    assert "unknown verb 'frobnicate'" in capsys.readouterr().err
    assert cli.main(["methods", "--no-such-option"]) == 2
    assert cli.main(["_errors"]) == 2, "helpers are no verbs"


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"torchmto {__version__}\n"


@pytest.mark.parametrize("verb", cli.verbs())
def test_every_verb_has_help(verb, capsys):
    assert cli.main([verb, "--help"]) == 0
    assert capsys.readouterr().out.startswith("usage: torchmto ")


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (UsageError("no such thing"), 2, "torchmto methods: no such thing"),
        (KeyboardInterrupt(), 130, "Interrupted"),
        (KeyboardInterrupt("go on like this"), 130, "go on like this"),
        (RuntimeError("broke"), 1, "RuntimeError: broke"),
        (ImportError("pip install 'torchmto[lab]'"), 1, "pip install"),
        (SystemExit(2), 2, ""),
        (SystemExit("not today"), 1, "not today"),
    ],
)
def test_exit_codes(error, code, text, monkeypatch, capsys):
    def run(args):
        raise error

    monkeypatch.setattr(methods_verb, "run", run)
    assert cli.main(["methods"]) == code
    assert text in capsys.readouterr().err


def test_signal_handlers_are_put_back(monkeypatch):
    seen = []
    monkeypatch.setattr(methods_verb, "run", lambda args: seen.append(signal.getsignal(signal.SIGTERM)) or 0)
    before = signal.getsignal(signal.SIGTERM)
    assert cli.main(["methods"]) == 0
    assert seen == [signal.default_int_handler]
    assert signal.getsignal(signal.SIGTERM) == before


def test_only_the_users_mistakes_are_wrong_usage():
    for error in (ValueError("x"), TypeError("x"), FileNotFoundError("x")):
        with pytest.raises(UsageError, match="x"), wrong_usage():
            raise error
    with pytest.raises(RuntimeError), wrong_usage():
        raise RuntimeError


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["report", ".", "--ou", "page.html"], "Did you mean `--out`?"),
        (["datasets", "--he"], "no option `--he`"),
        (["bench", "--model", "mlp"], "Did you mean `--models`?"),
        (["bench", "--clock", "sun"], "clock"),
        (["train", "--tasks", "left,middle", "--out", "run"], "tasks left, right, offset. Found 'middle'"),
        (["train", "--data.tasks=middle", "--out", "run"], "Found 'middle'"),
        (["reproduce", "groups", "--seeds", "0"], "`seeds` should be an int > 0. Found 0."),
        (["reproduce", "groups", "--executor", "rai"], "Did you mean `ray`?"),
        (["reproduce", "groups", "--ray-address", "here"], "belongs to the executor `ray`"),
        (["methods", "--mark"], "--mark"),
        (["compare", "--method", "gd"], "no option `--method`. Did you mean `--methods`?"),
        (["train", "--method", "CAGard(c=1)", "--out", "run"], "Did you mean `cagrad`?"),
        (["train", "--method", "cagrad(d=1)", "--out", "run"], "no hyper-parameter `d`"),
        (["train", "--method", "cagrad(c=", "--out", "run"], "should look like"),
    ],
)
def test_one_grammar(arguments, message, capsys):
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    "content", [b"repeats: 1\nmodles: mlp\n", bytes(range(128, 256)), b"models: &x [*x]\n", b"tasks: [1, 2]\n"]
)
def test_every_verb_reads_options_from_a_file(tmp_path, content, capsys):
    (tmp_path / "bench.yaml").write_bytes(content)
    out = str(tmp_path / "out")
    assert cli.main(["bench", "--config", str(tmp_path / "bench.yaml"), "--out", out]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("verb", [verb for verb in cli.verbs() if verb != "methods"])
def test_null_in_a_file_is_an_option_that_isnt_given(verb, tmp_path):
    parser = importlib.import_module(f"torchmto.cli.{verb}").make_parser(verb)
    own = [action.dest for action in parser._actions if action.option_strings and action.dest not in NOT_IN_A_FILE]
    given = [word for action in parser._actions if action.required for word in (*action.option_strings[:1], "run")]
    names = [name for name in own if name not in RunConfig().as_dict() and "." not in name]
    (tmp_path / "null.yaml").write_text("".join(f"{name}: null\n" for name in names if f"--{name}" not in given))
    assert parser.parse_args([*given, "--config", str(tmp_path / "null.yaml")]) == parser.parse_args(given)


NOT_IN_A_FILE = {"help", "config"}


@pytest.mark.parametrize(
    "text", ["12e3", "1e-3", "010", "0x1F", "1:30", "Yes", "off", "1_000", "2024-01-31", "[1e3, no]"]
)
def test_a_flag_is_read_as_a_file_is(text, tmp_path):
    (tmp_path / "c.yaml").write_text(f"problem: {{use: 'farm.py:farm', tag: {text}}}\n")
    parser = importlib.import_module("torchmto.cli.train").make_parser("train")
    flag, file = (
        parser.parse_args(words).settings["data"]["options"]["tag"]
        for words in (["--problem", "farm.py:farm", "--problem.tag", text], ["--config", str(tmp_path / "c.yaml")])
    )
    assert (flag, type(flag)) == (file, type(file))


CORE_ONLY = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"jsonargparse", "torchmetrics", "yaml", "rich", "lightning_fabric", "transformers"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing())
from torchmto.cli import main, verbs
print({verb: main([verb, "--help"]) for verb in verbs()})
"""


def test_without_the_extra_every_verb_but_methods_says_what_to_install():
    done = subprocess.run([sys.executable, "-c", CORE_ONLY], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == str({verb: 0 if verb == "methods" else 1 for verb in cli.verbs()})
    assert len(done.stderr.splitlines()) == len(cli.verbs()) - 1
    assert all("pip install 'torchmto[lab]'" in line for line in done.stderr.splitlines())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("1: 2\n", "name 1"),
        ("problem: 3\n", "`problem` should be a reference"),
        ("problem: [farm.py:farm]\n", "`problem` should be a reference"),
        ("data: digits\nproblem: {use: digits}\n", "both say what is learnt"),
    ],
)
def test_settings_of_the_wrong_shape_are_one_line(tmp_path, content, message, capsys):
    file = tmp_path / "run.yaml"
    file.write_text(content)
    assert cli.main(["compare", "--config", str(file), "--out", str(tmp_path / "o")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


ENDLESS = "a: &a {data: {options: *a}}\n"
EXPLODING = "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10 if n else '0' * 10)}]\n" for n in range(10))


@pytest.mark.parametrize("content", [ENDLESS, EXPLODING], ids=["endless", "exploding"])
def test_a_recipe_that_explodes_is_one_line(tmp_path, content, capsys):
    file = tmp_path / "recipe.yaml"
    file.write_text(content)
    assert cli.main(["reproduce", str(file), "--out", str(tmp_path / "o")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("command", ["--help", "--version", "methods", "datasets", "reproduce", "train --print-config"])
def test_a_pipe_that_nobody_reads_ends_every_verb_without_a_word(command, monkeypatch, capsys):
    ours, theirs = os.pipe()
    os.close(ours)
    with os.fdopen(theirs, "w") as unread:
        monkeypatch.setattr(sys, "stdout", unread)
        assert cli.main(command.split()) == 1
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", ["run", "-run", "a run"])
def test_a_training_whose_output_nobody_reads_says_how_to_go_on(tmp_path, name, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train = Mock(side_effect=BrokenPipeError(32, "Broken pipe"))
    monkeypatch.setattr(single, "train", train)
    assert cli.main(["train", f"--out={name}"]) == 1
    program, *words = shlex.split(capsys.readouterr().err.partition("Go on with: ")[2])
    assert program == "torchmto"
    (tmp_path / name).mkdir()
    (tmp_path / name / "config.yaml").touch()
    assert cli.main(words) == 1
    assert train.call_args.args[1] == Path(name)
    assert train.call_args.kwargs["resume"]


@pytest.mark.parametrize(
    ("verb", "work"),
    [
        ("compare", "torchmto.lab.grid.plan.compare"),
        ("reproduce theory", "torchmto.lab.reproduce.reproduce"),
        ("diagnose", "torchmto.lab.diagnosis.runs.diagnose"),
        ("bench", "torchmto.lab.bench.timing.measure_times"),
        ("report .", "torchmto.lab.report.write_report"),
    ],
)
def test_an_interrupt_promises_only_what_there_is(verb, work, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["torchmto", *verb.split()])
    monkeypatch.setattr(work, Mock(side_effect=KeyboardInterrupt))
    assert cli.main() == 130
    error = capsys.readouterr().err
    kept = verb in {"compare", "reproduce theory"}
    assert ("what is finished is kept" in error, f"Go on with: torchmto {verb}\n" in error) == (kept, kept)
    assert kept or error.endswith("Interrupted.\n")


FULL = Path("/dev/full")


@pytest.mark.skipif(not FULL.exists(), reason="needs a full device")
def test_an_output_that_has_no_room_is_one_line(monkeypatch, capsys):
    with FULL.open("w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert cli.main(["--help"]) == 1
    assert capsys.readouterr().err == "torchmto: [Errno 28] No space left on device\n"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_an_output_without_a_letter_shows_another_in_its_place(encoding, monkeypatch):
    text = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", text)
    monkeypatch.setattr(methods_verb, "run", lambda args: print("Δm é") or 0)
    assert cli.main(["methods"]) == 0
    assert text.buffer.getvalue() == "Δm é\n".encode(encoding, "replace")


@pytest.mark.parametrize(
    ("command", "text", "where"),
    [
        ("train --print-config --config {file}", "epochs: 1\nepochs: 2\n", "line 2: the key `epochs`"),
        (
            "compare --config {file}",
            "seeds: 1\ndata:\n  options: {train: 64, 'train': 65}\n",
            "line 3: the key `train`",
        ),
        ("bench --config {file}", "repeats: 1\ntasks: '2'\nrepeats: 2\n", "line 3: the key `repeats`"),
        (
            "reproduce {file}",
            "study: comparison\nsummary: x\narms: {a: {methods: [gd]}, a: {}}\n",
            "line 3: the key `a`",
        ),
        ("train --print-config --method.options {file}", "{c: 1, c: 2}", "method.options.*the key `c`"),
        ("train --print-config --losses {file}", "{left: {loss: a, loss: b}}", "losses.*the key `loss`"),
    ],
)
def test_a_key_given_twice_is_refused(command, text, where, tmp_path, capsys):
    (tmp_path / "twice.yaml").write_text(text)
    file = str(tmp_path / "twice.yaml") if "\n" in text else text
    assert cli.main([word.format(file=file) for word in command.split()]) == 2
    error = capsys.readouterr().err
    assert re.search(f"{where} is given twice", error)
    assert len(error.splitlines()) == 1
