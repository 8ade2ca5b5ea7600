"""Wheel and sdist hold what they should; the core runs without the packages of the lab; a user's strict mypy is content."""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import torchmto

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow

CORE = """
import importlib.abc, sys

class Missing(importlib.abc.MetaPathFinder):
    names = {"jsonargparse", "rich", "yaml", "kornia", "PIL", "pyarrow", "safetensors", "transformers", "matplotlib",
        "pandas", "tensorboard", "lightning_fabric", "lightning", "pytorch_lightning", "torchmetrics", "cloudpickle",
        "accelerate", "torchjd"}

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.names:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name.split(".")[0] in Missing.names else find(name, *rest)
sys.meta_path.insert(0, Missing())
import torch, torchmto
model = torch.nn.Linear(2, 2)
mt = torchmto.MultiTask(model, torch.optim.SGD(model.parameters(), lr=0.1), tasks=["a", "b"], method="pcgrad")
mt.step(lambda tasks: dict(zip("ab", model(torch.ones(2)).square())))
for name, extra in [("lightning", "lightning"), ("transformers", "transformers"), ("torchjd", "torchjd")]:
    try:
        importlib.import_module(f"torchmto.integrations.{name}")
    except ImportError as error:
        assert f"pip install 'torchmto[{extra}]'" in str(error), error
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


@pytest.mark.parametrize("which", [0, 1], ids=["wheel", "sdist"])
def test_installed_into_an_empty_environment(built, which, tmp_path):
    """Only torch, numpy, scipy and scikit-learn can be imported besides, then all of the lab's packages."""
    python = environment(tmp_path / "env")
    run(python, "-m", "pip", "install", "-q", "--no-deps", built[which])
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    here = next(path for path in map(Path, sys.path) if path.name == "site-packages" and (path / "torch").is_dir())
    # Its packages are found, but not what is installed there in place: a line of a .pth file is a folder, no site.
    (site / "others.pth").write_text(f"{here}\n", encoding="utf-8")
    said = run(python, "-I", "-c", CORE, cwd=tmp_path)
    assert said.split()[0] == torchmto.__version__
    assert str(site) in said
    assert "pcgrad" in run(python, "-I", "-m", "torchmto", "methods", cwd=tmp_path)


def test_a_users_strict_mypy(tmp_path):
    pytest.importorskip("mypy")
    (tmp_path / "user.py").write_text(USER, encoding="utf-8")
    (tmp_path / "mypy.ini").write_text(f"[mypy]\nmypy_path = {ROOT / 'src'}\n", encoding="utf-8")
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file", "mypy.ini", "user.py"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout
