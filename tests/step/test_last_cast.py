"""What the optimizer will see is what is checked: overflows by the last cast, the last division, or of the norm alone."""

import warnings

import pytest
import torch
from torch import nn

import torchmto
from toy import Toy, batch, closure, flat, make, same, state

TASKS = ("a", "b", "c")


class Vector(nn.Module):
    """One shared parameter; losses with constant gradients, all in one direction."""

    def __init__(self, dtype, size=64):
        super().__init__()
        self.theta = nn.Parameter(torch.ones(size, dtype=dtype))

    def losses(self, slopes):
        wide = torch.promote_types(self.theta.dtype, torch.float32)
        return lambda tasks: {
            t: (self.theta - self.theta.detach()).to(wide).sum() * slope + 1
            for t, slope in slopes.items()
            if t in tasks
        }


def attempt(method, dtype, slopes, *, lr=0.0, **options):
    model = Vector(dtype)
    slopes = {f"t{i}": slope for i, slope in enumerate(slopes)}
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    mt = torchmto.MultiTask(model, optimizer, tasks=list(slopes), method=method, **options)
    return model, mt, lambda: mt.step(model.losses(slopes))


@pytest.mark.parametrize("gradients", ["parameters", "layerwise"])
@pytest.mark.parametrize(("dtype", "slope"), [(torch.float16, 3e4), (torch.bfloat16, 2e38), (torch.float32, 2e38)])
def test_every_engine_checks_what_it_has_cast(gradients, dtype, slope):
    model, _, step = attempt("pcgrad", dtype, [slope] * 4, gradients=gradients, lr=1.0)
    with pytest.raises(torchmto.NonFiniteError, match="isn't finite"):
        step()
    assert flat(model).tolist() == [1.0] * 64


def test_a_step_that_reuses_weights_is_checked():
    model, mt, _ = attempt(torchmto.make_method("pcgrad", refresh_every=3), torch.float16, [1.0] * 4)
    mt.step(model.losses(dict.fromkeys(mt.tasks, 1.0)))
    before = state(mt)
    with pytest.raises(torchmto.NonFiniteError):
        mt.step(model.losses(dict.fromkeys(mt.tasks, 3e4)))
    assert same(state(mt), before)


@pytest.mark.parametrize("heads", ["unit", "weighted"])
@pytest.mark.parametrize("method", ["pcgrad", "nash_mtl", "upgrad"])
def test_a_head_that_overflows_is_found(method, heads):
    """The scale of a head's gradient is none of the shared parameters' business."""
    model = Toy(TASKS, dtype=torch.float32)
    model.heads["b"].to(torch.float16)
    x, targets = batch(TASKS, dtype=torch.float32)

    def losses(tasks, huge):
        features = model.trunk(x)
        outs = {t: model.heads[t](features.to(model.heads[t].weight.dtype)).float() for t in tasks}
        values = {t: (outs[t] - targets[t]).square().mean() for t in tasks}
        values["b"] = (
            values["b"] + (model.heads["b"].bias.float() * huge - (model.heads["b"].bias.float() * huge).detach()).sum()
        )
        return values

    made = torchmto.make_method(method, heads=heads)
    mt = torchmto.MultiTask(model, torch.optim.SGD(model.parameters(), lr=0.01), tasks=TASKS, method=made)
    mt.step(lambda tasks: losses(tasks, 1.0))
    before = state(mt)
    with pytest.raises(torchmto.NonFiniteError):
        mt.step(lambda tasks: losses(tasks, 1e6))
    assert same(state(mt), before)


@pytest.mark.parametrize("method", ["gd", "pcgrad", "sequential"])
def test_unscaling_by_less_than_one_is_checked(method):
    """A scale below 1 hides an overflow until it is taken out."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**-3)
    slopes, weight = ([2e38, 1.0], 8.0) if method == "sequential" else ([3e38, 3e38], 1.0)
    model, _, step = attempt(method, torch.float32, slopes, lr=1.0, scaler=scaler, weights={"t0": weight})
    info = step()
    assert info.skipped
    assert scaler.get_scale() == 2.0**-4
    assert flat(model).isfinite().all()


@pytest.mark.parametrize("scale", [None, 2.0**4])
@pytest.mark.parametrize(("dtype", "slope"), [(torch.float16, 2e4), (torch.float32, 1e20), (torch.float64, 1e160)])
@pytest.mark.parametrize("method", ["gd", "pcgrad", "nash_mtl"])
def test_a_norm_that_overflows_is_no_alarm(method, dtype, slope, scale):
    """Finite gradients are clipped by their norm, whatever its square."""
    if dtype is torch.float64 and method != "gd":
        pytest.skip("the Gramian is float64")
    if dtype is torch.float16 and scale is not None:
        pytest.skip("a GradScaler refuses float16 gradients")
    scaler = None if scale is None else torch.amp.GradScaler("cpu", init_scale=scale)
    model, _, step = attempt(method, dtype, [slope, slope / 2], clip=0.5, scaler=scaler)
    assert not step().skipped
    assert float(model.theta.grad.double().norm()) == pytest.approx(0.5, rel=1e-3)


def test_adatask_leaves_out_a_square_that_overflows():
    """It would stay in the second moment for good."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, mt, _ = attempt("adatask", torch.float32, [1.0, 1.0])
    mt.step(model.losses({"t0": 1.0, "t1": 1.0}))
    before = state(mt)
    with pytest.raises(torchmto.NonFiniteError):
        mt.step(model.losses({"t0": 1e20, "t1": 1.0}))
    assert same(state(mt), before)


# ---------------------------------------------------------------------- complex parameters


class Phases(nn.Module):
    """A shared complex parameter, used conjugated, and a complex embedding."""

    def __init__(self):
        super().__init__()
        self.theta = nn.Parameter(torch.tensor([1 + 2j, -1 + 0.5j], dtype=torch.complex64))

    def losses(self, tasks):
        y = torch.tensor([0.3 - 1j, 2 + 1j], dtype=torch.complex64)
        values = {"a": (y * self.theta.conj()).real.sum(), "b": (self.theta * self.theta.conj()).real.sum()}
        return {t: values[t] for t in tasks}


@pytest.mark.parametrize("method", ["gd", "pcgrad"])
def test_clip_sees_the_imaginary_part(method):
    """Also where autograd leaves a gradient conjugated."""
    model = Phases()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    mt = torchmto.MultiTask(model, optimizer, tasks=("a", "b"), method=method, clip=0.5)
    mt.step(model.losses, tasks=("a",))
    assert float(torch.linalg.vector_norm(model.theta.grad)) == pytest.approx(0.5)


@pytest.mark.parametrize("value", [complex(float("inf"), 0), complex(0, float("nan"))])
@pytest.mark.parametrize("method", ["gd", "pcgrad", "graddrop"])
def test_an_imaginary_part_that_is_not_finite_is_found(method, value):
    model = Phases()
    model.theta.register_hook(lambda gradient: gradient + value)
    mt = torchmto.MultiTask(model, torch.optim.SGD(model.parameters(), lr=0.1), tasks=("a", "b"), method=method)
    before = model.theta.detach().clone()
    with pytest.raises(torchmto.NonFiniteError):
        mt.step(model.losses)
    assert torch.equal(model.theta.detach(), before)


def test_a_scaler_is_refused_for_complex_parameters():
    model = Phases()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="complex"):
        torchmto.MultiTask(
            model, optimizer, tasks=("a", "b"), method="gd", scaler=torch.amp.GradScaler("cpu", init_scale=2.0)
        )


# ---------------------------------------------------------------------- the scaler's other optimizers


@pytest.mark.parametrize("broken", [False, True])
@pytest.mark.parametrize("method", ["gd", "pcgrad", "sequential"])
def test_gradients_of_another_optimizer_are_unscaled_once(method, broken):
    other = nn.Parameter(torch.ones(2))
    own = torch.optim.SGD([other], lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    model, optimizer, mt = make(method, scaler=scaler)
    steps = []

    def hook(*_):
        steps.append(1)
        if broken and len(steps) == (2 if method == "sequential" else 1):
            raise RuntimeError("once")

    optimizer.register_step_pre_hook(hook)
    for _ in range(2):
        scaler.scale(other.sum()).backward()
        scaler.unscale_(own)
        try:
            mt.step(closure(model, batch(TASKS)))
        except RuntimeError:
            assert broken
        scaler.step(own)
        own.zero_grad()
        scaler.update()
    assert other.tolist() == [-1.0, -1.0]
    assert scaler.get_scale() == 8.0


# ---------------------------------------------------------------------- hooks


def test_a_hook_that_takes_the_gradient_away_is_warned_of():
    """As an optimizer within the backward does."""
    model, _, mt = make("pcgrad")
    weight = model.trunk[0].weight

    def take(parameter):
        parameter.grad = None

    weight.register_post_accumulate_grad_hook(take)
    before = weight.detach().clone()
    with pytest.warns(UserWarning, match=r"hook of parameter `trunk\.0\.weight` has taken its gradient"):
        mt.step(closure(model, batch(TASKS)))
    assert torch.equal(weight.detach(), before)


@pytest.mark.parametrize("method", ["gd", "pcgrad"])
def test_hooks_are_left_as_they_were(method):
    """Outside of steps, and after one that failed, autograd runs them; one may remove itself."""
    model, _, mt = make(method)
    weight = model.trunk[0].weight
    seen = []
    handle = weight.register_post_accumulate_grad_hook(lambda p: (seen.append(p), handle.remove()))
    mt.step(closure(model, batch(TASKS)))
    mt.step(closure(model, batch(TASKS)))
    assert len(seen) == 1
    weight.register_post_accumulate_grad_hook(seen.append)
    with pytest.raises(torchmto.NonFiniteError):
        mt.step(lambda tasks: {t: v * float("nan") for t, v in closure(model, batch(TASKS))(tasks).items()})
    assert len(seen) <= 2
    seen.clear()
    weight.grad = None
    weight.sum().backward()
    assert len(seen) == 1


# ---------------------------------------------------------------------- names of parameters outside the model


def test_parameters_outside_the_model_keep_their_name_when_a_group_leaves():
    """Their place in the optimizer changes; who reaches them doesn't."""
    model = Toy(TASKS)
    extra = [nn.Parameter(torch.ones(3, dtype=torch.float64)) for _ in range(3)]
    groups = [{"params": [p]} for p in extra]
    optimizer = torch.optim.SGD([*groups, {"params": model.parameters()}], lr=0.05)
    mt = torchmto.MultiTask(model, optimizer, tasks=TASKS, method="pcgrad")

    def losses(used):
        inner = closure(model, batch(TASKS))
        return lambda tasks: {t: v + (used[0] if t == "a" else used[1]).sum() ** 2 for t, v in inner(tasks).items()}

    mt.step(losses(extra[:2]))
    optimizer.param_groups.pop(0)
    extra[0].requires_grad_(requires_grad=False)
    mt.step(losses([extra[2], extra[1]]))
    roles = mt.network.roles
    assert roles.is_shared(mt.network.name(extra[1]))
    assert not roles.is_shared(mt.network.name(extra[2]))
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1, dtype=torch.float64))]})
    mt.load_state_dict(mt.state_dict())
    mt.step(losses([extra[2], extra[1]]))
    assert len(set(mt.network.names())) == len(mt.network.names())
