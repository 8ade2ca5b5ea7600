"""Disturbs `train`, `compare` and `reproduce` at random moments, goes on, and checks that they end as undisturbed ones do.

    python benchmarks/kill_verbs.py --kills 20
    python benchmarks/kill_verbs.py --kills 3 --verbs compare --ways ray --hazards "kill worker"

One cell of the table is a verb, a way to run it (`WAYS`) and a hazard (`HAZARDS`): the same command is begun again until it was
hit so many times, then once in peace. What must hold: a command that was hit ends, as do all of its processes; one that was
asked to stop says so without a traceback; the last one ends with 0, and the folder holds the files and figures of a calm run,
times apart. With torchrun: `kill_training.py --processes 2`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from kill_training import forked

from torchmto import cli

SIZES = {"train": 320, "validation": 32, "test": 32}
RECIPE = {
    "study": "comparison",
    "summary": "two small arms",
    "seeds": 1,
    "run": {"data": "digits", "data.options": SIZES, "epochs": 2, "batch_size": 16, "model": "mlp"},
    "arms": {"a": {"methods": ["gd", "wpcgrad"], "baselines": False}, "b": {"methods": ["pcgrad"], "baselines": False}},
}
"""A recipe is YAML, and so JSON."""
DIGITS = [f"--problem.{split}={size}" for split, size in SIZES.items()] + ["--model=mlp", "--data.batch_size=16"]
VERBS = {
    "train": [
        *DIGITS,
        "--method.name=wpcgrad",
        "--epochs=4",
        "--checkpoint_every=3",
        "--loggers=[csv]",
        "--log_every=1",
    ],
    "compare": [*DIGITS, "--methods=gd,wpcgrad", "--seeds=1", "--epochs=2", "--checkpoint_every=3"],
    "reproduce": ["{folder}/recipe.yaml"],
}
WAYS = {"here": ["--jobs=1"], "local": ["--jobs=2"], "ray": ["--jobs=2", "--executor=ray"]}
HAZARDS: dict[str, tuple[signal.Signals | None, str]] = {
    "kill": (signal.SIGKILL, "main"),
    "terminate": (signal.SIGTERM, "main"),
    "ctrl-c": (signal.SIGINT, "group"),
    "kill worker": (signal.SIGKILL, "worker"),
    "terminate worker": (signal.SIGTERM, "worker"),
    "interrupt worker": (signal.SIGINT, "worker"),
    "full disk": (None, "files"),
    "read-only": (None, "mount"),
    "clock": (signal.SIGKILL, "main"),
    "two owners": (None, "twice"),
}
PATIENCE = 300.0
DIFFERS = {"seconds", "wait_seconds", "made", "cost", "sha256", "data_wait", "seconds_per_epoch", "environment"}
"""What two undisturbed runs don't share: times, memory, and checksums over them."""


class FindingError(AssertionError):
    """Something that must not happen."""


def begin(command: list[str], log: Path, prepare: Callable[[], object] = lambda: None) -> int:
    """Start a command in a group of its own; returns its process."""

    def work() -> None:
        os.setsid()
        with log.open("ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        prepare()
        code = cli.main(command)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    return forked(work)


def end(process: int, log: Path) -> int:
    """A command's exit code; negative: the signal that ended it."""
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.killpg(process, signal.SIGKILL)
    raise FindingError(f"it hangs: {tail(log)}")


def alone(process: int) -> None:
    """Wait until nothing of a command's group is left."""
    until = time.monotonic() + 150  # Ray's agents notice the end of their node after a minute
    while time.monotonic() < until:
        try:
            os.killpg(process, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    os.killpg(process, signal.SIGKILL)
    raise FindingError("processes are left long after the command has ended")


def tail(log: Path) -> str:
    return log.read_text(errors="replace")[-1500:]


def below(process: int) -> Iterator[int]:
    """All processes that a process has started."""
    for path in Path(f"/proc/{process}/task").glob("*/children"):
        for child in map(int, path.read_text().split()):
            yield child
            yield from below(child)


def workers(process: int) -> list[int]:
    """Those that do the Runs: without one of Ray's agents its node goes, and all workers with it."""
    found = []
    for child in below(process):
        with contextlib.suppress(OSError):  # it has ended by now
            line = Path(f"/proc/{child}/cmdline").read_text()
            if "spawn_main" in line or ("ray::" in line and "Agent" not in line):
                found.append(child)
    return found


def figures(value: Any) -> Any:
    """What must be the same in every undisturbed run."""
    if isinstance(value, dict):
        return {key: figures(part) for key, part in value.items() if key not in DIFFERS}
    return [figures(part) for part in value] if isinstance(value, list) else value


def outcome(out: Path) -> tuple[set[str], dict[str, Any]]:
    """The names of all files, and the figures of each Run."""
    names = {str(path.relative_to(out)) for path in out.rglob("*")}
    # What is made of Runs has times in its tables.
    files = list(out.rglob("runs/*.json")) or [out / "results.json"]
    return names, {str(path.relative_to(out)): figures(json.loads(path.read_text())) for path in files}


def command_for(verb: str, way: str, out: Path) -> list[str]:
    """What a user would give (again)."""
    if verb == "train" and (out / "config.yaml").exists():
        return ["train", "--resume", "--out", str(out)]
    more = [] if verb == "train" else WAYS[way]
    return [verb, *(part.format(folder=out.parent.parent) for part in VERBS[verb]), *more, "--out", str(out)]


Cell = tuple[str, str, str]
"""Verb, way, hazard."""


def strike(what: Cell, out: Path, moment: float, draw: random.Random) -> int:
    """Begin the command, hit it at a moment (in seconds), and check how it ends; returns 1 if it was hit."""
    verb, way, hazard = what
    number, victim = HAZARDS[hazard]
    log, command = out.parents[1] / "log", command_for(verb, way, out)
    prepare: Callable[[], object] = lambda: None  # noqa: E731
    if victim == "files":
        limit = int(10 ** draw.uniform(3, 5))
        prepare = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))  # noqa: E731
    if hazard == "clock":
        jump, clock = draw.choice((-86400, 86400, 1e9)), time.time
        prepare = lambda: setattr(time, "time", lambda: clock() + jump)  # noqa: E731
    if victim == "mount":
        strike((verb, way, "kill"), out, moment, draw)
        subprocess.run(["mount", "-o", "remount,ro", out.parent], check=True)
        command = command_for(verb, way, out)
    log.write_text("")
    process = begin(command, log, prepare)
    hit = number is None
    try:
        if victim == "twice":
            time.sleep(moment / 2)
            other = begin(command_for(verb, way, out), log)
            codes = {end(process, log), end(other, log)}
            if not codes <= {0, 1, 2} or 0 not in codes or "Traceback" in tail(log):
                raise FindingError(f"two owners ended with {codes}: {tail(log)}")
            return 1
        if number is not None:
            time.sleep(moment)
            found = workers(process) if victim == "worker" else [process]
            if found and os.waitpid(process, os.WNOHANG) == (0, 0):
                hit = True
                if victim == "group":
                    os.killpg(process, number)
                else:
                    os.kill(draw.choice(found), number)
        code = end(process, log)
    except ChildProcessError:  # it had ended by then
        return 0
    finally:
        if victim == "mount":
            subprocess.run(["mount", "-o", "remount,rw", out.parent], check=True)
    alone(process)
    allowed = {
        "main": {0, 130, -signal.SIGKILL},
        "group": {0, 130},
        "worker": {0},
        "files": {0, 1, 2},
        "mount": {1, 2},
    }[victim]
    if code not in allowed or ("Traceback" in tail(log) and victim != "worker"):
        raise FindingError(f"ended with {code}: {tail(log)}")
    return int(hit)


def cell(what: Cell, kills: int, seed: int, folder: Path) -> int:
    """One cell of the table; returns how often it was hit.

    Raises:
        FindingError: If something is wrong.
    """
    verb, way, hazard = what
    draw = random.Random(f"{verb} {way} {hazard} {seed}")
    (folder / "recipe.yaml").write_text(json.dumps(RECIPE))
    calm = folder / f"calm-{verb}-{way}" / "out"
    if not calm.exists():
        calm.parent.mkdir()
        began, log = time.monotonic(), calm.with_suffix(".log")
        if end(begin(command_for(verb, way, calm), log), log):
            raise FindingError(f"undisturbed: {tail(log)}")
        (calm.parent / "length").write_text(str(time.monotonic() - began))
    length = float((calm.parent / "length").read_text())
    right = outcome(calm)
    place = folder / "hit"
    place.mkdir()
    mounted = hazard == "read-only"
    if mounted:
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", place], check=True)
    hits = 0
    try:
        for attempt in range(3 * kills):
            out = place / "out"
            hits += strike(what, out, draw.uniform(0.02, 0.9) * length, draw)
            last = hits >= kills or attempt == 3 * kills - 1
            if last or (out / "results.json").exists():
                log = folder / "log"
                code = end(begin(command_for(verb, way, out), log), log)
                if code:
                    raise FindingError(f"the last one ended with {code}: {tail(log)}")
                names, found = outcome(out)
                if names != right[0]:
                    raise FindingError(f"other files than undisturbed: {sorted(names ^ right[0])}")
                if found != right[1]:
                    raise FindingError("other figures than undisturbed")
                shutil.rmtree(out)
            if last:
                break
    finally:
        if mounted:
            subprocess.run(["umount", place], check=True)
        shutil.rmtree(place)
    return hits


def cells(verbs: list[str], ways: list[str], hazards: list[str]) -> Iterator[Cell]:
    """Those of the table that make sense."""
    for verb in verbs:
        for way in ways:
            for hazard in hazards:
                alone_here = way == "here"
                if (verb != "train" or alone_here) and not (alone_here and "worker" in hazard):
                    yield verb, way, hazard


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="per cell")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--verbs", default=",".join(VERBS))
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--hazards", default=",".join(HAZARDS))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    findings = 0
    with tempfile.TemporaryDirectory() as name:
        chosen = [text.split(",") for text in (arguments.verbs, arguments.ways, arguments.hazards)]
        for what in cells(*chosen):
            try:
                said = f"{cell(what, arguments.kills, arguments.seed, Path(name))} hits"
            except FindingError as error:
                findings += 1
                said = f"FINDING: {error}"
            print(f"{shlex.join(what)}: {said}", flush=True)
    print(f"{findings} findings")
    return int(findings > 0)


if __name__ == "__main__":
    sys.exit(main())
