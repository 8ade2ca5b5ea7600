"""Anyone's problem: from a file, a module, an object; what is checked before anything trains."""

import json
import random
import re
import sys
import warnings
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from torchmetrics import MeanAbsoluteError, MeanMetric, MetricCollection, PearsonCorrCoef, R2Score
from torchmetrics.classification import BinaryAccuracy, MulticlassAccuracy

from torchmto import lab
from torchmto.cli import main
from torchmto.lab.atomic import read_json, write_json
from torchmto.lab.data import loading
from torchmto.lab.data.base import KINDS, MultiTaskDataset
from torchmto.lab.folders import FolderError
from torchmto.lab.grid.folder import SCHEMA_VERSION
from torchmto.lab.metrics import primary_metric
from torchmto.lab.problem import Origin, ProblemError
from torchmto.lab.references import UnknownReferenceError, load_problem, resolve
from torchmto.lab.run.build import build, problem_of
from torchmto.lab.run.config import ConfigError, config_of
from torchmto.lab.run.evaluation import Network, evaluate, measure, merged_values, metric_states, own_figures, placed
from torchmto.lab.run.first_batch import check_first_batch
from torchmto.lab.run.loop import Trainer
from torchmto.lab.run.processes import Processes

FARM = str(Path(__file__).with_name("farm.py"))
QUICK = {"epochs": 2, "batch_size": 16, "progress": False}


def problem(name, **options):
    return load_problem(f"{FARM}:{name}", options)


def scores(result):
    """A result's table without times."""
    return result.table().drop(columns="seconds_per_batch")


@pytest.mark.parametrize("name", ["farm", "pinn", "disjoint"])
def test_any_shape_of_problem_is_compared_with_single_tasks(tmp_path, name):
    result = lab.compare(problem(name), ["gd", "pcgrad", "sequential"], seeds=1, out=tmp_path / "x", jobs=1, **QUICK)
    tasks = result.results["tasks"]
    table = result.table()
    assert list(table["method"]) == [*(f"single:{task}" for task in tasks), "gd", "pcgrad", "sequential"]
    assert table["num_forward"].tolist() == [1, 1, 1, 1, 2]
    assert table.loc[table["method"] == "gd", "delta_m"].notna().all()
    again = lab.load_result(tmp_path / "x")
    assert again.table().equals(table)
    assert again.summary().equals(result.summary())
    assert again.summary()["method"].tolist() == ["single_task", "gd", "pcgrad", "sequential"]
    assert "<table" in result._repr_html_()
    assert result.report().name == "report.html"
    told = (tmp_path / "x" / "results.md").read_text()
    assert ("batches of its own" in told) == ("after the last epoch" in told) == (name == "pinn")
    assert ("batches of 16" in told) == ("validation split." in told) == (name != "pinn")
    assert result.figure("delta_m").axes
    assert result.figure(next(iter(tasks))).axes


def test_the_command_line_takes_it_with_its_arguments(tmp_path):
    common = ["--problem", f"{FARM}:farm", "--problem.width", "4", "--epochs", "1", "--batch-size", "16"]
    out = tmp_path / "compare"
    assert main(["compare", *common, "--methods", "gd", "--seeds", "1", "--jobs", "1", "--out", str(out)]) == 0
    config = json.loads((out / "results.json").read_text())["config"]
    assert (config["data"]["name"], config["data"]["options"]) == (f"{FARM}:farm", {"width": 4})
    (tmp_path / "run.yaml").write_text(
        f"problem: {{use: '{FARM}:farm', width: 4}}\nepochs: 1\ndata: {{batch_size: 16}}\nloggers: [csv]\n"
    )
    assert main(["train", "--config", str(tmp_path / "run.yaml"), "--out", str(tmp_path / "train")]) == 0
    results = json.loads((tmp_path / "train" / "results.json").read_text())
    assert list(results["test"]["yield"]) == ["mae"]
    assert main(["evaluate", "--run", str(tmp_path / "train")]) == 0
    assert main(["predict", "--run", str(tmp_path / "train"), "--count", "2"]) == 0
    assert main(["diagnose", *common, "--batches", "2", "--out", str(tmp_path / "diagnose")]) == 0
    assert main(["report", str(out), str(tmp_path / "train")]) == 0


def test_own_model_with_ready_data_and_ready_model_with_own_data(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self, tasks, shape, width):\n"
        "        super().__init__()\n"
        "        self.trunk = nn.Sequential(nn.Flatten(), nn.LazyLinear(width), nn.ReLU())\n"
        "        self.heads = nn.ModuleDict({t.name: nn.Linear(width, t.channels) for t in tasks})\n"
        "        import torch; self(torch.zeros(1, *shape))\n"
        "    def forward(self, x, tasks=None):\n"
        "        h = self.trunk(x)\n"
        "        return {name: self.heads[name](h) for name in tasks or self.heads}\n"
        "def net(tasks, input_shape, width=8):\n    return Net(tasks, input_shape, width)\n"
    )
    small = {"train": 32, "validation": 16, "test": 16}
    run = lab.fit(
        "digits",
        model={"name": f"{tmp_path / 'mine.py'}:net", "options": {"width": 6}},
        **{"data.options": small},
        epochs=1,
        say=lambda _: None,
    )
    assert run.model.heads["left"].in_features == 6
    run = lab.fit(problem("disjoint"), model={"name": "mlp", "options": {"widths": [5]}}, epochs=1, say=lambda _: None)
    assert run.model.heads["sum"].in_features == 5


def test_one_run_in_python(tmp_path):
    lines = []
    run = lab.fit(problem("farm"), "cagrad", epochs=2, batch_size=16, out=tmp_path / "one", say=lines.append)
    assert set(run.metrics) == {"crop", "yield"}
    assert [entry["epoch"] for entry in run.history] == [0, 1]
    assert run.table()["yield.mae"].notna().all()
    assert lines[-1].startswith("epoch 2/2")
    assert torch.is_tensor(run.model(torch.randn(2, 6, 3), ("crop",))["crop"])
    report = lab.diagnose(problem("farm"), batches=2, batch_size=16)
    assert "Methods that suit" in str(report)
    assert report.measurements.tasks == ("crop", "yield")


def test_a_sample_has_the_same_noise_in_any_batch_and_worker():
    farm = problem("farm")
    first = farm.loader("train", 16, seed=1)
    second = farm.loader("train", 8, seed=1, workers=1)
    torch.manual_seed(0)
    whole = next(first.epoch(3))["input"]
    before = torch.get_rng_state()
    halves = torch.cat([batch["input"] for batch in second.epoch(3)][:2])
    assert torch.equal(whole, halves)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(next(iter(second.epoch(3)))["input"], whole[:8])
    assert not torch.equal(next(first.epoch(4))["input"], whole)
    assert bool(whole.isfinite().all())


def mixed(samples):
    x = torch.stack([x for x, _ in samples])
    share = torch.rand(())
    targets = {task: torch.stack([torch.as_tensor(y[task]) for _, y in samples]) for task in samples[0][1]}
    return share * x + (1 - share) * x[torch.randperm(len(x))], targets


def noisy(batch, tasks, keys):
    noise = torch.randn_like(batch["input"]) + random.random() + float(np.random.rand())  # noqa: NPY002 - what users draw from
    return {"input": batch["input"] + noise, "targets": batch["targets"]}


class Noisy(MultiTaskDataset):
    def __len__(self):
        return 12

    def batch(self, indices):
        return {
            "input": torch.randn(len(indices), 4),
            "targets": {"kind": indices % 3, "sum": torch.ones(len(indices), 1)},
        }


class Streamed(IterableDataset):
    def __iter__(self):
        yield from 2 * samples(kind=CLASS, sum=NUMBER)


@pytest.mark.parametrize(
    "drawing",
    [
        {"train": lambda: 2 * samples(kind=CLASS, sum=NUMBER), "collate": mixed},
        {"train": lambda: 2 * samples(kind=CLASS, sum=NUMBER), "augment": noisy},
        {"train": lambda: Noisy([KIND, SUM])},
        {"train": Streamed, "collate": mixed},
        {"train": Streamed, "augment": noisy},
    ],
)
def test_what_is_drawn_for_a_batch_depends_on_the_batch_alone(drawing):
    """Mixup by a collate function, an augmentation by torch, a data set that draws: alike with workers and after resuming."""
    own = lab.Problem(**{**GOOD, **drawing, "train": drawing["train"]()})
    workers = (0,) if isinstance(own.train, Streamed) else (0, 2)
    torch.manual_seed(0)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002 - what users draw from
    whole = [batch["input"] for batch in own.loader("train", 4, seed=1).epoch(0)]
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (random.getstate(), np.random.get_state()[1].tolist())  # noqa: NPY002 - what users draw from
    assert len(whole) == 3
    for number in workers:
        torch.manual_seed(number + 5)
        loader = own.loader("train", 4, seed=1, workers=number)
        assert all(torch.equal(batch["input"], x) for batch, x in zip(loader.epoch(0), whole, strict=True))
        rest = [batch["input"] for batch in loader.epoch(0, 1)]
        assert all(torch.equal(x, y) for x, y in zip(rest, whole[1:], strict=True))
        others = [batch["input"] for batch in loader.epoch(1)]
        assert not any(torch.equal(x, y) for x in others for y in whole)
    plain = lab.Problem(**{**GOOD, "train": own.train})
    assert isinstance(own.train, Noisy) or not torch.equal(
        next(iter(plain.loader("train", 4, seed=1).epoch(0)))["input"], whole[0]
    )


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.float16, torch.float32])
@pytest.mark.parametrize("streamed", [False, True])
def test_inputs_of_any_type_are_normalised(dtype, streamed):
    images = torch.randint(0, 256, (6, 3, 2, 2), generator=torch.Generator().manual_seed(0)).to(dtype)
    data = [(x, {"kind": 0, "sum": 0.0}) for x in images]

    class Stream(IterableDataset):
        def __iter__(self):
            return iter(data)

    mean, std = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
    own = lab.Problem(**{**GOOD, "train": Stream() if streamed else data, "mean": mean, "std": std})
    inputs = next(iter(own.loader("train", 6, whole=True).epoch(0)))["input"]
    expected = (images.double() - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    assert inputs.is_floating_point()
    assert torch.allclose(inputs.double(), expected, atol=2e-2 if dtype == torch.float16 else 1e-5)


def test_disjoint_sets_start_again_reshuffled_and_resume_in_the_middle():
    loader = problem("disjoint").loader("train", 4, seed=0)
    assert len(loader) == 6
    steps = list(loader.epoch(1))
    assert all(set(step) == {"sign", "sum"} for step in steps)
    assert [step["sum"]["input"].shape[0] for step in steps] == [4] * 6
    for start in (1, 3, 5):
        for step, expected in zip(loader.epoch(1, start), steps[start:], strict=True):
            for task in step:
                assert torch.equal(step[task]["input"], expected[task]["input"])
    assert not torch.equal(steps[0]["sum"]["input"], steps[2]["sum"]["input"])


@pytest.mark.parametrize("alone", ["sign", "sum"])
def test_a_task_of_disjoint_sets_sees_the_same_batches_alone(alone):
    whole = problem("disjoint")
    restricted = whole.only([alone])
    for own in (restricted, restricted.only([alone]), replace(restricted, name="renamed")):
        loader = own.loader("train", 4, seed=1)
        assert len(loader) == 6
        for step, expected in zip(loader.epoch(1), whole.loader("train", 4, seed=1).epoch(1), strict=True):
            assert list(step) == [alone]
            assert torch.equal(step[alone]["input"], expected[alone]["input"])
        assert len(list(own.once("train", 4))) == {"sign": 6, "sum": 3}[alone]  # measuring sees each sample once


def test_single_task_models_of_disjoint_sets_take_as_many_steps(tmp_path):
    settings = {**QUICK, "batch_size": 4, "seeds": 1, "jobs": 1}
    lab.compare(f"{FARM}:disjoint", ["gd"], out=tmp_path / "x", **settings)
    runs = [json.loads(path.read_text())["content"] for path in (tmp_path / "x" / "runs").iterdir()]
    assert {run["result"]["cost"]["steps"] for run in runs} == {12}
    assert len(runs) == 3
    file = tmp_path / "x" / "config.json"
    saved = read_json(file, "torchmto compare", SCHEMA_VERSION)
    assert saved.pop("epoch") == "the longest set"  # as before single-task models took as many
    write_json(file, "torchmto compare", SCHEMA_VERSION, saved)
    with pytest.raises(FolderError, match="epoch is None there and 'the longest set' here"):
        lab.compare(f"{FARM}:disjoint", ["gd"], out=tmp_path / "x", **settings)


class Echo(nn.Module):
    """Gives its input for each task."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return {"a": self.scale * x, "b": self.scale * x}


def errors(size, *tasks):
    """Samples on which `Echo` errs by 0, 1, 2, ..."""
    return [(torch.tensor([float(i)]), {task: torch.zeros(1) for task in tasks}) for i in range(size)]


PAIR = [lab.Task("a", "regression", 1), lab.Task("b", "regression", 1)]
APART = {"a": errors(10, "a"), "b": errors(6, "b")}


@pytest.mark.parametrize("train", [APART, errors(10, "a", "b")], ids=["disjoint", "joint"])
def test_every_sample_of_every_split_is_measured_once(train):
    own = lab.Problem(PAIR, train, APART, errors(7, "a", "b"), model=Echo)
    network = Network(Echo())
    sizes = {"train": (10, 6 if train is APART else 10), "validation": (10, 6), "test": (7, 7)}
    for split, (a, b) in sizes.items():
        want = {"a": (a - 1) / 2, "b": (b - 1) / 2}
        assert {task: m["mae"] for task, m in evaluate(network, own, split, batch_size=4).items()} == want
        shares = [measure(network, own, split, batch_size=4, rank=rank, world_size=3) for rank in range(3)]
        together = merged_values(shares[0], [metric_states(share) for share in shares[1:]])
        assert {task: metrics["mae"] for task, metrics in together.items()} == want
    run = lab.fit(own, epochs=1, batch_size=4, say=lambda _: None)
    alone = lab.fit(own.only(["b"]), epochs=1, batch_size=4, say=lambda _: None)
    assert run.metrics.keys() == {"a", "b"}
    assert alone.metrics.keys() == {"b"}


def test_disjoint_sets_of_one_size_have_orders_of_their_own_and_divide_among_processes():
    data = {"a": errors(16, "a"), "b": errors(16, "b")}
    own = lab.Problem(PAIR, data, APART, APART, model=Echo)
    step = next(own.loader("train", 8, seed=3).epoch(0))
    assert step["a"]["input"].tolist() != step["b"]["input"].tolist()
    alone = next(own.only(["b"]).loader("train", 8, seed=3).epoch(0))
    assert torch.equal(alone["b"]["input"], step["b"]["input"])
    chosen, config = problem_of(config_of({"epochs": 1, "batch_size": 8}), own)
    assert len(next(build(config, chosen, rank=3, world_size=4).loader.epoch(0))["b"]["input"]) == 2
    with pytest.raises(ConfigError, match="Found 6 samples in a batch and 7 processes"):
        build(config, replace(chosen, train=APART), rank=3, world_size=7)


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        for _ in range(10):
            x = torch.randn(4)
            yield x, {"sum": x.sum().reshape(1)}


def streamed(train):
    task = lab.Task("sum", "regression", 1)
    return lab.Problem([task], train, list(Stream()), list(Stream()), "mlp")


def test_streams_are_replayed_up_to_the_place():
    loader = streamed(Stream()).loader("train", 3, seed=5)
    assert len(loader) == 3
    whole = list(loader.epoch(2))
    for batch, expected in zip(loader.epoch(2, 1), whole[1:], strict=True):
        assert torch.equal(batch["input"], expected["input"])
    assert not torch.equal(next(iter(loader.epoch(3)))["input"], whole[0]["input"])
    with pytest.raises(ProblemError, match="one-shot generator"):
        streamed(iter(Stream()))


class Shuffled(torch.utils.data.IterableDataset):
    """Its order is drawn when it is asked for, before the first sample is."""

    def __iter__(self):
        order = torch.randperm(12).tolist()
        return ((torch.full((4,), float(i)), {"sum": torch.ones(1)}) for i in order)


def test_a_stream_may_draw_before_its_first_sample():
    loader = streamed(Shuffled()).loader("train", 3, seed=5)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    whole = torch.cat([batch["input"] for batch in loader.epoch(1)])
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(torch.cat([batch["input"] for batch in loader.epoch(1, 2)]), whole[6:])


class Ends(torch.utils.data.IterableDataset):
    """Gives 12 samples a few times, fewer afterwards."""

    def __init__(self, passes, then):
        self.passes, self.then = passes, then

    def __iter__(self):
        self.passes -= 1
        yield from errors(12 if self.passes >= 0 else self.then, "a")


@pytest.mark.parametrize("then", [0, 6])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("joint", [False, True])
def test_a_stream_that_ends_too_early_says_so(then, accumulate, joint):
    train = Ends(9, then)
    own = lab.Problem(PAIR, {"a": train, "b": errors(24, "b")}, APART, APART, Echo)
    if not joint:
        own = lab.Problem(PAIR[:1], train, errors(4, "a"), errors(4, "a"), Echo)
    with pytest.raises(ValueError, match=f"as many samples every time.*Found 4 batches.*and {then // 3} in epoch"):
        lab.fit(own, epochs=20, batch_size=3, accumulate=accumulate, say=lambda _: None)


def test_an_iterator_that_is_used_up_once_is_refused():
    class Once:
        def __init__(self):
            self.items = iter(errors(8, "sum"))

        def __iter__(self):
            return self.items

    with pytest.raises(ProblemError, match="one-shot generator"):
        streamed(Once())


def test_batches_of_ones_own_and_lists_of_them():
    batches = [torch.full((2, 1), float(number)) for number in range(4)]
    seen = []

    def closure(model, batch, tasks):
        seen.append(float(batch[0]))
        return {"a": (model(batch).square().mean(), 2)}

    own = lab.Problem(
        ["a"], batches, model=lambda: nn.Linear(1, 1), closure=closure, evaluate=lambda _: {"a": {"rmse": 1.0}}
    )
    run = lab.fit(own, epochs=2, optimizer={"name": "sgd"}, say=lambda _: None)
    assert sorted(seen[1:5]) == [0, 1, 2, 3]  # the first is the check's
    assert run.metrics == {"a": {"rmse": 1.0}}


@pytest.mark.filterwarnings("ignore:The task")
def test_own_figures_are_known_again_after_resuming_and_on_every_process(tmp_path):
    def own():
        return replace(problem("pinn"), tasks=["equation", "start"], primary={})

    run = lab.fit(own(), epochs=1, out=tmp_path / "x", loggers=["csv"], say=lambda _: None)
    again = lab.fit(own(), epochs=1, out=tmp_path / "x", resume=True, loggers=["csv"], say=lambda _: None)
    assert again.metrics == run.metrics

    class Other(Processes):
        def first(self, work):
            return run.metrics

    chosen, config = problem_of(config_of({"epochs": 1}), own())
    Trainer(config, chosen, processes=Other()).evaluate("validation")
    assert [primary_metric(task)[0] for task in chosen.task_list] == ["error", "error"]


class Merging(PearsonCorrCoef):
    def merge_state(self, incoming_state):
        """Knows how."""


def test_own_metrics_of_several_processes_have_to_merge():
    for metric, merges in [(R2Score(), True), (Merging(), True), (PearsonCorrCoef(), False)]:
        own = lab.Problem(PAIR, APART, APART, APART, Echo, metrics={"a": {"m": metric}}, primary={"a": ("m", True)})
        chosen, config = problem_of(config_of({"epochs": 1, "batch_size": 4}), own)
        build(config, chosen)
        with nullcontext() if merges else pytest.raises(ProblemError, match=r"metrics.'a'.*`m`, a PearsonCorrCoef"):
            build(config, chosen, rank=1, world_size=2)


# ------------------------------------------------------------------------------------------------------ what is refused

X, CLASS, NUMBER = torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2]), torch.randn(6, 1)
KIND, SUM = lab.Task("kind", "classification", 3), lab.Task("sum", "regression", 1)


def samples(**targets):
    return [(X[i], {name: target[i] for name, target in targets.items()}) for i in range(6)]


GOOD = {"tasks": [KIND, SUM], "train": samples(kind=CLASS, sum=NUMBER), "model": "mlp"}
GOOD |= {"validation": GOOD["train"], "test": GOOD["train"]}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tasks": []}, ["`tasks`", "at least one", "none"]),
        ({"tasks": [KIND, KIND]}, ["`tasks`", "different names", "two called `kind`"]),
        ({"tasks": ["kind"]}, ["`tasks`", "lab.Task", "closure"]),
        ({"tasks": [3]}, ["`tasks`", "Found 3"]),
        ({"train": None}, ["`train`", "data set", "None"]),
        ({"train": []}, ["`train`", "samples", "empty"]),
        ({"validation": None}, ["`validation`", "`evaluate`"]),
        ({"train": {"kind": samples(kind=CLASS)}}, ["`train`", "none for `sum`"]),
        ({"losses": {"sun": nn.MSELoss()}}, ["`losses`", "kind, sum", "'sun'"]),
        ({"primary": {"sum": ("rsme", False)}}, ["`primary['sum']`", "rmse, mae, r2", "rsme"]),
        ({"primary": {"sum": "rmse"}}, ["`primary['sum']`", "(metric, whether higher is better)"]),
        ({"metrics": {"sum": MeanAbsoluteError()}}, ["`metrics['sum']`", "{name: a torchmetrics metric}"]),
        ({"metrics": {"sum": {"mae": MeanAbsoluteError}}}, ["`metrics['sum']`", "MeanAbsoluteError"]),
        ({"metrics": {"sum": {"mae": nn.functional.l1_loss}}}, ["`metrics['sum']`", "l1_loss"]),
        ({"model": nn.Linear(1, 1)}, ["`model`", "anew", "built already"]),
        ({"collate": 3}, ["`collate`", "callable"]),
        ({"mean": (0.5,) * 4}, ["`std`", "with `mean`", "none"]),
        ({"std": (0.5,) * 4}, ["`mean`", "with `std`", "none"]),
        ({"mean": (0.5,) * 4, "std": (1.0,)}, ["`std`", "as many", "1"]),
        ({"mean": (0.5,), "std": (0.0,)}, ["`std`", "positive"]),
        ({"mean": 0.5, "std": (1.0,)}, ["`mean`", "one per channel", "0.5"]),
        ({"losses": {"sum": nn.MSELoss}}, ["`losses['sum']`", "loss(output, target)", "MSELoss"]),
        ({"losses": {"sum": "huber"}}, ["`losses['sum']`", "huber"]),
        ({"optimizer": torch.optim.Adam}, ["`optimizer`", "callable", "Adam"]),
        ({"train": pd.DataFrame({"x": [1], "sum": [2]})}, ["`train`", "data set", "DataFrame"]),
        ({"train": DataLoader(TensorDataset(X))}, ["`train`", "makes batches itself", "DataLoader"]),
    ],
)
def test_parts_are_checked_when_a_problem_is_made(change, words):
    with pytest.raises(ProblemError) as raised:
        lab.Problem(**{**GOOD, **change})
    assert all(word in str(raised.value) for word in words), raised.value


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"train": samples(kind=CLASS)}, ["`train`", "`sum`", "targets of kind"]),
        ({"train": samples(kind=CLASS, sun=NUMBER)}, ["`train`", "`sum`", "targets of kind, sun"]),
        ({"train": samples(kind=CLASS, sum=NUMBER * torch.nan)}, ["`train`", "some have a label", "`sum`"]),
        (
            {"train": samples(kind=CLASS + 1, sum=NUMBER)},
            ["`train, task `kind``", "0 to 2, or -1 where missing", "Found 3"],
        ),
        ({"train": samples(kind=CLASS - 100, sum=NUMBER)}, ["`kind`", "-100"]),
        ({"train": samples(kind=CLASS, sum=torch.randn(6, 2))}, ["`sum`", "[B, 1]", "(6, 2)"]),
        ({"train": samples(kind=CLASS[:, None], sum=NUMBER)}, ["`kind`", "[B]", "(6, 1)"]),
        ({"train": [X[0], X[1]]}, ["`train`", "(x, {task: target})", "a tensor of shape (4,)"]),
        ({"train": [(X[i], CLASS[i]) for i in range(6)]}, ["`train`", "(x, {task: target})"]),
        ({"train": [(X[i, : 2 + i % 2], {"kind": 0, "sum": 1.0}) for i in range(6)]}, ["`train`", "collate"]),
        ({"validation": samples(kind=CLASS, sum=torch.randn(6, 2))}, ["validation", "`sum`", "[B, 1]"]),
        ({"validation": samples(sum=NUMBER)}, ["`validation`", "label of the task `kind`", "targets of sum"]),
        ({"test": samples(kind=CLASS, sum=NUMBER * torch.nan)}, ["`test`", "label of the task `sum`"]),
        ({"mean": (0.5,), "std": (1.0,)}, ["`mean`", "one number per channel", "1 for a tensor of shape (6, 4)"]),
        ({"model": lambda: nn.Linear(4, 3)}, ["`model`", "{task: output}", "Tensor"]),
        ({"model": lambda: Outputs(kind=3)}, ["`model`", "output for `sum`", "kind"]),
        ({"model": lambda: Outputs(kind=2, sum=1)}, ["`model`", "kind", "(2, 3)", "(2, 2)"]),
        ({"model": lambda: 3}, ["`model`", "torch.nn.Module", "int"]),
        ({"model": None}, ["`model`", "model.name"]),
        ({"losses": {"sum": lambda o, t: 3.0}}, ["`losses, task `sum``", "scalar tensor", "float"]),
        ({"losses": {"sum": lambda o, t: o - t}}, ["`losses, task `sum``", "scalar tensor", "(2, 1)"]),
        ({"closure": lambda m, b, t: 3}, ["`model`", "`closure`", "mlp"]),
        ({"closure": lambda m, b, t: 3, "model": lambda: Outputs(kind=3)}, ["`closure`", "{task: loss}", "int"]),
        ({"closure": lambda m, b, t: {"sun": X.sum()}, "model": lambda: Outputs(kind=3)}, ["`closure`", "`sun`"]),
        ({"evaluate": lambda m: {"sum": {"rmse": 1.0}}}, ["`evaluate`", "`kind`"]),
        ({"evaluate": lambda m: 3}, ["`evaluate`", "int"]),
        (
            {"evaluate": lambda m: {"kind": {"accuracy": 1.0}, "sum": {"b": 1.0}}, "primary": {"sum": ("c", True)}},
            ["`evaluate`", "`c`", "`sum`", "b"],
        ),
        ({"train": samples(kind=CLASS + 0.5, sum=NUMBER)}, ["`train, task `kind``", "whole class numbers", "0.5"]),
        ({"train": samples(kind=CLASS * torch.nan, sum=NUMBER)}, ["`train, task `kind``", "-1 where missing", "nan"]),
        ({"train": samples(kind=["cat"] * 6, sum=NUMBER)}, ["`train, task `kind``", "numbers or tensors", "'cat'"]),
        (
            {"train": [(x.double(), y) for x, y in GOOD["train"]]},
            ["`model` or `losses`", "made for the inputs", "Double and Float"],
        ),
        ({"model": lambda: Overwritten(kind=3, sum=1)}, ["`model`", "inplace operation"]),
        ({"model": lambda: Always({"kind": None, "sum": X})}, ["`model`", "`kind`", "(2, 3)", "NoneType"]),
        (
            {"model": lambda: Always({"kind": (torch.zeros(2, 3),), "sum": torch.zeros(2, 1)})},
            ["`model`", "`kind`", "a tensor", "tuple"],
        ),
        ({"losses": {"sum": nn.CrossEntropyLoss()}, "tasks": [KIND, lab.Task("sum", "own")]}, ["`primary['sum']`"]),
        ({"losses": {"kind": nn.L1Loss()}}, ["`model`", "losses", "must match"]),
        (
            {"model": lambda: Flat(kind=3, sum=1), "losses": {"sum": lambda o, t: (o - t.flatten()).square().mean()}},
            ["`model`", "`sum` (regression)", "(4, 1)", "(4,)"],
        ),
        (
            {"model": lambda: Outputs(kind=5, sum=1), "losses": {"kind": nn.CrossEntropyLoss()}},
            ["`model`", "`kind` (classification)", "(4, 3)", "(4, 5)"],
        ),
        ({"metrics": {"kind": {"acc": BinaryAccuracy()}}}, ["`metrics['kind']['acc']`", "(4, 3)", "same shape"]),
        (
            {"metrics": {"kind": {"acc": MulticlassAccuracy(3, average=None)}}},
            ["`metrics['kind']['acc']`", "one number"],
        ),
        ({"metrics": {"sum": {"all": MetricCollection([R2Score()])}}}, ["`metrics['sum']['all']`", "one number"]),
    ],
)
def test_the_first_batch_is_checked_before_anything_trains(change, words):
    own = lab.Problem(**{**GOOD, **change})
    chosen, config = problem_of(config_of({"epochs": 1, "batch_size": 6}), own)
    with pytest.raises(ProblemError) as raised:
        check_first_batch(chosen, config)
    assert all(word in str(raised.value) for word in words), raised.value


class Always(nn.Module):
    """The same outputs for any input."""

    def __init__(self, output):
        super().__init__()
        self.output = output

    def forward(self, x):
        return self.output


class Outputs(nn.Module):
    def __init__(self, **channels):
        super().__init__()
        self.heads = nn.ModuleDict({name: nn.Linear(4, size) for name, size in channels.items()})

    def forward(self, x):
        return {name: head(x) for name, head in self.heads.items()}


class Flat(Outputs):
    """One number per sample where a row of one is asked for."""

    def forward(self, x):
        return {name: output.squeeze(1) for name, output in super().forward(x).items()}


@pytest.mark.filterwarnings("ignore:The closure returned a loss")
@pytest.mark.parametrize("shape", ["samples", "checkpointed", "disjoint", "closure"])
@pytest.mark.parametrize("method", ["connection_strength", "gd"])
def test_norms_of_ones_own_model_are_split_by_task(method, shape, tmp_path):
    """Every call of a user's model or closure knows for which task it is: first batch, steps, evaluation, probing."""
    own = [
        "--problem",
        f"{FARM}:normed",
        f"--problem.shape={shape}",
        "--model.task_norms",
        "true",
        "--method.name",
        method,
    ]
    size = [] if shape == "closure" else ["--data.batch_size", "8"]
    out = tmp_path / "run"
    assert main(["train", *own, *size, "--epochs", "1", "--out", str(out)]) == 0
    assert main(["evaluate", "--run", str(out)]) == 0
    if shape in {"samples", "checkpointed"}:
        assert main(["predict", "--run", str(out), "--count", "2"]) == 0
    assert main(["diagnose", *own, *size, "--batches", "2", "--out", str(tmp_path / "diagnosis")]) == 0
    weights = load_file(out / "model.safetensors")
    for task in ("sum", "first"):
        assert any(re.fullmatch(rf"trunk\.1\..*\b{task}\.weight", name) for name in weights), list(weights)


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("label", [3, -2, 0.5, float("nan")])
def test_labels_of_every_batch_are_checked(split, label):
    """Not of the first one alone: a class that isn't there would be torch's error, or a wrong figure."""
    data = samples(kind=[0, 1, 2, 0, 1, label], sum=NUMBER)
    own = lab.Problem(**{**GOOD, split: data})
    batches = own.loader(split, 1).epoch(0)
    with pytest.raises(ProblemError, match=rf"`{split}, task `kind``.*Found {label}\."):
        list(batches)


def test_a_task_of_its_own_kind_may_have_outputs_of_any_kind(tmp_path):
    """A distribution, say: its parameters reach loss, metric and predictions as the network gives them."""
    found = []
    for named in ("true", "false"):
        out = tmp_path / named
        command = ["--problem", f"{FARM}:spread", f"--problem.named={named}", "--epochs", "1", "--out", str(out)]
        assert main(["train", *command, "--batch-size", "4"]) == 0
        assert main(["predict", "--run", str(out), "--count", "2"]) == 0
        predicted = json.loads((out / "predictions-test.json").read_text())["tasks"]["yield"]["prediction"]
        found.append(
            (
                json.loads((out / "results.json").read_text())["test"],
                list(predicted.values()) if named == "true" else predicted,
            )
        )
    assert found[0] == found[1]
    assert len(found[0][1]) == 2


def test_a_metric_that_doesnt_say_which_way_is_better_warns():
    class Share(MeanMetric):
        def update(self, output, target):
            super().update(output.argmax(1) == target)

    with pytest.warns(UserWarning, match=r"`kind` is judged by `share`, lower is better; `primary=` says otherwise"):
        lab.Problem(**{**GOOD, "metrics": {"kind": {"share": Share()}}})
    with warnings.catch_warnings(action="error"):
        lab.Problem(**{**GOOD, "metrics": {"kind": {"share": Share()}}, "primary": {"kind": ("share", True)}})


def test_figures_of_a_problems_own_keep_their_names():
    names = iter(("first", "second"))
    own = lab.Problem(
        ["a"],
        2,
        model=lambda: nn.Linear(1, 1),
        closure=lambda m, b, t: {},
        evaluate=lambda m: {"a": {next(names): 1.0}},
    )
    with pytest.warns(UserWarning, match="`first`"):
        own_figures(nn.Linear(1, 1), own)
    with pytest.raises(ProblemError, match=r"`first` of the task `a`.*second"):
        own_figures(nn.Linear(1, 1), own)


@pytest.mark.parametrize("call", [lab.fit, lab.compare, lab.diagnose])
@pytest.mark.parametrize("wrong", [lambda: None, nn.Linear(1, 1), None])
def test_something_else_than_a_problem_is_named(call, wrong):
    with pytest.raises(ConfigError, match=r"Parameter `problem` should be a lab.Problem \(.*\), or its reference"):
        call(wrong)


def test_an_endless_stream_says_that_it_is_counted(monkeypatch):
    monkeypatch.setattr(loading, "PATIENCE", 0.0)
    with pytest.warns(UserWarning, match=r"has to end.*`__len__`"):
        assert len(streamed(Stream()).loader("train", 2)) == 5


class Overwritten(Outputs):
    """What the backward needs is gone by then."""

    def forward(self, x):
        return {name: value.sigmoid().mul_(2) for name, value in super().forward(x).items()}


def test_labels_may_be_plain_numbers_of_any_precision():
    data = [(X[i], {"kind": int(CLASS[i]), "sum": float(NUMBER[i])}) for i in range(6)]
    batch = next(lab.Problem(**{**GOOD, "train": data}).loader("train", 6).epoch(0))
    assert batch["targets"]["kind"].dtype == torch.int64
    assert (batch["targets"]["sum"].dtype, batch["targets"]["sum"].shape) == (torch.float32, (6, 1))


LABELS = {
    "classification": torch.tensor(1),
    "binary": torch.tensor([1.0, 0.0, 1.0]),
    "regression": torch.tensor([1.0, 2.0, 3.0]),
    "segmentation": torch.tensor([[1, 0]]),
    "normals": torch.tensor([1.0, 0.0, 0.0]).reshape(3, 1, 1),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [None, torch.bool, torch.uint8, torch.int32, torch.float64])
def test_a_missing_label_is_one_whatever_type_the_others_have(kind, dtype):
    label = LABELS.get(kind, torch.ones(3 if kind == "map" else 1, 1, 1))
    task = lab.Task("t", kind, 1 if kind == "depth" else 3)
    sample = torch.zeros(3), {"t": label.to(dtype or label.dtype)}
    data = [sample, (torch.zeros(3), {}), (torch.zeros(3), {"t": None}), (torch.zeros(3), {"t": label})]
    target = next(lab.Problem([task], data, data, data, "mlp").loader("validation", 4).epoch(0))["targets"]["t"]
    valid = task.valid(target)
    assert [bool(row.all()) for row in valid] == [True, False, False, True]
    assert [bool(row.any()) for row in valid] == [True, False, False, True]
    assert torch.equal(target[0], label.to(dtype or label.dtype).to(target.dtype))
    assert torch.equal(target[3], label)


def test_the_first_samples_type_cuts_no_others_short():
    maps = [torch.ones(1, 2, 2, dtype=torch.int64), torch.full((1, 2, 2), 1.5)]
    data = [(torch.zeros(3), {"d": depth, "o": depth}) for depth in maps]
    own = lab.Problem([lab.Task("d", "depth"), "o"], data, data, data, "mlp", losses={"o": nn.MSELoss()})
    targets = next(own.loader("validation", 2).epoch(0))["targets"]
    assert targets["d"][1, 0, 0, 0] == targets["o"][1, 0, 0, 0] == 1.5


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("digts", "Did you mean `digits`"),
        ("nowhere.py:farm", "There is no file `nowhere.py`"),
        (f"{FARM}:barn", "should name a function"),
        (f"{FARM}:fam", "Did you mean `farm`"),
        ("no.such.module:farm", "should be one of"),
        ("torchmto.lab.problem:nothing", "should name a function"),
        ("os:system", "isn't run from settings"),
        ("torch.hub:os.system", "isn't run from settings"),
        ("torchmto.lab.atomic:tempfile.mkdtemp", "isn't run from settings"),
        ("torchmto.lab.atomic:write_bytes", "isn't run from settings"),
    ],
)
def test_references_that_lead_nowhere(reference, message):
    with pytest.raises(UnknownReferenceError, match=message):
        load_problem(reference, {})


def test_arguments_are_checked_and_modules_and_entry_points_found(monkeypatch):
    with pytest.raises(TypeError, match=r"no option `widht`.*Did you mean `width`"):
        problem("farm", widht=3)
    with pytest.raises(TypeError, match="takes an int for `width`"):
        problem("farm", width="wide")
    monkeypatch.syspath_prepend(str(Path(FARM).parent))
    assert load_problem("farm:farm", {"width": 4}).origin.arguments == {"width": 4}

    class Entry:
        name = "barn"

        def load(self):
            return sys.modules["farm"].farm

    monkeypatch.setattr("torchmto.lab.references.entry_points", lambda group: [Entry()])
    barn = load_problem("barn", {})
    assert barn.task_names == ("crop", "yield")
    assert barn.origin.source == problem("farm").origin.source


@pytest.mark.parametrize("reference", ["{}:made", "edited_farm:made"])
def test_an_edited_file_is_run_again(tmp_path, monkeypatch, reference):
    file = tmp_path / "edited_farm.py"
    monkeypatch.syspath_prepend(str(tmp_path))
    made = "lab.Problem(['a'], 1, closure=max, evaluate=max, model=dict, name='{}')"
    text = f"from torchmto import lab\ndef made():\n    return {made}\n"
    seen = []
    for name in ("one", "two"):  # of one length, in one second
        file.write_text(text.format(name))
        problem = load_problem(reference.format(file), {})
        seen.append((problem.name, problem.origin.source))
    del sys.modules["edited_farm"]
    assert [name for name, _ in seen] == ["one", "two"]
    assert seen[0][1] != seen[1][1]


def test_a_mistake_in_the_users_code_shows_the_users_frames(tmp_path, capsys):
    out = str(tmp_path / "x")
    assert main(["compare", "--problem", f"{FARM}:breaks", "--out", out]) == 1
    error = capsys.readouterr().err
    assert "the farm is flooded" in error
    assert 'farm.py", line' in error
    assert "torchmto/lab" not in error
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("text", "words"), [("import nothere", "No module named 'nothere'"), ("def f(:", "SyntaxError")]
)
def test_a_file_that_cant_be_run_shows_the_users_line(tmp_path, capsys, text, words):
    (tmp_path / "unrunnable.py").write_text(text)
    assert main(["train", "--problem", f"{tmp_path}/unrunnable.py:f", "--out", str(tmp_path / "x")]) == 1
    error = capsys.readouterr().err
    assert 'unrunnable.py", line 1' in error
    assert words in error
    assert "torchmto/lab" not in error
    assert "torchmto[lab]" not in error


def test_modules_are_found_in_the_folder_one_is_in(tmp_path, monkeypatch):
    """As `python -m torchmto` finds them, so does `torchmto`, which has its own folder to import from."""
    (tmp_path / "farm_of_this_folder.py").write_text("def made(): return 1")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    assert resolve("farm_of_this_folder:made")() == 1


def test_what_knows_how_to_move_moves_itself():
    """A packed sequence keeps its lengths on the CPU, a graph its nodes together."""
    packed = nn.utils.rnn.pack_sequence([torch.ones(2), torch.ones(1)])
    moved = placed([packed, {"a": X}], "meta")
    assert moved[0].data.device.type == moved[1]["a"].device.type == "meta"
    assert moved[0].batch_sizes.device.type == "cpu"


def test_a_problem_of_python_knows_who_made_it():
    made = lab.Problem(**GOOD)
    assert made.origin.name.endswith("test_a_problem_of_python_knows_who_made_it")
    own = replace(made)
    assert own.origin.name == f"{made.origin.name}()"
    assert own.origin.source


def test_what_only_python_has_is_told_apart_but_called_by_nobody():
    """A folder knows the data again by a short text, which isn't taken for an argument when its settings are read."""

    def made(data, width):
        return lab.Problem(**{**GOOD, "train": data})

    data = samples(kind=CLASS, sum=NUMBER) * 100
    origins = [made(rows, 3).origin for rows in (data, [*data], data[:-1])]
    assert [origin.arguments["width"] for origin in origins] == [3, 3, 3]
    told = [origin.arguments["data"] for origin in origins]
    assert told[0] == told[1] != told[2]
    assert len(json.dumps(told)) < 10_000
    with pytest.raises(UnknownReferenceError, match="called from Python"):
        load_problem(origins[0].name, origins[0].arguments)


class Last(nn.Module):
    """Looks at the last week only."""

    def __init__(self, width):
        super().__init__()
        self.trunk = nn.Linear(3, width)
        self.heads = nn.ModuleDict({"crop": nn.Linear(width, 3), "yield": nn.Linear(width, 1)})

    def forward(self, x, tasks):
        return {task: self.heads[task](self.trunk(x[:, -1])) for task in tasks}


def changed(width, **parts):
    """A problem as a user's script changes it."""
    return replace(load_problem(f"{FARM}:farm", {}), model=lambda: Last(width), **parts)


def test_a_replaced_problem_isnt_what_its_reference_names(tmp_path, capsys):
    settings = {"seeds": 1, "epochs": 1, "batch_size": 16, "jobs": 2, "progress": False}
    first = lab.compare(changed(4), ["gd"], out=tmp_path / "x", **settings)
    again = lab.compare(changed(4), ["gd"], out=tmp_path / "x", **settings)
    assert scores(first).equals(scores(again))
    other = {"yield": lambda output, target: (output - target).square().mean()}
    for problem in (changed(64), changed(4, losses=other), load_problem(f"{FARM}:farm", {})):
        with pytest.raises(FolderError, match="other settings: data"):
            lab.compare(problem, ["gd"], out=tmp_path / "x", **settings)
    fresh = lab.compare(changed(64), ["gd"], out=tmp_path / "y", **settings)
    assert not scores(first).equals(scores(fresh))  # other processes train what was changed, too
    lab.fit(changed(4), epochs=1, batch_size=16, out=tmp_path / "one", say=lambda line: None)
    assert main(["evaluate", "--run", str(tmp_path / "one")]) == 2
    said = capsys.readouterr().err.strip()
    assert "changed()` was called from Python" in said
    assert "\n" not in said


def test_a_replaced_problem_is_known_by_both_files(tmp_path):
    farm = load_problem(f"{FARM}:farm", {})
    assert farm.origin.loadable
    own = changed(4)
    assert own.origin.source == f"{farm.origin.source}+{Origin.of_caller().source}"
    assert (own.origin.loadable, own.origin.arguments["replaced"]["name"]) == (False, f"{FARM}:farm")
    assert own.only(["crop"]).origin is own.origin
    assert farm.only(["crop"]).origin is farm.origin
    first = replace(farm, model=lambda width=4: Last(width))  # changed twice in one place
    second = replace(farm, model=lambda width=64: Last(width))
    assert first.origin.name == second.origin.name
    assert first.origin != second.origin
    twice = replace(own, name="twice")
    assert twice.origin.arguments["replaced"]["name"] == own.origin.name


def test_functions_are_told_apart_by_their_text_and_what_they_hold():
    def made(model):
        return Origin.of_caller().arguments["model"]

    def net(width, bias=True):
        return lambda: nn.Linear(width, 1, bias)

    assert made(net(4)) == made(net(4))
    kinds = [made(net(4)), made(net(5)), made(net(4, bias=False)), made(lambda: nn.Linear(4, 1)), made(net)]
    assert len({*kinds, made(lambda width=4: width), made(lambda width=5: width)}) == 7
    assert all("0x" not in kind for kind in kinds)


def test_labels_that_are_missing_are_null_in_predictions(tmp_path):
    (tmp_path / "gaps.py").write_text(
        "import torch\n"
        "from torchmto import lab\n"
        "def gaps():\n"
        "    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))\n"
        "    kinds = [0, 1, None, 2] * 2\n"
        "    samples = [\n"
        "        (x[n], {k: v for k, v in {'kind': kinds[n], 'sum': [[1.0], None][n % 2]}.items() if v is not None})\n"
        "        for n in range(8)\n"
        "    ]\n"
        "    tasks = [lab.Task('kind', 'classification', 3), lab.Task('sum', 'regression', 1)]\n"
        "    return lab.Problem(tasks=tasks, train=samples, validation=samples, test=samples, model='mlp')\n"
    )
    out = str(tmp_path / "run")
    assert main(["train", "--problem", f"{tmp_path / 'gaps.py'}:gaps", "--epochs", "1", "--out", out]) == 0
    assert main(["predict", "--run", out, "--count", "4"]) == 0
    predicted = json.loads((tmp_path / "run" / "predictions-test.json").read_text())["tasks"]
    assert predicted["kind"]["label"] == [0, 1, None, 2]
    assert predicted["sum"]["label"] == [[1.0], [None], [1.0], [None]]
