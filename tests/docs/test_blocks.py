"""Every block of the documentation is run or parsed: none can say what isn't so any more."""

import importlib
import re
import shlex
import textwrap
import tomllib
from pathlib import Path

import pytest

from torchmto import cli
from torchmto.lab.reproduce.recipe import load_recipe
from torchmto.lab.run.config import config_of
from torchmto.lab.run.folder import read_yaml

ROOT = Path(__file__).parents[2]
GENERATED = ("methods", "api")
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text("utf-8")
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
    if path.parent.name not in GENERATED
}
RUN_ELSEWHERE = {
    "docs/coming-from.md": "test_coming_from.py",
    "docs/how-to/nuscenes.md": "test_driving.py",
    "docs/scaling.md": "test_scaling.py",
}
FENCED = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)
INDENTED = re.compile(r"(?<=\n\n)(?: {4}(?! *[-*|]).*\n)+")
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
TARGETS = set(re.findall(r"^([\w-]+)[\w -]*:", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))


def blocks(text):
    """Language and content of every block; indented ones that start with a command are shell."""
    found = [(language, textwrap.dedent(body)) for _, language, body in FENCED.findall(text)]
    for body in INDENTED.findall(FENCED.sub("", text)):
        if body.split()[0] in {"torchmto", "torchrun", "python", "pip", "make"}:
            found.append(("sh", textwrap.dedent(body)))
    return found


def lines_of(script):
    """The commands of a script, without comments and with continued lines joined."""
    joined = script.replace("\\\n", " ")
    return [words for line in joined.splitlines() if (words := shlex.split(line, comments=True))]


def check_command(words, monkeypatch):
    while "=" in words[0]:
        words = words[1:]
    if words[0] == "$":
        words = words[1:]
    program, *arguments = words
    if "torchmto" in words:  # as well behind torchrun, or python -m
        verb, *arguments = words[words.index("torchmto") + 1 :]
        monkeypatch.setattr(importlib.import_module(f"torchmto.cli.{verb}"), "run", lambda args: 0)
        assert cli.main([verb, *arguments]) == 0, words
    elif program == "python":
        assert (ROOT / arguments[0]).is_file(), words
    elif program == "make":
        assert {name for name in arguments if "=" not in name} <= TARGETS, words
    elif program == "pip":
        wanted = re.findall(r"\[([\w,]+)\]", " ".join(arguments))
        assert {extra for group in wanted for extra in group.split(",")} <= set(EXTRAS), words
    else:
        assert program == "export", words


@pytest.mark.parametrize("page", PAGES)
def test_every_block_is_a_test(page, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    text = PAGES[page]
    found = blocks(text)
    settings = [body for language, body in found if language == "yaml"]
    for name in re.findall(r"--config (\S+\.yaml)", text):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(
            (ROOT / name).read_text() if (ROOT / name).is_file() else settings[-1] if settings else "{}"
        )
    for language, body in found:
        if language == "python":
            assert ">>> " in body or page in RUN_ELSEWHERE, f"no test runs this block:\n{body}"
        elif language == "yaml":
            file = Path("block.yaml")  # as someone copies it: 2e-3 is a number there
            file.write_text(body)
            load_recipe("block.yaml") if "\narms:" in body else config_of(read_yaml(file)).validate()
        elif language == "toml":
            tomllib.loads(body)
        elif language in {"sh", "bash"}:
            for words in lines_of(body):
                check_command(words, monkeypatch)
        else:
            assert language == "text", f"a block in {language or 'no language'}:\n{body}"
