"""Closures, ready losses, micro-batches, counts, subsets of tasks and loss weights."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import torchmto
from torchmto.structure import split_norms
from toy import Toy, batch, closure, flat, make, same

TASKS = ("a", "b", "c")


def halves(data):
    x, targets = data
    return [(x[part], {t: y[part] for t, y in targets.items()}) for part in (slice(0, 4), slice(4, 8))]


def after(method, *sources, steps=2, model=None, **options):
    """Parameters after a few steps on the given sources (functions of the model)."""
    model, _, mt = make(method, TASKS, model=Toy(TASKS) if model is None else model(), **options)
    for i in range(steps):
        info = mt.step(sources[i % len(sources)](model))
    return flat(model), info, mt


def tensors(state):
    """The floating-point tensors of a nested state."""
    if isinstance(state, torch.Tensor):
        return [state] if state.is_floating_point() else []
    entries = state.values() if isinstance(state, dict) else state if isinstance(state, list | tuple) else ()
    return [tensor for entry in entries for tensor in tensors(entry)]


def test_ready_losses_replace_sum_and_backward():
    model, _, mt = make("gd")
    other = copy.deepcopy(model)
    plain = torch.optim.SGD(other.parameters(), lr=0.05)
    for seed in range(3):
        data = batch(TASKS, seed=seed)
        mt.step(closure(model, data)(TASKS))
        plain.zero_grad()
        sum(closure(other, data)(TASKS).values()).backward()
        plain.step()
    torch.testing.assert_close(flat(model), flat(other), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("method", ["gd", "pcgrad", "wpcgrad"])
def test_ready_losses_equal_a_closure(method):
    one, info, _ = after(method, lambda m: closure(m, batch(TASKS)))
    two, other, _ = after(method, lambda m: closure(m, batch(TASKS))(TASKS))
    assert same(one, two)
    assert (info.num_forward, info.losses) == (other.num_forward, other.losses)


@pytest.mark.parametrize("ready", [False, True])
@pytest.mark.parametrize("method", ["gd", "pcgrad", "wpcgrad", "sequential", "task_groups"])
def test_micro_batches_equal_one_batch(method, ready):
    if ready and torchmto.make_method(method).needs_closure:
        pytest.skip("procedures need closures")
    data = batch(TASKS)
    whole, _, _ = after(method, lambda m: closure(m, data))
    parts, _, _ = after(method, lambda m: [closure(m, d)(TASKS) if ready else closure(m, d) for d in halves(data)])
    torch.testing.assert_close(parts, whole, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("method", ["gd", "pcgrad", "sequential"])
@pytest.mark.parametrize("count", [int, float, torch.tensor, np.int64, np.float32])
def test_counts_weight_unequal_micro_batches(method, count):
    x, targets = batch(TASKS)

    def part(model, chosen):
        inner = closure(model, (x[chosen], {t: y[chosen] for t, y in targets.items()}), count=True)
        return lambda tasks: {t: (loss, count(n)) for t, (loss, n) in inner(tasks).items()}

    whole, _, _ = after(method, lambda m: closure(m, (x, targets)))
    parts, _, _ = after(method, lambda m: [part(m, slice(0, 3)), part(m, slice(3, 8))])
    torch.testing.assert_close(parts, whole, rtol=1e-11, atol=1e-13)


def test_a_count_of_one_batch_changes_nothing():
    for method in ("gd", "pcgrad"):
        one, info, _ = after(method, lambda m: closure(m, batch(TASKS)))
        two, other, _ = after(method, lambda m: closure(m, batch(TASKS), count=True))
        assert same(one, two)
        assert info.losses == other.losses


@pytest.mark.parametrize("method", ["gd", "pcgrad", "sequential"])
def test_a_task_missing_from_one_micro_batch(method):
    """Its loss and gradient come from the micro-batches that have it."""
    first, second = halves(batch(TASKS))

    def reference(model):
        def losses(tasks):
            one, two = closure(model, first)(tasks), closure(model, second)(tasks)
            return {t: one[t] if t == "b" else (one[t] + two[t]) / 2 for t in tasks}

        return losses

    whole, _, _ = after(method, reference)
    parts, info, _ = after(method, lambda m: [closure(m, first), closure(m, second, only=("a", "c"))])
    torch.testing.assert_close(parts, whole, rtol=1e-11, atol=1e-13)
    assert list(info.losses) == ["a", "b", "c"]


@pytest.mark.parametrize("refresh", [1, 2])
@pytest.mark.parametrize("method", ["gd", "static", "pcgrad", "sequential"])
def test_micro_batches_with_split_norms(method, refresh):
    """One forward per task and micro-batch; statistics aside (LayerNorm has none), as one batch."""
    options = {"weights": [1e-6, 1.0, 2.0]} if method == "static" else {}
    if method == "pcgrad":
        options["refresh_every"] = refresh
    elif refresh > 1:
        pytest.skip("only Gramian methods")

    def model():
        return split_norms(Toy(TASKS, norm=nn.LayerNorm(5).double()), TASKS)

    data = batch(TASKS)
    whole, one, _ = after(torchmto.make_method(method, **options), lambda m: closure(m, data), model=model)
    parts, two, _ = after(
        torchmto.make_method(method, **options), lambda m: [closure(m, d) for d in halves(data)], model=model
    )
    torch.testing.assert_close(parts, whole, rtol=1e-11, atol=1e-13)
    assert list(two.losses) == list(TASKS)
    assert two.weights is None or list(two.weights) == list(TASKS)
    assert two.num_forward == 2 * one.num_forward


def test_zero_weights_and_unit_heads_over_micro_batches_of_split_norms():
    """A reused weight of (almost) zero must not be divided by, whichever micro-batch it turns up in."""

    model = split_norms(Toy(TASKS, norm=nn.LayerNorm(5).double()), TASKS)
    grads = []
    for parts in (False, True):
        copied = copy.deepcopy(model)
        method = torchmto.make_method("pcgrad", refresh_every=2)
        mt = torchmto.MultiTask(copied, torch.optim.SGD(copied.parameters(), lr=0.0), tasks=TASKS, method=method)
        data = batch(TASKS)
        mt.step(closure(copied, data))
        method._kept_weights = {0: 1e-9, 1: 0.0, 2: 1.0}
        mt.step([closure(copied, d) for d in halves(data)] if parts else closure(copied, data))
        grads.append({n: p.grad.clone() for n, p in copied.named_parameters() if n.startswith("heads")})
    for name in grads[0]:
        torch.testing.assert_close(grads[1][name], grads[0][name], rtol=1e-11, atol=1e-13)
        assert grads[0][name].abs().max() > 1e-4


@pytest.mark.parametrize("method", ["gd", "pcgrad", "wpcgrad", "sequential"])
def test_missing_tasks(method):
    """A closure that leaves a task out equals a step for the others; absent heads keep no gradient."""
    adam = lambda parameters: torch.optim.Adam(parameters, lr=0.01)  # noqa: E731
    runs = []
    for left_out in (True, False):
        model, _, mt = make(method, optimizer=adam)
        head = copy.deepcopy(dict(model.heads["b"].state_dict()))
        for seed in range(3):
            data = batch(TASKS, seed=seed)
            if left_out:
                info = mt.step(closure(model, data, only=("a", "c")))
            else:
                info = mt.step(closure(model, data), tasks=["c", "a"])
        assert same(head, dict(model.heads["b"].state_dict()))
        assert model.heads["b"].weight.grad is None
        assert list(info.losses) == ["a", "c"]
        runs.append(flat(model))
        mt.step(closure(model, data))
    assert same(*runs)


@pytest.mark.parametrize("method", ["gd", "pcgrad", "wpcgrad", "sequential"])
def test_a_first_batch_with_one_task_only(method):
    model, _, mt = make(method)
    for task in ("b", "a", "c", "b"):
        info = mt.step(closure(model, batch(TASKS), only=(task,)))
        assert list(info.losses) == [task]
    assert method == "sequential" or model.trunk[0].weight.grad is not None
    info = mt.step(closure(model, batch(TASKS)))
    assert list(info.losses) == list(TASKS)
    assert set(mt.state_dict()["roles"]["layout"]) == {"trunk.0.weight", "trunk.0.bias"}


def test_weights_by_name():
    """The losses every method sees are the weighted ones."""
    factors = {"a": 2.0, "c": 0.5}
    for method in ("gd", "pcgrad", "sequential"):
        one, info, _ = after(method, lambda m: closure(m, batch(TASKS)), weights=factors)

        def scaled(model):
            inner = closure(model, batch(TASKS))
            return lambda tasks: {t: loss * factors.get(t, 1.0) for t, loss in inner(tasks).items()}

        two, other, _ = after(method, scaled)
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-14)
        assert info.losses["a"] == pytest.approx(other.losses["a"] / 2), "StepInfo reports them as they are"


@pytest.mark.parametrize("method", ["gd", "pcgrad", "sequential", "task_groups"])
@pytest.mark.parametrize("weighting", ["uw", "dwa", "rlw", "famo", "imtl_l"])
def test_weights_by_a_loss_weighting(method, weighting):
    """With gd it is the loss weighting itself; with the others it hears of every task's raw loss."""
    if weighting not in torchmto.methods():
        pytest.skip(f"no {weighting}")
    one, _, mt = after(method, lambda m: closure(m, batch(TASKS)), weights=weighting, steps=3)
    assert torch.isfinite(one).all()
    if method == "gd":
        alone = torchmto.make_method(weighting)
        alone.seed(mt.weights.generator.initial_seed())
        two, _, reference = after(alone, lambda m: closure(m, batch(TASKS)), steps=3)
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-12)
        for mine, its in zip(tensors(mt.weights.state_dict()), tensors(reference.method.state_dict()), strict=True):
            torch.testing.assert_close(mine, its, rtol=1e-9, atol=1e-12, equal_nan=True)
    if weighting == "uw":
        assert bool((mt.weights.scales.values != 0).all()), "every task's scale has moved"


def test_a_method_inside_that_runs_the_model_again_needs_a_closure():
    if "famo" not in torchmto.methods():
        pytest.skip("no famo")
    for options in ({"method": "gd", "weights": "famo"}, {"method": torchmto.make_method("wpcgrad", priority="famo")}):
        model, _, mt = make(**options)
        with pytest.raises(ValueError, match=r"Method `(famo|wpcgrad)` runs the model more than once.*closure"):
            mt.step(closure(model, batch(TASKS))(TASKS))
        mt.step(closure(model, batch(TASKS)))


def test_a_user_who_turned_gradients_off():
    model, _, mt = make("pcgrad")
    with torch.no_grad():
        info = mt.step(closure(model, batch(TASKS)))
    assert info.num_optimizer_steps == 1


def test_no_graph_is_left_behind():
    """Losses and rows don't keep the graph of the last step alive."""
    for method in ("gd", "pcgrad", "sequential"):
        model, _, mt = make(method)
        mt.step(closure(model, batch(TASKS)))
        assert all(p.grad is None or p.grad.grad_fn is None for p in model.parameters())
        assert all(not r.matrix.requires_grad for r in mt.network.rows)


@pytest.mark.parametrize("engine", ["parameters", "layerwise"])
def test_counts_of_losses_in_half_precision(engine):
    """A type with eight bits holds no count of 300001; the shares of equal batches are equal all the same."""

    def run(sources, count, dtype, method="mgda"):
        torch.manual_seed(0)
        model, _, mt = make(method, TASKS, model=Toy(TASKS, dtype=torch.float32), gradients=engine)
        losses = closure(model, batch(TASKS, dtype=torch.float32))
        mt.step([lambda tasks: {t: (loss.to(dtype), count) for t, loss in losses(tasks).items()}] * sources)
        return flat(model)

    for dtype in (torch.bfloat16, torch.float16):
        torch.testing.assert_close(run(2, 30001, dtype), run(1, 1, dtype), rtol=1e-5, atol=1e-7)
    with pytest.raises(ValueError, match=r"count 300000 of task `a` doesn't fit .*float16"):
        run(2, 300000, torch.float16)
