"""What heads get, and weights that are reused for some steps."""

import copy

import pytest
import torch
from torch import nn

import torchmto
from torchmto.methods import GramianWeighting
from toy import Toy, batch, closure, flat, make, same

TASKS = ("a", "b", "c")


def fixed(weights, **options):
    """A Gramian method with given weights."""

    class Given(GramianWeighting):
        name = "given"
        calls = 0

        def weights(self, gramian, losses=None, indices=None):
            self.calls += 1
            return torch.tensor([weights[i] for i in indices]).to(gramian)

    return Given(**options)


def grads(model):
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def own(model, data):
    """Every task's own gradients."""
    result = {}
    for task, loss in closure(model, data)(TASKS).items():
        model.zero_grad()
        loss.backward(retain_graph=True)
        result[task] = grads(model)
    model.zero_grad()
    return result


WEIGHTS = [(0.5, 2.0, 1.0), (0.0, 1.0, 3.0), (1e-7, -1.0, 1.0), (0.0, 0.0, 0.0)]


@pytest.mark.parametrize("reused", [False, True])
@pytest.mark.parametrize("heads", ["unit", "weighted"])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_heads_policy(weights, heads, reused):
    """Also where the weights are reused in one backward, zero and tiny ones included."""
    model = Toy(TASKS)
    data = batch(TASKS)
    expected = own(model, data)
    method = fixed(weights, heads=heads, refresh_every=2 if reused else 1)
    mt = torchmto.MultiTask(model, torch.optim.SGD(model.parameters(), lr=0.0), tasks=TASKS, method=method)
    for _ in range(2 if reused else 1):
        info = mt.step(closure(model, data))
    assert info.num_backward == (1 if reused else 3)
    for i, task in enumerate(TASKS):
        for part in ("weight", "bias"):
            name = f"heads.{task}.{part}"
            factor = weights[i] if heads == "weighted" else 1.0
            torch.testing.assert_close(
                model.get_parameter(name).grad, expected[task][name] * factor, rtol=1e-10, atol=1e-15
            )
    combined = sum(w * expected[t]["trunk.0.weight"] for w, t in zip(weights, TASKS, strict=True))
    torch.testing.assert_close(model.trunk[0].weight.grad, combined, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("reused", [False, True])
def test_a_head_of_several_tasks(reused):
    """A parameter outside the given shared ones that two tasks reach gets the sum of their own gradients."""
    model = Toy(TASKS)
    data = batch(TASKS)
    expected = own(model, data)
    method = fixed((2.0, 3.0, 0.0), refresh_every=2 if reused else 1)
    mt = torchmto.MultiTask(
        model,
        torch.optim.SGD(model.parameters(), lr=0.0),
        tasks=TASKS,
        method=method,
        shared=[model.trunk[0].weight],
    )
    for _ in range(2 if reused else 1):
        mt.step(closure(model, data))
    torch.testing.assert_close(model.trunk[0].bias.grad, sum(expected[t]["trunk.0.bias"] for t in TASKS))


@pytest.mark.parametrize("method", ["pcgrad", "wpcgrad", "mgda", "cagrad", "upgrad", "aligned_mtl"])
@pytest.mark.parametrize("heads", ["unit", "weighted"])
def test_reused_weights_equal_recomputed_ones_where_the_gramian_is_constant(method, heads):
    """Losses linear in the parameters have constant gradients."""
    if method not in torchmto.methods():
        pytest.skip(f"no {method}")
    options = {"pcgrad": {"shuffle": False}, "wpcgrad": {"priority": {"a": 1.0}}}.get(method, {})
    generator = torch.Generator().manual_seed(3)
    directions = {t: torch.randn(6, generator=generator, dtype=torch.float64) for t in TASKS}
    runs = []
    for refresh in (1, 3):
        theta = nn.Parameter(torch.zeros(6, dtype=torch.float64))
        head = nn.ParameterDict({t: nn.Parameter(torch.zeros(2, dtype=torch.float64)) for t in TASKS})
        model = nn.ParameterList([theta, *head.values()])
        mt = torchmto.MultiTask(
            model,
            torch.optim.SGD(model.parameters(), lr=0.01),
            tasks=TASKS,
            method=torchmto.make_method(method, refresh_every=refresh, heads=heads, **options),
        )
        infos = [
            mt.step(lambda tasks: {t: 9 + directions[t] @ theta + head[t].sum() for t in tasks})  # noqa: B023
            for _ in range(7)
        ]
        runs.append(torch.cat([p.detach() for p in model]))
        assert [info.num_backward for info in infos] == ([3] * 7 if refresh == 1 else [3, 1, 1, 3, 1, 1, 3])
        weights = [tuple(info.weights.values()) for info in infos]
    if method != "wpcgrad":
        torch.testing.assert_close(runs[0], runs[1], rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(torch.tensor(weights), torch.tensor(weights[:1] * 7), rtol=1e-6, atol=1e-9)


def test_reuse_with_missing_tasks_and_micro_batches():
    method = fixed((1.0, 2.0, 3.0), refresh_every=10)
    model, _, mt = make(method, optimizer=lambda ps: torch.optim.SGD(ps, lr=0.0))
    data = batch(TASKS)
    mt.step(closure(model, data, only=("a", "b")))
    assert mt.step(closure(model, data), tasks=["a"]).num_backward == 1
    assert mt.step(closure(model, data)).num_backward == 3, "task c has no weight yet"
    expected = own(model, data)
    mt.step([closure(model, data), closure(model, data, only=("b", "c"))])
    combined = sum((i + 1) * expected[t]["trunk.0.weight"] for i, t in enumerate(TASKS))
    torch.testing.assert_close(model.trunk[0].weight.grad, combined)
    assert method.calls == 2


@pytest.mark.parametrize("gradients", ["auto", "parameters", "layerwise", "representation", "ready"])
@pytest.mark.parametrize(
    ("absent", "counts"),
    [
        ({}, [3, 1, 1, 1, 3, 1, 1, 1]),
        # A task without labels costs nothing, and comes with a weight of its own.
        (dict.fromkeys(range(8), "c"), [2, 1, 1, 1, 2, 1, 1, 1]),
        ({0: "c", 1: "c"}, [2, 1, 3, 1, 1, 1, 3, 1]),
        # Absent when the others' are recomputed, it keeps its own.
        ({4: "c"}, [3, 1, 1, 1, 2, 1, 1, 1]),
        ({0: "a", 1: "b", 2: "c", 3: "a"}, [2, 2, 1, 1, 1, 3, 1, 1]),
    ],
)
def test_weights_are_recomputed_only_where_a_task_has_none(absent, counts, gradients):
    """In one forward. A task's weight is that of the last step that has computed one."""
    drawn = []

    class Drawn(GramianWeighting):
        name = "drawn"

        def weights(self, gramian, losses=None, indices=None):
            drawn.append({TASKS[i]: float(len(drawn) + i + 1) for i in indices})
            return torch.tensor(list(drawn[-1].values())).to(gramian)

    options = {} if gradients == "ready" else {"gradients": gradients}
    options |= {"features": "trunk"} if gradients == "representation" else {}
    model, _, mt = make(Drawn(refresh_every=4), **options)
    known = {}
    for step, count in enumerate(counts):
        only = [task for task in TASKS if task != absent.get(step)]
        batches = closure(model, batch(TASKS, seed=step), only=only)
        info = mt.step(batches(TASKS) if gradients == "ready" else batches)
        if count > 1:
            known |= drawn[-1]
        extra = gradients in ("layerwise", "representation") and count > 1
        assert (info.num_forward, info.num_backward) == (1, count + extra)
        assert info.weights == {task: known[task] for task in only}
        assert not model.trunk._forward_hooks
    assert len(drawn) == sum(count > 1 for count in counts)


def test_micro_batches_recompute_weights_while_a_task_has_none():
    """Which tasks they have isn't known before the last of them, when the first graph is gone."""
    method = fixed((1.0, 2.0, 3.0), refresh_every=10)
    model, _, mt = make(method)
    halves = [closure(model, batch(TASKS, seed=seed), only=("a", "b")) for seed in (1, 2)]
    assert [mt.step(halves).num_backward for _ in range(2)] == [4, 4]
    mt.step(closure(model, batch(TASKS)))
    assert mt.step(halves).num_backward == 2
    assert method.calls == 3


def test_reuse_counts_survive_saving():
    """The third step after loading is the one that refreshes."""
    method = fixed((1.0, 2.0, 3.0), refresh_every=4)
    model, _, mt = make(method)
    data = batch(TASKS)
    counts = [mt.step(closure(model, data)).num_backward for _ in range(2)]
    state = copy.deepcopy(mt.state_dict())
    again = fixed((1.0, 2.0, 3.0), refresh_every=4)
    _, _, other = make(again, model=model)
    other.load_state_dict(state)
    counts += [other.step(closure(model, data)).num_backward for _ in range(3)]
    assert counts == [3, 1, 1, 1, 3]


# ---------------------------------------------------------------------- clipping


@pytest.mark.parametrize("method", ["gd", "pcgrad", "sequential"])
def test_clip_is_the_global_norm_after_combining(method):
    free, _, mt = make(method, optimizer=lambda ps: torch.optim.SGD(ps, lr=0.0))
    data = batch(TASKS)
    mt.step(closure(free, data))
    whole = torch.cat([p.grad.flatten() for p in free.parameters() if p.grad is not None])
    norm = float(whole.norm())
    for limit in (norm / 3, norm * 3):
        model, _, mt = make(method, optimizer=lambda ps: torch.optim.SGD(ps, lr=0.0), clip=limit)
        mt.step(closure(model, data))
        clipped = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        torch.testing.assert_close(clipped, whole * min(1.0, limit / (norm + 1e-6)), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("method", ["gd", "pcgrad", "sequential"])
def test_clip_with_expanded_and_aliased_gradients(method):
    """Autograd hands out one expanded tensor for several parameters here; clipping in place must not scale it twice."""

    class Sums(nn.Module):
        def __init__(self):
            super().__init__()
            self.trunk = nn.Parameter(torch.ones(3, dtype=torch.float64))
            self.heads = nn.ParameterDict({t: nn.Parameter(torch.ones(3, dtype=torch.float64)) for t in TASKS})
            self.more = nn.ParameterDict({t: nn.Parameter(torch.ones(3, dtype=torch.float64)) for t in TASKS})

    model = Sums()
    start = copy.deepcopy(model)
    mt = torchmto.MultiTask(model, torch.optim.SGD(model.parameters(), lr=1.0), tasks=TASKS, method=method, clip=0.1)
    for _ in range(2):
        mt.step(lambda tasks: {t: (model.trunk + model.heads[t] + model.more[t]).sum() for t in tasks})
    moved = {n: p.detach() - start.get_parameter(n) for n, p in model.named_parameters()}
    for t in TASKS:
        assert same(moved[f"heads.{t}"], moved[f"more.{t}"])
    if method != "sequential":
        total = torch.cat(list(moved.values()))
        assert float(total.norm()) == pytest.approx(0.2, rel=1e-4)
        torch.testing.assert_close(moved["trunk"], 3 * moved["heads.a"])
    assert flat(model).isfinite().all()
