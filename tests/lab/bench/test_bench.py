"""The benchmark on a toy model: names, bounds, cycles, ratios, files."""

import json
import math

import pytest
import torch
from torch import nn

from torchmto import cli
from torchmto.lab.bench import cases, timing
from torchmto.lab.bench.bounds import BOUNDS
from torchmto.lab.bench.contestants import bound_of, contestant_names, make_contestant
from torchmto.lab.bench.peers import missing_peers
from torchmto.lab.memory import tensor_peak


def _toy(num_tasks, device):
    trunk = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU())
    heads = nn.ModuleList([nn.Linear(8, 3) for _ in range(num_tasks)])
    targets = [torch.randint(0, 3, (10,)) for _ in range(num_tasks)]
    return cases.Case(trunk.to(device), heads.to(device), torch.randn(10, 6), targets)


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    monkeypatch.setitem(cases.CASES, "toy", _toy)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [*BOUNDS, *contestant_names(peers=False)])
def test_every_contestant_moves_the_model(name):
    case = cases.make_case("toy", 3)
    before = [p.detach().clone() for p in case.trunk.parameters()]
    contestant = make_contestant(name, case)
    assert contestant.run() >= 1
    assert contestant.num_steps == (10 if "refresh_every" in name else 1)
    assert any(not torch.equal(p, b) for p, b in zip(case.trunk.parameters(), before, strict=True))


def test_bounds_of_task_gradients_take_the_steps_that_they_say():
    """The rows are added up, the plain bound leaves the last task's gradient on the trunk; the heads' are the same."""
    plain, rows, bound, last = (cases.make_case("toy", 3) for _ in range(4))
    for name, case in (("gd*", plain), ("lbm*", rows), ("lb*", bound)):
        make_contestant(name, case).run()
    last.loss(2, last.trunk(last.inputs)).backward()
    torch.optim.SGD(last.trunk.parameters(), 1e-4).step()
    expected = [*last.trunk.parameters(), *plain.heads.parameters()]
    for a, b, c, d in zip(plain.parameters(), rows.parameters(), expected, bound.parameters(), strict=True):
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(c, d)


def test_every_contestant_has_the_bound_of_what_it_does():
    expected = {
        "gd": "gd*",
        "uw": "gd*",
        "pcgrad": "lb*",
        "pcgrad(gradients=parameters)": "lbm*",
        "graddrop": "lbm*",
        "pcgrad(gradients=layerwise)": "lb*",
        "torchjd/upgrad": "lb*",
        "sequential": "singles*",
        "connection_strength": "separate*",
        "mgda(refresh_every=4)": "gd*+lb*/4",
        "task_groups(warmup=0)": "turns*/K",
    }
    assert {name: bound_of(name, 4).name for name in expected} == expected
    assert bound_of("mgda(refresh_every=4)", 8).parts == (("gd*", 1), ("lb*", 0.25))
    assert bound_of("task_groups", 4).parts == (("turns*", 0.25),)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing", "Unknown method"),
        ("pcgrad(gradients=layer)", "one of 'parameters'"),
        ("pcgrad@layerwise", "look like"),
        ("", "look like"),
    ],
)
def test_unknown_contestants(name, message):
    with pytest.raises(ValueError, match=message):
        bound_of(name, 2)


def test_options_reach_the_method():
    case = cases.make_case("toy", 2)
    with pytest.raises(TypeError, match="nonsense"):
        make_contestant("pcgrad(nonsense=1)", case)
    with pytest.raises(ValueError, match="groups"):
        make_contestant("task_groups(groups=nonsense)", case)


def test_times_are_of_one_step_and_ratios_of_the_same_round(monkeypatch):
    """On a clock that counts the calls of steps, times and ratios are known."""
    now = [0.0]
    make = timing.make_contestant
    seconds = {"gd*": 1.0, "lb*": 4.0, "lbm*": 5.0, "turns*": 8.0}

    def make_timed(name, case):
        contestant = make(name, case)

        def run():
            now[0] += seconds.get(name, 6.0)
            return 3 if name == "task_groups" else 1

        return type(contestant)(run, contestant.num_steps)

    monkeypatch.setattr(timing, "make_contestant", make_timed)
    monkeypatch.setattr(timing, "_clock", lambda device, kind: now[0])
    names = ["pcgrad", "pcgrad(refresh_every=10)", "task_groups"]
    found = {entry.name: entry for entry in timing.measure_times("toy", 4, names, repeats=5)}
    assert list(found) == ["gd*", "lb*", "lbm*", "turns*", *names]
    assert found["pcgrad"].seconds == 6
    assert found["pcgrad"].ratios == {"gd*": 6, "lb*": 1.5, "lbm*": 1.2}
    assert found["pcgrad(refresh_every=10)"].seconds == pytest.approx(0.6)
    assert found["pcgrad(refresh_every=10)"].ratios["gd*+lb*/10"] == pytest.approx(0.6 / 1.4)
    assert found["task_groups"].ratios["turns*/K"] == pytest.approx(6 / (8 / 4 * 3))
    assert found["task_groups"].num_updates == 3
    assert all(entry.iqr == pytest.approx(0) for entry in found.values())


def test_room_splits_contestants_into_runs_with_references():
    found = timing.measure_times("toy", 2, ["pcgrad", "mgda", "gd"], repeats=1, room=1)
    assert [entry.name for entry in found] == ["gd*", "lb*", "lbm*", "pcgrad", "mgda", "gd"]
    assert all(entry.ratios[entry.bound] > 0 for entry in found)


def test_one_failure_does_not_end_the_run():
    found = timing.measure_times("toy", 2, ["pcgrad(nonsense=1)", "gd"], repeats=1)
    assert "nonsense" in found[3].failed
    assert found[3].seconds is None
    assert found[4].seconds > 0


def test_memory_of_a_fresh_process():
    whole, tensors = timing.measure_memory("mlp", 2, "gd*")
    # At least the momentum and the gradients.
    assert whole > 2 * 4 * 990_000
    assert tensors > 2 * 4 * 990_000


def test_tensor_peak_is_exact_and_counts_what_was_freed():
    held = []

    def work():
        held.append(torch.zeros(1000))
        torch.zeros(5000).sum()
        held.append(torch.zeros(2000))

    assert 4 * 6000 <= tensor_peak(work) <= 4 * 6000 + 200


def test_command_writes_table_json_and_plot(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(cases.CASES, "wide", _toy)
    methods = "gd,pcgrad,pcgrad(gradients=layerwise),mgda(refresh_every=2),task_groups(warmup=0)"
    arguments = ["bench", "--models", "toy,wide", "--tasks", "2,3", "--methods", methods, "--repeats", "2"]
    assert cli.main([*arguments, "--no-memory", "--no-peers", "--clock", "cpu", "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "mgda(refresh_every=2)" in shown
    assert "gd*+lb*/2" in shown
    document = json.loads((tmp_path / "bench.json").read_text())
    assert len(document["results"]) == 2 * 2 * (3 + 1 + 5)
    assert {entry["num_tasks"] for entry in document["results"]} == {2, 3}
    for entry in document["results"]:
        assert math.isfinite(entry["seconds"])
        assert entry["ratios"]["lb*"] > 0
        assert entry["ratio_iqr"] >= 0
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_wrong_usage_is_said_before_anything_is_measured(tmp_path, capsys):
    out = str(tmp_path / "out")
    for option, value in (("--models", "vgg"), ("--tasks", "1"), ("--methods", "nothing"), ("--repeats", "0")):
        assert cli.main(["bench", option, value, "--out", out]) == 2
    assert not (tmp_path / "out").exists()
    assert "nothing" in capsys.readouterr().err


@pytest.mark.skipif("torchjd" in missing_peers(), reason="torchjd isn't installed")
@pytest.mark.parametrize("name", ["torchjd/mgda", "torchjd-gramian/mgda"])
def test_peers_take_a_step(name):
    case = cases.make_case("toy", 2)
    before = [p.detach().clone() for p in case.parameters()]
    make_contestant(name, case).run()
    assert any(not torch.equal(p, b) for p, b in zip(case.parameters(), before, strict=True))
