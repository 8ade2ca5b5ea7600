"""Imports only go down the layers, the core needs no package of the lab, and importing it is quick."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "torchmto"
CORE_LAYERS = ("solvers", "gradients", "task_norms", "undo", "structure", "step", "methods", "multitask")
LAYERS = (*CORE_LAYERS, "lab", "integrations", "cli")
EVERYWHERE = {"checks", "_version", "metrics"}
CORE = {"torch", "numpy", "scipy", "sklearn"}
FILES = sorted(SOURCE.rglob("*.py"))


def layer(module: str) -> int:
    """The number of a module's layer; -1 for what every layer may use; the package itself is above the core."""
    parts = module.split(".")
    if len(parts) == 1:
        return LAYERS.index("multitask")
    if parts[1] in EVERYWHERE:
        return -1
    return LAYERS.index(parts[1]) if parts[1] in LAYERS else len(LAYERS)


def name_of(path: Path) -> str:
    parts = ["torchmto", *path.relative_to(SOURCE).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(path: Path) -> set[str]:
    """Every module a file imports, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names if node.module == "torchmto"} or {
                node.module
            }
    return names


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_go_down(path):
    own = layer(name_of(path))
    for name in imported(path):
        if name.split(".")[0] != "torchmto":
            continue
        if own >= LAYERS.index("lab"):
            # `from torchmto import X` may name anything of the core.
            assert layer(name) <= own or layer(name) == len(LAYERS), f"{name_of(path)} imports {name}"
        elif path.parent == SOURCE:
            assert layer(name) <= LAYERS.index("multitask"), f"{name_of(path)} imports {name}"
        else:
            assert layer(name) <= own, f"{name_of(path)} imports {name}"


@pytest.mark.parametrize(
    "path",
    [path for path in FILES if layer(name_of(path)) < LAYERS.index("lab") and path.name != "__main__.py"],
    ids=name_of,
)
def test_the_core_needs_no_package_of_the_lab(path):
    packages = {name.split(".")[0] for name in imported(path)} - set(sys.stdlib_module_names) - {"torchmto"}
    assert packages <= CORE, f"{name_of(path)} imports {packages - CORE}"


def test_importing_torchmto_is_quick_and_leaves_slow_packages_alone():
    code = """
import sys, time
began = time.process_time()
import torch
middle = time.process_time()
import torchmto
print((time.process_time() - middle) / (middle - began))
slow = "sklearn scipy.stats transformers lightning_fabric torchmetrics kornia matplotlib plotly pandas".split()
print(*(name for name in (*slow, "rich") if name in sys.modules))
import torchmto.lab.grid.plan, torchmto.lab.run.fitted, torchmto.cli.compare, torchmto.cli.train
print(*(name for name in slow if name in sys.modules))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    ratio, loaded, loaded_by_the_lab = result.stdout.split("\n")[:3]
    assert loaded == loaded_by_the_lab == ""
    assert float(ratio) < 0.5, "0.2 s of processor time where torch takes 2 s"
