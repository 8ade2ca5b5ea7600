"""Every method against every region of the losses: what it declares to take it takes, the rest it refuses unchanged."""

import warnings

import pytest
import torch

import torchmto
from battery.table import ROWS, build
from battery.test_battery import Vector, every, linear, names_of, random_directions
from torchmto.methods import GramianWeighting, LossWeighting, method_class
from toy import same, state

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

REGIONS = {
    "ordinary": [1.0, 3.0, 2.0],
    "negative": [-700.0, 2.0, 1.0],
    "all negative": [-3.0, -2.0, -1.0],
    "zero": [0.0, 2.0, 1.0],
    "all zero": [0.0, 0.0, 0.0],
    "tiny": [1e-12, 2.0, 1.0],
    "all tiny": [1e-12, 2e-12, 3e-12],
    "huge": [1e12, 2.0, 1.0],
    "one negative task": [-2.0],
    "one task at zero": [0.0],
    "many": [0.1 * i + 0.1 for i in range(12)],
}
WEIGHTINGS = [name for name in ROWS if issubclass(method_class(name), LossWeighting)]
GRAMIAN = [name for name in ROWS if issubclass(method_class(name), GramianWeighting)]
WITHIN = {
    "task_groups": lambda inner: {"groups": "joint", "inner": inner},
    "cr_mogm": lambda inner: {"method": inner},
    "connection_strength": lambda inner: {"schedule": "phase2", "phase2": inner},
    "wpcgrad": lambda inner: {"priority": inner},
}


def scaled(model, constants):
    """Losses l_i (1 + <theta, d_i> / 100): gradients as long as the losses are large, zero where a loss is."""
    directions = random_directions(len(constants)) / 100
    values = torch.tensor(constants, dtype=torch.float64)
    return linear(model, values.unsqueeze(1) * directions, values)


def drive(method, constants, *, lr=0.0, **options):
    """A model and its MultiTask."""
    model = Vector(6)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    return model, torchmto.MultiTask(model, optimizer, tasks=names_of(len(constants)), method=method, **options)


def try_out(method, constants, judges, **options):
    """Take some steps. Losses that a judge refuses are refused or skipped, and change nothing; others leave all finite."""
    model, mt = drive(method, constants, **options)
    seen = torch.tensor(constants, dtype=torch.float64)
    refused = any(judge(mt).outside(seen, range(len(constants))) for judge in judges)
    before = state(mt)
    if refused:
        with pytest.raises(torchmto.NonFiniteError, match=r"Method `.*` needs .*losses"):
            mt.step(scaled(model, constants))
        assert same(state(mt), before)
        return
    for _ in range(5):
        info = mt.step(scaled(model, constants))
        assert model.theta.grad is None or model.theta.grad.isfinite().all()
        assert info.weights is None or all(weight - weight == 0 for weight in info.weights.values())
        mt.report({"t0": 0.5})
        mt.end_window()


def own(mt):
    return mt.method


@pytest.mark.parametrize("region", list(REGIONS))
@every
def test_losses(name, region):
    constants = REGIONS[region]
    try_out(build(name, len(constants)), constants, [own])


@every
def test_refused_steps_can_be_skipped(name):
    method = build(name, 2)
    for constants in ([-3.0, 1.0], [0.0, 1.0]):
        model, mt = drive(build(name, 2), constants, on_nonfinite="skip")
        method.bind(mt.tasks)
        before = state(mt)
        info = mt.step(scaled(model, constants))
        assert info.skipped == bool(method.outside(torch.tensor(constants), (0, 1)))
        assert not info.skipped or (same(state(mt), before) and f"`{name}`" in info.reason)


@every
def test_one_task_goes_down(name):
    """Whatever the loss of a single task is, the step doesn't climb."""
    for loss in (-3.0, 1e-9, 2.0, 1e9):
        model, mt = drive(build(name, 1), [loss], lr=1e-4 / max(abs(loss), 1.0))
        source = scaled(model, [loss])
        if mt.method.outside(torch.tensor([loss]), (0,)):
            continue
        before = float(source(("t0",))["t0"].detach())
        for _ in range(3):
            mt.step(source)
        assert float(source(("t0",))["t0"].detach()) <= before


@every
def test_a_finished_task_does_not_stop_the_others(name):
    """A loss that is 0, with a gradient of 0: the other task goes on, unless the step is refused."""
    model, mt = drive(build(name, 2), [0.0, 2.0], lr=0.1)
    source = scaled(model, [0.0, 2.0])
    if mt.method.outside(torch.tensor([0.0, 2.0]), (0, 1)):
        return
    for _ in range(5):
        mt.step(source)
    assert float(source(("t1",))["t1"].detach()) < 2.0


@pytest.mark.parametrize("method", ["pcgrad", "sequential", "gd"])
@pytest.mark.parametrize("region", ["ordinary", "negative", "zero", "all zero", "tiny", "huge"])
@pytest.mark.parametrize("name", WEIGHTINGS)
def test_losses_of_a_weighting_in_front(name, region, method):
    try_out(method, REGIONS[region], [lambda mt: mt.weights], weights=build(name, 3))


@pytest.mark.parametrize("region", ["ordinary", "negative", "zero", "all zero", "tiny", "huge"])
@pytest.mark.parametrize(
    ("name", "outer"),
    [
        *((name, "task_groups") for name in GRAMIAN),
        *((name, "cr_mogm") for name in GRAMIAN if build(name, 3).only_weighs),
        *((name, "connection_strength") for name in ROWS),
        *((name, "wpcgrad") for name in WEIGHTINGS),
    ],
)
def test_losses_of_a_method_inside(name, outer, region):
    inner = build(name, 3)
    try_out(torchmto.make_method(outer, **WITHIN[outer](inner)), REGIONS[region], [lambda _: inner])


@pytest.mark.parametrize("name", ["mgda", "moco"])
def test_a_hyperparameter_may_narrow_the_domain(name):
    assert torchmto.make_method(name).domain.losses == "any losses"
    for region in ("negative", "zero", "ordinary"):
        try_out(torchmto.make_method(name, normalize="loss"), REGIONS[region], [own])


@every
def test_declaration(name):
    """The words on the page agree with what is refused, bounds that are hyper-parameters included."""
    method = build(name, 2)
    refuses = {loss: bool(method.outside(torch.tensor([loss, 1.0]), (0, 1))) for loss in (-1.0, 0.0, 1.0)}
    expected = {
        "any losses": (False, False, False),
        "non-negative losses": (True, False, False),
        "losses of at least `reference`": (True, False, False),
        "positive losses": (True, True, False),
        "losses above `min_losses` + `eps`": (True, True, False),
    }
    assert tuple(refuses.values()) == expected[method.domain.losses]


@pytest.mark.parametrize(
    ("name", "bound"), [("tchebycheff", "reference"), ("pbi", "reference"), ("famo", "min_losses")]
)
def test_bounds_can_be_lowered(name, bound):
    """Likelihoods and actor losses: with a bound below them they are taken, and fall."""
    method = torchmto.make_method(name, **{bound: {"t0": -800.0, "t1": 0.0}})
    model, mt = drive(method, [-700.0, 2.0], lr=1e-4)
    source = scaled(model, [-700.0, 2.0])
    for _ in range(20):
        info = mt.step(source)
    assert info.losses["t0"] < -700
    with pytest.raises(torchmto.NonFiniteError, match=rf"`{name}` needs losses .*`{bound}`.*\(-800\).*`t0` is -900"):
        mt.step(linear(model, torch.zeros(2, 6, dtype=torch.float64) * model.theta, torch.tensor([-900.0, 2.0])))


@pytest.mark.cpu
@every
def test_records_before_and_without_a_step(name):
    """A method used by itself names tasks by their numbers, and has nothing to tell before its first use."""
    method = build(name, 3)
    if not hasattr(method, "records"):
        return
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        method.records()
    losses, gramian = torch.tensor([1.0, 2.0, 3.0]), torch.eye(3) + 0.1
    if isinstance(method, LossWeighting):
        method.loss_weights(losses)
    elif isinstance(method, GramianWeighting):
        method.weights(gramian, losses)
    else:
        method.ensure_setup(3)
    for value in method.records().values():
        if isinstance(value, dict):
            assert set(value) <= {"0", "1", "2"}
