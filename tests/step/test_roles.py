"""Which parameters are shared: found once, followed as training goes on, saved."""

import copy
import warnings

import pytest
import torch
from torch import nn

import torchmto
from torchmto.step import forwards
from toy import Toy, batch, closure, flat, make, same

TASKS = ("a", "b", "c")
METHODS = ["gd", "uw", "pcgrad", "moco", "sequential", "connection_strength"]


def resumed(model, optimizer, mt, method, **options):
    """Copies that go on where these are."""
    other = copy.deepcopy(model)
    theirs = type(optimizer)(other.parameters(), lr=0.05)
    theirs.load_state_dict(optimizer.state_dict())
    loaded = torchmto.MultiTask(other, theirs, tasks=TASKS, method=method, **options)
    loaded.load_state_dict(copy.deepcopy(mt.state_dict()))
    return other, loaded


@pytest.mark.parametrize("first", ["abc", "b"])
@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_learns_no_role_anew(monkeypatch, method, first):
    """Whichever tasks have been seen; what the next graphs look like doesn't matter, nor is the model run again for it."""
    model, optimizer, mt = make(method)
    mt.step(closure(model, batch(TASKS)), tasks=tuple(first))
    other, loaded = resumed(model, optimizer, mt, method)
    assert same(loaded.state_dict(), mt.state_dict())
    learnt = []
    original = forwards._learn

    def learn(parts, chunk, closure, names, new):
        learnt.extend(parts.tasks[index] for index in new)
        original(parts, chunk, closure, names, new)

    monkeypatch.setattr(forwards, "_learn", learn)
    for net, driver in ((model, mt), (other, loaded)):
        learnt.clear()
        for seed in range(2):
            driver.step(closure(net, batch(TASKS, seed=seed)))
        assert learnt == [task for task in TASKS if task not in first]
    assert same(flat(other), flat(model))
    assert same(loaded.state_dict(), mt.state_dict())


@pytest.mark.parametrize("method", ["gd", "pcgrad"])
def test_a_resumed_compiled_model_is_not_run_again(method):
    """Its roles come from one eager forward, before; heads of absent tasks get no gradient afterwards."""
    model, optimizer, mt = make(method)
    calls = []

    def run(net, driver, tasks):
        compiled = torch.compile(net, backend="aot_eager")

        def losses(wanted):
            calls.append(wanted)
            outputs = compiled(batch(TASKS)[0], TASKS)
            return {t: (outputs[t] - batch(TASKS)[1][t]).square().mean() for t in wanted}

        calls.clear()
        info = driver.step(losses, tasks=tasks)
        assert info.num_forward == len(calls)
        return len(calls)

    assert run(model, mt, TASKS) == 2
    other, loaded = resumed(model, optimizer, mt, method)
    for net, driver in ((model, mt), (other, loaded)):
        assert run(net, driver, ("a", "c")) == 1
        assert net.heads["b"].weight.grad is None
        assert driver.network.roles.layout == ["trunk.0.weight", "trunk.0.bias"]
    assert same(flat(other), flat(model))


@pytest.mark.parametrize("method", ["gd", "pcgrad", "moco"])
def test_a_model_compiled_only_after_resuming(method):
    """Zeros that a compiled region reports for other tasks' heads don't make these shared."""
    model, optimizer, mt = make(method)
    mt.step(closure(model, batch(TASKS)))
    other, loaded = resumed(model, optimizer, mt, method)
    mt.step(closure(model, batch(TASKS)))
    loaded.step(closure(torch.compile(other, backend="aot_eager"), batch(TASKS)))
    assert loaded.network.roles.layout == mt.network.roles.layout
    torch.testing.assert_close(flat(other), flat(model))


@pytest.mark.parametrize("outside", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_groups_that_leave_the_optimizer_keep_their_columns(method, outside):
    """A state saved after that loads, into the object that gave it and into a new one."""
    model = Toy(TASKS)
    extra = nn.Parameter(torch.ones(5, dtype=torch.float64))
    if not outside:
        model.register_parameter("extra", extra)
    rest = [p for p in model.parameters() if p is not extra]
    optimizer = torch.optim.SGD([{"params": [extra]}, {"params": rest}], lr=0.05)
    mt = torchmto.MultiTask(model, optimizer, tasks=TASKS, method=method)
    x, targets = batch(TASKS)

    def losses(tasks, model=model):
        features = model.trunk(x) * extra
        return {t: (model.heads[t](features) - targets[t]).square().mean() for t in tasks}

    mt.step(losses)
    optimizer.param_groups.pop(0)
    extra.requires_grad_(False)
    mt.step(losses)
    mt.load_state_dict(mt.state_dict())
    mt.step(losses)
    if not outside:
        fewer = torch.optim.SGD(rest, lr=0.05)
        other = torchmto.MultiTask(model, fewer, tasks=TASKS, method=method)
        other.load_state_dict(mt.state_dict())
        other.step(losses)
        assert other.state_dict()["roles"] == mt.state_dict()["roles"]
    assert same(extra, torch.ones_like(extra)) is False


@pytest.mark.parametrize("method", ["gd", "uw", "sequential"])
def test_a_trunk_that_is_set_free_becomes_shared(method):
    """Also after a resume in between, and the other way round nothing is forgotten."""
    model, optimizer, mt = make(method)
    model.trunk.requires_grad_(False)
    with pytest.warns(UserWarning, match=r"share no parameters.*frozen.*; 2 parameters of the model are frozen now"):
        mt.step(closure(model, batch(TASKS)))
    assert mt.network.roles.layout == []
    model.trunk.requires_grad_(True)
    other, loaded = resumed(model, optimizer, mt, method)
    for net, driver in ((model, mt), (other, loaded)):
        for frozen in (False, True, False):
            net.trunk.requires_grad_(not frozen)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                driver.step(closure(net, batch(TASKS)))
            assert driver.network.roles.layout == ["trunk.0.weight", "trunk.0.bias"]
    assert same(flat(other), flat(model))


def test_after_the_trunk_is_set_free_one_task_alone_is_no_proof():
    """A refusal waits until all tasks have been seen with the parameters that are trained now."""
    model, _, mt = make("gd")
    model.trunk.requires_grad_(False)
    with pytest.warns(UserWarning, match="share no parameters"):
        mt.step(closure(model, batch(TASKS)))
    _, _, other = make("pcgrad", model=model)
    other.network.load_roles(mt.network.roles.state_dict())
    with pytest.raises(ValueError, match="share no parameters"):
        other.step(closure(model, batch(TASKS)))
    model.trunk.requires_grad_(True)
    other.step(closure(model, batch(TASKS), only=("b",)))
    assert other.network.roles.layout == []
    other.step(closure(model, batch(TASKS)))
    assert other.network.roles.layout == ["trunk.0.weight", "trunk.0.bias"]


@pytest.mark.parametrize("method", METHODS)
def test_placeholders_say_nothing_about_roles(method):
    """A constant with a graph of its own for tasks without labels: the first batch isn't the end of looking."""
    model, _, mt = make(method)
    good = closure(model, batch(TASKS))

    def losses(tasks):
        placeholder = torch.ones((), dtype=torch.float64, requires_grad=True)
        return {t: loss if t == "a" else placeholder * 1 for t, loss in good(tasks).items()}

    for source in (losses, good):
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*share no parameters")
            mt.step(source)
    assert mt.network.roles.layout == ["trunk.0.weight", "trunk.0.bias"]


def tie(model, optimizer, one, other):
    """The head of ``one`` gets the parameters of the other's, also in the optimizer."""
    for kind in ("weight", "bias"):
        setattr(model.heads[one], kind, getattr(model.heads[other], kind))
    optimizer.param_groups[0]["params"] = list(model.parameters())


def assert_sums(model, mt, losses):
    """Under weights of 1 ``.grad`` is the gradient of the sum, and the Gramian that of one column for every shared number."""
    every = list(model.parameters())
    rows = [torch.autograd.grad(loss, every, retain_graph=True, allow_unused=True) for loss in losses(TASKS).values()]
    shared = [i for i in range(len(every)) if sum(row[i] is not None for row in rows) > 1]
    flat_rows = torch.stack(
        [
            torch.cat([torch.zeros_like(every[i]).flatten() if r[i] is None else r[i].flatten() for i in shared])
            for r in rows
        ]
    )
    info = mt.backward(losses)
    torch.testing.assert_close(info.gramian, flat_rows @ flat_rows.T)
    for place, p in enumerate(every):
        torch.testing.assert_close(p.grad, sum(row[place] for row in rows if row[place] is not None))
    columns = [id(mt.network._by_name[name]) for name in mt.network.roles.layout]
    assert len(set(columns)) == len(columns)


@pytest.mark.parametrize("gradients", ["auto", "layerwise"])
@pytest.mark.parametrize("detour", [(), ("a", "b"), ("b", "a"), ("c", "a")])
@pytest.mark.parametrize("ties", ["cb ab", "ab cb", "bc ab", "ba ca", "ca ba", "ab"])
def test_tied_in_mid_run(ties, detour, gradients):
    """Whichever head was shared before (``detour``: one is read out by the other's), a tied parameter has one column."""
    model, optimizer, _ = make("gd")
    constant = torchmto.make_method("constant", weights=[1.0, 1.0, 1.0])
    mt = torchmto.MultiTask(model, optimizer, tasks=TASKS, method=constant, gradients=gradients)
    x, targets = batch(TASKS)
    head_of = {}

    def losses(tasks):
        features = model.trunk(x)
        return {t: (model.heads[head_of.get(t, t)](features) - targets[t]).square().mean() for t in tasks}

    mt.step(losses)
    if detour:
        head_of[detour[0]] = detour[1]
        mt.step(losses)
        head_of.clear()
        mt.step(losses)
    before = mt.network.roles.state_dict()
    for one, other in ties.split():
        tie(model, optimizer, one, other)
        for _ in range(2):
            if detour:
                mt.backward(losses)
                expected = torch.autograd.grad(sum(losses(TASKS).values()), list(model.parameters()))
                for p, gradient in zip(model.parameters(), expected, strict=True):
                    torch.testing.assert_close(p.grad, gradient)
            else:
                assert_sums(model, mt, losses)
            columns = [id(mt.network._by_name[name]) for name in mt.network.roles.layout]
            assert len(set(columns)) == len(columns)
            optimizer.step()
    other, theirs = copy.deepcopy((model, optimizer))
    loaded = torchmto.MultiTask(other, theirs, tasks=TASKS, method="gd")
    for roles in (mt.network.roles.state_dict(), before):
        loaded.network.load_roles(roles)
        loaded.step(closure(other, (x, targets)))
        columns = [id(loaded.network._by_name[name]) for name in loaded.network.roles.layout]
        assert len(set(columns)) == len(columns)


@pytest.mark.parametrize("method", ["gd", "pcgrad"])
def test_nothing_is_replaced_within_an_accumulated_batch(method):
    """Neither rows nor sums of the former parameters are lost in silence; the next batch goes on."""
    model, optimizer, mt = make(method)
    losses = closure(model, batch(TASKS))
    mt.backward(losses, final=False)
    tie(model, optimizer, "c", "b")
    with pytest.raises(ValueError, match="Parameters were replaced, or left the optimizer, between two calls"):
        mt.backward(losses)
    mt.backward(losses)


@pytest.mark.parametrize("method", METHODS)
def test_a_single_task_shares_with_nobody(method):
    """Frozen trunk or not: no warning, no error."""
    model, _, mt = make(method, ("a",))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*share no parameters")
        for frozen in (True, False):
            model.trunk.requires_grad_(not frozen)
            before = flat(model.trunk)
            mt.step(closure(model, batch("a")))
            assert same(flat(model.trunk), before) is frozen
