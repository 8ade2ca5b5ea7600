"""The committed results are what the committed runs say, by the command that made them; nothing is trained again."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from tests.shared_data import SHARED

from torchmto.lab.grid import executors, outputs
from torchmto.lab.reproduce import load_recipe, recipe_names, reproduce

ROOT = Path(__file__).parents[2]
EXPERIMENTS = sorted(path.parent.name for path in (ROOT / "results").glob("*/results.json"))


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_results_follow_from_the_runs(name, tmp_path, monkeypatch):
    recipe = load_recipe(name)
    needed = re.findall(r"\{data\}/([\w/.]+)", (ROOT / "recipes" / "reproduce" / f"{name}.yaml").read_text())
    for file in needed:
        if not (SHARED / "data" / file).exists():
            pytest.skip(f"needs the data set {file}, which a plain clone doesn't have")
    outcomes, execute = [], executors.execute
    monkeypatch.setattr(
        executors, "execute", lambda *job, **more: outcomes.append(execute(*job, **more)) or outcomes[-1]
    )
    monkeypatch.setattr(Figure, "savefig", lambda *_, **__: None)
    monkeypatch.setattr(outputs, "plots", lambda *_: {})
    monkeypatch.setattr(sys.modules["torchmto.lab.reproduce.reproduce"], "write_report", lambda *_: None)
    folder = shutil.copytree(ROOT / "results" / name, tmp_path / name)
    committed = json.loads((folder / "results.json").read_text())
    # What isn't finished stays so, for want of time.
    minutes = None if committed["complete"] else 1e-9
    root = SHARED / "data" if needed else None
    reproduce(recipe, folder, data_root=root, seeds=committed["seeds"], minutes=minutes, say=lambda _: None)
    assert not any(outcome.result for outcome in outcomes), "only what diverged is tried again"
    again = json.loads((folder / "results.json").read_text())
    for part in ("complete", "numbers", "tables", "notes"):
        assert again[part] == committed[part], part


def test_experiments_are_named_as_their_recipes():
    assert set(EXPERIMENTS) <= set(recipe_names())
