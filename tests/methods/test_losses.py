"""Loss weightings: formulas, learnt scales, windows, missing tasks, resuming and composition."""

import io
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import torchmto
from torchmto.methods import LossWeighting, method_class
from torchmto.methods.losses.go4align import group_means
from torchmto.methods.losses.learnable import LearnableScales
from torchmto.methods.method import copied
from torchmto.methods.registry import hyperparameters_of
from toy import Toy, batch, closure, flat, flat_grad, same

TASKS = ("a", "b", "c")
WEIGHTINGS = [
    name
    for name in torchmto.methods()
    if issubclass(method_class(name), LossWeighting)
    and not any((hyperparameters_of(method_class(name)) or {}).values())
]
positive = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=6).map(np.array)


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def make(name, **hyperparameters):
    return torchmto.make_method(name, **hyperparameters)


class Feed:
    """A MultiTask on one parameter that stays 1, so that losses can be set: l_i = c_i * parameter."""

    def __init__(self, method, tasks=TASKS, lr=0.0, **options):
        self.parameter = nn.Parameter(torch.ones((), dtype=torch.float64))
        model = nn.ParameterList([self.parameter])
        self.mt = torchmto.MultiTask(
            model, torch.optim.SGD([self.parameter], lr=lr), tasks=tasks, method=method, **options
        )

    def __call__(self, **losses):
        return self.mt.step(lambda tasks: {t: self.parameter * losses[t] for t in tasks if t in losses})


# ------------------------------------------------------------------ formulas


def pbi_weights(l):
    """Gradient of d1 + 5 d2 by central differences."""
    w = np.full(len(l), 1 / math.sqrt(len(l)))

    def value(x):
        along = x @ w
        return along + 5 * np.sqrt(((x - along * w) ** 2).sum())

    h = 1e-6 * l.max()
    return np.array([(value(l + h * e) - value(l - h * e)) / (2 * h) for e in np.eye(len(l))])


def cosmos_weights(l):
    r = np.full(len(l), 1 / len(l))
    size = np.linalg.norm(l)
    return r - (r / size - (r @ l) * l / size**3) / np.linalg.norm(r)


FORMULAS = {
    "gd": (lambda l: l.sum(), lambda l: np.ones(len(l))),
    "si": (lambda l: np.log(l).sum(), lambda l: 1 / l),
    "uw": (lambda l: (l / 2).sum(), lambda l: np.full(len(l), 0.5)),
    "imtl_l": (lambda l: l.sum(), lambda l: np.ones(len(l))),
    "dtp": (lambda l: l.sum(), lambda l: np.ones(len(l))),
    "dwa": (lambda l: l.sum(), lambda l: np.ones(len(l))),
    "gls": (lambda l: l.prod() ** (1 / len(l)), lambda l: l.prod() ** (1 / len(l)) / len(l) / l),
    "stch": (lambda l: np.log(l).sum(), lambda l: 1 / l),
    "igb": (lambda l: np.log(l).sum(), lambda l: 1 / l),
    "famo": (
        lambda l: np.log(l + 1e-8).mean() / (1 / (l + 1e-8)).mean(),
        lambda l: (1 / (l + 1e-8)) / (1 / (l + 1e-8)).sum(),
    ),
    "cosmos": (lambda l: l.mean() - l.sum() / np.linalg.norm(l) / math.sqrt(len(l)), cosmos_weights),
    "tchebycheff": (lambda l: l.max() / len(l), None),
    "mtchebycheff": (lambda l: l.max() * len(l), None),
}


@pytest.mark.parametrize("name", FORMULAS)
@settings(max_examples=15)
@given(losses=positive)
def test_formula_at_the_start(name, losses):
    value, weights = FORMULAS[name]
    tensor = torch.tensor(losses)
    assert make(name).objective(tensor).item() == pytest.approx(value(losses), rel=1e-8, abs=1e-8 * losses.max())
    if weights is not None:
        expected = weights(losses)
        np.testing.assert_allclose(
            make(name).loss_weights(tensor), expected, rtol=1e-7, atol=1e-9 * abs(expected).max()
        )


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_separable_weightings_weigh_a_task_alone_as_among_others(name):
    method, losses = make(name), torch.tensor([0.5, 2.0, 7.0], dtype=torch.float64)
    if not (method.fixed or method.separable):
        pytest.skip("it weighs tasks against each other")
    method.ensure_setup(3)
    alone = [method.loss_weights(losses[[task]], (task,)) for task in range(3)]
    torch.testing.assert_close(torch.cat(alone), method.loss_weights(losses), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", WEIGHTINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_is_kept_and_nothing_is_needed_before(name, dtype):
    losses = torch.tensor([0.5, 2.0, 3.0], dtype=dtype)
    weights = make(name).loss_weights(losses)
    assert weights.dtype == dtype
    assert weights.isfinite().all()
    assert make(name).objective(losses).shape == ()
    assert make(name).objective(losses).dtype == dtype


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_objective_is_pure(name):
    method = make(name)
    method.objective(torch.tensor([1.0, 2.0, 3.0]))
    method.generator.manual_seed(0)
    before = method.state_dict()
    method.objective(torch.tensor([3.0, 1.0]), indices=(0, 2))
    method.generator.manual_seed(0)
    after = method.state_dict()
    assert same(after, before)


@pytest.mark.parametrize("name", WEIGHTINGS)
@settings(max_examples=10)
@given(losses=positive, exponent=st.integers(-4, 4))
def test_declared_homogeneity_of_the_first_step(name, losses, exponent):
    degree = make(name).properties.homogeneity
    if degree is None:
        return
    scale = 10.0**exponent
    # The update is weights times gradients, and the gradients have degree 1.
    weights = make(name).loss_weights(torch.tensor(losses))
    scaled = make(name).loss_weights(torch.tensor(losses * scale))
    torch.testing.assert_close(scaled, weights * scale ** (degree - 1), rtol=1e-7, atol=1e-9 * weights.abs().max())


@pytest.mark.parametrize("name", WEIGHTINGS)
@settings(max_examples=10)
@given(losses=positive, order=st.randoms(use_true_random=False))
def test_declared_equivariance(name, losses, order):
    if not make(name).properties.equivariant:
        return
    permutation = list(range(len(losses)))
    order.shuffle(permutation)
    weights = make(name).loss_weights(torch.tensor(losses))
    permuted = make(name).loss_weights(torch.tensor(losses[permutation]))
    torch.testing.assert_close(permuted, weights[permutation], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", WEIGHTINGS)
@settings(max_examples=10)
@given(loss=st.floats(1e-3, 1e3))
def test_declared_identity(name, loss):
    if make(name).properties.identity:
        assert make(name).loss_weights(torch.tensor([loss])).item() == 1


@pytest.mark.parametrize("name", WEIGHTINGS)
@given(
    size=st.integers(2, 40),
    level=st.floats(0.1, 1e3),
    seed=st.integers(0, 10**6),
    kinds=st.sampled_from(
        [(torch.float32, torch.float32), (torch.float64, torch.float64), (torch.float32, torch.float64)]
    ),
)
@settings(max_examples=25)
def test_no_task_climbs_by_rounding_errors(name, size, level, seed, kinds):
    """Losses that are equal but for these, as behind a weighting that makes them so: the weights are those of equal ones.

    Sums over ranks come in double precision, whatever the losses were computed in.
    """
    generator, (dtype, kind) = torch.Generator().manual_seed(seed), kinds
    losses = torch.full((size,), level, dtype=kind)
    noise = torch.randint(-2, 3, (size,), generator=generator) * torch.finfo(dtype).eps / 2
    exact, found = (make(name).loss_weights(values) for values in (losses, losses * (1 + noise)))
    assert bool((found >= 0).all())
    if "tchebycheff" not in name and name != "go4align":
        torch.testing.assert_close(found, exact, rtol=100 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("preference", [[1.0, 2.0, 4.0], [0.1, 0.3, 0.7], [1.0, 1e-3, 7.0]])
@pytest.mark.parametrize("reference", [0.0, -100.0, [-1.0, 0.5, 0.0]])
def test_pbi_on_its_reference(preference, reference):
    """Where the losses lie on the preferred direction only the distance along it counts."""
    method, direction = (
        make("pbi", preference=preference, reference=reference),
        torch.tensor(preference, dtype=torch.float64),
    )
    for dtype in (torch.float32, torch.float64):
        for length in (0.3, 0.7, 1.1, 13.0):
            losses = (length * direction + torch.tensor(reference, dtype=torch.float64)).to(dtype)
            torch.testing.assert_close(
                method.loss_weights(losses), (direction / direction.norm()).to(dtype), rtol=1e-5, atol=0
            )
    small = torch.tensor([0.5, 1e-12])
    weights = make("pbi", preference=[1.0, 1e-30]).loss_weights(small)
    assert weights.tolist() == pytest.approx([1.0, 5.0]), "a small distance isn't a rounding error of a large loss"


def test_pbi():
    losses = np.array([0.5, 2.0, 3.0])
    np.testing.assert_allclose(make("pbi").loss_weights(torch.tensor(losses)), pbi_weights(losses), rtol=1e-6)
    method = make("pbi", preference=[1.0, 3.0], theta=2.0, reference=[0.5, 0.25])
    gap, w = np.array([0.5, 1.0]), np.array([1.0, 3.0]) / math.sqrt(10)
    expected = gap @ w + 2 * math.sqrt(gap @ gap - (gap @ w) ** 2)
    assert method.objective(torch.tensor([1.0, 1.25], dtype=torch.float64)).item() == pytest.approx(expected)


def test_preferences_are_shares_of_the_present_tasks():
    for name, expected in (("tchebycheff", 0.75 * 2), ("mtchebycheff", 2 / 0.25), ("cosmos", 0.25 * 2 + 0.75 * 2)):
        hyperparameters = {"penalty": 0.0} if name == "cosmos" else {}
        method = make(name, preference={"a": 1.0, "b": 4.0, "c": 3.0}, **hyperparameters)
        method.bind(TASKS)
        assert method.objective(torch.tensor([2.0, 2.0]), indices=(0, 2)).item() == pytest.approx(expected)
    method = make("tchebycheff", reference={"a": 1.0, "b": 0.0})
    method.bind(("a", "b"))
    assert method.loss_weights(torch.tensor([2.5, 2.0])).tolist() == [0.0, 0.5]


def test_tchebycheff_shares_ties():
    assert make("tchebycheff").loss_weights(torch.tensor([2.0, 2.0, 1.0])).tolist() == pytest.approx([1 / 6, 1 / 6, 0])


def test_rlw():
    losses = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    method = make("rlw")
    method.seed(3)
    draw = torch.randn(3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    first = method.loss_weights(losses)
    torch.testing.assert_close(first, 3 * draw.softmax(0))
    assert not torch.equal(method.loss_weights(losses), first)
    assert method.loss_weights(losses[:2], indices=(0, 2)).sum().item() == pytest.approx(2)


# ------------------------------------------------------------------ learnt scales


@pytest.mark.parametrize("name", ["uw", "imtl_l"])
def test_scales_move_as_adam_on_the_objective(name):
    feed = Feed(make(name, lr=0.1))
    scales = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([scales], lr=0.1)
    for step in range(6):
        losses = torch.tensor([0.5 + step, 2.0, 3.0 / (step + 1)], dtype=torch.float64)
        objective = losses / (2 * scales.exp()) + scales / 2 if name == "uw" else scales.exp() * losses - scales
        weight = (-scales).exp() / 2 if name == "uw" else scales.exp()
        info = feed(**dict(zip(TASKS, losses.tolist(), strict=True)))
        assert list(info.weights.values()) == pytest.approx(weight.tolist())
        adam.zero_grad()
        objective.sum().backward()
        adam.step()
        torch.testing.assert_close(feed.mt.method.scales.values, scales.detach())
        assert info.records["scales"] == pytest.approx(dict(zip(TASKS, scales.tolist(), strict=True)))


def test_scales_settle_at_the_losses():
    losses = {"a": 0.5, "b": 2.0, "c": 30.0}
    for name, expected in (("uw", 1.0), ("imtl_l", -1.0)):
        feed = Feed(make(name, lr=0.3))
        for _ in range(150):
            info = feed(**losses)
        assert info.records["scales"] == pytest.approx({t: expected * math.log(l) for t, l in losses.items()}, abs=0.05)


def test_adam_agrees_with_torch():
    scales = LearnableScales(3, lr=0.2, initial=0.5, weight_decay=0.1)
    parameter = torch.full((3,), 0.5, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([parameter], lr=0.2, weight_decay=0.1)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        parameter.grad = torch.randn(3, generator=generator, dtype=torch.float64)
        scales.step(parameter.grad, range(3))
        adam.step()
        torch.testing.assert_close(scales.values, parameter.detach(), rtol=1e-12, atol=1e-14)
    before = copied(scales.state_dict())
    scales.step(torch.ones(2), (0, 1))
    assert all(tensor[2] == before[name][2] for name, tensor in scales.state_dict().items())


def test_learnable_scales_take_over_states():
    scales, other = LearnableScales(2, lr=0.1), LearnableScales(2, lr=0.1)
    fresh = copied(scales.state_dict())
    scales.step(torch.tensor([1.0, -2.0]), (0, 1))
    other.load_state_dict(scales.state_dict())
    scales.step(torch.tensor([0.5]), (1,))  # the copy must not share memory
    assert other.values[0] == scales.values[0]
    assert other.values[1] != scales.values[1]
    other.step(torch.tensor([0.5]), (1,))
    assert torch.equal(other.values, scales.values)
    scales.load_state_dict(fresh)
    assert scales.values.tolist() == [0, 0]
    with pytest.raises(ValueError, match="3 scales"):
        scales.load_state_dict(LearnableScales(3, lr=0.1).state_dict())


# ------------------------------------------------------------------ windows


def test_dwa_compares_the_last_two_windows():
    feed = Feed(make("dwa", temperature=1.5))
    for losses in ((4.0, 1.0), (2.0, 3.0)):
        feed(a=losses[0], b=losses[1], c=1.0)
    feed.mt.end_window()
    assert set(feed(a=1.0, b=1.0, c=1.0).weights.values()) == {1.0}
    feed(a=2.0, b=3.0, c=1.0)
    feed.mt.end_window()  # means (3, 2, 1), then (1.5, 2, 1)
    feed.mt.end_window()  # a window without steps changes nothing
    expected = 3 * softmax(np.array([1.5 / 3, 2 / 2, 1]) / 1.5)
    assert list(feed(a=9.0, b=9.0, c=9.0).weights.values()) == pytest.approx(expected.tolist())
    pair = 2 * softmax(np.array([0.5, 1]) / 1.5)
    assert list(feed(a=1.0, b=1.0).weights.values()) == pytest.approx(pair.tolist())


def test_dwa_windows_by_steps():
    by_steps, by_hand = Feed(make("dwa", window=2)), Feed(make("dwa"))
    for step in range(7):
        losses = {"a": 1.0 + step, "b": 3.0 / (step + 1), "c": 2.0}
        assert by_steps(**losses).weights == by_hand(**losses).weights
        if step % 2:
            by_hand.mt.end_window()


@pytest.mark.parametrize(
    ("name", "options"), [("dwa", {}), ("stch", {"warmup": 2}), ("igb", {}), ("wpcgrad", {"priority": "loss"})]
)
def test_windows_of_steps_are_not_cut_short_by_epochs(name, options):
    """Trainers call ``mt.end_window()`` after every epoch, whatever the method."""
    epochs, steps = (Feed(make(name, window=3, **options)) for _ in range(2))
    for step in range(8):
        losses = {"a": 1.0 + step, "b": 3.0 / (step + 1), "c": 2.0}
        assert epochs(**losses).weights == steps(**losses).weights
        epochs.mt.end_window()
    assert same(epochs.mt.state_dict(), steps.mt.state_dict())


def test_dwa_keeps_means_of_absent_tasks():
    feed = Feed("dwa")
    for losses in ({"a": 4.0, "b": 2.0}, {"a": 2.0, "b": 2.0}, {"a": 3.0}):
        feed(**losses)
        feed.mt.end_window()
    method = feed.mt.method
    assert method.last.tolist() == pytest.approx([3, 2, math.nan], nan_ok=True)
    assert method.before.tolist() == pytest.approx([2, 2, math.nan], nan_ok=True)
    expected = 3 * softmax(np.array([1.5, 1, 1]) / 2)
    assert method.loss_weights(torch.ones(3)).tolist() == pytest.approx(expected.tolist())


def test_stch_warm_up_then_smooth_maximum():
    feed = Feed(make("stch", mu=0.5, warmup=2))
    for losses in ((8.0, 8.0), (2.0, 4.0), (4.0, 6.0)):
        info = feed(a=losses[0], b=losses[1])
        assert list(info.weights.values()) == pytest.approx([1 / losses[0], 1 / losses[1]])
        if losses != (2.0, 4.0):
            feed.mt.end_window()
    nadir = np.array([3.0, 5.0])  # the last warm-up window's means
    l = np.array([1.5, 4.0])
    value = 0.5 * np.log(((l / nadir) ** 2).sum())
    method = feed.mt.method
    assert method.objective(torch.tensor(l)).item() == pytest.approx(value)
    share = (l / nadir) ** 2 / ((l / nadir) ** 2).sum()
    assert list(feed(a=1.5, b=4.0).weights.values()) == pytest.approx((share / l).tolist())
    feed.mt.end_window()
    assert method.nadir[:2].tolist() == nadir.tolist()
    # A task that appears after the warm-up counts as being at its nadir, until its first window ends.
    share = np.array([0.25, 1.0]) / 1.25
    assert list(feed(a=1.5, c=7.0).weights.values()) == pytest.approx((share / np.array([1.5, 7.0])).tolist())
    feed.mt.end_window()
    assert method.nadir.tolist() == [3, 5, 7]


def test_stch_small_mu_is_the_maximum():
    feed = Feed(make("stch", mu=1e-3, warmup=1, window=1))
    feed(a=1.0, b=10.0)
    weights = feed(a=0.9, b=8.0).weights
    assert weights == pytest.approx({"a": 1 / 0.9, "b": 0.0}, abs=1e-12)


def test_igb_weighs_by_the_gap_that_is_left():
    feed = Feed("igb")
    for losses in ((8.0, 8.0), (2.0, 4.0)):
        info = feed(a=losses[0], b=losses[1])
        assert list(info.weights.values()) == pytest.approx([1 / losses[0], 1 / losses[1]])
        feed.mt.end_window()
    feed.mt.end_window()
    l = np.array([1.0, 3.0])
    for _ in range(2):
        expected = 2 * softmax(l / np.array([2.0, 4.0])) / l
        assert list(feed(a=1.0, b=3.0).weights.values()) == pytest.approx(expected.tolist())
        feed.mt.end_window()
    expected = 2 * softmax(np.array([0.5, 1.0])) / np.array([1.0, 6.0])
    assert list(feed(a=1.0, c=6.0).weights.values()) == pytest.approx(expected.tolist())
    feed.mt.end_window()
    assert feed.mt.method.base.tolist() == [2, 4, 6]


def test_dtp_follows_reports():
    feed = Feed(make("dtp", gamma={"a": 1.0, "b": 2.0, "c": 0.0}, alpha=0.25))
    assert feed(a=1.0, b=2.0, c=3.0).weights == {"a": 1, "b": 1, "c": 1}
    feed.mt.report({"a": 0.8, "b": 0.5})
    expected = {"a": -0.2 * math.log(0.8), "b": -0.25 * math.log(0.5), "c": 1}
    assert feed(a=1.0, b=2.0, c=3.0).weights == pytest.approx(expected)
    feed.mt.report({"a": 0.4, "c": 0.0})
    info = feed(a=1.0, c=3.0)
    assert info.weights == pytest.approx({"a": -0.3 * math.log(0.7), "c": -math.log(1e-6)})
    assert info.records["performance"] == pytest.approx({"a": 0.7, "b": 0.5, "c": 0.0})
    feed.mt.report(dict.fromkeys(TASKS, 1.0))
    before = feed.mt.method.state_dict()["performance"]
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        feed.mt.report({"a": 0.5, "b": 55.0})
    assert torch.equal(feed.mt.method.performance, before)
    with pytest.raises(ValueError, match="not known yet"):
        make("dtp").report({"a": 0.5})


# ------------------------------------------------------------------ famo, go4align


def test_famo_against_a_hand_computation():
    model, data = Toy(TASKS), batch(TASKS)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    mt = torchmto.MultiTask(model, optimizer, tasks=TASKS, method=make("famo", lr=0.1, gamma=0.01, min_losses=0.1))
    logits = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([logits], lr=0.1, weight_decay=0.01)
    losses = closure(model, data)

    def log_distance():
        with torch.no_grad():
            return torch.stack([loss - 0.1 + 1e-8 for loss in losses(TASKS).values()]).log()

    for _ in range(4):
        before = log_distance()
        z = logits.softmax(0)
        weights = (z / before.exp() / (z / before.exp()).sum()).detach()
        info = mt.step(losses)
        assert (info.num_forward, info.num_backward, info.num_optimizer_steps) == (2, 1, 1)
        torch.testing.assert_close(torch.tensor(list(info.weights.values()), dtype=torch.float64), weights)
        adam.zero_grad()
        (z * (before - log_distance())).sum().backward()
        adam.step()
        torch.testing.assert_close(mt.method.logits.values, logits.detach())
    assert mt.method.cost(3).num_forward == 2


def test_famo_replays_the_noise_and_leaves_no_trace():
    """With learning rate 0 the second forward must see the same losses, so the logits only decay (from 0: not at all)."""
    model, data = Toy(TASKS, norm=nn.BatchNorm1d(5), dropout=0.5), batch(TASKS)
    reference = Toy(TASKS, norm=nn.BatchNorm1d(5), dropout=0.5)
    mt = torchmto.MultiTask(model, torch.optim.SGD(model.parameters(), lr=0.0), tasks=TASKS, method="famo")
    plain = torchmto.MultiTask(reference, torch.optim.SGD(reference.parameters(), lr=0.0), tasks=TASKS, method="gd")
    for stepping, net in ((mt, model), (plain, reference)):
        torch.manual_seed(5)
        for _ in range(3):
            stepping.step(closure(net, data))
    assert mt.method.logits.values.tolist() == [0, 0, 0]
    for ours, theirs in zip(model.buffers(), reference.buffers(), strict=True):
        assert torch.equal(ours, theirs)


def test_famo_behind_a_random_weighting_compares_equal_factors():
    model, data = Toy(TASKS), batch(TASKS)
    mt = torchmto.MultiTask(
        model, torch.optim.SGD(model.parameters(), lr=0.0), tasks=TASKS, method=make("famo", eps=0.0), weights="rlw"
    )
    mt.step(closure(model, data))
    assert mt.method.logits.values.abs().max() < 1e-6


def test_famo_needs_a_closure():
    model, data = Toy(TASKS), batch(TASKS)
    for options in (
        {"method": "famo"},
        {"method": "gd", "weights": "famo"},
        {"method": make("wpcgrad", priority="famo")},
    ):
        mt = torchmto.MultiTask(model, torch.optim.SGD(model.parameters(), lr=0.1), tasks=TASKS, **options)
        with pytest.raises(ValueError, match="needs a closure"):
            mt.step(closure(model, data)(TASKS))
        mt.step(closure(model, data))


@settings(max_examples=30)
@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=7), st.integers(1, 3))
def test_group_means_are_the_best_partition(values, num_groups):
    ordered = np.sort(values)
    best = math.inf
    for cuts in np.ndindex(*[len(values) + 1] * (num_groups - 1)):
        edges = [0, *sorted(cuts), len(values)]
        parts = [ordered[i:j] for i, j in itertools.pairwise(edges) if j > i]
        best = min(best, sum(((part - part.mean()) ** 2).sum() for part in parts))
    means = group_means(torch.tensor(values, dtype=torch.float64), num_groups).numpy()
    assert ((means - values) ** 2).sum() == pytest.approx(best, abs=1e-9)
    assert len(set(means.round(9))) <= num_groups or len(values) <= num_groups


def test_go4align():
    feed = Feed(make("go4align", num_groups=2, step_size=0.1))
    l = np.array([1.0, 1.2, 6.0])
    q = np.full(3, 1 / 3)
    for _ in range(3):
        q = q * np.exp(-0.1 * l)
        q /= q.sum()
        nu = q * l.sum() / l
        expected = [nu[:2].mean()] * 2 + [nu[2]]
        info = feed(a=1.0, b=1.2, c=6.0)
        assert list(info.weights.values()) == pytest.approx(expected)
        assert list(info.records["shares"].values()) == pytest.approx(q.tolist())
    feed(a=1.0, c=6.0)
    pair = q[[0, 2]] * np.exp([-0.1, -0.6])
    pair *= (q[0] + q[2]) / pair.sum()
    assert feed.mt.method.shares.tolist() == pytest.approx([pair[0], q[1], pair[1]])
    assert make("go4align", num_groups=1).loss_weights(torch.tensor([1.0, 2.0])).unique().numel() == 1


# ------------------------------------------------------------------ weightings that need the gradients


def test_gradnorm_moves_norms_together():
    norms, losses = torch.tensor([1.0, 4.0, 2.0], dtype=torch.float64), {"a": 1.0, "b": 4.0, "c": 2.0}
    feed = Feed(make("gradnorm", lr=0.05))  # l_i = c_i * parameter, so the norms are the losses
    weights, adam_input = torch.ones(3, dtype=torch.float64), []
    first = feed(**losses)
    assert set(first.weights.values()) == {1.0}
    assert (first.num_forward, first.num_backward) == (1, 3)
    scaled = weights * norms
    adam_input.append(torch.sign(scaled - scaled.mean()) * norms)
    moved = torch.ones(3, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([moved], lr=0.05)
    moved.grad = adam_input[0]
    adam.step()
    torch.testing.assert_close(feed.mt.method.scales.values, (moved * 3 / moved.sum()).detach())
    for _ in range(60):
        info = feed(**losses)
    products = np.array([info.weights[t] * losses[t] for t in TASKS])
    assert products.std() / products.mean() < 0.1
    assert sum(info.weights.values()) == pytest.approx(3)


def test_gradnorm_pulls_up_slow_tasks():
    feed = Feed(make("gradnorm", alpha=1.0))
    feed(a=2.0, b=2.0)
    for _ in range(40):
        info = feed(a=2.0, b=1.0)  # b has halved, a stands still: its norm should become twice b's
    assert info.weights["a"] * 2.0 == pytest.approx(2 * info.weights["b"] * 1.0, rel=0.15)


def test_gradnorm_a_first_loss_of_zero_starves_nobody():
    feed = Feed(make("gradnorm", lr=0.05))
    feed(a=1.0, b=1.0, c=0.0)
    assert feed.mt.method.first[:2].tolist() == [1.0, 1.0]
    assert feed.mt.method.first[2].isnan()
    for _ in range(40):
        info = feed(a=1.0, b=1.0, c=1.0)
    assert feed.mt.method.first.tolist() == [1.0, 1.0, 1.0]
    assert list(info.weights.values()) == pytest.approx([1.0, 1.0, 1.0], rel=0.1)
    before = feed.mt.method.scales.values.clone()
    feed(a=0.0, b=0.0, c=0.0)
    assert torch.equal(feed.mt.method.scales.values, before)  # nobody's rate is defined: no step


def test_gradnorm_on_a_layer():
    model, data = Toy(TASKS), batch(TASKS)
    method = make("gradnorm", layer="trunk.0", alpha=0.0)
    mt = torchmto.MultiTask(model, torch.optim.SGD(model.parameters(), lr=0.1), tasks=TASKS, method=method)
    whole = torchmto.MultiTask(
        Toy(TASKS), torch.optim.SGD(model.parameters(), lr=0.1), tasks=TASKS, method=make("gradnorm", alpha=0.0)
    )
    mt.step(closure(model, data))
    assert method.scales.values.sum().item() == pytest.approx(3)
    assert whole.method.layer is None
    model.trunk[0] = Toy(TASKS, seed=3).trunk[0]
    mt.network.optimizers.all[0].param_groups[0]["params"] = list(model.parameters())
    mt.step(closure(model, data))  # finds the layer that took its place
    with pytest.raises(ValueError, match="path of a module"):
        torchmto.MultiTask(model, mt.network.optimizers.all[0], tasks=TASKS, method=make("gradnorm", layer="nowhere"))
    wrong = torchmto.MultiTask(
        model, mt.network.optimizers.all[0], tasks=TASKS, method=make("gradnorm", layer="heads.a")
    )
    before = flat(model)
    with pytest.raises(ValueError, match="shared parameters"):
        wrong.step(closure(model, data))
    assert torch.equal(flat(model), before)


def test_excess_mtl_against_a_hand_computation():
    model, data = Toy(TASKS), batch(TASKS)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    mt = torchmto.MultiTask(model, optimizer, tasks=TASKS, method=make("excess_mtl", step_size=0.5))
    shared = list(model.trunk.parameters())
    squares, first, weights = torch.zeros(3, sum(p.numel() for p in shared), dtype=torch.float64), None, torch.ones(3)
    for _ in range(4):
        losses = closure(model, data)(TASKS)
        rows = torch.stack(
            [
                torch.cat([g.flatten() for g in torch.autograd.grad(l, shared, retain_graph=True)])
                for l in losses.values()
            ]
        )
        squares += rows**2
        excess = (rows**2 / squares.sqrt()).sum(1)
        if first is None:
            first = excess
        else:
            weights = weights * (0.5 * excess / first).exp()
            weights = weights * 3 / weights.sum()
        info = mt.step(closure(model, data))
        torch.testing.assert_close(torch.tensor(list(info.weights.values()), dtype=torch.float64), weights.double())
        grad = torch.cat([p.grad.flatten() for p in shared])
        torch.testing.assert_close(grad, weights.double() @ rows)
    assert (info.num_forward, info.num_backward) == (1, 3)


def test_excess_mtl_a_first_gradient_of_zero_sets_no_scale():
    """It is as if the task had come later."""
    feed, later = (Feed(make("excess_mtl", step_size=0.05)) for _ in range(2))
    feed(a=1.0, b=0.0, c=1.0)
    later(a=1.0, c=1.0)
    assert feed.mt.method.first.isnan().tolist() == [False, True, False]
    for _ in range(3):
        assert feed(a=2.0, b=1.0, c=1.0).weights == later(a=2.0, b=1.0, c=1.0).weights
    assert same(feed.mt.method.state_dict(), later.mt.method.state_dict())
    assert not feed.mt.method.first.isnan().any()


def test_excess_mtl_ignores_the_scale_of_the_losses():
    small, large = Feed("excess_mtl"), Feed("excess_mtl")
    for step in range(4):
        a = small(a=1e-6 * (step + 1), b=1e-6)
        b = large(a=1e6 * (step + 1), b=1e6)
        assert a.weights == pytest.approx(b.weights, rel=1e-9)


@pytest.mark.parametrize("on_nonfinite", ["raise", "skip"])
@pytest.mark.parametrize("large", [1e20, 1.5e19])
def test_excess_mtl_leaves_out_gradients_whose_squares_overflow(large, on_nonfinite):
    """At once, or in the sum over the steps: an infinite sum would stay for good."""
    parameter = nn.Parameter(torch.ones(()))
    optimizer = torch.optim.SGD([parameter], lr=0.0)
    method = make("excess_mtl")
    mt = torchmto.MultiTask(
        nn.ParameterList([parameter]), optimizer, tasks=TASKS, method=method, on_nonfinite=on_nonfinite
    )

    def step(a):
        return mt.step(lambda tasks: {t: 1 + (a if t == "a" else 1.0) * (parameter - 1) for t in tasks})

    step(1.0)
    if large < 1e20:
        step(large)
    before = mt.state_dict()
    if on_nonfinite == "skip":
        info = step(large)
        assert info.skipped
        assert "squares of the gradient of task `a`" in info.reason
    else:
        with pytest.raises(torchmto.NonFiniteError, match="squares of the gradient of task `a`"):
            step(large)
    assert same(mt.state_dict(), before)
    assert method.squares.isfinite().all()
    assert not step(1.0).skipped


# ------------------------------------------------------------------ in training


def train(model, mt, data, steps, start=0):
    for step in range(start, start + steps):
        only = [task for i, task in enumerate(TASKS) if (step + i) % 3 or step < 2]
        mt.step(closure(model, data, only=only))
        if step % 2:
            mt.end_window()
        if step == 3:
            mt.report({"a": 0.4, "b": 0.7, "c": 0.9})


@pytest.mark.parametrize("name", WEIGHTINGS)
@pytest.mark.parametrize("as_weights", [False, True])
def test_resume_is_exact(name, as_weights):
    def build():
        model = Toy(TASKS)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
        options = {"method": "pcgrad", "weights": name} if as_weights else {"method": name}
        return model, optimizer, torchmto.MultiTask(model, optimizer, tasks=TASKS, seed=4, **options)

    data = batch(TASKS)
    for steps in (0, 5):
        model, optimizer, mt = build()
        train(model, mt, data, steps)
        buffer = io.BytesIO()
        torch.save({"mt": mt.state_dict(), "model": model.state_dict(), "optimizer": optimizer.state_dict()}, buffer)
        resumed, other, again = build()
        buffer.seek(0)
        state = torch.load(buffer, weights_only=True)
        resumed.load_state_dict(state["model"])
        other.load_state_dict(state["optimizer"])
        again.load_state_dict(state["mt"])
        train(model, mt, data, 4, steps)
        train(resumed, again, data, 4, steps)
        assert torch.equal(flat(model), flat(resumed))
        assert same(again.state_dict(), mt.state_dict())


@pytest.mark.parametrize("name", ["uw", "imtl_l", "famo", "gradnorm", "excess_mtl", "go4align", "stch", "dwa"])
def test_absent_tasks_keep_their_state(name):
    feed = Feed(name, lr=1e-3)
    for _ in range(3):
        feed(a=1.0, b=2.0, c=4.0)
    before = feed.mt.state_dict()["method_state"]
    feed(a=1.5, b=1.0)
    after = feed.mt.state_dict()["method_state"]

    def entries(state):
        for value in state.values():
            if isinstance(value, dict):
                yield from entries(value)
            elif isinstance(value, torch.Tensor) and value.dtype == torch.float64 and value.dim():
                yield value[2] if len(value) == 3 else value

    for old, new in zip(entries(before), entries(after), strict=True):
        torch.testing.assert_close(new, old, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_missing_tasks_renormalise(name):
    method = make(name)
    method.bind(TASKS)
    method.seed(1)
    some = method.loss_weights(torch.tensor([0.5, 2.0]), indices=(0, 2))
    alone = make(name)
    alone.seed(1)
    torch.testing.assert_close(some, alone.loss_weights(torch.tensor([0.5, 2.0])))


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_update_is_the_gradient_of_the_weighted_sum(name):
    model, reference, data = Toy(TASKS), Toy(TASKS), batch(TASKS)
    mt = torchmto.MultiTask(model, torch.optim.SGD(model.parameters(), lr=0.01), tasks=TASKS, method=name, seed=3)
    losses = closure(reference, data)(TASKS)
    alone = make(name)
    alone.seed(3)
    weights = alone.loss_weights(torch.stack([l.detach() for l in losses.values()]))
    sum(w * l for w, l in zip(weights, losses.values(), strict=True)).backward()
    mt.step(closure(model, data))
    torch.testing.assert_close(flat_grad(model.parameters()), flat_grad(reference.parameters()))


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_micro_batches_equal_one_batch(name):
    x, targets = batch(TASKS)
    halves = [(x[:4], {t: y[:4] for t, y in targets.items()}), (x[4:], {t: y[4:] for t, y in targets.items()})]
    one, two = Toy(TASKS), Toy(TASKS)
    steps = [
        torchmto.MultiTask(m, torch.optim.SGD(m.parameters(), lr=0.02), tasks=TASKS, method=name) for m in (one, two)
    ]
    for _ in range(3):
        steps[0].step(closure(one, (x, targets)))
        steps[1].step([closure(two, half) for half in halves])
    torch.testing.assert_close(flat(one), flat(two), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_in_front_of_gd_equals_alone(name):
    """As ``weights=`` of gd a weighting makes the same step, and learns from the unweighted losses."""
    one, two, data = Toy(TASKS), Toy(TASKS), batch(TASKS)
    alone = torchmto.MultiTask(one, torch.optim.SGD(one.parameters(), lr=0.01), tasks=TASKS, method=name)
    front = torchmto.MultiTask(two, torch.optim.SGD(two.parameters(), lr=0.01), tasks=TASKS, method="gd", weights=name)
    alone.method.seed(front.weights.generator.initial_seed())
    train(one, alone, data, 6)
    train(two, front, data, 6)
    torch.testing.assert_close(flat(one), flat(two), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(
        front.state_dict()["weights_state"], alone.state_dict()["method_state"], rtol=1e-9, atol=1e-11, equal_nan=True
    )


@pytest.mark.parametrize("method", ["pcgrad", "wpcgrad", "sequential", "uw", "gradnorm"])
@pytest.mark.parametrize("name", WEIGHTINGS)
def test_composes(name, method):
    model, data = Toy(TASKS), batch(TASKS)
    mt = torchmto.MultiTask(
        model, torch.optim.SGD(model.parameters(), lr=0.01), tasks=TASKS, method=method, weights=name
    )
    train(model, mt, data, 3)
    assert flat(model).isfinite().all()


def test_weighting_in_front_of_sequential_learns_from_every_task():
    model, data = Toy(TASKS), batch(TASKS)
    mt = torchmto.MultiTask(
        model, torch.optim.SGD(model.parameters(), lr=0.01), tasks=TASKS, method="sequential", weights="uw"
    )
    mt.step(closure(model, data))
    assert (mt.weights.scales.values != 0).all()


# ------------------------------------------------------------------ errors


@pytest.mark.parametrize("name", ["si", "gls", "stch", "famo", "igb", "go4align"])
@pytest.mark.parametrize("loss", [0.0, -1.0])
def test_losses_that_are_not_positive_are_refused(name, loss):
    for options in ({"method": name}, {"method": "pcgrad", "weights": name}):
        feed = Feed(options.pop("method"), lr=0.1, **options)
        feed(a=1.0, b=2.0)
        before, parameter = feed.mt.state_dict(), feed.parameter.detach().clone()
        with pytest.raises(torchmto.NonFiniteError, match=rf"Method `{name}` needs .*losses.*task `b` is "):
            feed(a=1.0, b=loss)
        assert torch.equal(feed.parameter, parameter)
        assert same(feed.mt.state_dict(), before)
    feed = Feed(name, lr=0.1, on_nonfinite="skip")
    assert feed(a=1.0, b=loss).skipped


def test_log_methods_refuse_with_a_scaler_too():
    """The scaler must not take a loss that isn't positive for an overflow, and lower its scale for ever."""
    parameter = nn.Parameter(torch.ones(()))
    scaler = torch.amp.GradScaler("cpu")
    mt = torchmto.MultiTask(
        nn.ParameterList([parameter]),
        torch.optim.SGD([parameter], lr=0.1),
        tasks=["a", "b"],
        method="si",
        scaler=scaler,
    )
    with pytest.raises(torchmto.NonFiniteError, match="needs positive losses"):
        mt.step({"a": parameter * 1.0, "b": parameter * -1.0})


def test_a_step_that_fails_leaves_the_scales():
    feed = Feed("uw", lr=0.1)
    feed(a=1.0, b=2.0)
    before = feed.mt.state_dict()
    with pytest.raises(torchmto.NonFiniteError):
        feed(a=math.nan, b=2.0)
    assert same(feed.mt.state_dict(), before)


BAD = [
    ("uw", {"lr": 0}, ValueError, "lr"),
    ("uw", {"lr": "fast"}, TypeError, "lr"),
    ("imtl_l", {"initial": math.inf}, ValueError, "initial"),
    ("dwa", {"temperature": -1.0}, ValueError, "temperature"),
    ("dwa", {"window": 0}, ValueError, "window"),
    ("stch", {"mu": 0.0}, ValueError, "mu"),
    ("stch", {"warmup": 0}, ValueError, "warmup"),
    ("igb", {"base_window": 0}, ValueError, "base_window"),
    ("dtp", {"gamma": -1.0}, ValueError, "gamma"),
    ("dtp", {"alpha": 1.5}, ValueError, "alpha"),
    ("famo", {"gamma": -1}, ValueError, "gamma"),
    ("famo", {"min_losses": "zero"}, TypeError, "min_losses"),
    ("cosmos", {"preference": [1.0, 0.0]}, ValueError, "preference"),
    ("pbi", {"theta": -1.0}, ValueError, "theta"),
    ("go4align", {"num_groups": 0}, ValueError, "num_groups"),
    ("gradnorm", {"alpha": -1.0}, ValueError, "alpha"),
    ("gradnorm", {"layer": 3}, TypeError, "layer"),
    ("excess_mtl", {"step_size": -1.0}, ValueError, "step_size"),
    ("excess_mtl", {"heads": "all"}, ValueError, "heads"),
    ("rlw", {"alpha": 1}, TypeError, "rlw"),
]


@pytest.mark.parametrize(("name", "hyperparameters", "error", "match"), BAD)
def test_bad_hyperparameters(name, hyperparameters, error, match):
    with pytest.raises(error, match=match):
        make(name, **hyperparameters)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("famo", "min_losses"),
        ("dtp", "gamma"),
        ("pbi", "preference"),
        ("tchebycheff", "reference"),
        ("cosmos", "preference"),
    ],
)
def test_numbers_per_task_must_fit_the_tasks(name, key):
    for given_numbers in ({"a": 1.0, "x": 1.0}, [1.0, 2.0]):
        method = make(name, **{key: given_numbers})
        with pytest.raises(ValueError, match=key):
            method.bind(TASKS)
    method = make(name, **{key: [1.0, 2.0]})
    with pytest.raises(ValueError, match=key):
        method.objective(torch.tensor([5.0, 6.0, 7.0]))
