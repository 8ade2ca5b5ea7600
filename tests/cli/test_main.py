"""The dispatcher: verbs, exit codes, what reaches the terminal."""

import signal

import pytest

from torchmto import __version__, cli
from torchmto.cli import methods as methods_verb
from torchmto.cli._errors import UsageError, wrong_usage


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
