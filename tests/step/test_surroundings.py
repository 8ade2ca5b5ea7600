"""What is around a step: modes of the caller, copies, parameters and buffers that are replaced, hooks that fail."""

import copy
import dataclasses
import importlib
import pickle
import warnings

import pytest
import torch
from torch import nn

import torchmto
from battery.table import ROWS, build
from toy import Toy, batch, closure, flat, make, same, state

TASKS = ("a", "b", "c")


@pytest.mark.parametrize("size", [3, 200_000])
def test_buffers_that_come_from_inference_mode_are_undone(size):
    """As a validation leaves them that builds a cache anew; two modules may hold the same one."""
    model, _, mt = make("gd")
    with torch.inference_mode():
        model.register_buffer("cache", torch.full((size,), 2.0))
        model.trunk.register_buffer("cache", model.cache)
    losses = closure(model, batch(("a", "b", "c")))

    def fail(tasks):
        model.cache.add_(1)
        if fail.replaces:
            with torch.inference_mode():
                model.cache = torch.zeros(size)
        raise OSError("no")

    for fail.replaces in (False, True):
        with pytest.raises(OSError, match="no"):
            mt.step(fail)
        assert torch.equal(model.cache, torch.full((size,), 2.0))
        assert model.trunk.cache is model.cache
        mt.step(losses)


@pytest.mark.parametrize("name", ["gd", "uw", "pcgrad", "mgda", "sequential"])
def test_autocast_around_a_step_reaches_the_closure_alone(name):
    ends = []
    for around in (True, False):
        model, _, mt = make(name, model=Toy(TASKS, dtype=torch.float32))
        losses = closure(model, batch(TASKS, dtype=torch.float32))
        cast = torch.autocast("cpu", dtype=torch.bfloat16)
        for _ in range(3):
            if around:
                with cast:
                    mt.step(losses)
            else:
                mt.step(cast(losses))
        ends.append(flat(model))
    assert torch.equal(*ends)


@pytest.mark.parametrize("name", ROWS)
def test_neither_a_default_device_nor_no_grad_changes_a_step(name):
    ends = []
    for device in ("cpu", "meta"):
        model, data = Toy(TASKS), batch(TASKS)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        with warnings.catch_warnings(), torch.device(device), torch.set_grad_enabled(device == "cpu"):
            warnings.simplefilter("ignore")
            mt = torchmto.MultiTask(model, optimizer, tasks=TASKS, method=build(name, 3), seed=0)
            for _ in range(2):
                mt.step(closure(model, data))
        ends.append(flat(model))
    assert torch.equal(*ends)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda parts: pickle.loads(pickle.dumps(parts))])
def test_a_copy_goes_on_like_the_original(copied):
    model, optimizer, mt = make("pcgrad")
    mt.step(closure(model, batch(TASKS)))
    twin, _, other = copied((model, optimizer, mt))
    infos = [one.step(closure(net, batch(TASKS, seed=2))) for net, one in ((model, mt), (twin, other))]
    assert torch.equal(flat(model), flat(twin))
    for again in (copied(infos[0]), torchmto.StepInfo(**dataclasses.asdict(infos[0]))):
        assert same(dataclasses.asdict(again), dataclasses.asdict(infos[1]))


def replaced(model, optimizer, width):
    """Other layers of the same names, and what the optimizer trains."""
    torch.manual_seed(3)
    model.trunk[0] = nn.Linear(4, width).double()
    model.heads = nn.ModuleDict({task: nn.Linear(width, 1).double() for task in TASKS})
    optimizer.param_groups[0]["params"] = list(model.parameters())


def test_layers_that_are_replaced_are_combined_like_a_new_model():
    model, optimizer, mt = make("mgda")
    mt.step(closure(model, batch(TASKS)))
    replaced(model, optimizer, 5)
    twin, _, fresh = make("mgda", model=copy.deepcopy(model))
    info, expected = (one.step(closure(net, batch(TASKS))) for net, one in ((model, mt), (twin, fresh)))
    assert torch.equal(info.gramian, expected.gramian)
    assert torch.equal(flat(model), flat(twin))


def test_layers_replaced_by_others_of_another_shape_are_named():
    model, optimizer, mt = make("mgda")
    mt.step(closure(model, batch(TASKS)))
    before = [p.detach().clone() for p in model.parameters()]
    former = model.trunk[0], model.heads
    replaced(model, optimizer, 7)
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"`trunk.0.weight` was replaced by one of another shape, \[7, 4\] after \[5, 4\]"
        ):
            mt.step(closure(model, batch(TASKS)))
    model.trunk[0], model.heads = former
    optimizer.param_groups[0]["params"] = list(model.parameters())
    assert all(map(torch.equal, model.parameters(), before))
    mt.step(closure(model, batch(TASKS)))


def test_lazy_parameters_are_named_before_anything_happens():
    model = nn.ModuleDict({"trunk": nn.LazyLinear(3), "a": nn.Linear(3, 1), "b": nn.Linear(3, 1)})
    with pytest.raises(ValueError, match="Run it once before"):
        torchmto.MultiTask(model, torch.optim.SGD(model.parameters(), lr=0.1), tasks=["a", "b"], method="gd")


@pytest.mark.parametrize("name", ["gd", "famo"])
def test_buffers_without_places_of_their_own_are_undone(name):
    model, _, mt = make(name)
    model.register_buffer("mask", torch.ones(1, 5).expand(4, 5))
    model.register_buffer("later", None)
    mt.step(closure(model, batch(TASKS)))
    before = state(mt)

    def failing(tasks):
        model.later = torch.ones(2)
        model.mask[:, :1].narrow(0, 0, 1).fill_(7)
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        mt.step(failing)
    assert model.later is None
    assert same(before, state(mt))


@pytest.mark.parametrize("size", [4, 200_000])
@pytest.mark.parametrize("other", [torch.zeros(4), torch.zeros(2, 3), torch.zeros(4, dtype=torch.float64)])
def test_buffers_that_are_given_other_memory_are_undone(other, size):
    model, _, mt = make("famo")
    kept = torch.arange(float(size))
    model.register_buffer("table", kept.clone())
    model.register_buffer("often", torch.zeros(4))
    losses = closure(model, batch(TASKS))

    def failing(tasks):
        model.table.add_(1)
        model.table.data = other
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        mt.step(failing)
    assert torch.equal(model.table, kept)

    def counting(tasks):
        model.often.data = model.often + 1
        return losses(tasks)

    for step in range(1, 3):
        # Its second forward, after the step, leaves no trace.
        assert mt.step(counting).num_forward == 2
        assert torch.equal(model.often, torch.full((4,), float(step)))


@pytest.mark.parametrize("error", [MemoryError(), KeyboardInterrupt()], ids=["memory", "interrupt"])
@pytest.mark.parametrize("part", ["slices_of", "widest", "views_of", "_kinds"])
def test_columns_that_are_half_laid_out_are_laid_out_anew(part, error, monkeypatch):
    rows = importlib.import_module("torchmto.gradients.rows")
    original = getattr(rows, part)

    def failing(given, *more):
        return throw(error) if len(given) else original(given, *more)

    ends = []
    for fails in (True, False):
        model, _, mt = make("pcgrad", model=Toy(TASKS, dtype=torch.float32))
        mt.step(closure(model, batch(TASKS, dtype=torch.float32)))
        model.double()  # so there will be other columns for the same roles
        losses = closure(model, batch(TASKS))
        if fails:
            monkeypatch.setattr(rows, part, failing)
            with pytest.raises(type(error)):
                mt.step(losses)
            monkeypatch.undo()
        mt.step(losses)
        ends.append(flat(model))
    assert torch.equal(*ends)


def throw(error):
    raise error


def test_a_hook_that_fails_after_the_step_says_that_it_was_taken():
    model, optimizer, mt = make("uw")
    before = mt.state_dict()
    optimizer.register_step_post_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError) as caught:
        mt.step(closure(model, batch(TASKS)))
    assert "1 of 1 optimizers had stepped" in caught.value.__notes__[0]
    assert same(before["roles"], torchmto.MultiTask(model, optimizer, tasks=TASKS, method="uw").state_dict()["roles"])


def test_a_head_frozen_between_two_parts_of_a_batch_stays():
    model, optimizer, mt = make("pcgrad")
    mt.backward(closure(model, batch(TASKS)), final=False)
    model.heads["a"].requires_grad_(False)
    before = model.heads["a"].weight.clone()
    mt.backward(closure(model, batch(TASKS, seed=2)))
    optimizer.step()
    assert model.heads["a"].weight.grad is None
    assert torch.equal(model.heads["a"].weight, before)


@pytest.mark.parametrize("name", ["gd", "pcgrad", "dwa"])
def test_a_part_of_a_batch_may_bring_no_task(name):
    ends = []
    for empty in (True, False):
        model, optimizer, mt = make(name)
        if empty:
            mt.backward(lambda tasks: {}, final=False)
        mt.backward(closure(model, batch(TASKS), count=True), final=False)
        if empty:
            mt.backward(lambda tasks: {}, final=False)
        mt.backward(closure(model, batch(TASKS, seed=2), count=True))
        optimizer.step()
        ends.append(flat(model))
    torch.testing.assert_close(*ends, rtol=1e-12, atol=0)


@pytest.mark.parametrize("engine", ["parameters", "auto"])
def test_weights_are_not_rounded_to_the_type_of_the_losses(engine):
    model, _, mt = make(
        torchmto.make_method("constant", weights={"a": 1.003, "b": 0.3337, "c": 0.7171}),
        model=Toy(TASKS, dtype=torch.float32),
        gradients=engine,
    )
    losses = closure(model, batch(TASKS, dtype=torch.float32))
    weights = torch.tensor([1.003, 0.3337, 0.7171])
    half = [loss.bfloat16() for loss in losses(TASKS).values()]
    rows = [torch.autograd.grad(loss, list(model.trunk.parameters()), retain_graph=True) for loss in half]
    mt.backward(lambda tasks: {task: loss.bfloat16() for task, loss in losses(tasks).items()})
    for parameter, *gradients in zip(model.trunk.parameters(), *rows, strict=True):
        expected = sum(w * g for w, g in zip(weights, gradients, strict=True))
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-5, atol=1e-6)


def test_a_loss_that_is_a_leaf_reaches_nothing():
    ends = []
    for engine in ("parameters", "layerwise"):
        model, _, mt = make("mgda", gradients=engine)
        losses = closure(model, batch(TASKS), only="ab")
        info = mt.step(lambda tasks, losses=losses: {**losses(tasks), "c": torch.zeros((), requires_grad=True)})
        assert info.weights["c"] == 0
        ends.append(flat(model))
    torch.testing.assert_close(*ends, rtol=1e-9, atol=1e-12)


def test_a_method_inside_another_that_looks_at_losses_after_the_step_needs_the_step():
    for method in (
        torchmto.make_method("wpcgrad", priority="famo"),
        torchmto.make_method("cr_mogm", method=torchmto.make_method("wpcgrad", priority="famo")),
    ):
        model, _, mt = make(method)
        with pytest.raises(ValueError, match=r"call mt.step\(closure\)"):
            mt.backward(closure(model, batch(TASKS)))


@pytest.mark.parametrize("name", ["sequential", "m_config"])
@pytest.mark.parametrize("weights", ["dwa", "rlw", "gls", "famo", "cosmos", "stch", "igb"])
def test_weightings_that_compare_tasks_are_named_where_tasks_come_alone(name, weights):
    with pytest.warns(UserWarning, match="can't weigh it against"):
        make(name, weights=weights)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for other in ("uw", "si", "imtl_l"):
            make(name, weights=other)
        make("pcgrad", weights=weights)


def test_nested_states_are_undone():
    class Counting(torchmto.LossWeighting):
        name = "counting"

        def __init__(self):
            super().__init__()
            self.add_state("seen", {"losses": [0]})

        def objective(self, losses, indices=None):
            self.seen["losses"].append(len(losses))
            return losses.sum()

    model, _, mt = make(Counting(), on_nonfinite="skip")
    losses = closure(model, batch(TASKS))
    assert mt.step(lambda tasks: {**losses(tasks), "a": losses(tasks)["a"] * torch.inf}).skipped
    assert mt.method.seen == {"losses": [0]}


def test_momenta_of_tasks_whose_turn_it_is_not_move_what_only_they_share():
    class Net(Toy):
        def __init__(self):
            super().__init__(TASKS)
            self.between = nn.Linear(5, 5).double()

        def forward(self, x, tasks=None):
            features = self.trunk(x)
            return {t: self.heads[t](features if t == "a" else self.between(features)) for t in tasks or TASKS}

    model, _, mt = make(torchmto.make_method("m_config", num_updates=1), model=Net())
    for seed in range(4):
        before = model.between.weight.clone()
        mt.step(closure(model, batch(TASKS, seed=seed + 1)))
        assert not torch.equal(before, model.between.weight)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"seed": True}, TypeError, "`seed` should be an int"),
        ({"seed": 2**70}, ValueError, "`seed` should be an int"),
        ({"shared": 3}, TypeError, "`shared` should be an iterable of parameters"),
    ],
)
def test_arguments_are_named(options, error, message):
    with pytest.raises(error, match=message):
        make("gd", **options)


def test_reports_of_several_values_are_named():
    _, _, mt = make("dtp")
    with pytest.raises(TypeError, match=r"performance\['a'\]"):
        mt.report({"a": torch.ones(2)})
