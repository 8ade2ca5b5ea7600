"""Connection strength as a method: phases, schedules, phase 2 against a computation by hand."""

import copy

import pytest
import torch
from torch import nn

import torchmto
from torchmto import structure

TASKS = ("seg", "depth", "normals")


class Net(nn.Module):
    """Two conv-norm pairs, then one linear head per task."""

    def __init__(self, tasks=TASKS):
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1, bias=False),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.Conv2d(6, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(),
        )
        self.heads = nn.ModuleDict({task: nn.Conv2d(4, 1, 1) for task in tasks})

    def forward(self, x, task):
        return self.heads[task](self.trunk(x))


def setup(seed=0, tasks=TASKS, split=True, **options):
    torch.manual_seed(seed)
    model = Net(tasks).double()
    if split:
        structure.split_norms(model, tasks)
    for parameter in model.parameters():  # priorities differ only once the norms do
        parameter.data += 0.3 * torch.randn_like(parameter)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    method = torchmto.make_method("connection_strength", **options)
    mt = torchmto.MultiTask(model, optimizer, tasks=tasks, method=method)
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64)
    y = {task: torch.randn(4, 1, 5, 5, dtype=torch.float64) * (i + 1) for i, task in enumerate(tasks)}

    def closure(asked):
        return {task: (model(x, task) - y[task]).square().mean() for task in asked}

    return model, mt, closure


def test_phase_two_is_the_projection_of_every_layer_by_hand():
    model, mt, closure = setup(schedule="phase2")
    expected = copy.deepcopy(model)
    reference = {}
    gradients = {}
    losses = {}
    for task in TASKS:  # strengths are read after the step's forwards, which move the running variances
        with structure.active_task(task):
            x_loss = closure_of(expected, closure, model)((task,))[task]
        losses[task] = x_loss
        gradients[task] = dict(
            zip(
                [name for name, _ in expected.named_parameters()],
                torch.autograd.grad(x_loss, list(expected.parameters()), allow_unused=True),
                strict=True,
            )
        )
    for conv, norm in (("trunk.0", "trunk.1"), ("trunk.3", "trunk.4")):
        layer, split = expected.get_submodule(conv), expected.get_submodule(norm)
        strengths = torch.stack(
            [
                structure.connection_strength(
                    layer.weight, split.copy_for(t).weight, split.copy_for(t).running_var, split.copy_for(t).eps
                )
                for t in TASKS
            ]
        )
        top = structure.top_priority(structure.normalized_strength(strengths))
        names = [f"{conv}.weight"] + ([f"{conv}.bias"] if layer.bias is not None else [])
        stacked = [torch.stack([gradients[t][name] for t in TASKS]) for name in names]
        # Weight and bias of a channel are one group.
        flat = torch.cat([g.reshape(len(TASKS), len(top), -1) for g in stacked], dim=2)
        combined = structure.project_by_priority(flat, top)
        assert not torch.allclose(combined, flat.sum(0)) or conv == "trunk.0"
        widths = [g[0].numel() // len(top) for g in stacked]
        for name, part in zip(names, combined.split(widths, dim=1), strict=True):
            reference[name] = part.reshape(expected.get_parameter(name).shape)
    info = mt.step(closure)
    assert info.records["phase"] == 2
    assert (info.num_forward, info.num_backward, info.num_optimizer_steps) == (3, 3, 1)
    for name, parameter in model.named_parameters():
        if name in reference:
            torch.testing.assert_close(parameter.grad, reference[name], rtol=1e-12, atol=1e-12)
        else:
            own = [g[name] for g in gradients.values() if g[name] is not None]
            assert len(own) == 1
            torch.testing.assert_close(parameter.grad, own[0], rtol=1e-12, atol=1e-12)
    shares = info.records["priority_shares"]
    assert set(shares) == set(TASKS)
    assert sum(shares.values()) == pytest.approx(1)
    assert set(info.records["layer_priority_shares"]) == {"trunk.0", "trunk.3"}


def closure_of(other, closure, model):
    """The closure, run on another copy of the model."""

    def run(asked):
        cells = dict(zip(closure.__code__.co_freevars, (c.cell_contents for c in closure.__closure__), strict=True))
        x, y = cells["x"], cells["y"]
        return {task: (other(x, task) - y[task]).square().mean() for task in asked}

    return run


def test_phase_one_is_one_plain_step_per_task():
    model, mt, closure = setup(schedule="phase1")
    expected = copy.deepcopy(model)
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.05)
    run = closure_of(expected, closure, model)
    info = mt.step(closure)
    for task in TASKS:
        optimizer.zero_grad()
        with structure.active_task(task):
            run((task,))[task].backward()
        optimizer.step()
    assert (info.records["phase"], info.num_optimizer_steps) == (1, 3)
    for key, value in model.state_dict().items():
        assert torch.equal(value, expected.state_dict()[key]), key


@pytest.mark.parametrize("schedule", ["phase1", "phase2"])
def test_layers_of_heads_have_no_priority(schedule):
    torch.manual_seed(0)
    tasks = ("a", "b")
    trunk = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    heads = nn.ModuleDict({t: nn.Sequential(nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2)) for t in tasks})
    model = structure.split_norms(nn.ModuleDict({"trunk": trunk, "heads": heads}), tasks)
    mt = torchmto.MultiTask(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        tasks=tasks,
        method=torchmto.make_method("connection_strength", schedule=schedule),
    )
    x = torch.randn(2, 3, 4, 4)
    for _ in range(2):
        info = mt.step(lambda asked: {t: heads[t](trunk(x)).square().mean() for t in asked})
        assert set(info.records["layer_priority_shares"]) == {"trunk.0"}


def test_mix_moves_from_phase_one_to_phase_two():
    _, mt, closure = setup(total_steps=60)
    phases = [mt.step(closure).records["phase"] for _ in range(60)]
    assert phases[0] == 1
    assert phases[:20].count(1) > phases[-20:].count(1)
    assert mt.step(closure).records["phase"] == 2  # past the end


def test_sequence_switches_once():
    _, mt, closure = setup(total_steps=10, schedule="sequence", switch=0.3)
    assert [mt.step(closure).records["phase"] for _ in range(10)] == [1] * 3 + [2] * 7


def test_a_phase_drawn_per_epoch_holds_until_the_window_ends():
    _, mt, closure = setup(total_steps=40, draw="epoch")
    for _ in range(4):
        epoch = {mt.step(closure).records["phase"] for _ in range(10)}
        assert len(epoch) == 1
        mt.end_window()


def test_any_method_can_be_the_second_phase():
    _, mt, closure = setup(schedule="phase2", phase2="pcgrad")
    info = mt.step(closure)
    assert (info.records["phase"], info.num_backward, info.num_optimizer_steps) == (2, 3, 1)


@pytest.mark.parametrize("measure", ["gradients", "saliency"])
def test_other_measures(measure):
    model, mt, closure = setup(schedule="phase2", measure=measure)
    info = mt.step(closure)
    assert sum(info.records["priority_shares"].values()) == pytest.approx(1)
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters())


def test_without_split_norms_it_warns_and_sums():
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="split_norms"):
        model, mt, closure = setup(split=False, schedule="phase2")
    plain = copy.deepcopy(model)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.05)
    mt.step(closure)
    sum(closure_of(plain, closure, model)(TASKS).values()).backward()
    optimizer.step()
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_missing_tasks():
    model, mt, closure = setup(schedule="phase2")
    info = mt.step(lambda asked: {t: v for t, v in closure(asked).items() if t != "depth"})
    assert set(info.losses) == {"seg", "normals"}
    assert model.heads["depth"].weight.grad is None
    assert info.records["priority_shares"]["depth"] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "sequence"}, "total_steps"),
        ({"schedule": "both"}, "one of 'mix'"),
        ({"total_steps": 0}, "an int >= 1"),
        ({"measure": "size"}, "one of 'parameters'"),
        ({"degenerate": "none"}, "one of 'sum'"),
        ({"draw": "day"}, "one of 'step'"),
        ({"phase2": "nothing"}, "Unknown method"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        torchmto.make_method("connection_strength", **options)
