"""What SECURITY.md says of connections and of names in a report."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from chromium import chromium, require_chromium
from report_folders import comparison
from torchmto.lab.report import write_report

WATCH = """
import ipaddress, os, sys

def local(host):
    name = host.decode() if isinstance(host, bytes) else host
    if name in (None, "", "localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False

def watch(event, arguments):
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        address = arguments[1]
        far = isinstance(address, tuple) and not local(address[0])
    elif event in ("socket.getaddrinfo", "socket.gethostbyname"):
        address, far = arguments[0], not local(arguments[0])
    else:
        return
    if far:
        note(f"{event} {address}")
        raise PermissionError(f"{event} to {address}")

def note(line):
    with open(os.environ["WATCHED"], "a") as file:
        file.write(line + "\\n")

note("watching")
sys.addaudithook(watch)
"""
"""A `sitecustomize.py`: every process notes that it watches, and refuses and notes what leads away from this machine."""

SMALL = [
    "--data.options",
    "{train: 32, validation: 16, test: 16}",
    "--batch-size",
    "16",
    "--model.options",
    "{widths: [4, 4]}",
]
ONCE = [*SMALL, "--epochs", "1"]
COMPARE = ["compare", *ONCE, "--methods", "gd,pcgrad", "--seeds", "1", "--jobs", "2", "--out", "compared"]
VERBS = {
    "compare": [COMPARE, ["report", "compared"]],
    "train": [["train", *ONCE, "--out", "trained"], ["report", "trained"]],
    "diagnose": [["diagnose", *ONCE, "--batches", "2", "--out", "diagnosed"]],
    "reproduce": [["reproduce", "theory", "--budget", "0.001", "--out", "reproduced"]],
}


def watched(folder: Path, *command: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """Run Python in ``folder``; what it did, and what the watch noted."""
    (folder / "watch").mkdir(exist_ok=True)
    (folder / "watch" / "sitecustomize.py").write_text(WATCH)
    notes = folder / "notes"
    notes.unlink(missing_ok=True)
    path = os.pathsep.join([str(folder / "watch"), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "WATCHED": str(notes)}
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    return done, notes.read_text().splitlines()


def test_the_watch_sees_what_leads_away(tmp_path):
    away = "import socket; socket.create_connection(('192.0.2.1', 80), timeout=1)"
    done, notes = watched(tmp_path, "-c", away)
    assert done.returncode
    assert notes[0] == "watching"
    assert notes[1].startswith(("socket.getaddrinfo 192.0.2.1", "socket.connect ('192.0.2.1'"))


@pytest.mark.slow
@pytest.mark.parametrize("verb", VERBS)
def test_no_verb_connects_beyond_this_machine(tmp_path, verb):
    for command in VERBS[verb]:
        done, notes = watched(tmp_path, "-c", "from torchmto.cli import main; raise SystemExit(main())", *command)
        assert done.returncode == 0, done.stderr
        assert set(notes) == {"watching"}
        # Jobs are processes of their own, and watched, too.
        assert command is not COMPARE or len(notes) > 2


HOSTILE = (
    "</script><script>window.hacked=1;alert(1)</script>",
    "<!--<script>window.hacked=1",
    "\"'`><img src=x onerror=window.hacked=1>",
    "${window.hacked=1}{{window.hacked=1}}",
    "\u202eright to left\u2066\u200f",
    "two\nlines\tand\r\u2028more",
    "__proto__",
    "&lt;b&gt;&#0;",
    "long" * 2500,
)


def test_a_report_shows_hostile_names_as_text(tmp_path):
    require_chromium()
    run = tmp_path / "run"
    comparison(run, methods=("gd", *HOSTILE), tasks=("plain", *HOSTILE, "last"), points=2)
    write_report([run])
    with chromium(tmp_path) as browser:
        browser.open(run / "report.html")
        shown, table = browser.run(
            "return [[...document.querySelectorAll('#comparison tbody tr')].map(r => r.dataset.method),"
            " document.getElementById('comparison').textContent]"
        )
        assert browser.run("return [window.hacked, document.images.length]") == [None, 0]
        assert browser.log("browser") == []
    assert len(shown) == 1 + len(HOSTILE)
    for name in HOSTILE[:4]:
        assert name in shown
        assert name in table
