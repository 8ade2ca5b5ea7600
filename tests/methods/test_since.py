"""The methods published since: numbers by hand and by the formulas of their released code, and what each one claims."""

import copy
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import torchmto
import toy
from torchmto import solvers
from torchmto.methods.registry import hyperparameters_of, method_class

few = settings(max_examples=15)
seeds = st.integers(0, 10**6)
sizes = st.integers(2, 5)


def made(name: str, **hyperparameters: Any) -> Any:
    return torchmto.make_method(name, **hyperparameters)


def matrix(seed: int, num_tasks: int, width: int = 8) -> Tensor:
    """Random rows whose lengths span two orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    lengths = 10 ** torch.empty(num_tasks, 1, dtype=torch.float64).uniform_(-1, 1, generator=generator)
    return torch.randn(num_tasks, width, generator=generator, dtype=torch.float64) * lengths


def rows_of(model: toy.Toy, source: Any, tasks: tuple[str, ...] = ("a", "b", "c")) -> Tensor:
    """The gradients of the trunk as autograd gives them, [K, P]."""
    losses = source(tasks)
    parameters = list(model.trunk.parameters())
    return torch.stack(
        [
            torch.cat([g.flatten() for g in torch.autograd.grad(losses[task], parameters, retain_graph=True)])
            for task in tasks
        ]
    )


@pytest.mark.parametrize("name", ["pcd", "metabalance"])
def test_the_primary_task(name: str) -> None:
    """By number or name; the first by default; errors at once."""
    assert "primary" in (hyperparameters_of(method_class(name)) or {})
    J = []
    for primary in (0, "a", 1, "b"):
        model, _, mt = toy.make(made(name, primary=primary))
        before = toy.flat(model.trunk)
        mt.step(toy.closure(model, toy.batch(mt.tasks)))
        J.append(toy.flat(model.trunk) - before)
    assert torch.equal(J[0], J[1])
    assert torch.equal(J[2], J[3])
    assert not torch.allclose(J[0], J[2])
    for wrong, message in (("x", "Unknown task `x` in `primary`"), (3, "one of 3 tasks. Found `primary = 3`")):
        with pytest.raises(ValueError, match=message):
            toy.make(made(name, primary=wrong))
    with pytest.raises(ValueError, match="an int >= 0"):
        made(name, primary=-1)
    with pytest.raises(TypeError, match="an int >= 0"):
        made(name, primary=None)


# ---------------------------------------------------------------------- pcd


@given(seed=seeds, size=sizes, tau=st.sampled_from([0.0, 0.02, 0.5, 1.0]))
@few
def test_pcd_is_the_nearest_direction_that_gives_all_their_share(seed: int, size: int, tau: float) -> None:
    J = matrix(seed, size)
    unit = J / J.norm(dim=1, keepdim=True)
    solution = solvers.pcd((J @ J.T).numpy(), tau, (1 / J.norm(dim=1)).numpy())
    direction = torch.from_numpy(solution.weights) @ J
    assert direction.norm().item() == pytest.approx(J[0].norm().item())
    # In units of the primary gradient: what was added to it is a positive combination of tight constraints.
    scaled = torch.from_numpy(solution.weights * J.norm(dim=1).numpy() / solution.weights[0] / float(J[0].norm()))
    d = scaled @ unit
    slack = unit[1:] @ d - tau
    assert slack.min() >= -1e-9
    assert scaled[1:].min() >= 0
    assert (scaled[1:] * slack).abs().max() <= 1e-8


def test_pcd_agrees_with_another_implementation() -> None:
    """Several steps, with the running means."""
    aggregation = pytest.importorskip("torchjd.aggregation")
    if not hasattr(aggregation, "PCD"):
        pytest.skip("this version of torchjd has none")
    for seed in range(20):
        size = 2 + seed % 4
        method, reference = made("pcd", tau=0.3, beta=0.9, eps=1e-8), aggregation.PCD(tau=0.3, beta=0.9, eps=1e-8)
        for step in range(3):
            J = matrix(100 * seed + step, size, width=3)
            torch.testing.assert_close(method.weights(J @ J.T) @ J, reference(J), rtol=1e-6, atol=1e-9)


@pytest.mark.filterwarnings("ignore:Method `pcd`. a solve didn't converge")
def test_pcd_at_the_corners() -> None:
    method = made("pcd", tau=0.5)
    opposed = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, -1.0]], dtype=torch.float64)
    assert torch.equal(method.weights(opposed @ opposed.T) @ opposed, opposed[0])
    assert method.num_fallbacks == 1, "constraints that exclude each other are dropped"
    still = torch.tensor([[0.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    assert not (made("pcd").weights(still @ still.T) @ still).any()
    against = torch.tensor([[1.0, 0.0], [-2.0, 0.0]], dtype=torch.float64)
    assert not (made("pcd", tau=0.0).weights(against @ against.T) @ against).any(), "nothing is left of the direction"
    # Without the primary task the first of the others leads; its running mean doesn't move.
    method = made("pcd", tau=[1.0, 0.0, 0.0])
    method.bind(("a", "b", "c"))
    J = torch.tensor([[3.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    assert torch.equal(method.weights(J @ J.T, indices=(1, 2)) @ J, J[0])
    assert method.times.tolist() == [0, 1, 1]
    with pytest.raises(ValueError, match=r"`tau\[1\]` should be a float >= 0 and <= 1"):
        made("pcd", tau=[0.0, 2.0])


# ---------------------------------------------------------------------- metabalance


def test_metabalance_balances_every_parameter_by_running_means() -> None:
    """The released formula, over three steps, the second without task c."""
    relax, beta = 0.6, 0.5
    model, _, mt = toy.make(made("metabalance", primary="b", relax=relax, beta=beta))
    parameters = list(model.trunk.parameters())
    means = torch.zeros(3, len(parameters), dtype=torch.float64)
    counts = [0, 0, 0]
    for seed, present in enumerate([("a", "b", "c"), ("a", "b"), ("a", "b", "c")]):
        losses = toy.closure(model, toy.batch(mt.tasks, seed=seed))(present)
        gradients = {t: torch.autograd.grad(losses[t], parameters, retain_graph=True) for t in present}
        for task in present:
            row = mt.tasks.index(task)
            counts[row] += 1
            means[row] = beta * means[row] + (1 - beta) * torch.stack([g.norm() for g in gradients[task]])
        corrected = means / torch.tensor([[1 - beta**count] for count in counts])
        before = [p.detach().clone() for p in parameters]
        mt.step(toy.closure(model, toy.batch(mt.tasks, seed=seed), only=present))
        for place, (old, new) in enumerate(zip(before, parameters, strict=True)):
            expected = sum(
                gradients[t][place] * (relax * corrected[1, place] / corrected[mt.tasks.index(t), place] + 1 - relax)
                for t in present
            )
            torch.testing.assert_close(new.detach(), old - 0.05 * expected, rtol=1e-10, atol=1e-12)


def test_metabalance_without_gradients() -> None:
    """A gradient of zero stays zero, and a primary task that has had none leaves the others as they are."""
    for slopes, expected in (((1.0, 0.0), -0.1), ((0.0, 1.0), -0.1), ((0.0, 0.0), 0.0)):
        weight = torch.nn.Parameter(torch.zeros(2))
        optimizer = torch.optim.SGD([weight], lr=0.1)
        mt = torchmto.MultiTask(torch.nn.ParameterList([weight]), optimizer, tasks=("a", "b"), method="metabalance")
        mt.step({task: slope * weight[0] for task, slope in zip("ab", slopes, strict=True)})
        assert weight[0].item() == pytest.approx(expected)


# ---------------------------------------------------------------------- fair shares


@given(seed=seeds, size=sizes)
@few
def test_pivrg_solves_its_equation(seed: int, size: int) -> None:
    tasks = tuple("abcde"[:size])
    J = matrix(seed, size)
    method = made("pivrg", baseline=dict.fromkeys(tasks, 50.0), higher_is_better={"a": False}, bound=3.0)
    method.bind(tasks)
    assert torch.allclose(method.weights(J @ J.T), made("fairgrad").weights(J @ J.T)), "no report: equally important"
    values = torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 20
    method.report({task: 50.0 + value for task, value in zip(tasks, values.tolist(), strict=True)})
    drops = -2 * values.double()
    drops[0] *= -1
    temperature = max(float(drops.max() - drops.min()) / np.log(3.0), 10.0)
    importance = size * (drops / temperature).softmax(0)
    torch.testing.assert_close(method.importance(range(size)), importance, rtol=1e-5, atol=1e-8)
    assert importance.max() / importance.min() <= 3.0 * (1 + 1e-9)
    weights = method.weights(J @ J.T)
    torch.testing.assert_close(J @ (weights @ J), (importance / weights).sqrt(), rtol=1e-5, atol=0)


def test_pivrg_reports() -> None:
    method = made("pivrg", baseline={"a": 1.0, "b": 2.0})
    method.bind(("a", "b"))
    method.report({"b": 1.0})
    assert method.records()["drops"]["b"] == 50.0
    assert method.importance((0, 1)).tolist() == [1.0, 1.0], "a task without a report counts as the others"
    with pytest.raises(ValueError, match="a mapping with exactly the tasks"):
        toy.make(made("pivrg", baseline={"a": 1.0}))
    with pytest.raises(ValueError, match=r"`baseline\['a'\]` should be different from 0"):
        made("pivrg", baseline={"a": 0.0})
    with pytest.raises(ValueError, match="Unknown task `aa` in `higher_is_better`"):
        toy.make(made("pivrg", baseline=dict.fromkeys("abc", 1.0), higher_is_better={"aa": False}))
    with pytest.raises(TypeError, match="a bool, or a mapping"):
        made("pivrg", baseline={"a": 1.0}, higher_is_better={"a": "min"})
    _, _, mt = toy.make("pivrg")
    with pytest.warns(UserWarning, match="no `baseline`"):
        mt.report({"a": 1.0})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mt.report({"a": 1.0})


@pytest.mark.parametrize("name", ["fairgrad", "pivrg"])
def test_the_released_scale(name: str) -> None:
    """Times K, then the encoder alone is clipped to 1; in steps that reuse the weights by their own gradient."""
    J = matrix(3, 3)
    weights, released = (made(name, scale=scale).weights(J @ J.T) for scale in ("paper", "released"))
    expected = 3 * weights @ J
    torch.testing.assert_close(released @ J, expected / expected.norm().clamp_min(1))
    model, _, mt = toy.make(made(name, scale="released", refresh_every=2))
    plain, _, other = toy.make(made(name))
    data = toy.closure(model, toy.batch(mt.tasks))
    trunk, head = toy.flat(model.trunk), toy.flat(model.heads["a"])
    info = other.step(toy.closure(plain, toy.batch(mt.tasks)))
    weights = torch.tensor(list(info.weights.values()), dtype=torch.float64)
    first = rows_of(model, data)
    mt.step(data)
    update = 3 * weights @ first
    torch.testing.assert_close(toy.flat(model.trunk), trunk - 0.05 * update / update.norm().clamp_min(1))
    torch.testing.assert_close(toy.flat(model.heads["a"]), toy.flat(plain.heads["a"]))
    assert not torch.equal(toy.flat(model.heads["a"]), head)
    second, trunk = rows_of(model, data), toy.flat(model.trunk)
    mt.step(data)
    update = 3 * weights @ second
    torch.testing.assert_close(toy.flat(model.trunk), trunk - 0.05 * update / update.norm().clamp_min(1))


# ---------------------------------------------------------------------- m_config


def config_direction(J: Tensor) -> Tensor:
    """ConFIG by the pseudo-inverse."""
    unit = J / J.norm(dim=1, keepdim=True)
    direction = torch.linalg.pinv(unit) @ torch.ones(len(J), dtype=J.dtype)
    direction = direction / direction.norm()
    return (J @ direction).sum() * direction


@pytest.mark.parametrize("num_updates", [None, 1, 2])
def test_m_config_step_by_step(num_updates: int | None) -> None:
    """The printed algorithm, with the first step for all tasks, and a batch without task b."""
    first, second = 0.9, 0.99
    model, _, mt = toy.make(made("m_config", num_updates=num_updates, betas=(first, second)))
    size = sum(p.numel() for p in model.trunk.parameters())
    momenta, counts = torch.zeros(3, size, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    moment, last, turn = torch.zeros(size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64), 0
    for step in range(1, 8):
        present = ("a", "c") if step == 5 else ("a", "b", "c")
        asked = [mt.tasks.index(task) for task in present]
        data = toy.closure(model, toy.batch(mt.tasks, seed=step), only=present)
        J = dict(zip(asked, rows_of(model, data, present), strict=True))
        chosen, calls = asked, 1
        if num_updates is not None and step > 1:
            queue = [(turn + i) % 3 for i in range(3)]
            batches = [queue[i : i + num_updates] for i in range(0, 3, num_updates)]
            calls = next(i for i, batch in enumerate(batches, start=1) if set(batch) & set(asked))
            chosen = [task for task in sorted(batches[calls - 1]) if task in asked]
            turn = (batches[calls - 1][-1] + 1) % 3
        for task in chosen:
            momenta[task] = first * momenta[task] + (1 - first) * J[task]
            counts[task] += 1
        direction = config_direction(momenta / (1 - first**counts).unsqueeze(1))
        momentum = direction * (1 - first**step)
        moment = second * moment + (1 - second) * ((momentum - first * last) / (1 - first)).square()
        last = momentum
        expected = direction / ((moment / (1 - second**step)).sqrt() + 1e-8)
        before, heads = toy.flat(model.trunk), {task: toy.flat(model.heads[task]) for task in mt.tasks}
        info = mt.step(data)
        torch.testing.assert_close(toy.flat(model.trunk), before - 0.05 * expected, rtol=1e-6, atol=1e-9)
        moved = [mt.tasks.index(task) for task in mt.tasks if not torch.equal(toy.flat(model.heads[task]), heads[task])]
        assert moved == chosen
        assert (info.num_forward, info.num_backward, info.num_optimizer_steps) == (calls, len(chosen), 1)


@pytest.mark.parametrize("num_updates", [1, 2])
def test_m_config_passes_over_tasks_without_labels(num_updates: int) -> None:
    """Their turn ends, whichever tasks the batch has; only one without any is refused."""
    model, _, mt = toy.make(made("m_config", num_updates=num_updates), ("a", "b", "c", "d"))
    data = toy.batch(mt.tasks)
    mt.step(toy.closure(model, data))
    for only in (["d"], ["b", "c"], ["b"], ["a"], ["a"]):
        info = mt.step(toy.closure(model, data, only=only))
        assert not info.skipped
        assert set(info.losses) <= set(only)
    before = toy.state(mt)
    with pytest.raises(ValueError, match="Empty batch"):
        mt.step(toy.closure(model, data, only=[]))
    assert toy.same(toy.state(mt), before)


@pytest.mark.parametrize("parts", [1, 2])
def test_m_config_of_ready_losses_of_some_tasks(parts: int) -> None:
    """Whose turn it is among those that are there, and one pass through each of them."""
    runs = []
    for ready in (True, False):
        model, _, mt = toy.make("m_config")
        for seed, only in enumerate([mt.tasks, ("b", "c"), ("c",), ("a", "b"), ("c",), mt.tasks]):
            sources = [
                toy.closure(model, toy.batch(mt.tasks, seed=seed + 10 * part), only=only) for part in range(parts)
            ]
            info = mt.step([losses(mt.tasks) for losses in sources] if ready else sources)
            assert info.num_forward == parts or not ready
        runs.append(toy.flat(model))
    torch.testing.assert_close(*runs, rtol=1e-12, atol=0)


def test_m_config_of_tasks_that_agree_is_adam() -> None:
    """The second moment is that of the gradient behind the direction's momentum."""
    model, _, mt = toy.make(made("m_config", num_updates=None, betas=(0.9, 0.999)), ("a", "b"))
    plain = toy.Toy(("a", "b"))
    plain.load_state_dict(model.state_dict())
    adam = torch.optim.Adam(plain.trunk.parameters(), lr=0.05, betas=(0.9, 0.999))
    for step in range(4):
        x, targets = toy.batch(("a",), seed=step)
        loss = lambda net: (net.trunk(x).sum(1, keepdim=True) - targets["a"]).square().mean()  # noqa: B023, E731
        mt.step({"a": loss(model), "b": loss(model)})
        adam.zero_grad()
        (2 * loss(plain)).backward()
        adam.step()
    torch.testing.assert_close(toy.flat(model.trunk), toy.flat(plain.trunk), rtol=1e-7, atol=1e-9)


def test_m_config_begins_anew_where_a_parameter_turns_shared() -> None:
    """Of tasks that agree it is Adam, which counts the steps of every parameter by itself."""
    model, _, mt = toy.make(made("m_config", num_updates=None), ("a", "b"))
    plain = toy.Toy(("a", "b"))
    plain.load_state_dict(model.state_dict())
    late, followed = model.heads["b"], plain.heads["b"]
    adam = torch.optim.Adam([*plain.trunk.parameters(), *followed.parameters()], lr=0.05)
    for step in range(9):
        x, targets = toy.batch(("a",), seed=step)
        joined = step >= 5

        def common(net: toy.Toy, x: Tensor = x, targets: dict[str, Tensor] = targets) -> Tensor:
            return (net.trunk(x).sum(1, keepdim=True) - targets["a"]).square().mean()

        def more(net: toy.Toy, step: int = step) -> Tensor:
            return (net.heads["b"].weight.sum() - step).square() + net.heads["b"].bias.square().sum()

        start = copy.deepcopy(late.state_dict())
        mt.step({"a": common(model) + more(model), "b": common(model) + (more(model) if joined else 0.0)})
        if not joined:
            # As a head it isn't Adam's.
            late.load_state_dict(start)
        adam.zero_grad()
        (2 * common(plain) + (2 * more(plain) if joined else 0.0)).backward()
        adam.step()
        torch.testing.assert_close(toy.flat(model.trunk), toy.flat(plain.trunk), rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(toy.flat(late), toy.flat(followed), rtol=1e-6, atol=1e-8)


def test_m_config_wants_plain_sgd() -> None:
    with pytest.warns(UserWarning, match="is Adam's rule itself"):
        toy.make("m_config", optimizer=torch.optim.Adam)
    with pytest.raises(TypeError, match="a pair of floats"):
        made("m_config", betas=0.9)
    with pytest.raises(ValueError, match=r"`betas\[1\]` should be a float >= 0 and < 1"):
        made("m_config", betas=(0.9, 1.0))


# ---------------------------------------------------------------------- ldc_mtl


@pytest.mark.parametrize("normalize", ["none", "ratio", "log"])
def test_ldc_mtl_is_one_loop_over_both_levels(normalize: str) -> None:
    """The released objective by autograd, descended by the model and by W; a task that is missing once."""
    model, _, mt = toy.make(made("ldc_mtl", penalty=0.1, lr=0.05, normalize=normalize))
    plain = toy.Toy(mt.tasks)
    plain.load_state_dict(model.state_dict())
    # Different ones: where all are equal the first normalised losses tie.
    W = torch.tensor([1.0, 0.5, -0.3], dtype=torch.float64, requires_grad=True)
    mt.method.logits.values.copy_(W.detach())
    sgd, adam = torch.optim.SGD(plain.parameters(), lr=0.05), torch.optim.Adam([W], lr=0.05)
    first = None
    for seed in range(5):
        data = toy.batch(mt.tasks, seed=seed)
        info = mt.step(toy.closure(model, data))
        losses = torch.stack(list(toy.closure(plain, data)(mt.tasks).values()))
        first = losses.detach() if first is None else first
        normalised = {
            "none": lambda now, start: now,
            "ratio": lambda now, start: now / (start / start.min()),
            "log": lambda now, start: (now / start).log(),
        }[normalize](losses, first)
        weights = W.sigmoid()
        weighted = weights * normalised
        objective = weights @ normalised / weights.sum().detach() + 0.1 * (weighted[:-1] - weighted[1:]).abs().sum()
        sgd.zero_grad()
        adam.zero_grad()
        objective.backward()
        sgd.step()
        adam.step()
        torch.testing.assert_close(toy.flat(model), toy.flat(plain), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(list(info.records["logits"].values()), W.detach().tolist(), rtol=1e-9, atol=1e-12)
    before = dict(info.records["logits"])
    info = mt.step(toy.closure(model, toy.batch(mt.tasks), only=("a", "c")))
    assert info.records["logits"]["b"] == before["b"]
    assert info.records["logits"]["c"] != before["c"]


def test_ldc_mtl_domain() -> None:
    for normalize in ("ratio", "log"):
        assert made("ldc_mtl", normalize=normalize).domain.losses == "positive losses"
    with pytest.raises(ValueError, match="`penalty` should be a non-negative float"):
        made("ldc_mtl", penalty=-1.0)


# ---------------------------------------------------------------------- gradvac's groups


@pytest.mark.parametrize("groups", ["layer", "matrix"])
def test_gradvac_takes_each_group_by_itself(groups: str) -> None:
    """The rule, with targets of its own, for the gradients of one module or tensor; a batch without task b in between."""
    model = toy.Toy(("a", "b", "c"), norm=torch.nn.LayerNorm(5))
    _, _, mt = toy.make(made("gradvac", groups=groups, beta=0.5, shuffle=False), model=model)
    sizes = [p.numel() for p in model.trunk.parameters()]
    parts = [sum(sizes[:2]), sum(sizes[2:])] if groups == "layer" else sizes
    targets = [np.zeros((3, 3)) for _ in parts]
    for step, present in enumerate([("a", "b", "c"), ("a", "c"), ("a", "b", "c")]):
        data = toy.closure(model, toy.batch(mt.tasks, seed=step), only=present)
        where = np.ix_(*[[mt.tasks.index(task) for task in present]] * 2)
        expected = []
        for part, rows in enumerate(rows_of(model, data, present).split(parts, dim=1)):
            projection, targets[part][where] = solvers.gradvac((rows @ rows.T).numpy(), targets[part][where], beta=0.5)
            expected.append(torch.from_numpy(projection.weights) @ rows)
        before = toy.flat(model.trunk)
        info = mt.step(data)
        assert info.weights is None
        torch.testing.assert_close(toy.flat(model.trunk), before - 0.05 * torch.cat(expected), rtol=1e-9, atol=1e-12)
    assert len(mt.method.group_targets) == len(parts)
    inside, _, mt = toy.make(made("task_groups", groups=[["a", "b"], ["c"]], inner=made("gradvac", groups=groups)))
    mt.step(toy.closure(inside, toy.batch(mt.tasks)))


def test_gradvac_groups_need_rows() -> None:
    for options in ({"heads": "weighted"}, {"refresh_every": 2}):
        with pytest.raises(ValueError, match="`groups` should be 'whole' with"):
            made("gradvac", groups="layer", **options)
    with pytest.raises(ValueError, match="takes cosines over the columns of each group"):
        toy.make(made("gradvac", groups="layer"), gradients="layerwise")
    with pytest.raises(ValueError, match="'whole' where the rows aren't known"):
        made("gradvac", groups="layer").weights(torch.eye(3))


# ---------------------------------------------------------------------- f_mtl and samo


def gradient_at(model: toy.Toy, data: Any, task: str, shifts: dict[str, Tensor]) -> dict[str, Tensor]:
    """One task's gradient where the parameters are moved, by autograd on a copy."""
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in moved.named_parameters():
            parameter.add_(shifts.get(name, torch.zeros_like(parameter)))
    loss = toy.closure(moved, data)((task,))[task]
    reached = {n: p for n, p in moved.named_parameters() if n.startswith(("trunk", f"heads.{task}."))}
    return dict(zip(reached, torch.autograd.grad(loss, list(reached.values())), strict=True))


def step_along(directions: dict[str, Tensor], model: toy.Toy, rho: float, *, adaptive: bool) -> dict[str, Tensor]:
    """rho g / |g|, or relative to the parameters."""
    sizes = {n: p.detach().abs() if adaptive else torch.ones_like(p) for n, p in model.named_parameters()}
    norm = torch.cat([(sizes[n] * g).flatten() for n, g in directions.items()]).norm()
    return {n: rho * sizes[n] ** 2 * g / norm for n, g in directions.items()}


def split(gradient: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    trunk = {n: g for n, g in gradient.items() if n.startswith("trunk")}
    return trunk, {n: g for n, g in gradient.items() if n not in trunk}


def row(gradient: dict[str, Tensor]) -> Tensor:
    return torch.cat([g.flatten() for g in split(gradient)[0].values()])


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("apart", [False, True])
def test_f_mtl_goes_where_each_task_leads(apart: bool, adaptive: bool) -> None:
    """Loss and flat directions combined apart, heads by their perturbed gradients, parameters back in place."""
    model, _, mt = toy.make(made("f_mtl", rho=0.3, apart=apart, adaptive=adaptive))
    for seed in range(2):
        data = toy.batch(mt.tasks, seed=seed)
        first = {task: gradient_at(model, data, task, {}) for task in mt.tasks}
        second = {}
        for task in mt.tasks:
            shifts = [step_along(part, model, 0.3, adaptive=adaptive) for part in split(first[task])]
            second[task] = gradient_at(model, data, task, shifts[0] | shifts[1])
        J, S = (torch.stack([row(gradient) for gradient in group.values()]) for group in (first, second))
        cagrad = made("cagrad")
        expected = cagrad.weights(S @ S.T) @ S
        if apart:
            H = S - J
            expected = cagrad.weights(J @ J.T) @ J + cagrad.weights(H @ H.T) @ H
        trunk, heads = toy.flat(model.trunk), {task: toy.flat(model.heads[task]) for task in mt.tasks}
        mt.step(toy.closure(model, data))
        torch.testing.assert_close(toy.flat(model.trunk), trunk - 0.05 * expected, rtol=1e-6, atol=1e-9)
        for task in mt.tasks:
            own = torch.cat([g.flatten() for g in split(second[task])[1].values()])
            torch.testing.assert_close(toy.flat(model.heads[task]), heads[task] - 0.05 * own, rtol=1e-9, atol=1e-12)


def test_samo_mixes_the_mean_gradient_and_an_estimate() -> None:
    """The released formula for CelebA, with its two losses per task."""
    model, _, mt = toy.make(made("samo", rho=0.3, alpha=0.4, mu=0.01, inner="fairgrad"))
    generator = torch.Generator().manual_seed(0)
    for seed in range(2):
        data = toy.batch(mt.tasks, seed=seed)
        gradients = [gradient_at(model, data, task, {}) for task in mt.tasks]
        mean = {n: sum(g[n] for g in gradients) / 3 for n in split(gradients[0])[0]}
        second = {}
        for task, gradient in zip(mt.tasks, gradients, strict=True):
            z = {n: torch.randn(g.shape, generator=generator, dtype=g.dtype) for n, g in mean.items()}
            losses = []
            for sign in (1, -1):
                moved = copy.deepcopy(model)
                for name, parameter in moved.named_parameters():
                    parameter.data += sign * 0.01 * z.get(name, torch.zeros_like(parameter))
                losses.append(toy.closure(moved, data)((task,))[task].item())
            estimate = {n: (losses[0] - losses[1]) / 0.02 * value for n, value in z.items()}
            joint = {n: 0.4 * mean[n] + 0.6 * mean[n].norm() * estimate[n] / estimate[n].norm() for n in mean}
            shifts = step_along(joint, model, 0.3, adaptive=False)
            shifts |= step_along(split(gradient)[1], model, 0.3, adaptive=False)
            second[task] = gradient_at(model, data, task, shifts)
        S = torch.stack([row(gradient) for gradient in second.values()])
        trunk, head = toy.flat(model.trunk), toy.flat(model.heads["b"])
        info = mt.step(toy.closure(model, data))
        torch.testing.assert_close(
            toy.flat(model.trunk), trunk - 0.05 * made("fairgrad").weights(S @ S.T) @ S, rtol=1e-6, atol=1e-9
        )
        own = torch.cat([g.flatten() for g in split(second["b"])[1].values()])
        torch.testing.assert_close(toy.flat(model.heads["b"]), head - 0.05 * own, rtol=1e-9, atol=1e-12)
        assert (info.num_forward, info.num_backward, info.num_optimizer_steps) == (10, 4, 1)


@pytest.mark.parametrize("name", ["f_mtl", "samo"])
def test_perturbed_passes_leave_no_trace(name: str) -> None:
    """Norm statistics move once, micro-batches equal one batch, and an error in the second pass changes nothing."""
    counts = []
    model, _, mt = toy.make(name, model=toy.Toy(("a", "b", "c"), norm=torch.nn.BatchNorm1d(5)))
    mt.step(toy.closure(model, toy.batch(mt.tasks)))
    assert int(model.trunk[1].num_batches_tracked) == 1
    before = toy.state(mt)
    inner = toy.closure(model, toy.batch(mt.tasks))

    def failing(tasks: tuple[str, ...]) -> Any:
        counts.append(tasks)
        if len(counts) == mt.method.cost(3).num_forward:
            raise KeyError("late")
        return inner(tasks)

    with pytest.raises(KeyError, match="late"):
        mt.step(failing)
    assert toy.same(toy.state(mt), before)
    runs = []
    for halves in (False, True):
        model, _, mt = toy.make(name)
        x, targets = toy.batch(mt.tasks)
        parts = [(x[i : i + 4], {t: y[i : i + 4] for t, y in targets.items()}) for i in (0, 4)]
        closures = [toy.closure(model, part) for part in parts] if halves else toy.closure(model, (x, targets))
        mt.step(closures)
        runs.append(toy.flat(model))
    torch.testing.assert_close(*runs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["f_mtl", "samo"])
def test_the_losses_of_perturbed_passes_are_those_of_the_first_forward(name: str) -> None:
    """They are reported, a weighting in front learns from them, and they are checked."""
    data = toy.batch(("a", "b", "c"))
    model, _, mt = toy.make(made(name, rho=2.0), weights="dwa")
    first = toy.closure(model, data)
    expected = {task: loss.item() for task, loss in first(mt.tasks).items()}
    assert mt.step(first).losses == pytest.approx(expected)
    assert mt.weights.state_dict()["means"]["total"].tolist() == pytest.approx(list(expected.values()))
    calls = []

    def bad(tasks: tuple[str, ...]) -> dict[str, Tensor]:
        calls.append(tasks)
        return {task: loss * (torch.nan if len(calls) == 1 else 1.0) for task, loss in first(tasks).items()}

    before = toy.state(mt)
    with pytest.raises(torchmto.NonFiniteError, match="loss of task `a`"):
        mt.step(bad)
    assert toy.same(toy.state(mt), before)


@pytest.mark.parametrize("name", ["f_mtl", "samo"])
def test_inner_methods_of_perturbed_passes(name: str) -> None:
    for inner in ("mgda", "pcgrad", "wpcgrad", "imtl_g", made("gradvac")):
        model, _, mt = toy.make(made(name, inner=inner))
        mt.step(toy.closure(model, toy.batch(mt.tasks)))
        mt.report({"a": 0.5})
        mt.end_window()
        assert toy.flat(model).isfinite().all()
    with pytest.raises(TypeError, match="`inner` should be a Gramian method"):
        made(name, inner="uw")
    with pytest.raises(ValueError, match="refresh_every=1"):
        made(name, inner=made("pcgrad", refresh_every=2))


@pytest.mark.parametrize("weights", ["dwa", "gls", "igb", "rlw", "stch"])
@pytest.mark.parametrize(("name", "options"), [("f_mtl", {}), ("samo", {"alpha": 1.0})])
def test_perturbed_passes_keep_the_weights_of_the_first_forward(
    name: str, options: dict[str, Any], weights: str
) -> None:
    """There tasks come one by one, where a weighting can't compare them: unmoved, the inner method behind it is left."""
    early = {"igb": {"base_window": 1}, "stch": {"warmup": 1}}
    runs = []
    for method in ("pcgrad", made(name, rho=0.0, inner="pcgrad", **options)):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model, _, mt = toy.make(method, weights=made(weights, **early.get(weights, {})))
        for seed in range(4):
            mt.step(toy.closure(model, toy.batch(mt.tasks, seed=seed)))
            mt.end_window()
        runs.append(toy.flat(model))
    torch.testing.assert_close(*runs, rtol=1e-9, atol=1e-12)


# ---------------------------------------------------------------------- consmtl


@pytest.mark.parametrize("strength", [1e-3, 50.0])
@pytest.mark.parametrize("halves", [False, True])
def test_consmtl_bends_heads_towards_the_update(strength: float, halves: bool) -> None:
    """Its second terms by hand: for a linear head and squared errors everything is known; long ones are shortened."""
    model, _, mt = toy.make(made("consmtl", strength=strength))
    x, targets = toy.batch(mt.tasks)
    weights = made("fairgrad").weights((rows := rows_of(model, toy.closure(model, (x, targets)))) @ rows.T)
    z = model.trunk(x).detach()
    heads = {task: (model.heads[task].weight.detach()[0], model.heads[task].bias.detach()) for task in mt.tasks}
    residuals = {task: (z @ w + b - targets[task][:, 0]) * 2 / len(x) for task, (w, b) in heads.items()}
    common = sum(s * residuals[t][:, None] * heads[t][0] for s, t in zip(weights, mt.tasks, strict=True))
    expected = {}
    for task, (w, b) in heads.items():
        along = common @ w
        first = torch.cat([residuals[task] @ z, residuals[task].sum()[None]])
        second = torch.cat([residuals[task] @ common + along @ z * 2 / len(x), along.sum()[None] * 2 / len(x)])
        factor = min(strength, float(0.1 * first.norm() / second.norm()))
        expected[task] = torch.cat([w, b]) - 0.05 * (first - factor * second)
    trunk = toy.flat(model.trunk)
    parts = [(x[i : i + 4], {t: y[i : i + 4] for t, y in targets.items()}) for i in (0, 4)]
    info = mt.step([toy.closure(model, part) for part in parts] if halves else toy.closure(model, (x, targets)))
    torch.testing.assert_close(toy.flat(model.trunk), trunk - 0.05 * weights @ rows, rtol=1e-9, atol=1e-12)
    for task in mt.tasks:
        torch.testing.assert_close(toy.flat(model.heads[task]), expected[task], rtol=1e-9, atol=1e-12)
    assert (info.num_forward, info.num_backward) == ((4, 18) if halves else (2, 9))


class Scales(torch.nn.Module):
    """A trunk of three scales, each computed from the one before, and heads that read some of them."""

    def __init__(self, scales: dict[str, list[int]]) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.trunk = torch.nn.ModuleList([torch.nn.Linear(4, 4) for _ in range(3)])
            self.heads = torch.nn.ModuleDict(
                {
                    task: torch.nn.Sequential(torch.nn.Linear(4 * len(read), 3), torch.nn.Tanh(), torch.nn.Linear(3, 1))
                    for task, read in scales.items()
                }
            )
        self.scales = scales
        self.double()

    def features(self, x: torch.Tensor) -> list[torch.Tensor]:
        found = []
        for layer in self.trunk:
            found.append(x := layer(x).tanh())
        return found

    def losses(self, found: list[torch.Tensor], data: toy.Batch) -> dict[str, torch.Tensor]:
        read = {task: torch.cat([found[i] for i in scales], 1) for task, scales in self.scales.items()}
        return {task: (self.heads[task](part) - data[1][task]).square().mean() for task, part in read.items()}


@pytest.mark.parametrize(
    "scales",
    [
        {"a": [0, 1, 2], "b": [0, 1, 2], "c": [0, 1, 2]},
        {"a": [0, 2], "b": [1], "c": [0, 2]},
        {"a": [0], "b": [2], "c": [2, 1]},
    ],
)
def test_consmtl_takes_what_a_head_reads(scales: dict[str, list[int]]) -> None:
    """By what its own head reads, whatever is computed from that: other tasks' gradients by these come from there, too."""
    model = Scales(scales)
    model, _, mt = toy.make(
        made("consmtl", strength=1e-3), model=model, optimizer=lambda ps: torch.optim.SGD(ps, lr=0.0)
    )
    data = toy.batch(mt.tasks)
    weights = mt.step(lambda _: model.losses(model.features(data[0]), data)).weights
    for task, read in scales.items():
        # The features that this head reads as inputs, the others computed from them.
        cut: list[torch.Tensor] = []
        found: list[torch.Tensor] = []
        x = data[0]
        for place, layer in enumerate(model.trunk):
            x = layer(x).tanh()
            if place in read:
                # Read by heads; what comes next is computed from it, unless it is read, too.
                cut.append(x := x.detach().requires_grad_())
            found.append(x)
        losses = model.losses(found, data)
        pulls = {
            name: torch.autograd.grad(loss, cut, create_graph=True, allow_unused=True, materialize_grads=True)
            for name, loss in losses.items()
        }
        common = [sum(weights[t] * pulls[t][i].detach() for t in mt.tasks) for i in range(len(cut))]
        product = sum((part * own).sum() for part, own in zip(pulls[task], common, strict=True))
        parameters = list(model.heads[task].parameters())
        own = torch.autograd.grad(losses[task], parameters, retain_graph=True)
        second = torch.autograd.grad(product, parameters, allow_unused=True, materialize_grads=True)
        for parameter, first, other in zip(parameters, own, second, strict=True):
            torch.testing.assert_close(parameter.grad, first - 1e-3 * other, rtol=1e-9, atol=1e-12)


def test_consmtl_is_fairgrad_elsewhere() -> None:
    """Without second terms, and where no forward is shared; compiled models are refused, and change nothing."""
    runs = []
    for name, options in (("consmtl", {"strength": 0.0}), ("consmtl", {"limit": 0.0}), ("fairgrad", {})):
        model, _, mt = toy.make(made(name, scale="released", **options))
        mt.step(toy.closure(model, toy.batch(mt.tasks)))
        runs.append(toy.flat(model))
    assert torch.equal(runs[0], runs[2])
    assert torch.equal(runs[1], runs[2])
    split = torchmto.structure.split_norms(toy.Toy(("a", "b", "c"), norm=torch.nn.LayerNorm(5)), ("a", "b", "c"))
    with pytest.warns(UserWarning, match="is FairGrad with split norms"):
        toy.make("consmtl", model=split)
    model, _, mt = toy.make("consmtl")
    mt.network.compiled = True
    before = toy.state(mt)
    with pytest.raises(ValueError, match="no second derivatives of compiled models"):
        mt.step(toy.closure(model, toy.batch(mt.tasks)))
    assert toy.same(toy.state(mt), before)


def test_consmtl_says_that_micro_batches_differ_in_their_tasks() -> None:
    """What tasks share is found in each; a batch that lacks a task altogether is another matter."""
    model, _, mt = toy.make("consmtl")
    first, second = (toy.closure(model, toy.batch(mt.tasks), only=only) for only in (("a",), ("b", "c")))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mt.step([second, second])
    with pytest.warns(UserWarning, match="lacks tasks that others of this step have"):
        mt.step([first, second])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mt.step([first, second])


def test_consmtl_within_groups() -> None:
    """Within a group it is what it is for these tasks alone."""
    groups = [["a", "c"], ["b", "d"]]
    tasks = ("a", "b", "c", "d")
    data = toy.batch(tasks)
    for partition in ([list(tasks)], groups):
        model, _, mt = toy.make(made("task_groups", groups=partition, inner="consmtl"), tasks)
        twin, _, alone = toy.make("consmtl", tasks)
        for group in mt.step(toy.closure(model, data)).records["order"]:
            alone.step(toy.closure(twin, data), tasks=group)
        torch.testing.assert_close(toy.flat(model), toy.flat(twin), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("outer", "argument"), [("cr_mogm", "method"), ("f_mtl", "inner"), ("samo", "inner")])
def test_what_does_more_than_weigh_is_refused_where_weights_alone_are_used(outer: str, argument: str) -> None:
    for inside in ("consmtl", made("gradvac", groups="layer")):
        with pytest.raises(ValueError, match=f"`{argument}` should be a Gramian method whose weights are all that it"):
            made(outer, **{argument: inside})
