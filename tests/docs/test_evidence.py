"""The committed results are what the committed runs say, by the command that made them; nothing is trained again."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from tests.shared_data import SHARED

from scripts import load_script
from torchmto.lab.grid import executors, outputs
from torchmto.lab.reproduce import load_recipe, recipe_names, reproduce

ROOT = Path(__file__).parents[2]
EXPERIMENTS = sorted(path.parent.name for path in (ROOT / "results").glob("*/results.json"))
UNCOMMITTED = {"wpcgrad-many": {"sider"}}
"""Arms of which only figures and tables are in the repository: a Run of 27 tasks traces 351 cosines at each of 60 steps."""


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
    # Of some arms the Runs are too large to be committed.
    left = {arm for arm in committed["numbers"]["arms"] if not (folder / "arms" / arm / "runs").is_dir()}
    assert left <= UNCOMMITTED.get(name, set())
    # What isn't finished stays so, for want of time.
    minutes = None if committed["complete"] else 1e-9
    root = SHARED / "data" if needed else None
    reproduce(recipe, folder, data_root=root, seeds=committed["seeds"], minutes=minutes, say=lambda _: None)
    assert not any(outcome.result for outcome in outcomes), "only what diverged is tried again"
    again = json.loads((folder / "results.json").read_text())
    assert again["notes"] == committed["notes"]
    assert again["complete"] == (committed["complete"] and not left)
    for part, numbers in committed["numbers"].items():
        for arm in left:
            del numbers[arm]
        assert again["numbers"][part] == numbers, part
    assert again["tables"] == [t for t in committed["tables"] if t["title"].split()[-1] not in left]


def test_the_leaderboard_names_the_arms_whose_runs_arent_kept(tmp_path, monkeypatch):
    evidence = load_script("docs/evidence.py")
    intro = evidence.leaderboard().partition("##")[0]
    assert set(re.findall(r"`([\w-]+)`'s arm `(\w+)`", intro)) == {
        (name, arm) for name, arms in UNCOMMITTED.items() for arm in arms
    }
    shutil.copytree(ROOT / "results" / "wpcgrad-many", tmp_path / "wpcgrad-many")
    next((tmp_path / "wpcgrad-many" / "arms" / "rf1" / "runs").glob("gd-seed3*")).unlink()
    monkeypatch.setattr(evidence, "RESULTS", tmp_path)
    assert "`wpcgrad-many`'s arm `rf1` and `wpcgrad-many`'s arm `sider`" in evidence.leaderboard()


def test_experiments_are_named_as_their_recipes():
    assert set(EXPERIMENTS) <= set(recipe_names())
