"""A sample of `benchmarks/fuzz_steps.py`, and what it has found."""

import contextlib
import itertools

import pytest
import torch
from torch import nn
from torch._functorch import config as functorch_config

import torchmto
from scripts import load_script
from torchmto.task_norms import current_tasks
from toy import batch, closure, make, same, state

fuzz = load_script("benchmarks/fuzz_steps.py")


@pytest.mark.filterwarnings("ignore")
def test_a_sample():
    ends, findings = fuzz.run(itertools.count(20_000), steps=40)
    assert not findings
    assert ends["plain steps taken"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", ["gd", "pcgrad"])
def test_an_interrupt_at_sampled_lines(method):
    assert fuzz.every_line(method, stride=97) > 100


@pytest.mark.parametrize("line", range(1, 20))
def test_an_interrupt_while_new_parameters_are_looked_up(line):
    """What is known of the parameters is replaced as a whole: the step after an interrupt works as if there had been none."""
    model, optimizer, mt = make("pcgrad")

    def losses(tasks):
        return {task: model(torch.ones(2, 4, dtype=torch.float64))[task].square().mean() for task in tasks}

    mt.step(losses)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    mt.network.buffers.take()
    before = state(mt)
    with fuzz.raising_at(line, KeyboardInterrupt()), pytest.raises(KeyboardInterrupt):
        mt.network.refresh()
    assert same(state(mt), before)
    assert mt.step(losses).num_optimizer_steps == 1


@pytest.mark.parametrize("method", ["pcgrad", "mgda"])
def test_one_task_and_a_scaler(method):
    """With nothing on the shared parameters there is nothing to unscale."""
    model = nn.Linear(2, 1)
    model.requires_grad_(False)
    head = nn.Linear(1, 1)
    both = nn.ModuleList([model, head])
    mt = torchmto.MultiTask(
        both,
        torch.optim.SGD(both.parameters(), lr=0.1),
        tasks=["a", "b"],
        shared=model.parameters(),
        method=method,
        scaler=torch.amp.GradScaler("cpu", init_scale=8.0),
        gradients="layerwise",
    )
    info = mt.step(lambda tasks: dict.fromkeys(tasks, head(model(torch.ones(3, 2))).square().mean()))
    assert info.num_optimizer_steps == 1


def test_an_interrupt_just_before_the_optimizer_counts_no_step_of_before():
    model, _, mt = make("adatask")

    def losses(tasks):
        return {task: model(torch.ones(2, 4, dtype=torch.float64))[task].square().mean() for task in tasks}

    mt.step(losses)
    before = state(mt)
    mt.network.optimizers.step = interrupted
    with pytest.raises(KeyboardInterrupt):
        mt.step(losses)
    assert same(state(mt), before)


def test_an_interrupt_after_an_overflow_puts_the_scale_back(monkeypatch):
    model = nn.Linear(2, 2)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    mt = torchmto.MultiTask(
        model, torch.optim.SGD(model.parameters(), lr=0.1), tasks=["a", "b"], method="gd", scaler=scaler
    )

    def overflowing(tasks):
        loss = (model.weight.sum() * 0).abs().sqrt()  # its gradient isn't finite
        return dict.fromkeys(tasks, loss)

    show = mt.network.show_overflow
    monkeypatch.setattr(mt.network, "show_overflow", lambda: (show(), interrupted()))
    with pytest.raises(KeyboardInterrupt):
        mt.step(overflowing)
    assert scaler.get_scale() == 8.0
    monkeypatch.undo()
    assert mt.step(overflowing).skipped
    assert scaler.get_scale() == 4.0


def interrupted():
    raise KeyboardInterrupt


@pytest.mark.parametrize("method", ["f_mtl", "samo"])
def test_an_interrupt_while_moved_parameters_are_put_back(method):
    model, _, mt = make(method)
    before = state(mt)
    put_back, calls = mt.network.put_back, []

    def interrupted():
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt
        put_back()

    mt.network.put_back = interrupted
    with pytest.raises(KeyboardInterrupt):
        mt.step(lambda tasks: {t: model(torch.ones(2, 4, dtype=torch.float64))[t].square().mean() for t in tasks})
    assert same(state(mt), before)


def test_gradients_stay_on_where_an_interrupt_has_lost_the_end_of_a_with():
    _, _, mt = make("gd")

    def interrupted(context):
        torch.set_grad_enabled(False)
        raise KeyboardInterrupt

    mt.method.step = interrupted
    try:
        with pytest.raises(KeyboardInterrupt):
            mt.step(lambda tasks: {})
        assert torch.is_grad_enabled()
    finally:
        torch.set_grad_enabled(True)


@pytest.mark.parametrize("name", ["gd", "pcgrad", "sequential"])
def test_an_interrupt_leaves_the_modes_around_a_step(name, monkeypatch):
    """And the compiler's settings: at any line, each begins and ends modes of its own."""
    monkeypatch.setattr("torchmto.multitask.may_compile", lambda: True)
    model, _, mt = make(name)
    losses = closure(model, batch("abc"))

    def step(line):
        with fuzz.raising_at(line, KeyboardInterrupt()) as count:
            mt.step(losses)
        return count[0]

    settings = functorch_config.donated_buffer, torch.compiler.config.cache_key_tag
    for line in range(1, step(-1) + 100, 3):
        with torch.device("meta"), torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
            with contextlib.suppress(KeyboardInterrupt):
                step(line)
            assert torch.empty(0).device.type == "meta", line
            assert torch.is_autocast_enabled("cpu"), line
            assert not torch.is_grad_enabled(), line
        assert current_tasks() == (), line
        assert torch.empty(0).device.type == "cpu", line
        assert not torch.is_autocast_enabled("cpu"), line
        assert (functorch_config.donated_buffer, torch.compiler.config.cache_key_tag) == settings, line


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("seed", "method"),
    [(5232, "task_groups"), (100488, "task_groups"), (200137, "excess_mtl"), (200389, "tchebycheff")],
)
def test_worlds_that_were_findings(seed, method):
    """Groups without a present task, twice; an empty state in another type; an interrupt before the step began."""
    assert fuzz.live(seed, 8, method)[0]
