"""Parameters that the autograd graph hides, because a function trains them by a backward of its own, are never left out."""

import copy

import pytest
import torch
from torch import nn

import torchmto
from toy import Toy, batch, inner, reentrant, same, state

TASKS = ("a", "b", "c")
X, TARGETS = batch(TASKS)


class Given(torch.autograd.Function):
    """The same with the parameters among its inputs: nothing is hidden."""

    @staticmethod
    def forward(ctx, module, x, *parameters):
        ctx.module = module
        ctx.save_for_backward(x)
        return module(x.detach()).detach()

    @staticmethod
    def backward(ctx, gradient):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            y = ctx.module(x)
        return None, *torch.autograd.grad(y, [x, *ctx.module.parameters()], gradient)


class Once(Given):
    """An implicit layer that keeps its inner graph for a single backward."""

    @staticmethod
    def forward(ctx, module, x, *parameters):
        with torch.enable_grad():
            ctx.inputs = [x.detach().requires_grad_(), *(p.detach().requires_grad_() for p in parameters)]
            names = [name for name, _ in module.named_parameters()]
            ctx.y = torch.func.functional_call(module, dict(zip(names, ctx.inputs[1:], strict=True)), ctx.inputs[0])
        return ctx.y.detach()

    @staticmethod
    def backward(ctx, gradient):
        return None, *torch.autograd.grad(ctx.y, ctx.inputs, gradient)


def given(module, x):
    return Given.apply(module, x, *module.parameters())


def once(module, x):
    return Once.apply(module, x, *module.parameters())


def hook(module, x):
    """A backward inside a hook on an activation."""
    y = module(x.detach()).detach().requires_grad_()
    y = y + 0 * x.sum()

    def listen(gradient):
        with torch.enable_grad():
            module(x.detach()).backward(gradient)

    y.register_hook(listen)
    return y


HIDING = {"reentrant": reentrant, "inner": inner}


class Blocks(nn.Module):
    """Two blocks and a head per task; ``run[place]`` runs the first or second block, or the head of a."""

    def __init__(self):
        super().__init__()
        self.toy = Toy(TASKS)
        self.second = copy.deepcopy(Toy(TASKS, seed=1).trunk)
        self.second[0] = nn.Linear(5, 5).double()
        self.features = nn.Identity()
        self.run = {}

    def forward(self, tasks):
        def run(place, module, x):
            return self.run.get(place, lambda module, x: module(x))(module, x)

        x = X.clone().requires_grad_()
        features = self.features(run("second", self.second, run("first", self.toy.trunk, x)))
        heads = self.toy.heads
        outputs = {t: run("head", heads[t], features) if t == "a" else heads[t](features) for t in tasks}
        return {t: (y - TARGETS[t]).square().mean() for t, y in outputs.items()}


def made(method, options=None, **run):
    torch.manual_seed(0)
    model = Blocks()
    model.run = run
    options = dict(options or {})
    if options.get("gradients") == "representation":
        options["features"] = "features"
    if options.pop("given", False):
        options["shared"] = [*model.toy.trunk.parameters(), *model.second.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    return model, torchmto.MultiTask(model, optimizer, tasks=TASKS, method=method, **options)


RUNS = {
    "gd": {},
    "uw": {},
    "pcgrad": {},
    "pcgrad given": {"given": True},
    "pcgrad layerwise": {"gradients": "layerwise"},
    "pcgrad representation": {"gradients": "representation"},
    "graddrop": {},
    "sequential": {},
    "task_groups": {},
    "gd weighted": {"weights": "dwa"},
}


@pytest.mark.parametrize("place", ["first", "second", "head"])
@pytest.mark.parametrize("kind", list(HIDING))
@pytest.mark.parametrize("run", list(RUNS))
def test_refused_with_the_cause(run, kind, place):
    """From the first step, or switched on later; whether or not other parameters lie below. Nothing has changed then."""
    for steps in (0, 2):
        model, mt = made(run.split()[0], RUNS[run])
        for _ in range(steps):
            mt.step(model)
        before = state(mt)
        model.run = {place: HIDING[kind]}
        with pytest.raises(ValueError, match="reentrant checkpoint"):
            mt.step(model)
        # Groups before that of the task whose head it is have stepped.
        assert (run, place) == ("task_groups", "head") or same(state(mt), before)
        model.run = {}
        mt.step(model)


def test_ready_losses_and_micro_batches():
    """Also where only one of several micro-batches hides something, and where the forward is the user's."""
    for method in ("gd", "pcgrad"):
        model, mt = made(method)
        mt.step([model, model])

        def hiding(tasks, model=model):
            model.run = {"first": reentrant}
            try:
                return model(tasks)
            finally:
                model.run = {}

        with pytest.raises(ValueError, match="reentrant checkpoint"):
            mt.step([model, hiding])
        mt.step(model(TASKS))
        with pytest.raises(ValueError, match="reentrant checkpoint"):
            mt.step(hiding(TASKS))


@pytest.mark.parametrize("method", ["gd", "pcgrad"])
def test_hidden_in_a_hook(method):
    model, mt = made(method, second=hook)
    with pytest.raises(ValueError, match=r"`second.0.weight` .* appeared by itself.*hook"):
        mt.step(model)


@pytest.mark.parametrize("place", ["first", "second", "head"])
@pytest.mark.parametrize("function", [given, once])
@pytest.mark.parametrize("run", list(RUNS))
def test_functions_that_hide_nothing_work(run, function, place):
    """They bring the gradients of the same model without them; one backward is one backward."""
    single = ("gd", "uw", "sequential", "task_groups")
    if function is once and run.split()[0] not in single:
        pytest.skip("several backwards through one graph")
    results = []
    for functions in ({}, {place: function}):
        model, mt = made(run.split()[0], RUNS[run], **functions)
        for _ in range(2):
            mt.step(model)
        results.append([p.detach().clone() for p in model.parameters()])
    for left, right in zip(*results, strict=True):
        torch.testing.assert_close(left, right)


def test_frozen_parameters_are_not_hidden():
    """An inner backward over frozen parameters sets no gradient that anything waits for; set free, they are refused."""
    model, mt = made("pcgrad", first=inner)
    model.toy.trunk.requires_grad_(False)
    mt.step(model)
    model.toy.trunk.requires_grad_(True)
    with pytest.raises(ValueError, match="reentrant checkpoint"):
        mt.step(model)


def test_graphs_are_looked_at_once(monkeypatch):
    """Further steps whose graphs have as many nodes aren't walked."""
    walks = []
    original = torchmto.step.network.reach_of
    monkeypatch.setattr("torchmto.step.network.reach_of", lambda losses: walks.append(1) or original(losses))
    for method in ("gd", "pcgrad"):
        model, mt = made(method)
        mt.step(model)
        walks.clear()
        for _ in range(3):
            mt.step(model)
        assert not walks


class Overwriting(torch.autograd.Function):
    """Its backward writes its results where its forward has saved its inputs, past their version counters."""

    @staticmethod
    def forward(ctx, x, y):
        ctx.save_for_backward(x, y)
        return x * y

    @staticmethod
    def backward(ctx, gradient):
        x, y = ctx.saved_tensors
        results = gradient * y, gradient * x
        x.data.copy_(results[0])
        y.data.copy_(results[1])
        return x, y


class Rounded(torch.autograd.Function):
    """Its backward rounds at random."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient + torch.rand_like(gradient)


@pytest.mark.parametrize("options", [{}, {"gradients": "layerwise"}], ids=str)
def test_a_backward_that_ruins_what_the_next_one_needs(options):
    """A fused kernel's: refused where several tasks go through it; one backward, or one task's own head, is fine."""

    def fused(module, x):
        module = module[0] if isinstance(module, nn.Sequential) else module
        return Overwriting.apply(module(x), module(x) + 1)

    model, mt = made("pcgrad", options, second=fused)
    before = state(mt)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"OverwritingBackward gives another gradient the second time.*Liger"):
            mt.step(model)
        assert same(state(mt), before)
    model, mt = made("gd", second=fused)
    mt.backward(model)
    twin, own = made("gd", second=lambda module, x: module[0](x) * (module[0](x) + 1))
    own.backward(twin)
    torch.testing.assert_close([p.grad for p in model.parameters()], [p.grad for p in twin.parameters()])
    model, mt = made("pcgrad", head=fused)
    assert mt.step(model).num_optimizer_steps == 1


def test_a_backward_that_draws_random_numbers_is_no_such_thing():
    model, mt = made("pcgrad", second=lambda module, x: Rounded.apply(module(x)))
    state_before = torch.get_rng_state()
    mt.backward(model)
    drawn = torch.get_rng_state()
    torch.set_rng_state(state_before)
    mt.backward(model)
    assert torch.equal(torch.get_rng_state(), drawn)
