"""A comparison goes on from its settings and finished runs alone: elsewhere, with the data elsewhere, and with more in it."""

import copy
import functools
import json
import linecache
import random
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.utils.data import ConcatDataset, Subset, TensorDataset

from torchmto import lab
from torchmto.lab import memory
from torchmto.lab.fingerprints import content_of
from torchmto.lab.grid import FailedRunsError, FolderError, executors, outputs
from torchmto.lab.grid.identity import contents, decided, identity, run_key
from torchmto.lab.problem import Origin
from torchmto.lab.references import load_problem
from torchmto.lab.run.config import ConfigError, RunConfig, config_of
from torchmto.lab.run.loop import Trainer

FARM = Path(__file__).parents[1] / "farm.py"
SETTINGS = {"seeds": 1, "epochs": 1, "batch_size": 16, "jobs": 1, "progress": False}


def river(path: Path, rows: int = 64, seed: int = 0) -> Path:
    """A small file of the data set ``rf1``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).normal(size=(rows, 5)).round(3)
    lines = ["@relation r", *(f"@attribute a{n} numeric" for n in range(5)), "@data"]
    path.write_text("\n".join([*lines, *(",".join(map(str, row)) for row in values)]) + "\n")
    return path


def committed(folder: Path, target: Path) -> Path:
    """What of a comparison goes into version control."""
    for path in [folder / "config.json", *folder.glob("runs/*.json")]:
        (target / path.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target / path.relative_to(folder))
    return target


@pytest.fixture
def trained(monkeypatch):
    """The settings of the runs that are trained."""
    configs = []
    fit = Trainer.fit
    monkeypatch.setattr(Trainer, "fit", lambda self: configs.append(self.config) or fit(self))
    monkeypatch.setattr(outputs, "plots", lambda *_: {})
    monkeypatch.setattr(memory.gc, "collect", lambda: 0)  # exact memory, which is tested elsewhere
    return configs


def test_a_comparison_goes_on_elsewhere(tmp_path, trained):
    here, there = river(tmp_path / "a" / "rf1.arff"), river(tmp_path / "b" / "other name.arff")
    data = {"data.options": {"targets": 2}, "model.options": {"widths": [4]}}
    first = lab.compare(f"rf1:{here}", ["gd"], out=tmp_path / "first", **data, **SETTINGS)
    assert len(trained) == 3
    for path in [first.path / "config.json", *first.path.glob("runs/*.json")]:
        assert str(tmp_path) not in path.read_text(), path
    folder = committed(first.path, tmp_path / "clone" / "results")
    trained.clear()
    again = lab.compare(f"rf1:{there}", ["gd"], out=folder, **{**data, "workers": 0, "device": "cpu"}, **SETTINGS)
    assert trained == []
    assert again.table().equals(first.table())
    # a method and a seed more
    more = lab.compare(f"rf1:{there}", ["gd", "pcgrad"], out=folder, **data, **{**SETTINGS, "seeds": 2})
    assert len(trained) == 5
    kept = more.table().query("seed == 0 and method != 'pcgrad'")
    assert kept.reset_index(drop=True).equals(first.table())
    trained.clear()
    lab.compare(f"rf1:{here}", ["gd", "pcgrad"], out=folder, **data, **{**SETTINGS, "seeds": 2})
    with pytest.raises(FolderError, match="seeds is 2 there and 1 here"):
        lab.compare(f"rf1:{here}", ["gd", "pcgrad"], out=folder, **data, **SETTINGS)
    short = river(tmp_path / "c" / "rf1.arff", 48)
    with pytest.raises(FolderError, match=r"samples\.train is \d+ there and \d+ here"):
        lab.compare(f"rf1:{short}", ["gd", "pcgrad"], out=folder, **data, **{**SETTINGS, "seeds": 2})
    assert trained == []


def test_other_data_in_a_file_of_the_same_name_is_noticed(tmp_path, trained):
    file, other = river(tmp_path / "a" / "rf1.arff"), river(tmp_path / "b" / "rf1.arff", seed=1)
    data = {"data.options": {"targets": 2}, "model.options": {"widths": [4]}}
    common = {**data, "epochs": 1, "batch_size": 16, "loggers": ["csv"], "out": tmp_path / "run"}
    lab.compare(f"rf1:{file}", ["gd"], out=tmp_path / "x", **data, **SETTINGS)
    lab.fit(f"rf1:{file}", **common)
    for changed in (other, river(file, seed=2)):
        with pytest.raises(FolderError, match=r"begun with other data.*--changed-source"):
            lab.compare(f"rf1:{changed}", ["gd"], out=tmp_path / "x", **data, **SETTINGS)
    with pytest.raises(ConfigError, match=r"begun with other data.*--changed-source"):
        lab.fit(f"rf1:{file}", resume=True, **common)
    assert len(trained) == 4
    lab.compare(f"rf1:{file}", ["gd", "pcgrad"], out=tmp_path / "x", changed_source=True, **data, **SETTINGS)
    assert len(trained) == 5


def test_a_method_that_fails_leaves_the_table_of_the_others(tmp_path, trained, monkeypatch):
    execute = executors.execute

    def sometimes(job, *arguments):
        if job.config.method.name == "pcgrad":
            return executors.Outcome(None, "out of memory")
        return execute(job, *arguments)

    monkeypatch.setattr(executors, "execute", sometimes)
    methods = ["pcgrad", "gd", "uw"]
    with pytest.raises(FailedRunsError, match="pcgrad, seed 0: out of memory"):
        lab.compare(f"{FARM}:farm", methods, out=tmp_path / "x", **SETTINGS)
    assert list(lab.load_result(tmp_path / "x").table()["method"])[-2:] == ["gd", "uw"]
    told = "Left out, as Runs of theirs failed: pcgrad."
    assert told in (tmp_path / "x" / "results.md").read_text()
    assert told in lab.load_result(tmp_path / "x").report().read_text()
    monkeypatch.setattr(executors, "execute", execute)
    whole = lab.compare(f"{FARM}:farm", methods, out=tmp_path / "x", **SETTINGS)
    assert list(whole.table()["method"])[-3:] == methods
    assert told not in (tmp_path / "x" / "results.md").read_text()


def test_tuned_comparisons_and_own_files_go_on_elsewhere(tmp_path, trained):
    pytest.importorskip("optuna")
    first = lab.compare(f"{FARM}:farm", ["gd"], out=tmp_path / "first", tune=2, **SETTINGS)
    folder = committed(first.path, tmp_path / "second")
    for round_ in (first.path / "tuning").iterdir():
        committed(round_, folder / "tuning" / round_.name)
    (tmp_path / "own").mkdir()
    own = shutil.copy(FARM, tmp_path / "own" / "farm.py")
    trained.clear()
    again = lab.compare(f"{own}:farm", ["gd"], out=folder, tune=2, **SETTINGS)
    assert trained == []
    assert again.table().equals(first.table())
    lab.compare(f"{own}:farm", ["gd", "pcgrad"], out=folder, tune=2, **SETTINGS)
    assert {config.method.name for config in trained} == {"pcgrad"}
    assert len(trained) == 3


def test_what_a_run_is_known_by(tmp_path):
    def key(**settings):
        return run_key(config_of({"data.name": "nyuv2:/a/b.npz", "epochs": 3, **settings}))

    for same in (
        {"data.name": "nyuv2:../x.npz"},
        {"device": "cuda", "workers": 3, "log_every": 7, "model.compile": True},
        {"optimizer.momentum": 0.9},
        {"data.options": {}},
    ):
        assert key(**same) == key(), same
    for other in (
        {"data.name": "cityscapes:/a/b.npz"},
        {"epochs": 4},
        {"data.options": {"size": [1, 2]}},
        {"seed": 1},
        {"devices": 2},
    ):
        assert key(**other) != key(), other
    for n, content in enumerate(("same", "same", "other")):
        (tmp_path / str(n)).mkdir()
        (tmp_path / str(n) / "a.pt").write_text(content)
    options = [*(str(tmp_path / str(n) / "a.pt") for n in range(3)), *(str(tmp_path / str(n)) for n in (0, 2))]
    first, moved, changed, *folders = (key(**{"model.options": {"weights": path}}) for path in options)
    assert first == moved
    assert len({first, changed, *folders}) == 4
    numbers = (float("inf"), -float("inf"), float("nan"), None)
    assert len({key(**{"model.options": {"x": number}}) for number in numbers}) == 4
    assert key(**{"data.tasks": ["/a/x"]}) != key(**{"data.tasks": ["/b/x"]})


def test_a_path_is_known_by_its_content_however_it_is_written(tmp_path, monkeypatch):
    def key(value):
        return run_key(config_of({"data.name": "rf1", "data.options": {"csv": value}}))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "data").mkdir()
    file = tmp_path / "data" / "t.csv"
    written = ["data/t.csv", "./data/t.csv", "~/data/t.csv", f"../{tmp_path.name}/data/t.csv", str(file)]
    words = ["data", "/", ".", "..", "no/such.csv", "t.csv", "~nobody/t.csv", "a\0.b"]
    before = {}
    for content in ("a,b", "b,a,c"):
        file.write_text(content)
        before[content] = [key(value) for value in written]
        assert len(set(before[content])) == 1
        (tmp_path / "data" / content).write_text("")  # another folder, too
        before[f"{content} words"] = [key(value) for value in words]
    assert before["a,b"] != before["b,a,c"]
    assert before["a,b words"] == before["b,a,c words"]
    assert len(set(before["a,b words"])) == len(words)
    file.rename(tmp_path / "t.csv")
    assert key("t.csv") == before["b,a,c"][0]


def test_a_folder_in_options_may_grow_in_a_call_and_is_other_data_in_the_next(tmp_path, trained):
    place = tmp_path / "place"
    (place / "runs").mkdir(parents=True)
    (tmp_path / "cached.py").write_text(
        "import sys, pathlib\n"
        f"sys.path.insert(0, {str(FARM.parent)!r})\n"
        "import farm\n"
        "def cached(root, cache=True):\n"
        "    problem = farm.farm()\n"
        "    class Cached(farm.Fields):\n"
        "        def __getitem__(self, index):\n"
        "            if cache:\n"
        "                (pathlib.Path(root) / f'{int(index)}.npy').touch()\n"
        "            return super().__getitem__(index)\n"
        "    problem.train = Cached(48, 0)\n"
        "    return problem\n"
    )
    data = {"data.options": {"root": str(place), "cache": False}}
    reference = f"{tmp_path / 'cached.py'}:cached"
    for _ in range(2):
        lab.compare(reference, ["gd"], out=place / "runs" / "x", **data, **SETTINGS)
    assert len(trained) == 3
    data = {"data.options": {"root": str(place)}}
    lab.compare(reference, ["gd"], out=tmp_path / "y", **data, **SETTINGS)
    with pytest.raises(FolderError, match=r"begun with other data.*--changed-source"):
        lab.compare(reference, ["gd"], out=tmp_path / "y", **data, **SETTINGS)
    lab.compare(reference, ["gd"], out=tmp_path / "y", changed_source=True, **data, **SETTINGS)
    assert len(trained) == 6


def test_arguments_of_a_problem_from_python_count(tmp_path, trained):
    def made(*sizes, **more):
        return replace(load_problem(f"{FARM}:farm", {}), origin=Origin.of_caller())

    out = tmp_path / "x"
    lab.compare(made(8, names=["a"]), ["gd"], out=out, **SETTINGS)
    for other in (made(9, names=["a"]), made(8, names=["b"])):
        with pytest.raises(FolderError, match="options"):
            lab.compare(other, ["gd"], out=out, **SETTINGS)


def test_data_given_to_a_function_are_told_apart_by_all_their_values():
    def made(data):
        return Origin.of_caller()

    def key(data):
        return json.dumps(made(data).arguments)

    @dataclass
    class Held:
        data: torch.Tensor

    x = torch.zeros(5000, dtype=torch.bfloat16)
    y = x.clone()
    y[2500] = 1
    frame = pd.DataFrame({"x": x.tolist()})
    for first, second in (
        (x, y),
        ([{"x": x}], [{"x": y}]),
        (Held(x), Held(y)),
        (TensorDataset(x), TensorDataset(y)),
        (x.float().numpy(), y.float().numpy()),
        (x.float().numpy(), x.float().numpy().reshape(50, 100)),
        (frame, pd.DataFrame({"x": y.tolist()})),
        (frame["x"], frame["x"] + y.float().numpy()),
        (set(range(5000)), set(range(5001))),
        ({"a", "b"}, {"a", "c"}),
        (x.float().to_sparse(), y.float().to_sparse()),
        (Rows(x), Rows(y)),
        (Subset(TensorDataset(x), [1, 2]), Subset(TensorDataset(x), [1, 3])),
        (ConcatDataset([TensorDataset(x)]), ConcatDataset([TensorDataset(y)])),
        (nn.CrossEntropyLoss(weight=torch.tensor([1.0, 9])), nn.CrossEntropyLoss(weight=torch.tensor([9.0, 1]))),
        (nn.Linear(2, 2), nn.Linear(2, 2)),
        (nn.LeakyReLU(), nn.ReLU()),
        (nn.Sequential(Focal(0.25)), nn.Sequential(Focal(0.5))),
        (random.Random(0), random.Random(1)),
        (Held(Rows(x)), Held(Rows(y))),
        (functools.partial(max, x), functools.partial(max, y)),
        (Rows(x).first, Rows(y).first),
        (Rows(x).first, Rows(x).__len__),
    ):
        assert key(first) == key(copy.deepcopy(first)) != key(second)
    assert key(torch.tensor(1.0)) != key(torch.tensor(2.0))
    same = Rows(x)
    same.self = [same]  # leads to itself
    assert key(same) == key(copy.deepcopy(same)) != key(Rows(x))
    for function, of_others in ((lambda: x, lambda: y), (Rows(x).function(), Rows(y).function())):
        assert key(function) != key(of_others)
    assert key(Rows(x).function()) == key(Rows(x).function())
    # Nothing tells what is in it: no folder takes it for what it was begun with.
    for unknown in ((n for n in range(3)), Held(n for n in range(3)), Rows(n for n in range(3))):
        assert key(unknown) != key(unknown)


class Rows(torch.utils.data.Dataset):
    """A data set of one's own, which prints nothing of what it holds."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]

    def first(self):
        return self[0]

    def function(self):
        return lambda: self


class Focal(nn.Module):
    """A loss whose number is neither printed nor in its state."""

    def __init__(self, alpha):
        super().__init__()
        self.alpha = alpha


def test_data_in_an_object_of_ones_own_count_in_every_process(tmp_path):
    """What a folder knows them by is the same in another process, also of classes that only a script has."""
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, torch\n"
        "from torchmto.lab.problem import Origin\n"
        "class Rows(torch.utils.data.Dataset):\n"
        "    def __init__(self, seed):\n"
        "        self.words, self.x = {'a', 'b', 'c', 'd'}, torch.full((4,), seed)\n"
        "def made(data):\n"
        "    return Origin.of_caller().arguments['data']\n"
        "print(made(Rows(int(sys.argv[1]))))\n"
    )
    told = [
        subprocess.run([sys.executable, script, seed], capture_output=True, text=True, check=True).stdout
        for seed in ("0", "0", "1")
    ]
    assert told[0] == told[1] != told[2]


class Place:
    """An object that knows others."""

    def __init__(self, height):
        self.height, self.near = height, []


@pytest.mark.timeout(60)
def test_objects_that_know_each_other_are_told_once():
    def made(data):
        return json.dumps(Origin.of_caller().arguments)

    def places(last):
        found = [Place(height) for height in (*range(11), last)]
        for place in found:
            place.near = [other for other in found if other is not place]
        return found

    assert made(places(1)) == made(places(1)) != made(places(2))
    assert made({Place(1): 0}) == made({Place(1): 0}) != made({Place(2): 0})
    chain = places(0)[:1]
    for height in range(2000):
        chain.append(Place(height))
        chain[-2].near = [chain[-1]]
    assert made(chain[0]) != made(chain[0]), "too deep to be told from another one"
    for without_values in (nn.LazyLinear(2), nn.Linear(2, 2, device="meta")):
        assert made(without_values) == made(without_values)


def test_a_loss_that_cannot_be_copied_is_named():
    class Kept(nn.Module):
        def __init__(self):
            super().__init__()
            self.file = sys.stdout

        def forward(self, output, target):
            return (output - target).square().mean()

    problem = replace(load_problem(f"{FARM}:farm", {}), losses={"yield": Kept()}, origin=Origin.of_caller())
    with pytest.raises(
        ValueError, match=r"Part `losses \(yield\)` of the problem should be modules that can be copied"
    ):
        lab.fit(problem, method="gd", epochs=1, say=lambda _: None)


def test_the_folders_of_a_data_set_count(tmp_path):
    told = []
    for names in (("train", "val"), ("train", "test")):
        root = tmp_path / names[1]
        for name in names:
            (root / name).mkdir(parents=True)
        told.append(content_of(f"cityscapes:{root}"))
    assert None not in told
    assert told[0] != told[1]


def test_a_cell_of_a_notebook_is_known_by_its_text():
    def made(text):
        linecache.cache["cell.py"] = (len(text), None, text.splitlines(keepends=True), "cell.py")
        names = {"Origin": Origin}
        exec(compile(text, "cell.py", "exec"), names)  # as a notebook does
        return names["cell"]().source

    sources = [made(f"def cell(): return Origin.of_caller()  # {number}") for number in (1, 1, 2)]
    assert sources[0] == sources[1] != sources[2]


def test_an_own_model_is_known_by_its_file(tmp_path, trained):
    file = tmp_path / "net.py"
    text = (
        "from torchmto.lab.models import build_model\n"
        "def net(tasks, input_shape):\n"
        "    return build_model('mlp', tasks, input_shape, widths=[{}])\n"
    )
    data = {"data.options": {"targets": 2}, "model": f"{file}:net"}
    file.write_text(text.format(4))
    lab.compare(f"rf1:{river(tmp_path / 'rf1.arff')}", ["gd"], out=tmp_path / "x", **data, **SETTINGS)
    file.write_text(text.format(5))
    with pytest.raises(FolderError, match="changed-source"):
        lab.compare(f"rf1:{tmp_path / 'rf1.arff'}", ["gd"], out=tmp_path / "x", **data, **SETTINGS)
    assert len(trained) == 3


def test_one_task_alone_is_compared_too(tmp_path, trained):
    result = lab.compare(f"{FARM}:farm", ["gd", "pcgrad"], tasks=["crop"], out=tmp_path / "x", **SETTINGS)
    assert list(result.table()["method"]) == ["single:crop", "gd", "pcgrad"]
    with pytest.raises(ValueError, match="evaluate_test"):
        lab.compare(f"{FARM}:farm", ["gd"], evaluate_test=False, out=tmp_path / "y", **SETTINGS)


def test_settings_that_are_new_leave_finished_runs_what_they_are():
    config = RunConfig(epochs=3)
    known = identity(config)
    older = {name: value for name, value in known.items() if name != "ema"}
    older["optimizer"] = {name: value for name, value in known["optimizer"].items() if name != "clip"}
    assert decided(older) == decided(known) == {"epochs": 3}
    assert decided(identity(replace(config, ema=0.9))) == {"epochs": 3, "ema": 0.9}


def test_contents_of_every_kind_of_data():
    farm, pinn, disjoint = (load_problem(f"{FARM}:{name}", {}) for name in ("farm", "pinn", "disjoint"))
    assert json.loads(json.dumps(contents(farm))) == {
        "samples": {"train": 48, "validation": 32, "test": 32},
        "input_shape": [6, 3],
    }
    assert contents(pinn) == {"samples": {"train": 3, "validation": None, "test": None}, "input_shape": None}
    assert contents(disjoint)["samples"]["train"] == {"sign": 24, "sum": 9}
