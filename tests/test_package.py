"""Wheel and sdist hold what they should and run with what they require; a user's strict mypy is content."""

import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import torchmto
from torchmto.cli import verbs

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow

CORE = """
import importlib, torch, torchmto
model = torch.nn.Linear(2, 2)
mt = torchmto.MultiTask(model, torch.optim.SGD(model.parameters(), lr=0.1), tasks=["a", "b"], method="pcgrad")
mt.step(lambda tasks: dict(zip("ab", model(torch.ones(2)).square())))
for name in ("lightning", "transformers", "torchjd"):
    try:
        importlib.import_module(f"torchmto.integrations.{name}")
    except ImportError as error:
        assert f"pip install 'torchmto[{name}]'" in str(error), error
    else:
        raise AssertionError(name)
print(torchmto.__version__, torchmto.__file__)
"""

USER = """
import torch
import torchmto
from torchmto import MultiTask, StepInfo


class Mine(torchmto.GramianWeighting):
    def weights(
        self, gramian: torch.Tensor, losses: torch.Tensor | None = None, indices: object = None
    ) -> torch.Tensor:
        return gramian.diagonal().rsqrt()


def train(model: torch.nn.Module, x: torch.Tensor) -> StepInfo:
    optimizer = torch.optim.AdamW(model.parameters())
    mt = MultiTask(model, [optimizer], tasks=["a", "b"], method=torchmto.make_method("cagrad", c=0.4), weights={"a": 2.0})

    def closure(tasks: tuple[str, ...]) -> dict[str, torch.Tensor]:
        return {task: model(x).square().mean() for task in tasks}

    info = mt.backward(closure)
    optimizer.step()
    mt.report({"a": 0.5})
    losses: dict[str, float] = dict(info.losses)
    names: list[str] = list(torchmto.methods())
    percent: float = torchmto.metrics.delta_m({"a": 1.0}, {"a": 2.0}, {"a": True})
    print(losses, names, percent, info.engine)
    return mt.step([closure, closure])
"""


def run(*command: str | Path, **options: object) -> str:
    return subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True, **options).stdout


def environment(folder: Path) -> Path:
    """An empty environment; its Python."""
    run(sys.executable, "-m", "venv", folder)
    return folder / "bin" / "python"


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Wheel and sdist."""
    folder = tmp_path_factory.mktemp("built")
    python = environment(folder / "builder")
    try:
        run(python, "-m", "pip", "install", "-q", "hatchling>=1.25")
    except subprocess.CalledProcessError as error:
        pytest.skip(f"hatchling can't be installed here: {error.stderr.strip()[-200:]}")
    run(python, "-m", "hatchling", "build", "-d", folder, cwd=ROOT)
    return next(folder.glob("*.whl")), next(folder.glob("*.tar.gz"))


def test_what_they_hold(built):
    wheel, sdist = built
    version = torchmto.__version__
    names = zipfile.ZipFile(wheel).namelist()
    for name in ("torchmto/py.typed", "torchmto/integrations/lightning.py", f"torchmto-{version}.dist-info/METADATA"):
        assert name in names
    assert any(name.startswith("torchmto/recipes/") for name in names)
    assert all(name.startswith(("torchmto/", f"torchmto-{version}.dist-info/")) for name in names)
    assert not [name for name in names if "__pycache__" in name]
    with tarfile.open(sdist) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "LICENSE", "README.md", "CHANGELOG.md", "src/torchmto/__init__.py"} <= inside


def install(package: Path, folder: Path, *extras: str) -> Path:
    """An environment with the package and exactly what it and its extras require, linked from this one; its Python."""
    python = environment(folder)
    run(python, "-m", "pip", "install", "-q", "--no-deps", package)
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    for name in sorted(required(*extras)):
        distribution = metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files or () if file.parts[0] not in {"..", "__pycache__"}}:
            if not (site / top).exists():
                (site / top).symlink_to(distribution.locate_file(top))
    return python


def required(*extras: str) -> set[str]:
    """Names of all distributions that this package requires, with its extras, as far as they are installed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    own = [*project["dependencies"], *(line for extra in extras for line in project["optional-dependencies"][extra])]
    waiting, seen, names = [(Requirement(line), ()) for line in own], set(), set()
    while waiting:
        requirement, asked = waiting.pop()
        wanted = requirement.marker is None or any(requirement.marker.evaluate({"extra": e}) for e in ("", *asked))
        here = requirement.name, frozenset(requirement.extras)
        if not wanted or here in seen:
            continue
        seen.add(here)
        if requirement.name == "torchmto":
            names |= required(*requirement.extras)
            continue
        try:
            lines = metadata.requires(requirement.name) or []
        except metadata.PackageNotFoundError:
            continue
        names.add(requirement.name)
        waiting += [(Requirement(line), tuple(requirement.extras)) for line in lines]
    return names


SMALL = ("compare", "--methods", "gd", "--seeds", "1", "--epochs", "1", "--jobs", "1", "--out", "c")
LOOP = """
import sys
from torchmto.cli import main
assert [main(line.split()) for line in sys.argv[1:]] == [1] * (len(sys.argv) - 1)
"""


def refused(python: Path, folder: Path, *lines: str) -> None:
    """Each of these commands says in one line what to install, and does nothing."""
    command = [python, "-I", "-c", LOOP, *lines]
    said = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert (said.returncode, said.stdout) == (0, ""), said
    assert [line.endswith("pip install 'torchmto[lab]'") for line in said.stderr.splitlines()] == [True] * len(lines), (
        said
    )


@pytest.mark.parametrize("which", [0, 1], ids=["wheel", "sdist"])
def test_the_core_alone(built, which, tmp_path):
    """It works, and every verb but `methods` says what to install."""
    python = install(built[which], tmp_path / "env")
    assert run(python, "-I", "-c", CORE, cwd=tmp_path).split()[0] == torchmto.__version__
    assert "pcgrad" in run(python, "-I", "-m", "torchmto", "methods", cwd=tmp_path)
    refused(python, tmp_path, *sorted({*verbs()} - {"methods"}))


def test_extras(built, tmp_path):
    """`lab` compares and reports; with `cli` alone, what a comparison needs shows before anything trains."""
    python = install(built[0], tmp_path / "lab", "lab")
    run(python, "-I", "-m", "torchmto", *SMALL, cwd=tmp_path)
    run(python, "-I", "-m", "torchmto", "report", "c", cwd=tmp_path)
    assert (tmp_path / "c/report.html").is_file()
    python = install(built[0], tmp_path / "cli", "cli")
    refused(python, tmp_path / "cli", " ".join(SMALL), "bench", "reproduce theory", "train --loggers csv --out t")


def test_a_users_strict_mypy(tmp_path):
    pytest.importorskip("mypy")
    (tmp_path / "user.py").write_text(USER, encoding="utf-8")
    (tmp_path / "mypy.ini").write_text(f"[mypy]\nmypy_path = {ROOT / 'src'}\n", encoding="utf-8")
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file", "mypy.ini", "user.py"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout
