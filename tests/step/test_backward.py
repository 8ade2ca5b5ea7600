"""`mt.backward` fills `.grad` with what `mt.step` would hand to the optimizer, and leaves the step to a trainer."""

import copy

import pytest
import torch

import torchmto
from battery.table import ROWS, build
from toy import Toy, batch, closure, flat, make, same, state

TASKS = ("a", "b", "c")
REFUSED = (
    "adatask",
    "connection_strength",
    "consmtl",
    "f_mtl",
    "famo",
    "m_config",
    "samo",
    "sequential",
    "task_groups",
)
"""Several optimizer steps or forwards per batch, or a step of their own."""
SERVED = [name for name in ROWS if name not in REFUSED]


def gradients(model):
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def handed_over(mt, *args, **kwargs):
    """The gradients that a step hands to its optimizer, and the step's report."""
    seen = {}
    hook = mt.network.optimizers.all[0].register_step_pre_hook(lambda *_: seen.update(gradients(mt.network.model)))
    info = mt.step(*args, **kwargs)
    hook.remove()
    return seen, info


def pair(name, **options):
    """Two equal models with equal methods: one steps, one is stepped."""
    twins = []
    for _ in range(2):
        model = Toy(TASKS)
        method = build(name, len(TASKS)) if isinstance(name, str) else name()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
        twins.append(torchmto.MultiTask(model, optimizer, tasks=TASKS, method=method, seed=3, **options))
    return twins


def close(a, b, rtol=1e-9):
    assert list(a) == list(b)
    for name, value in a.items():
        assert (value is None) == (b[name] is None), name
        if value is not None:
            torch.testing.assert_close(value, b[name], rtol=rtol, atol=1e-12)


@pytest.mark.parametrize("name", SERVED)
def test_backward_and_a_step_equal_mt_step(name):
    """To the bit, over several batches, with whatever the method learns on the way."""
    stepping, stepped = pair(name)
    for number in range(4):
        only = TASKS if number != 2 else TASKS[1:]
        data = batch(TASKS, seed=number)
        wanted, expected = handed_over(stepping, closure(stepping.network.model, data, only=only))
        info = stepped.backward(closure(stepped.network.model, data, only=only))
        found = gradients(stepped.network.model)
        assert same(found, wanted), number
        stepped.network.optimizers.all[0].step()
        assert info.num_optimizer_steps == 0
        assert (info.num_forward, info.num_backward) == (expected.num_forward, expected.num_backward)
        assert info.losses == expected.losses
        assert info.weights == expected.weights
    assert same(state(stepping), state(stepped))


@pytest.mark.parametrize("name", REFUSED)
def test_methods_that_step_themselves_or_run_the_model_again_are_refused(name):
    model, _, mt = make(torchmto.make_method(name))
    before = state(mt)
    with pytest.raises(ValueError, match=f"(?s)`{name}`.*mt.step"):
        mt.backward(closure(model, batch(TASKS)))
    assert same(before, state(mt))


@pytest.mark.parametrize("name", ["sdmgrad", "modo"])
def test_independent_batches_are_served(name):
    stepping, stepped = pair(name)
    sources = [[closure(mt.network.model, batch(TASKS, seed=s)) for s in range(3)] for mt in (stepping, stepped)]
    wanted, _ = handed_over(stepping, sources[0][0], independent=sources[0][1:])
    stepped.backward(sources[1][0], independent=sources[1][1:])
    assert same(gradients(stepped.network.model), wanted)


@pytest.mark.parametrize("name", SERVED)
def test_accumulation_equals_one_step_on_a_list(name):
    """The rows of all micro-batches are combined once: that is what `mt.step` makes of a list."""
    stepping, stepped = pair(name)
    for number in range(3):
        parts = [batch(TASKS, size=4, seed=10 * number + part) for part in range(3)]
        wanted, expected = handed_over(stepping, [closure(stepping.network.model, part) for part in parts])
        for place, part in enumerate(parts):
            model = stepped.network.model
            before = gradients(model)
            info = stepped.backward(closure(model, part), final=place == 2)
            if place < 2:
                assert same(gradients(model), before), "a micro-batch that isn't the last sets nothing"
        close(gradients(model), wanted)
        assert info.losses == pytest.approx(expected.losses, rel=1e-9)
        stepped.network.optimizers.all[0].step()
    torch.testing.assert_close(flat(stepping.network.model), flat(stepped.network.model), rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("name", ["pcgrad", "nash_mtl", "graddrop", "gradnorm", "dwa"])
def test_accumulation_of_partial_labels_and_counts(name):
    stepping, stepped = pair(name)
    parts = [batch(TASKS, size=size, seed=size) for size in (3, 5, 2)]
    only = [TASKS, TASKS[:1], TASKS[1:]]
    lists = [
        [closure(mt.network.model, part, only=names, count=True) for part, names in zip(parts, only, strict=True)]
        for mt in (stepping, stepped)
    ]
    wanted, _ = handed_over(stepping, lists[0])
    for place, part in enumerate(lists[1]):
        stepped.backward(part, final=place == 2)
    close(gradients(stepped.network.model), wanted)


def test_what_accumulation_costs():
    """K backwards per micro-batch where rows are kept; one where a loss weighting's weights don't depend on the losses."""
    for name, num_backward in (("gd", 1), ("uw", 1), ("dwa", 3), ("pcgrad", 3)):
        model, _, mt = make(name)
        infos = [mt.backward(closure(model, batch(TASKS, seed=s)), final=s == 1) for s in range(2)]
        assert [info.num_backward for info in infos] == [num_backward] * 2, name
        assert [info.num_forward for info in infos] == [1, 1]


def test_a_plain_sum_needs_the_same_shares_in_every_micro_batch():
    """Its one backward per micro-batch can't be divided by task afterwards: an error instead of wrong shares."""
    model, _, mt = make("gd")
    mt.backward(closure(model, batch(TASKS)), final=False)
    with pytest.raises(ValueError, match="micro-batch"):
        mt.backward(closure(model, batch(TASKS, seed=2), only=TASKS[1:]))
    data = [batch(TASKS, size=size, seed=size) for size in (3, 5)]
    twin, _, other = make("gd")
    wanted, _ = handed_over(other, [closure(twin, part, count=True) for part in data])
    for place, part in enumerate(data):
        mt.backward(closure(model, part, count=True), final=place == 1)
    close(gradients(model), wanted)


def test_an_accumulated_batch_is_about_the_same_tasks():
    model, _, mt = make("pcgrad")
    mt.backward(closure(model, batch(TASKS)), final=False)
    with pytest.raises(ValueError, match="`tasks` should be the same"):
        mt.backward(closure(model, batch(TASKS)), tasks=["a", "b"])


def test_several_optimizers_step_one_after_the_other():
    model, twin = Toy(TASKS), Toy(TASKS)
    parts = [torch.optim.SGD(model.trunk.parameters(), lr=0.1), torch.optim.Adam(model.heads.parameters(), lr=0.02)]
    mt = torchmto.MultiTask(model, parts, tasks=TASKS, method="pcgrad", seed=3)
    by_hand = [torch.optim.SGD(twin.trunk.parameters(), lr=0.1), torch.optim.Adam(twin.heads.parameters(), lr=0.02)]
    all_of_them = torch.optim.SGD(twin.parameters(), lr=0.0)
    other = torchmto.MultiTask(twin, all_of_them, tasks=TASKS, method="pcgrad", seed=3)
    for number in range(3):
        info = mt.step(closure(model, batch(TASKS, seed=number)))
        other.backward(closure(twin, batch(TASKS, seed=number)))
        for optimizer in by_hand:
            optimizer.step()
        assert info.num_optimizer_steps == 1
    assert torch.equal(flat(model), flat(twin))


def test_optimizers_with_a_parameter_in_common_are_refused():
    model = Toy(TASKS)
    both = [torch.optim.SGD(model.parameters(), lr=0.1), torch.optim.SGD(model.heads.parameters(), lr=0.1)]
    with pytest.raises(ValueError, match="different parameters"):
        torchmto.MultiTask(model, both, tasks=TASKS, method="gd")
    with pytest.raises(ValueError, match="at least one"):
        torchmto.MultiTask(model, [], tasks=TASKS, method="gd")


def test_an_error_of_the_second_optimizer_says_what_has_stepped():
    model = Toy(TASKS)
    parts = [torch.optim.SGD(part.parameters(), lr=0.1) for part in (model.trunk, model.heads)]
    mt = torchmto.MultiTask(model, parts, tasks=TASKS, method="pcgrad")

    def fail(*_):
        raise ZeroDivisionError("second")

    parts[1].register_step_pre_hook(fail)
    with pytest.raises(ZeroDivisionError) as raised:
        mt.step(closure(model, batch(TASKS)))
    assert "1 of 2 optimizers had stepped already" in raised.value.__notes__[0]


def test_gradients_that_are_there_are_replaced():
    model, _, mt = make("pcgrad")
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)
    twin, _, other = make("pcgrad")
    with pytest.warns(UserWarning, match="has a gradient already"):
        mt.backward(closure(model, batch(TASKS)))
    other.backward(closure(twin, batch(TASKS)))
    assert same(gradients(model), gradients(twin))


@pytest.mark.parametrize("ending", ["error", "step", "load"])
def test_kept_rows_are_dropped(ending):
    model, _, mt = make("pcgrad")
    twin, _, other = make("pcgrad")
    mt.backward(closure(model, batch(TASKS, seed=9)), final=False)
    if ending == "error":
        with pytest.raises(ZeroDivisionError):
            mt.backward(lambda tasks: {"a": 1 / 0})
    elif ending == "step":
        mt.step(closure(model, batch(TASKS, seed=8)))
        other.step(closure(twin, batch(TASKS, seed=8)))
    else:
        mt.load_state_dict(mt.state_dict())
        other.load_state_dict(copy.deepcopy(mt.state_dict()))
    mt.backward(closure(model, batch(TASKS, seed=7)))
    other.backward(closure(twin, batch(TASKS, seed=7)))
    close(gradients(model), gradients(twin))


@pytest.mark.parametrize("name", ["gd", "uw", "pcgrad", "graddrop"])
def test_with_a_scaler_the_gradient_keeps_its_scale(name):
    model, optimizer, mt = make(name, scaler=(scaler := torch.amp.GradScaler("cpu", init_scale=8.0)))
    twin, _, other = make(name)
    data = batch(TASKS)
    other.backward(closure(twin, data))
    mt.backward(closure(model, data))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, 8 * q.grad)
    before = flat(model)
    scaler.step(optimizer)
    scaler.update()
    assert not torch.equal(before, flat(model))


@pytest.mark.parametrize("name", ["gd", "uw", "pcgrad", "moco"])
def test_an_overflow_is_left_to_the_scaler(name):
    model, optimizer, mt = make(name, scaler=(scaler := torch.amp.GradScaler("cpu", init_scale=8.0)))
    mt.backward(closure(model, batch(TASKS)))
    before, known = flat(model), copy.deepcopy(mt.state_dict())
    losses = closure(model, batch(TASKS))
    info = mt.backward(lambda tasks: {t: _Infinite.apply(loss) for t, loss in losses(tasks).items()})
    assert info.skipped
    assert not all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
    assert same(known, mt.state_dict())
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(before, flat(model))
    assert scaler.get_scale() == 4.0


class _Infinite(torch.autograd.Function):
    """The loss itself, with an infinite gradient."""

    @staticmethod
    def forward(ctx, loss):
        return loss.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * torch.inf


def test_without_a_scaler_a_skipped_batch_leaves_no_gradient():
    model, _, mt = make("pcgrad", on_nonfinite="skip")
    losses = closure(model, batch(TASKS))
    info = mt.backward(lambda tasks: {t: _Infinite.apply(loss) for t, loss in losses(tasks).items()})
    assert info.skipped
    assert all(p.grad is None for p in model.parameters())


def test_clip_is_the_trainers():
    model, _, mt = make("pcgrad", clip=1e-3)
    twin, _, other = make("pcgrad")
    mt.backward(closure(model, batch(TASKS)))
    other.backward(closure(twin, batch(TASKS)))
    assert same(gradients(model), gradients(twin))


def test_a_wrapper_that_swallows_the_step_is_noticed():
    class Accumulating(torch.optim.Optimizer):
        """As wrappers do that hold the step back while gradients are accumulated."""

        def __init__(self, optimizer):
            self.optimizer = optimizer

        @property
        def param_groups(self):
            return self.optimizer.param_groups

        @param_groups.setter
        def param_groups(self, value):
            self.optimizer.param_groups = value

        @property
        def state(self):
            return self.optimizer.state

        @property
        def defaults(self):
            return self.optimizer.defaults

        def state_dict(self):
            return self.optimizer.state_dict()

        def step(self, closure=None):
            if self.sync:
                self.optimizer.step()

    model = Toy(TASKS)
    wrapper = Accumulating(torch.optim.SGD(model.parameters(), lr=0.1))
    mt = torchmto.MultiTask(model, wrapper, tasks=TASKS, method="pcgrad")
    wrapper.sync = True
    assert mt.step(closure(model, batch(TASKS))).num_optimizer_steps == 1
    wrapper.sync = False
    before = flat(model)
    with pytest.raises(RuntimeError, match=r"mt\.backward"):
        mt.step(closure(model, batch(TASKS)))
    assert torch.equal(before, flat(model))
    assert not wrapper.optimizer._optimizer_step_post_hooks


@pytest.mark.parametrize(
    "method", [("nash_mtl", {"update_every": 2}), ("fairgrad", {"scale": "released", "refresh_every": 2})]
)
def test_reused_weights_are_bounded_whatever_the_scaler(method):
    """The second batch, of much larger gradients, reuses weights; its gradient is brought to length 1 all the same."""
    name, options = method
    lengths = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=1024.0)):
        model, _, mt = make(torchmto.make_method(name, **options), scaler=scaler, gradients="parameters")
        for factor in (1.0, 100.0):
            losses = closure(model, batch(TASKS))
            scaled = lambda tasks, losses=losses, factor=factor: {t: factor * x for t, x in losses(tasks).items()}  # noqa: E731
            mt.backward(scaled, final=False)
            mt.backward(scaled)
            length = torch.cat([p.grad.flatten() for p in model.trunk.parameters()]).norm()
            lengths.append(float(length) / (1.0 if scaler is None else scaler.get_scale()))
            for parameter in model.parameters():
                parameter.grad = None
    assert lengths[2:] == pytest.approx(lengths[:2])
    assert lengths[1] == pytest.approx(1.0)


@pytest.mark.parametrize("method", ["gd", "pcgrad"])
def test_no_copy_in_the_middle_of_an_accumulated_batch(method):
    """What has been added up belongs to the original's parameters."""
    model, _, mt = make(method)
    losses = closure(model, batch(TASKS))
    mt.backward(losses, final=False)
    with pytest.raises(RuntimeError, match="in the middle of an accumulated batch"):
        copy.deepcopy(mt)
    mt.backward(losses)
    copy.deepcopy(mt)


@pytest.mark.parametrize("method", ["gd", "uw", "dwa", "rlw"])
def test_loss_weightings_accumulate_where_nothing_is_shared(method):
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({task: torch.nn.Linear(4, 1) for task in TASKS})
    mt = torchmto.MultiTask(model, torch.optim.SGD(model.parameters(), lr=0.1), tasks=TASKS, method=method, seed=1)
    x = torch.randn(8, 4)
    losses = lambda tasks: {task: model[task](x).square().mean() for task in tasks}  # noqa: E731
    mt.step(losses)
    mt.backward(losses, final=False)
    info = mt.backward(losses)
    for task, weight in info.weights.items():
        (wanted,) = torch.autograd.grad(losses([task])[task] * weight, [model[task].weight])
        torch.testing.assert_close(model[task].weight.grad, wanted)


@pytest.mark.parametrize("weights", [None, "uw"])
def test_constant_weights_keep_apart_what_a_weighted_sum_cannot(weights):
    """What the error of gd and uw with partial labels in an accumulated batch advises."""
    parts = [(batch(TASKS, seed=seed), only) for seed, only in enumerate((("a", "b"), ("c",), ("a", "c"), ("b",)))]
    _, _, refused = make(weights or "gd")
    first, second = (closure(refused.network.model, data, only=only) for data, only in parts[:2])
    refused.backward(first, final=False)
    with pytest.raises(ValueError, match="method `constant` with weights of 1"):
        refused.backward(second, final=False)
    model, optimizer, mt = make(torchmto.make_method("constant", weights=[1, 1, 1]), weights=weights)
    twin, _, plain = make(weights or "gd")
    for _ in range(3):
        for number, (data, only) in enumerate(parts):
            mt.backward(closure(model, data, only=only), final=number == len(parts) - 1)
        optimizer.step()
        plain.step([closure(twin, data, only=only) for data, only in parts])
    torch.testing.assert_close(flat(model), flat(twin), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", ["gd", "pcgrad"])
def test_zero_grad_drops_what_was_kept(method):
    mt, twin = pair(method)
    for way in (mt, twin):
        model, data = way.network.model, [batch(TASKS, seed=seed) for seed in range(2)]
        if way is mt:
            way.backward(closure(model, data[0]), final=False)
            assert way.accumulating
            way.zero_grad()
            assert not way.accumulating
            assert all(p.grad is None for p in model.parameters())
        way.backward(closure(model, data[1]))
    assert same(gradients(mt.network.model), gradients(twin.network.model))
