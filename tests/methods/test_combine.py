"""The combiners and SON-GOKU: steps by hand, conventions, memory that grows, missing tasks, resume."""

import copy
import warnings
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import torchmto
import toy
from torchmto.methods import GradientCombiner
from torchmto.methods.combine import columns
from torchmto.methods.procedures.son_goku import colour_conflicts

NAMES = ["trimmed_mean", "graddrop", "moco", "db_mtl", "adatask"]


@dataclass
class Rows:
    """What a combiner reads of the task gradients."""

    matrix: Tensor
    losses: Tensor
    indices: tuple[int, ...]
    heads: dict[int, Any] = field(default_factory=dict)

    @property
    def gramian(self) -> Tensor:
        return (self.matrix @ self.matrix.T).double()

    @property
    def parameters(self) -> list[int]:
        """One for every column."""
        return list(range(self.matrix.shape[1]))

    @property
    def trained(self) -> list[bool]:
        return [True] * self.matrix.shape[1]

    def columns(self, parameter: int) -> slice:
        return slice(parameter, parameter + 1)


def rows(J: Any, losses: Any = None, indices: tuple[int, ...] | None = None) -> Rows:
    matrix = torch.as_tensor(J, dtype=torch.float64)
    values = torch.ones(len(matrix)) if losses is None else torch.as_tensor(losses, dtype=torch.float64)
    return Rows(matrix.clone(), values, tuple(range(len(matrix))) if indices is None else indices)


def made(name: str, num_tasks: int = 0, **hyperparameters: Any) -> GradientCombiner:
    method = torchmto.make_method(name, **hyperparameters)
    assert isinstance(method, GradientCombiner)
    if num_tasks:
        method.ensure_setup(num_tasks)
    return method


def advance(method: GradientCombiner, task_grads: Rows) -> Tensor:
    """What the method combines, in a step that is taken."""
    combined = method.combine(task_grads)
    method.remember(task_grads)
    return combined


def random_rows(seed: int, num_tasks: int, width: int = 7) -> Tensor:
    return torch.randn(num_tasks, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---------------------------------------------------------------------- all of them


@pytest.mark.parametrize("name", NAMES)
def test_one_task(name: str) -> None:
    method = made(name)
    J = random_rows(0, 1)
    combined = method.combine(rows(J))
    assert combined.shape == (7,)
    assert combined.dtype == torch.float64
    if method.properties.identity:
        assert torch.equal(combined, J[0])


@pytest.mark.parametrize("name", NAMES)
@given(seed=st.integers(0, 10**6), size=st.integers(2, 5))
@settings(max_examples=8)
def test_equivariance(name: str, seed: int, size: int) -> None:
    J, losses = random_rows(seed, size), torch.arange(1.0, size + 1)
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    found = made(name).combine(rows(J[order], losses[order]))
    assert torch.allclose(found, made(name).combine(rows(J, losses)), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["trimmed_mean", "graddrop"])
@pytest.mark.parametrize("scale", [1e-8, 1e8])
def test_homogeneity(name: str, scale: float) -> None:
    J = random_rows(4, 4)
    assert torch.allclose(made(name).combine(rows(J * scale)), made(name).combine(rows(J)) * scale, rtol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_pieces_of_columns_make_no_difference(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    J = random_rows(5, 3, width=50)
    whole = made(name).combine(rows(J))
    monkeypatch.setattr(columns, "PIECE", 7)
    found = made(name).combine(rows(J))
    assert torch.allclose(found, whole, rtol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_zero_gradients_give_finite_updates(name: str) -> None:
    combined = (
        made(name, eps=0.0).combine(rows(torch.zeros(3, 4)))
        if name == "adatask"
        else made(name).combine(rows(torch.zeros(3, 4), [0.0, 1.0, 2.0]))
    )
    assert torch.equal(combined, torch.zeros(4, dtype=torch.float64))


def test_memory_grows_with_the_shared_parameters() -> None:
    """New columns behave as if they had been there with gradients of zero."""
    first, second = random_rows(6, 3, 4), random_rows(7, 3, 6)
    padded = torch.cat([first, torch.zeros(3, 2, dtype=torch.float64)], dim=1)
    grown, full = made("db_mtl"), made("db_mtl")
    advance(grown, rows(first))
    advance(full, rows(padded))
    assert torch.allclose(advance(grown, rows(second)), advance(full, rows(second)))


@pytest.mark.parametrize(("name", "options"), [("moco", {"gamma": 0.0}), ("adatask", {})])
def test_new_columns_begin_as_all_did(name: str, options: dict[str, Any]) -> None:
    """What corrects a memory for its start, or a rate that decays from there, starts with the column."""
    grown, old, new = (made(name, 3, **options) for _ in range(3))
    for step in range(6):
        present = (0, 1, 2) if step % 2 else (0, 2)
        J = random_rows(step, len(present), 4 if step < 3 else 6)
        expected = [advance(old, rows(J[:, :4], indices=present))]
        if step >= 3:
            expected.append(advance(new, rows(J[:, 4:], indices=present)))
        found = advance(grown, rows(J, indices=present))
        assert torch.allclose(found, torch.cat(expected), rtol=1e-12)


@pytest.mark.parametrize("name", ["moco", "adatask", "m_config"])
def test_states_that_count_per_task_alone_go_on(name: str) -> None:
    """As states of before are."""
    runs = []
    for old in (False, True):
        model, _, mt = toy.make(name)
        for step in range(4):
            if step == 2 and old:
                state = copy.deepcopy(mt.state_dict())
                method = state["method_state"]
                method["times"] = method["times"][:, 0].clone()
                if name == "m_config":
                    method["num_steps"] = int(method["num_steps"][0, 0])
                method.pop("head_tasks", None)
                mt.load_state_dict(state)
            mt.step(toy.closure(model, toy.batch(mt.tasks, seed=step)))
        runs.append((toy.flat(model), mt.state_dict()))
    assert torch.equal(runs[0][0], runs[1][0])
    assert toy.same(runs[0][1], runs[1][1])


@pytest.mark.parametrize("name", ["moco", "db_mtl", "adatask"])
def test_absent_tasks_keep_their_memory(name: str) -> None:
    method = made(name)
    advance(method, rows(random_rows(8, 3)))
    before = copy.deepcopy(method.state_dict())
    advance(method, rows(random_rows(9, 2), indices=(0, 2)))
    memory = "first" if name == "adatask" else "tracked"
    after = method.state_dict()
    assert torch.equal(after[memory][1], before[memory][1])
    assert not torch.equal(after[memory][2], before[memory][2])
    assert after["times"].reshape(3, -1)[:, 0].tolist() == [2, 1, 2]


@pytest.mark.parametrize("first", [0, 3, 5])
@pytest.mark.parametrize("name", [*NAMES, "m_config", "metabalance"])
def test_resume_bit_for_bit_with_missing_tasks(name: str, first: int) -> None:
    """Also where all but one are missing at first, so that parameters turn shared before or after the break."""

    def run(model: torch.nn.Module, mt: torchmto.MultiTask, steps: range) -> None:
        for step in steps:
            only = ("a",) if step < first else ("a", "b", "c") if step % 3 else ("a", "c")
            mt.step(toy.closure(model, toy.batch(mt.tasks, seed=step), only=only))

    model, _, mt = toy.make(name)
    run(model, mt, range(1, 4))
    saved = copy.deepcopy((model.state_dict(), mt.state_dict()))
    run(model, mt, range(4, 7))
    again, _, resumed = toy.make(name, seed=99)
    again.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    run(again, resumed, range(4, 7))
    assert torch.equal(toy.flat(model), toy.flat(again))
    assert toy.same(mt.state_dict(), resumed.state_dict())


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("trimmed_mean", {"num_trimmed": -1}, "num_trimmed"),
        ("graddrop", {"leak": 1.5}, "Parameter `leak` should be a float >= 0 and <= 1"),
        ("graddrop", {"leak": [0.5, 2.0]}, "leak"),
        ("moco", {"beta": 0.0}, "beta"),
        ("moco", {"step": "mirror"}, "one of 'softmax', 'projection'"),
        ("db_mtl", {"beta": 1.0}, "beta"),
        ("db_mtl", {"heads": "none"}, "heads"),
        ("adatask", {"betas": (0.9, 1.0)}, r"betas\[1\]"),
        ("adatask", {"eps": -1.0}, "eps"),
        ("son_goku", {"tau": 2.0}, "tau"),
    ],
)
def test_options_are_checked(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        torchmto.make_method(name, **options)


@pytest.mark.parametrize("betas", [0.9, (0.9,), (0.9, 0.99, 0.1), "ab", None])
def test_adatask_takes_a_pair_of_betas(betas: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="Parameter `betas` should be a pair of floats"):
        torchmto.make_method("adatask", betas=betas)
    assert torchmto.make_method("adatask", betas=[0.5, 0.9]).betas == (0.5, 0.9)


# ---------------------------------------------------------------------- one by one


def test_trimmed_mean() -> None:
    J = [[1.0, -9.0], [2.0, 0.0], [3.0, 1.0], [99.0, 2.0]]
    assert made("trimmed_mean").combine(rows(J)).tolist() == [2.5, 0.5]
    assert made("trimmed_mean", num_trimmed=0).combine(rows(J)).tolist() == [26.25, -1.5]
    assert made("trimmed_mean").combine(rows(J[:2])).tolist() == [1.5, -4.5], "two tasks leave nothing to trim"


@pytest.mark.parametrize("leak", [0.0, 0.25, [0.0, 0.5, 1.0]])
def test_graddrop_keeps_one_sign_per_entry(leak: Any) -> None:
    J = random_rows(10, 3, 2000)
    found = made("graddrop", leak=leak).combine(rows(J))
    leaks = torch.tensor([leak] * 3 if isinstance(leak, float) else leak, dtype=torch.float64).unsqueeze(1)
    positive, negative = J.clamp_min(0), J.clamp_max(0)
    if_positive = (positive + leaks * negative).sum(0)
    if_negative = (negative + leaks * positive).sum(0)
    is_positive = torch.isclose(found, if_positive)
    assert (is_positive | torch.isclose(found, if_negative)).all()
    mixed = (positive.sum(0) > 0) & (negative.sum(0) < 0)
    purity = (J.sum(0) / J.abs().sum(0) + 1) / 2
    assert is_positive[mixed].double().mean().item() == pytest.approx(purity[mixed].mean().item(), abs=0.04)


def test_graddrop_leak_is_the_share_that_leaks_through() -> None:
    J = random_rows(11, 4)
    assert torch.allclose(made("graddrop", leak=1.0).combine(rows(J)), J.sum(0))
    agreeing = J.abs()
    assert torch.allclose(made("graddrop").combine(rows(agreeing)), agreeing.sum(0))
    assert torch.allclose(made("graddrop").combine(rows(-agreeing)), -agreeing.sum(0))


def test_moco_by_hand() -> None:
    method = made("moco", beta=0.5, beta_sigma=1.0, gamma=0.2, gamma_sigma=0.0, rho=0.1)
    first, second = random_rows(12, 2), random_rows(13, 2)
    tracked = torch.zeros_like(first)
    weights = torch.tensor([0.5, 0.5], dtype=torch.float64)
    for step, J in enumerate((first, second), start=1):
        tracked = tracked - 0.5 / step * (tracked - J)
        inner = tracked @ tracked.T + 0.1 * torch.eye(2, dtype=torch.float64)
        weights = (weights - 0.2 * inner @ weights).softmax(0)
        assert torch.allclose(advance(method, rows(J)), weights @ tracked)
    assert list(method.records()["weights"].values()) == pytest.approx(weights.tolist())


def test_moco_options() -> None:
    J, losses = random_rows(14, 2), [2.0, 3.0]
    unit = J / J.norm(dim=1, keepdim=True) * torch.tensor([[2.0], [3.0]], dtype=torch.float64)
    normalised = made("moco", normalize="loss").combine(rows(J, losses))
    assert torch.allclose(normalised, made("moco").combine(rows(unit)))
    projected = made("moco", step="projection", gamma=100.0, beta=1.0).combine(rows([[1.0, 0.0], [0.0, 3.0]]))
    assert torch.allclose(projected, torch.tensor([1.0, 0.0], dtype=torch.float64))


def test_moco_needs_non_negative_losses_to_multiply_with() -> None:
    J, losses = random_rows(14, 3), [2.0, -3.0, 1.0]
    made("moco").combine(rows(J, losses))
    method = made("moco", num_tasks=3, normalize="loss")
    before = copy.deepcopy(method.state_dict())
    with pytest.raises(ValueError, match=r"non-negative losses. That of task `1` is -3"):
        method.combine(rows(J, losses))
    assert toy.same(method.state_dict(), before)


def test_moco_shares_of_absent_tasks() -> None:
    method = made("moco", num_tasks=3)
    method.combine(rows(random_rows(15, 2), indices=(0, 1)))
    shares = method.state_dict()["shares"]
    assert shares[2].item() == pytest.approx(1 / 3)
    assert shares.sum().item() == pytest.approx(1)


def test_db_mtl_by_hand() -> None:
    method = made("db_mtl", beta=0.8, sigma=0.5)
    tracked = torch.zeros(2, 7, dtype=torch.float64)
    for step, losses in enumerate(([2.0, 0.5], [1.0, 4.0]), start=1):
        J = random_rows(15 + step, 2)
        beta = 0.8 / step**0.5
        tracked = beta * tracked + (1 - beta) * J / torch.tensor(losses, dtype=torch.float64).unsqueeze(1)
        norms = tracked.norm(dim=1)
        expected = (norms.max() / norms) @ tracked
        assert torch.allclose(advance(method, rows(J, losses)), expected)
    assert method.head_weights is not None
    assert method.head_weights.tolist() == [1.0, 0.25]


def test_db_mtl_ignores_the_scale_of_the_losses() -> None:
    J, losses = random_rows(18, 3), torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    assert torch.allclose(made("db_mtl").combine(rows(J * 1e6, losses * 1e6)), made("db_mtl").combine(rows(J, losses)))
    with pytest.raises(ValueError, match="non-negative losses"):
        made("db_mtl").combine(rows(J, -losses))


@pytest.mark.parametrize("on_nonfinite", ["raise", "skip"])
@pytest.mark.parametrize("loss", [1e-15, 1e-18, 1e-19, 1e-25, 1e-38, 1e-42])
def test_db_mtl_never_writes_what_is_not_finite(loss: float, on_nonfinite: str) -> None:
    """Norms whose squares overflow are no harm; gradients of the logarithm that overflow are left out."""
    J = random_rows(19, 2, 5).float()
    parameter = torch.nn.Parameter(torch.ones(5))
    head = torch.nn.Parameter(torch.ones(2))
    model = torch.nn.ParameterList([parameter, head])
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-30)
    mt = torchmto.MultiTask(model, optimizer, tasks=("a", "b"), method="db_mtl", on_nonfinite=on_nonfinite)

    def one_step(loss: float) -> torchmto.StepInfo:
        moved = [10 * J[0] @ (parameter - parameter.detach()) + loss, 1 + J[1] @ (parameter - parameter.detach())]
        return mt.step(lambda tasks: {"a": moved[0] + (head - head.detach()).sum() * loss, "b": moved[1]})

    one_step(1.0)
    before = toy.state(mt)
    if loss > 1e-37:
        assert not one_step(loss).skipped
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()
    else:
        if on_nonfinite == "skip":
            assert one_step(loss).skipped
        else:
            with pytest.raises(torchmto.NonFiniteError, match="combined gradient isn't finite"):
                one_step(loss)
        assert toy.same(toy.state(mt), before)
    assert not one_step(1.0).skipped
    assert all(p.isfinite().all() for p in model)


def test_db_mtl_counts_a_vanished_gradient_as_zero() -> None:
    """Even one that can't be scaled up to the longest."""
    method = made("db_mtl", beta=0.0)
    J = torch.tensor([[1.0, 2.0], [1e-44, 0.0]])
    task_grads = Rows(J.clone(), torch.ones(2), (0, 1))
    assert torch.equal(method.combine(task_grads), J[0])


@pytest.mark.parametrize("on_nonfinite", ["raise", "skip"])
def test_a_combination_that_is_not_finite_changes_nothing(on_nonfinite: str) -> None:
    class Overflowing(GradientCombiner):
        name = "overflowing"

        def combine(self, task_grads: Any) -> Tensor:
            vector: Tensor = task_grads.matrix.sum(0)
            vector[-1] = torch.inf
            return vector

    model, _, mt = toy.make(Overflowing(), on_nonfinite=on_nonfinite)
    before = toy.state(mt)
    if on_nonfinite == "skip":
        assert mt.step(toy.closure(model, toy.batch(mt.tasks))).reason == "The combined gradient isn't finite."
    else:
        with pytest.raises(torchmto.NonFiniteError, match="combined gradient isn't finite"):
            mt.step(toy.closure(model, toy.batch(mt.tasks)))
    assert toy.same(toy.state(mt), before)
    assert all(p.grad is None for p in model.parameters())


def test_db_mtl_heads_get_the_gradient_of_the_log_loss() -> None:
    gradients = {}
    for heads in ("weighted", "unit"):
        model, optimizer, mt = toy.make(torchmto.make_method("db_mtl", heads=heads))
        optimizer.step = lambda *_: None  # type: ignore[method-assign]
        info = mt.step(toy.closure(model, toy.batch(mt.tasks)))
        gradients[heads] = {task: toy.flat_grad(model.heads[task].parameters()) for task in mt.tasks}
    for task, loss in info.losses.items():
        assert torch.allclose(gradients["weighted"][task], gradients["unit"][task] / loss)


def test_adatask_with_one_task_is_adam() -> None:
    tasks = ("a",)
    model, _, mt = toy.make("adatask", tasks, optimizer=lambda p: torch.optim.SGD(p, lr=0.01))
    plain = copy.deepcopy(model)
    adam = torch.optim.Adam(plain.parameters(), lr=0.01)
    for seed in range(5):
        mt.step(toy.closure(model, toy.batch(tasks, seed=seed)))
        adam.zero_grad()
        toy.closure(plain, toy.batch(tasks, seed=seed))(tasks)["a"].backward()
        adam.step()
    assert torch.allclose(toy.flat(model), toy.flat(plain), rtol=1e-10)


@pytest.mark.parametrize("first", [("a", "b"), ("a",), ("b",)])
def test_adatask_is_the_sum_of_the_tasks_own_adams(first: tuple[str, ...]) -> None:
    """With the heads by Adam as well, a task that is missing once, and where parameters turn shared only when it comes."""
    tasks = ("a", "b")
    model = toy.Toy(tasks)
    # Columns follow the memory of a parameter.
    model.trunk[0].weight = torch.nn.Parameter(model.trunk[0].weight.detach().T.contiguous().T)
    model, _, mt = toy.make("adatask", tasks, model=model, optimizer=lambda p: torch.optim.SGD(p, lr=0.01))
    plain = copy.deepcopy(model)
    trunk = list(plain.trunk.parameters())
    copies = {task: [torch.zeros_like(p, requires_grad=True) for p in trunk] for task in tasks}
    adams = {task: torch.optim.Adam([*copies[task], *plain.heads[task].parameters()], lr=0.01) for task in tasks}
    for seed, present in enumerate((first, first, tasks, ("a",), tasks)):
        mt.step(toy.closure(model, toy.batch(tasks, seed=seed), only=present))
        start = [p.detach().clone() for p in trunk]
        losses = toy.closure(plain, toy.batch(tasks, seed=seed), only=present)(tasks)
        gradients = {}
        for task in present:
            parameters = [*trunk, *plain.heads[task].parameters()]
            gradients[task] = torch.autograd.grad(losses[task], parameters, retain_graph=True)
        for task in present:
            for copied, value in zip(copies[task], start, strict=True):
                copied.data.copy_(value)
            for parameter, gradient in zip(adams[task].param_groups[0]["params"], gradients[task], strict=True):
                parameter.grad = gradient
            adams[task].step()
        for i, parameter in enumerate(trunk):
            parameter.data += sum(copies[task][i].detach() - start[i] for task in present)
    assert torch.allclose(toy.flat(model), toy.flat(plain), rtol=1e-10)


@pytest.mark.parametrize("first", [("a", "b"), ("a",)])
def test_adatask_goes_back_when_the_optimizer_fails(first: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = ("a", "b")
    model, optimizer, mt = toy.make("adatask", tasks, optimizer=lambda p: torch.optim.SGD(p, lr=0.01))
    mt.step(toy.closure(model, toy.batch(tasks), only=first))
    before = copy.deepcopy(toy.state(mt))

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("lost")

    with monkeypatch.context() as patched:
        patched.setattr(optimizer, "step", fail)
        with pytest.raises(OSError, match="lost"):
            mt.step(toy.closure(model, toy.batch(tasks, seed=1)))
    assert toy.same(toy.state(mt), before)


def test_adatask_wants_plain_sgd() -> None:
    for optimizer in (torch.optim.Adam, lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)):
        with pytest.warns(UserWarning, match="Adam.s rule itself"):
            toy.make("adatask", optimizer=optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, _, mt = toy.make(torchmto.make_method("adatask", adam_heads=False))
        before = toy.flat(model.heads["a"])
        losses = toy.closure(model, toy.batch(mt.tasks))(mt.tasks)
        expected = torch.cat(
            [g.flatten() for g in torch.autograd.grad(losses["a"], list(model.heads["a"].parameters()))]
        )
        mt.step(toy.closure(model, toy.batch(mt.tasks)))
    assert torch.allclose(toy.flat(model.heads["a"]), before - 0.05 * expected)


# ---------------------------------------------------------------------- SON-GOKU


@given(seed=st.integers(0, 10**6), size=st.integers(1, 8), threshold=st.sampled_from([0.0, 0.3, 1.0]))
@settings(max_examples=25)
def test_colouring_is_a_partition_without_conflicts(seed: int, size: int, threshold: float) -> None:
    J = random_rows(seed, size, 3)
    groups = colour_conflicts(J @ J.T, threshold)
    assert sorted(task for group in groups for task in group) == list(range(size))
    cosines = torch.nn.functional.normalize(J) @ torch.nn.functional.normalize(J).T
    for group in groups:
        assert (cosines[group][:, group] >= -threshold - 1e-12).all()
    degree = int((cosines < -threshold).sum(1).max())
    assert len(groups) <= degree + 1


def test_son_goku_trains_one_group_per_step() -> None:
    tasks = ("a", "b", "c")
    model, _, mt = toy.make(torchmto.make_method("son_goku", beta=0.0, refresh_every=100))
    batch = toy.batch(tasks)
    seen = []
    for step in range(4):
        before = {task: toy.flat(model.heads[task]) for task in tasks}
        trunk = toy.flat(model.trunk)
        losses = toy.closure(model, batch)(tasks)
        gradients = {
            task: torch.cat(
                [
                    g.flatten()
                    for g in torch.autograd.grad(losses[task], list(model.trunk.parameters()), retain_graph=True)
                ]
            )
            for task in tasks
        }
        info = mt.step(toy.closure(model, batch))
        if step == 0:
            J = torch.stack(list(gradients.values()))
            expected = [[tasks[i] for i in group] for group in colour_conflicts(J @ J.T)]
        assert info.records["groups"] == expected
        active = info.records["active"]
        seen.append(active)
        assert torch.allclose(toy.flat(model.trunk), trunk - 0.05 * sum(gradients[task] for task in active))
        moved = [task for task in tasks if not torch.equal(toy.flat(model.heads[task]), before[task])]
        assert moved == active
        assert (info.num_forward, info.num_backward, info.num_optimizer_steps) == (1, 3, 1)
    assert seen == [expected[step % len(expected)] for step in range(4)]


def test_son_goku_leaves_alone_what_the_active_group_does_not_reach() -> None:
    """A layer that only waiting tasks share has no gradient, so Adam's moments don't move it."""
    model = torch.nn.ParameterDict({name: torch.nn.Parameter(torch.ones(2)) for name in ("all", "bc", "a")})

    def closure(tasks: tuple[str, ...]) -> dict[str, Tensor]:
        losses = {"a": model["all"].sum() + model["a"].sum()}
        for factor, task in enumerate("bc", start=1):
            losses[task] = -model["all"].sum() + factor * model["bc"].sum()
        return {task: losses[task] for task in tasks}

    optimizer = torch.optim.Adam(model.values(), lr=1e-2)
    mt = torchmto.MultiTask(model, optimizer, tasks=("a", "b", "c"), method="son_goku")
    turns = []
    for _ in range(4):
        before = {name: parameter.detach().clone() for name, parameter in model.items()}
        info = mt.step([closure, closure])
        active = info.records["active"]
        turns.append(active)
        moved = {name for name, parameter in model.items() if not torch.equal(parameter, before[name])}
        assert moved == ({"all", "a"} if active == ["a"] else {"all", "bc"})
        assert {name for name, parameter in model.items() if parameter.grad is not None} == moved
    assert turns == [["a"], ["b", "c"]] * 2


def test_son_goku_passes_over_absent_groups() -> None:
    method = torchmto.make_method("son_goku")
    model, _, mt = toy.make(method)
    mt.step(toy.closure(model, toy.batch(mt.tasks)))
    method.groups = [[0], [1], [2]]
    info = mt.step(toy.closure(model, toy.batch(mt.tasks), only=("c",)))
    assert info.records["active"] == ["c"]
    turns = [mt.step(toy.closure(model, toy.batch(mt.tasks))).records["active"] for _ in range(3)]
    assert {"a", "b"} == {*turns[0], *turns[1]}
    assert turns[2] == ["c"]


@pytest.mark.parametrize("refresh_every", [1, 2, 3, 50])
def test_son_goku_lets_no_task_wait_for_more_steps_than_there_are_tasks(refresh_every: int) -> None:
    """However often the groups are drawn anew, and whatever they are then: the task that waited longest is next."""
    model, _, mt = toy.make(
        torchmto.make_method("son_goku", beta=0.0, refresh_every=refresh_every), tasks=("a", "b", "c", "d")
    )
    inner = toy.closure(model, toy.batch(mt.tasks))
    generator, waited = torch.Generator().manual_seed(refresh_every), dict.fromkeys(mt.tasks, 0)
    for _ in range(40):
        # Gradients that conflict, each step others.
        signs = torch.randn(4, generator=generator, dtype=torch.float64)
        common = 100 * model.trunk[0].bias

        def losses(tasks: tuple[str, ...], signs: Tensor = signs, common: Tensor = common) -> dict[str, Tensor]:
            own = inner(tasks)
            return {t: own[t] + signs[mt.tasks.index(t)] * common.sum() for t in tasks}

        active = mt.step(losses).records["active"]
        waited = {task: 0 if task in active else steps + 1 for task, steps in waited.items()}
        assert max(waited.values()) < 4


def test_son_goku_resumes_bit_for_bit() -> None:
    def run(model: torch.nn.Module, mt: torchmto.MultiTask, steps: range) -> None:
        for step in steps:
            mt.step(toy.closure(model, toy.batch(mt.tasks, seed=step)))

    model, _, mt = toy.make(torchmto.make_method("son_goku", refresh_every=2))
    run(model, mt, range(3))
    saved = copy.deepcopy((model.state_dict(), mt.state_dict()))
    run(model, mt, range(3, 7))
    again, _, resumed = toy.make(torchmto.make_method("son_goku", refresh_every=2))
    again.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    run(again, resumed, range(3, 7))
    assert torch.equal(toy.flat(model), toy.flat(again))
    assert toy.same(mt.state_dict(), resumed.state_dict())
