"""Mutates every kind of file that torchmto reads, byte by byte and field by field, and reads it.

    python benchmarks/fuzz_files.py --cases 5000
    python benchmarks/fuzz_files.py --seed 17          # replay one finding, with its traceback

What must hold: the file is read, or refused by one short line that is an error of the file; no code of the file runs, no
process is started, nothing is connected to, and nothing outside the folder is opened for writing; the files beside it stay as
they are; all of it within 10 s and 1 GB.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import io
import json
import os
import random
import resource
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image
from torch import nn

import torchmto
from torchmto.lab.data.files import load_array, load_picture, load_rgb, read_names, read_npz
from torchmto.lab.grid.result import load_result
from torchmto.lab.models.weights import load_weights
from torchmto.lab.report import write_report
from torchmto.lab.run.checkpoint import MAGIC, CheckpointError, read_checkpoint
from torchmto.lab.run.config import RunConfig
from torchmto.lab.run.folder import read_yaml

FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "os.fork", "socket.connect", "shutil.rmtree")
CLEAR = (ValueError, TypeError, OSError, CheckpointError)
SECONDS, BYTES = 10.0, 1 << 30


class FindingError(AssertionError):
    """Something that must not happen."""


class Payload:
    """Runs a command when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("true",)


_watching: list[Path] = []
_seen: list[str] = []


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    """Note what no reader may do: run a program, connect, write outside."""
    if not _watching:
        return
    if event in (
        "os.system",
        "os.exec",
        "os.posix_spawn",
        "subprocess.Popen",
        "os.fork",
        "socket.connect",
        "shutil.rmtree",
    ):
        _seen.append(f"{event} {arguments[:1]!r}")
    elif event == "open" and isinstance(arguments[0], str) and any(c in str(arguments[1]) for c in "wax+"):
        if not Path(arguments[0]).resolve().is_relative_to(_watching[0]):
            _seen.append(f"open {arguments[0]!r} for writing")
    elif event in ("os.remove", "os.rename", "os.rmdir", "os.truncate"):
        path = Path(os.fsdecode(arguments[0])) if isinstance(arguments[0], str | bytes | os.PathLike) else None
        if path is not None and not path.resolve().is_relative_to(_watching[0]):
            _seen.append(f"{event} {path}")


# ---------------------------------------------------------------------- the files, and who reads them

CONFIG = RunConfig().as_dict()
ODD: tuple[Any, ...] = (
    None, True, -1, 0, 10**30, 1e308, float("nan"), float("inf"), "", "x" * 10_000, "../../../etc/passwd",
    "</script><script>alert(1)",
    [], {}, [[[[]]]], {"a": {"b": None}}, [1, "a", None], "\u202e\x00\n", ["../x"], {"__class__": "os"},
)  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    Attributes:
        name: The file's name.
        content: What is right.
        read: Reads it.
        fields: How mutated fields become bytes again; None where only bytes are mutated.
        beside: Files that lie beside it.
    """

    name: str
    content: bytes
    read: Callable[[Path], object]
    document: Any = None
    fields: Callable[[Any], bytes] | None = None
    beside: dict[str, bytes] | None = None


def _saved(state: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def _checked(body: bytes) -> bytes:
    """A checkpoint with a right checksum."""
    return MAGIC + hashlib.sha256(body).hexdigest().encode() + b"\n" + body


def _multitask() -> torchmto.MultiTask:
    model = nn.Linear(2, 2)
    mt = torchmto.MultiTask(
        model, torch.optim.SGD(model.parameters(), lr=0.1), tasks=["a", "b"], method="wpcgrad", weights="uw"
    )
    mt.step(lambda tasks: {t: model(torch.ones(1, 2))[0, i].square() for i, t in enumerate(tasks)})
    return mt


def _load_state(path: Path) -> None:
    """A method's state: what is refused leaves everything as it was."""
    mt = _multitask()
    before = _saved(mt.state_dict())
    state = torch.load(path, weights_only=True)
    try:
        mt.load_state_dict(state)
    except (ValueError, TypeError):
        if _saved(mt.state_dict()) != before:
            raise FindingError("A state that was refused has left a trace.") from None
        raise


def _load_raw(path: Path) -> None:
    try:
        state = torch.load(path, weights_only=True)
    except Exception as error:
        raise ValueError("torch's own") from error
    del state
    _load_state(path)


def _npz(**arrays: Any) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def _npy(array: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def _picture(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3)).save(buffer, kind)
    return buffer.getvalue()


def _safetensors() -> bytes:
    from safetensors.torch import save  # noqa: PLC0415

    return bytes(save({name: value.clone() for name, value in nn.Linear(2, 2).state_dict().items()}))


def _json(document: Any) -> bytes:
    return json.dumps(document).encode()


def _yaml(document: Any) -> bytes:
    return yaml.safe_dump(document).encode()


def _folder(name: str, made: dict[str, bytes], read: Callable[[Path], object]) -> Kind:
    document = json.loads(made[name]) if name.endswith(".json") else yaml.safe_load(made[name])
    beside = {other: content for other, content in made.items() if other != name}
    fields = _json if name.endswith(".json") else _yaml
    return Kind(name, made[name], read, document, fields, beside)


def kinds(comparison: dict[str, bytes]) -> list[Kind]:
    """All kinds of files.

    Args:
        comparison: The files of a finished comparison, by their paths in its folder.
    """
    state = {"epoch": 1, "model": nn.Linear(2, 2).state_dict(), "list": [1, 2.0, "a"]}
    mt = _multitask().state_dict()
    every = [
        Kind("step-00000001.ckpt", _checked(_saved(state)), read_checkpoint),
        Kind("body.ckpt", _saved(state), read_checkpoint, state, lambda document: _checked(_saved(document))),
        Kind("mt.pt", _saved(mt), _load_raw, mt, _saved),
        Kind("config.yaml", _yaml(CONFIG), lambda path: RunConfig.from_dict(read_yaml(path)), CONFIG, _yaml),
        Kind("data.npz", _npz(a=np.ones((3, 2)), b=np.arange(4)), lambda path: read_npz(path, ["a", "b"])),
        Kind("data.npy", _npy(np.ones((3, 2))), lambda path: load_array(path, "fuzz")),
        Kind("picture.png", _picture("PNG"), lambda path: load_picture(path, "fuzz")),
        Kind("picture.jpg", _picture("JPEG"), lambda path: load_rgb(path, "fuzz")),
        Kind("names.txt", b"a/b.png\nc.png\n\nd e.png\n", lambda path: read_names(path, "fuzz")),
        Kind("trunk.safetensors", _safetensors(), lambda path: load_weights(nn.Linear(2, 2), path)),
    ]
    for name in comparison:
        if name.endswith(".json"):
            every.append(_folder(name, comparison, lambda path: load_result(_root(path))))
            every.append(_folder(name, comparison, lambda path: write_report([_root(path)], None)))
    return every


def _root(path: Path) -> Path:
    return path.parent.parent if path.parent.name == "runs" else path.parent


# ---------------------------------------------------------------------- mutations


def mutated_bytes(draw: random.Random, content: bytes) -> bytes:
    """A few bytes are others."""
    data = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 8))):
        start = draw.randrange(len(data) + 1)
        length = draw.choice((1, 1, 4, 64, len(data)))
        match draw.randrange(7):
            case 0:
                data[start : start + 1] = bytes([draw.randrange(256)])
            case 1:
                del data[start : start + length]
            case 2:
                data[start:start] = draw.randbytes(min(length, 64))
            case 3:
                data[start : start + length] = bytes(min(length, len(data) - start))
            case 4:
                data = data[:start]
            case 5:
                data[start:start] = data[start : start + min(length, 1000)]
            case 6:
                data[start : start + 4] = b"\xff\xff\xff\x7f"
    return bytes(data)


def mutated_fields(draw: random.Random, document: Any, *, pickles: bool) -> Any:
    """A few fields are missing, or hold something else."""
    document = copy.deepcopy(document)
    for _ in range(draw.choice((1, 1, 2, 4))):
        inside, at = None, None
        value = document
        while isinstance(value, dict | list) and value and (inside is None or draw.random() < 0.8):
            inside, at = value, draw.choice(list(value) if isinstance(value, dict) else range(len(value)))
            value = value[at]
        if inside is None:
            return draw.choice(ODD)
        if draw.random() < 0.25:
            del inside[at]
        elif pickles and draw.random() < 0.3:
            inside[at] = draw.choice(
                (Payload(), torch.ones(0), torch.ones(2, 2, dtype=torch.int8), torch.full((3,), float("nan")))
            )
        else:
            inside[at] = copy.deepcopy(draw.choice(ODD))
    return document


def case(seed: int, every: list[Kind], folder: Path) -> str:
    """Mutate one file and read it; returns how that ended.

    Raises:
        FindingError: If something is wrong.
    """
    draw = random.Random(seed)
    kind = every[seed % len(every)]
    path = folder / kind.name
    by_field = kind.fields is not None and draw.random() < 0.6
    if by_field:
        assert kind.fields is not None
        document = mutated_fields(draw, kind.document, pickles=path.suffix in (".pt", ".ckpt"))
        content = kind.fields(document)
    else:
        content = mutated_bytes(draw, kind.content)
        if kind.name == "body.ckpt":
            content = _checked(content)
    for name, right in {**(kind.beside or {}), kind.name: content}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(right)
    began, memory = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    end = read(kind, path)
    if time.monotonic() - began > SECONDS:
        raise FindingError(f"{kind.name}: {time.monotonic() - began:.0f} s")
    if (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) * 1024 > BYTES:
        raise FindingError(f"{kind.name}: more than 1 GB")
    for name, right in {**(kind.beside or {}), kind.name: content}.items():
        if (folder / name).read_bytes() != right:
            raise FindingError(f"{kind.name}: reading has changed {name}")
    return end


def read(kind: Kind, path: Path) -> str:
    """Read a file, watched; returns whether it was read or refused."""
    _seen.clear()
    _watching.append(path.parents[kind.name.count("/")].resolve())
    end = "read"
    try:
        kind.read(path)
    except CLEAR as error:
        end = "refused"
        text = str(error)
        if not text.strip() or len(text) > 1500 or len(text.strip().splitlines()) > 1:
            raise FindingError(f"{kind.name}: not one short line: {error!r:.300}") from error
    except FindingError:
        raise
    except BaseException as error:
        raise FindingError(f"{kind.name}: {error!r:.300}") from error
    finally:
        _watching.clear()
    if _seen:
        raise FindingError(f"{kind.name}: {_seen[0]}")
    return end


def made_comparison(folder: Path) -> dict[str, bytes]:
    """The files of the made-up comparison of the tests."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from report_folders import comparison  # noqa: PLC0415

    comparison(folder, methods=("gd", "pcgrad"), seeds=1, points=2)
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def run(seeds: Iterator[int]) -> tuple[Counter[str], list[str]]:
    """Cases one after the other; returns counts and findings."""
    if not getattr(sys, "_torchmto_watched", False):
        sys.addaudithook(_watch)
        sys._torchmto_watched = True  # type: ignore[attr-defined]  # an audit hook stays for ever
    ends: Counter[str] = Counter()
    findings = []
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        every = kinds(made_comparison(Path(name) / "made"))
        for seed in seeds:
            folder = Path(name) / "case"
            folder.mkdir(exist_ok=True)
            try:
                ends[case(seed, every, folder)] += 1
            except FindingError as error:
                ends["finding"] += 1
                findings.append(f"--seed {seed}: {error}")
                if os.environ.get("TRACE"):
                    traceback.print_exc()
    return ends, findings


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=5000)
    parser.add_argument("--start", type=int, default=0, help="the first seed")
    parser.add_argument("--seed", type=int, help="replay this one")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.seed is not None:
        os.environ["TRACE"] = "1"
        arguments.start, arguments.cases = arguments.seed, 1
    ends, findings = run(iter(range(arguments.start, arguments.start + arguments.cases)))
    print(*findings, sep="\n")
    print(f"{dict(ends)}; {len(findings)} findings")
    return int(bool(findings))


if __name__ == "__main__":
    sys.exit(main())
