"""Probing: known gradients are measured right, and nothing is left behind."""

import ast
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import torchmto
import torchmto.lab.diagnosis
from torchmto.cli import main
from torchmto.lab.diagnosis import advise, probe, probe_priorities
from torchmto.lab.diagnosis.measurements import summarize_gramians
from torchmto.lab.diagnosis.text import as_text
from toy import Toy, batch, closure


class Pulls(nn.Module):
    """Two layers of parameters that tasks pull in given directions: the gradients are known."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, 1, bias=False)
        self.second = nn.Linear(2, 1, bias=False)
        # At zero the losses of `pulls` are exactly 10, whatever the gradients.
        for parameter in self.parameters():
            nn.init.zeros_(parameter)
        self.double()


def pulls(model: Pulls, first: dict[str, list[float]], second: dict[str, list[float]]) -> Any:
    def losses(tasks: tuple[str, ...]) -> dict[str, Tensor]:
        return {
            t: 10
            + model.first.weight[0] @ torch.tensor(first[t]).double()
            + model.second.weight[0] @ torch.tensor(second[t]).double()
            for t in tasks
        }

    return losses


def test_known_gradients() -> None:
    model = Pulls()
    data = pulls(model, {"a": [3.0, 0.0], "b": [-2.0, 0.0]}, {"a": [0.0, 4.0], "b": [0.0, 1.0]})
    found = probe(model, torch.optim.SGD(model.parameters(), 1e-3), ["a", "b"], [data], num_batches=3)
    assert found.gradient_norms["a"] == pytest.approx(5)
    assert found.gradient_norms["b"] == pytest.approx(math.sqrt(5))
    assert found.cosines[0][1] == pytest.approx(-2 / (5 * math.sqrt(5)))
    assert found.conflict_shares[0][1] == 1
    assert found.sum_cosines["b"] == pytest.approx(3 / (math.sqrt(5) * math.sqrt(26)))
    assert sum(found.sum_shares.values()) == pytest.approx(1)
    assert [layer.name for layer in found.layers] == ["first", "second"]
    assert [layer.conflict_part for layer in found.layers] == [1, 0]
    cosine = -2 / (5 * math.sqrt(5))
    assert found.condition_number == pytest.approx(np.linalg.cond([[1.0, cosine], [cosine, 1.0]]))
    assert found.sum_ratio == pytest.approx(26 / 30)
    assert (found.num_shared, found.num_other, found.gradient_bytes) == (4, 0, 2 * 4 * 8)
    assert found.affinity is not None
    # A step along -b raises a: conflict and negative affinity belong together here.
    assert found.affinity[1][0] == pytest.approx(-2e-3 / 10, rel=0.2)
    assert found.noise_floor == {"a": 0, "b": 0}
    assert set(found.seconds) == {"gd", "gramian", "sequential"}


def test_momentum_of_other_tasks_doesnt_count_as_affinity() -> None:
    model = Pulls()
    data = pulls(model, {"a": [1.0, 0.0], "b": [0.0, 1.0]}, {"a": [0.0, 0.0], "b": [0.0, 0.0]})
    for optimizer in (
        torch.optim.Adam(model.parameters(), 1e-2),
        torch.optim.SGD(model.parameters(), 1e-2, momentum=0.9),
    ):
        found = probe(model, optimizer, ["a", "b"], [data], num_batches=3)
        assert found.affinity is not None
        assert found.affinity[0][1] == pytest.approx(0, abs=1e-12)
        assert found.affinity[0][0] > 0


def test_nothing_is_left_behind() -> None:
    tasks = ["a", "b", "c"]
    model = Toy(tasks, norm=nn.BatchNorm1d(5), dropout=0.3)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    batches = [closure(model, batch(tasks, seed=seed)) for seed in range(2)]
    torchmto.MultiTask(model, optimizer, tasks=tasks, method="gd").step(batches[0])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    moments = [optimizer.state[parameter]["exp_avg"].clone() for parameter in model.parameters()]
    gradients = [parameter.grad for parameter in model.parameters()]
    random_state = torch.get_rng_state()
    found = probe(model, optimizer, tasks, batches, num_batches=3)
    again = probe(model, optimizer, tasks, batches, num_batches=3)
    assert found.cosines == again.cosines
    assert found.affinity == again.affinity
    assert min(found.noise_floor.values()) > 0, "dropout makes two forwards differ"
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for parameter, moment, gradient in zip(model.parameters(), moments, gradients, strict=True):
        assert torch.equal(optimizer.state[parameter]["exp_avg"], moment)
        assert parameter.grad is gradient
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not optimizer._optimizer_step_post_hooks


@pytest.mark.parametrize("calls", [1, 10, 22])
def test_nothing_is_left_behind_by_an_error(calls: int) -> None:
    model = Toy(["a", "b"])
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    data = closure(model, batch(["a", "b"]))
    torchmto.MultiTask(model, optimizer, tasks=["a", "b"], method="gd").step(data)
    left = iter(range(calls))

    def failing(tasks: Any) -> Any:
        if next(left, None) is None:
            raise RuntimeError("no more")
        return data(tasks)

    with pytest.raises(RuntimeError, match="no more"):
        probe(model, optimizer, ["a", "b"], [failing], num_batches=5)
    data(("a",))["a"].backward()
    optimizer.step()
    assert len(optimizer.state) == len(list(model.parameters())), "the moments are kept"


def test_tasks_that_are_missing_in_some_batches() -> None:
    tasks = ["a", "b", "c"]
    model = Toy(tasks)
    only = [["a", "b"], ["b", "c"]]
    batches = [closure(model, batch(tasks, seed=seed), only=some) for seed, some in enumerate(only)]
    found = probe(model, torch.optim.SGD(model.parameters(), 1e-2), tasks, batches, num_batches=4)
    assert math.isfinite(found.cosines[0][1])
    assert math.isnan(found.cosines[0][2])
    assert set(found.losses) == set(tasks)
    assert found.condition_number is None


@pytest.mark.parametrize(("batches", "number"), [([], 3), (iter([]), 3), ([None], 0)])
def test_nothing_to_probe(batches: Any, number: int) -> None:
    model = Toy(["a", "b"])
    with pytest.raises(ValueError, match="should"):
        probe(model, torch.optim.SGD(model.parameters(), 1e-2), ["a", "b"], batches, num_batches=number)


def test_priorities_of_channels() -> None:
    tasks = ["a", "b"]
    model = torchmto.structure.split_norms(Toy(tasks, norm=nn.BatchNorm1d(5)), tasks)
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    batches = [closure(model, batch(tasks, seed=seed)) for seed in range(3)]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    margins = probe_priorities(model, optimizer, tasks, batches, num_batches=6)
    assert margins is not None
    assert (margins.num_channels, margins.num_batches) == (5, 6)
    assert 0 < margins.median < 1
    assert 0 <= margins.stable_share <= 1
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert probe_priorities(Toy(tasks), optimizer, tasks, batches) is None


def test_gramians_that_are_singular_or_incomplete() -> None:
    singular = np.array([[1.0, 1.0], [1.0, 1.0]])
    missing = np.array([[1.0, math.nan], [math.nan, math.nan]])
    found = summarize_gramians(np.array([singular, missing]))
    assert found["conditions"].tolist() == [math.inf]
    assert found["cosines"][0, 1] == 1
    assert found["norms"].tolist() == [1, 1]
    silent = summarize_gramians(np.array([[[1.0, 0.0], [0.0, 0.0]]]))
    assert silent["conditions"].tolist() == [math.inf]


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
@pytest.mark.parametrize("ratio", [1.0, 1e-6, 1e6])
def test_the_condition_is_that_of_directions(scale: float, ratio: float) -> None:
    scales = np.diag([scale, scale * ratio])
    found = summarize_gramians(scales @ np.array([[[1.0, 0.5], [0.5, 1.0]]]) @ scales)
    assert found["conditions"] == pytest.approx([3.0])


@pytest.mark.parametrize("scale", [1e-16, 1.0, 1e16])
@pytest.mark.parametrize("rest", [0.0, 1e-14, -1e-14])
def test_a_sum_that_cancels_has_no_direction(scale: float, rest: float) -> None:
    opposed = scale * np.array([[1.0, -1.0], [-1.0, 1.0 + rest]])
    apart = scale * np.array([[1.0, 0.0], [0.0, 1.0]])
    found = summarize_gramians(np.array([opposed]))
    assert np.isnan([*found["sum_cosines"], *found["sum_shares"]]).all()
    assert abs(found["sum_ratio"]) < 1e-12
    found = summarize_gramians(np.array([opposed, apart]))
    assert found["sum_shares"].tolist() == [0.5, 0.5]
    assert math.isnan(summarize_gramians(np.zeros((1, 2, 2)))["sum_ratio"])


def test_opposed_tasks_are_seen_to_cancel() -> None:
    model = Pulls()
    data = pulls(model, {"a": [3.0, 0.0], "b": [-3.0, 0.0]}, {"a": [0.0, 4.0], "b": [0.0, -4.0]})
    found = probe(model, torch.optim.SGD(model.parameters(), 1e-3), ["a", "b"], [data], num_batches=3)
    diagnosis = advise(found)
    assert "cancelled" in {finding.topic for finding in diagnosis.findings if finding.kind == "warning"}
    assert not diagnosis.plain_sum_is_fine
    assert not re.search(r"\bnan\b", as_text(found, diagnosis))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(
        "data: {name: digits, batch_size: 8, options: {train: 60, validation: 20, test: 20}}\n"
        "model: {options: {widths: [4]}}\nmethod: {name: connection_strength}\nepochs: 1\n"
    )
    out = tmp_path / "out"
    assert (
        main(["diagnose", "--config", str(config), "--batches", "2", "--optimizer.lr", "0.01", "--out", str(out)]) == 0
    )
    text = capsys.readouterr().out
    assert "Methods that suit" in text
    assert "Phase 1 is short" in text
    content = json.loads((out / "diagnose.json").read_text())
    assert content["measurements"]["tasks"] == ["left", "right", "offset"]
    assert content["plan"] == {
        "method": "connection_strength",
        "options": {},
        "total_steps": content["plan"]["total_steps"],
        "has_norms": True,
    }
    assert content["measurements"]["margins"]["num_channels"] > 0


@pytest.mark.parametrize(
    "arguments",
    [
        ["--config", "nowhere.yaml"],
        ["--data", "nowhere"],
        ["--method", "nowhere"],
        ["--epochs"],
        ["--epochs", "-1"],
    ],
)
def test_wrong_usage(arguments: list[str], tmp_path: Path) -> None:
    assert main(["diagnose", *arguments, "--out", str(tmp_path / "out")]) == 2


def test_the_library_function_needs_no_lab_packages() -> None:
    allowed = {"torchmto", "torch", "numpy"} | set(sys.stdlib_module_names)
    for name in ("__init__", "advice", "measurements", "probe"):
        tree = ast.parse((Path(torchmto.lab.diagnosis.__file__).parent / f"{name}.py").read_text())
        modules = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        modules += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
        assert {module.partition(".")[0] for module in modules} <= allowed
        lab = {module for module in modules if module.startswith("torchmto.lab")}
        assert all(module.startswith("torchmto.lab.diagnosis") for module in lab)
