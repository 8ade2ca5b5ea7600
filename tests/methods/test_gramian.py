"""The Gramian methods: reference numbers, what the literature claims of each, state across steps, missing tasks."""

import copy
import inspect
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
from shared_data import golden
from torchmto.methods import GramianWeighting, method_class

DETERMINISTIC: list[tuple[str, dict[str, Any]]] = [
    ("mgda", {}),
    ("mgda", {"normalize": "l2"}),
    ("pcgrad", {"shuffle": False}),
    ("gradvac", {"shuffle": False}),
    ("cagrad", {}),
    ("cagrad", {"c": 1.5, "scale": "sum", "rescale": True}),
    ("imtl_g", {}),
    ("nash_mtl", {}),
    ("nash_mtl", {"max_norm": 0.0}),
    ("aligned_mtl", {}),
    ("aligned_mtl", {"scale_mode": "rmse"}),
    ("upgrad", {}),
    ("dualproj", {}),
    ("fairgrad", {}),
    ("pivrg", {}),
    ("pcd", {}),
    ("config", {}),
    ("krum", {}),
    ("sdmgrad", {}),
    ("modo", {}),
    ("cr_mogm", {}),
]
ALL = [*DETERMINISTIC, ("random", {}), ("constant", {"weights": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]})]


def made(name: str, **hyperparameters: Any) -> GramianWeighting:
    method = torchmto.make_method(name, **hyperparameters)
    assert isinstance(method, GramianWeighting)
    return method


def matrix(seed: int, num_tasks: int, width: int = 8) -> Tensor:
    """Random rows whose mean isn't 0, so that some conflict and some don't."""
    generator = torch.Generator().manual_seed(seed)
    lengths = 10 ** torch.empty(num_tasks, 1, dtype=torch.float64).uniform_(-1, 1, generator=generator)
    return torch.randn(num_tasks, width, generator=generator, dtype=torch.float64) * lengths


def update(method: GramianWeighting, J: Tensor, **arguments: Any) -> Tensor:
    return method.weights(J @ J.T, **arguments) @ J


seeds = st.integers(0, 10**6)
sizes = st.integers(2, 5)
few = settings(max_examples=15)

# ---------------------------------------------------------------------- reference numbers

PLAIN = ("random", "conflicting", "aligned")
FULL_RANK = (*PLAIN, "norms")
ANY = (*FULL_RANK, "rank_deficient", "zero_row")
# Row of the reference numbers, our method under its convention, relative tolerance, kinds of matrices on which the row is
# accurate (the public solvers lose digits, most of all where norms span orders of magnitude), largest K.
ROWS: list[tuple[str, str, dict[str, Any], float, tuple[str, ...], int]] = [
    ("exact.MGDA", "mgda", {}, 1e-8, ANY, 8),
    ("exact.UPGrad", "upgrad", {}, 1e-8, ANY, 8),
    ("exact.DualProj", "dualproj", {}, 1e-8, ANY, 8),
    ("exact.Nash/FairGrad1 (G a = 1/a)", "nash_mtl", {"max_norm": 0.0}, 1e-8, FULL_RANK, 5),
    ("exact.Nash/FairGrad1 (G a = 1/a)", "fairgrad", {"alpha": 1.0}, 1e-8, FULL_RANK, 5),
    ("LibMTL.PCGrad[identity order]", "pcgrad", {"shuffle": False}, 1e-6, PLAIN, 8),
    ("TorchJD.PCGrad[identity order]", "pcgrad", {"shuffle": False}, 1e-8, ANY, 8),
    ("LibMTL.MGDA[l2]", "mgda", {"normalize": "l2", "normalize_update": True}, 1e-4, PLAIN, 3),
    ("LibMTL.CAGrad[calpha=0.5,rescale=0]", "cagrad", {}, 2e-3, PLAIN, 8),
    ("LibMTL.CAGrad[calpha=0.5,rescale=1]", "cagrad", {"rescale": True}, 2e-3, PLAIN, 8),
    ("TorchJD.CAGrad[c=0.5]", "cagrad", {}, 1e-4, PLAIN, 8),
    ("LibMTL.Aligned_MTL", "aligned_mtl", {}, 1e-7, PLAIN, 8),
    ("TorchJD.AlignedMTL[min]", "aligned_mtl", {"scale": "mean"}, 1e-8, PLAIN, 8),
    ("TorchJD.AlignedMTL[median]", "aligned_mtl", {"scale": "mean", "scale_mode": "median"}, 1e-8, PLAIN, 8),
    ("TorchJD.AlignedMTL[rmse]", "aligned_mtl", {"scale": "mean", "scale_mode": "rmse"}, 1e-8, PLAIN, 8),
    ("LibMTL.Nash_MTL[niter=20,max_norm=1]", "nash_mtl", {}, 2e-6, PLAIN, 5),
    ("TorchJD.NashMTL[niter=20,max_norm=1]", "nash_mtl", {}, 2e-6, PLAIN, 5),
    ("LibMTL.IMTL", "imtl_g", {}, 1e-8, PLAIN, 5),
    ("TorchJD.IMTLG", "imtl_g", {}, 1e-8, FULL_RANK, 5),
    ("LibMTL.FairGrad[alpha=2]", "fairgrad", {}, 1e-6, PLAIN, 5),
    ("TorchJD.FairGrad[alpha=2]", "fairgrad", {}, 1e-6, PLAIN, 5),
    ("TorchJD.ConFIG", "config", {}, 1e-8, ANY, 8),
    ("TorchJD.GradVac[beta=.5,identity order,call 1]", "gradvac", {"beta": 0.5, "shuffle": False}, 1e-5, PLAIN, 8),
    ("TorchJD.GradVac[beta=.5,identity order,call 3]", "gradvac", {"beta": 0.5, "shuffle": False}, 1e-5, PLAIN, 8),
]


@pytest.mark.parametrize("entry", ROWS, ids=lambda entry: f"{entry[1]} = {entry[0]}")
def test_reference_numbers(entry: tuple[str, str, dict[str, Any], float, tuple[str, ...], int]) -> None:
    row, name, options, tolerance, kinds, largest = entry
    warnings.simplefilter("ignore")
    compared = 0
    for case in golden("gradient_matrices")["cases"]:
        if case["kind"] not in kinds or case["K"] > largest:
            continue
        J = torch.tensor(case["J"], dtype=torch.float64)
        expected = torch.tensor(case["results"][row]["vector"], dtype=torch.float64)
        method = made(name, **options)
        for _ in range(3 if "call 3" in row else 1):
            found = update(method, J)
        rounding = 1e-13 * J.norm(dim=1).max()
        assert (found - expected).norm() <= tolerance * expected.norm() + rounding, case["name"]
        compared += 1
    assert compared >= 6


def test_cagrad_conventions() -> None:
    J = torch.tensor([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]], dtype=torch.float64)
    mean = torch.tensor([0.1835, 1.2041, 1.2041], dtype=torch.float64)
    assert torch.allclose(update(made("cagrad"), J), mean, atol=1e-4)
    assert torch.allclose(update(made("cagrad", rescale=True), J), mean / 1.25, atol=1e-4)
    assert torch.allclose(update(made("cagrad", rescale=True, scale="sum"), J), mean / 1.25 * 2, atol=2e-4)


# ---------------------------------------------------------------------- what holds for all


@pytest.mark.parametrize(("name", "options"), ALL)
def test_dtype_shape_and_finite_weights(name: str, options: dict[str, Any]) -> None:
    for J in (matrix(0, 3), torch.zeros(3, 4), torch.ones(3, 4), torch.diag(torch.tensor([0.0, 1.0, 1e6]))):
        gramian = (J @ J.T).float()
        weights = made(name, **options).weights(gramian, torch.ones(3))
        assert weights.shape == (3,)
        assert weights.dtype == torch.float32
        assert weights.isfinite().all()


@pytest.mark.parametrize(("name", "options"), ALL)
def test_one_task(name: str, options: dict[str, Any]) -> None:
    for square in (1e-12, 7.0, 1e12):
        weights = made(name, **options).weights(torch.tensor([[square]], dtype=torch.float64))
        if torchmto.make_method(name, **options).properties.identity:
            assert weights.item() == 1.0


@pytest.mark.parametrize(("name", "options"), DETERMINISTIC)
@given(seed=seeds, size=sizes, power=st.sampled_from([-8, -3, 3, 8]))
@settings(max_examples=6)
def test_homogeneity(name: str, options: dict[str, Any], seed: int, size: int, power: int) -> None:
    degree = made(name, **options).properties.homogeneity
    if degree is None or (name == "nash_mtl" and options):
        return
    J, scale = matrix(seed, size), 10.0**power
    expected = update(made(name, **options), J) * scale**degree
    found = update(made(name, **options), J * scale)
    assert (found - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize(("name", "options"), DETERMINISTIC)
@given(seed=seeds, size=sizes)
@settings(max_examples=6)
def test_equivariance(name: str, options: dict[str, Any], seed: int, size: int) -> None:
    if not made(name, **options).properties.equivariant:
        return
    J = matrix(seed, size)
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    weights = made(name, **options).weights(J @ J.T)
    permuted = made(name, **options).weights(J[order] @ J[order].T)
    assert torch.allclose(permuted @ J[order], weights @ J, rtol=1e-6, atol=1e-8 * float(J.norm()))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("mgda", {}),
        ("cagrad", {"c": 1.0}),
        ("upgrad", {}),
        ("dualproj", {"preference": [1.0, 2.0, 0.5, 0.1, 3.0]}),
        ("nash_mtl", {}),
        ("fairgrad", {}),
        ("fairgrad", {"alpha": 0.5}),
        ("pivrg", {}),
    ],
)
@given(seed=seeds, size=sizes, spread=st.sampled_from([0, 3]))
@few
def test_nonconflicting(name: str, options: dict[str, Any], seed: int, size: int, spread: int) -> None:
    J = matrix(seed, size) * 10 ** torch.linspace(-spread, spread, size, dtype=torch.float64).unsqueeze(1)
    d = update(made(name, **options), J)
    assert (J @ d >= -1e-7 * J.norm(dim=1) * d.norm()).all()


def test_declared_nonconflicting_are_the_ones_tested() -> None:
    declared = {name for name, options in ALL if made(name, **options).properties.nonconflicting}
    assert declared == {"mgda", "upgrad", "dualproj", "nash_mtl", "fairgrad", "pivrg"}


# ---------------------------------------------------------------------- claims of each method


@given(seed=seeds, size=sizes)
@few
def test_mgda_is_the_shortest_of_the_hull(seed: int, size: int) -> None:
    J = matrix(seed, size)
    method = made("mgda")
    weights = method.weights(J @ J.T)
    d = weights @ J
    assert weights.min() >= 0
    assert weights.sum().item() == pytest.approx(1)
    assert (J @ d >= d.square().sum() - 1e-8 * J.norm(dim=1) * d.norm()).all()


@pytest.mark.parametrize("normalize", ["l2", "loss", "loss+"])
def test_mgda_normalisations(normalize: str) -> None:
    J, losses = matrix(3, 3), torch.tensor([0.5, 2.0, 7.0], dtype=torch.float64)
    norms = J.norm(dim=1)
    sizes = {"l2": norms, "loss": losses, "loss+": losses * norms}[normalize]
    scaled = J / sizes.unsqueeze(1)
    expected = made("mgda").weights(scaled @ scaled.T)
    assert torch.allclose(made("mgda", normalize=normalize).weights(J @ J.T, losses), expected)
    normalised = made("mgda", normalize=normalize, normalize_update=True).weights(J @ J.T, losses)
    assert torch.allclose(normalised @ J, expected @ scaled)
    zero = made("mgda", normalize=normalize).weights(torch.zeros(2, 2), torch.zeros(2))
    assert torch.allclose(zero, torch.tensor([0.5, 0.5]))


def test_mgda_needs_losses_to_normalise_by() -> None:
    with pytest.raises(ValueError, match=r"needs the losses. Found `losses = None`"):
        made("mgda", normalize="loss").weights(torch.eye(2))
    with pytest.raises(ValueError, match=r"needs non-negative losses. That of task `0` is -1"):
        made("mgda", normalize="loss+").weights(torch.eye(2), torch.tensor([-1.0, 1.0]))


@given(seed=seeds, size=sizes)
@few
def test_cagrad_stays_in_the_ball_and_serves_the_worst_off(seed: int, size: int) -> None:
    J, c = matrix(seed, size), 0.5
    d, mean = update(made("cagrad", c=c), J), J.mean(0)
    assert (d - mean).norm() <= c * mean.norm() * (1 + 1e-8)
    generator = torch.Generator().manual_seed(seed)
    other = torch.randn(64, J.shape[1], generator=generator, dtype=torch.float64)
    other = mean + other / other.norm(dim=1, keepdim=True) * c * mean.norm()
    assert (J @ d).min() >= (other @ J.T).min(dim=1).values.max() - 1e-8 * J.norm() * mean.norm()
    assert torch.allclose(update(made("cagrad", c=0.0), J), mean)


@given(seed=seeds, size=sizes)
@few
def test_equal_projections(seed: int, size: int) -> None:
    J = matrix(seed, size)
    unit = J / J.norm(dim=1, keepdim=True)
    imtl, conf = update(made("imtl_g"), J), update(made("config"), J)
    for d in (imtl, conf):
        projections = unit @ d
        assert torch.allclose(projections, projections.mean().expand(size), rtol=1e-5, atol=1e-9 * float(d.norm()))
    assert made("imtl_g").weights(J @ J.T).sum().item() == pytest.approx(1)
    assert conf.norm().item() == pytest.approx(float((J @ conf).sum() / conf.norm()))


@given(seed=seeds, size=sizes, alpha=st.sampled_from([0.5, 1.0, 2.0, 5.0]))
@few
def test_fair_shares(seed: int, size: int, alpha: float) -> None:
    J = matrix(seed, size)
    gramian = J @ J.T
    weights = made("fairgrad", alpha=alpha).weights(gramian)
    assert (weights > 0).all()
    assert torch.allclose(gramian @ weights, weights ** (-1 / alpha), rtol=1e-6)


@given(seed=seeds, size=sizes)
@few
def test_nash_condition_and_bound(seed: int, size: int) -> None:
    J = matrix(seed, size)
    free = made("nash_mtl", max_norm=0.0).weights(J @ J.T)
    assert torch.allclose(J @ J.T @ free, 1 / free, rtol=1e-6)
    assert (free @ J).norm().item() == pytest.approx(size**0.5)
    assert update(made("nash_mtl"), J).norm().item() == pytest.approx(1)
    assert torch.allclose(update(made("nash_mtl", max_norm=100.0), J), free @ J)


@given(seed=seeds, size=sizes)
@few
def test_aligned_gradients_are_orthogonal_and_equally_long(seed: int, size: int) -> None:
    J = matrix(seed, size)
    preferences = torch.eye(size, dtype=torch.float64)
    aligned = torch.stack([update(made("aligned_mtl", preference=row.tolist()), J) for row in preferences])
    smallest = torch.linalg.svdvals(J)[-1]
    assert torch.allclose(aligned @ aligned.T, preferences * smallest**2, rtol=1e-6, atol=1e-8 * float(smallest) ** 2)


@given(seed=seeds, size=sizes)
@few
def test_upgrad_projects_every_gradient_by_itself(seed: int, size: int) -> None:
    J = matrix(seed, size)
    single = [update(made("dualproj", preference=row.tolist()), J) for row in torch.eye(size)]
    assert torch.allclose(
        update(made("upgrad"), J), torch.stack(single).mean(0), rtol=1e-7, atol=1e-9 * float(J.norm())
    )
    assert torch.allclose(update(made("upgrad", scale="sum"), J), update(made("upgrad"), J) * size)


def test_preferences_of_absent_tasks_are_shared_out() -> None:
    method = made("dualproj", preference=[1.0, 1.0, 2.0])
    weights = method.weights(torch.eye(2), indices=(0, 2))
    assert torch.allclose(weights, torch.tensor([4 / 3, 8 / 3]))
    assert made("upgrad").weights(torch.eye(2), indices=(0, 2)).tolist() == [0.5, 0.5]
    with pytest.raises(ValueError, match="exactly the tasks"):
        torchmto.MultiTask(
            *toy.make(tasks=("a", "b"))[:2], tasks=("a", "b"), method=made("upgrad", preference={"a": 1.0})
        )


def test_krum_ignores_the_outlier() -> None:
    J = torch.tensor([[1.0, 0.0], [1.1, 0.0], [0.9, 0.1], [-50.0, 9.0]])
    assert made("krum", num_selected=3).weights(J @ J.T)[3] == 0


def test_random_weights_come_from_the_generator() -> None:
    method, again = made("random"), made("random", scale="mean")
    first = method.weights(torch.eye(3))
    assert first.sum().item() == pytest.approx(3)
    assert torch.allclose(again.weights(torch.eye(3)) * 3, first)
    assert not torch.equal(method.weights(torch.eye(3)), first)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_orders_are_drawn_alike_whatever_the_default_type(dtype: torch.dtype) -> None:
    expected = torchmto.make_method("pcgrad").weights(-torch.ones(5, 5) + 6 * torch.eye(5))
    torch.set_default_dtype(dtype)
    try:
        found = torchmto.make_method("pcgrad").weights((-torch.ones(5, 5) + 6 * torch.eye(5)).float())
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, expected)


def test_constant() -> None:
    method = made("constant", weights={"a": 1.0, "b": 2.0, "c": 0.0})
    method.bind(("c", "b", "a"))
    assert method.weights(torch.eye(2), indices=(0, 1)).tolist() == [0.0, 2.0]
    with pytest.raises(TypeError, match="weights"):
        torchmto.make_method("constant")
    with pytest.raises(ValueError, match="at least 3 floats"):
        made("constant", weights=[1.0, 2.0]).weights(torch.eye(3))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mgda", {"normalize": "max"}, "one of 'none', 'l2', 'loss', 'loss\\+'"),
        ("gradvac", {"beta": 2.0}, "Parameter `beta` should be a float >= 0 and <= 1"),
        ("cagrad", {"c": 10**400}, "Parameter `c` should be a non-negative float. Found `c = 1000"),
        ("cagrad", {"c": -5.0}, "Parameter `c` should be a non-negative float. Found `c = -5.0`"),
        ("cagrad", {"scale": "median"}, "one of 'mean', 'sum'"),
        ("nash_mtl", {"max_norm": -1.0}, "max_norm"),
        ("nash_mtl", {"update_every": 2, "refresh_every": 3}, "mean the same"),
        ("aligned_mtl", {"scale_mode": "max"}, "one of 'min', 'median', 'rmse'"),
        ("upgrad", {"preference": [1.0, -1.0]}, r"Parameter `preference\[1\]` should be a non-negative float"),
        ("fairgrad", {"alpha": 0.0}, "alpha"),
        ("sdmgrad", {"momentum": 1.0}, "momentum"),
        ("modo", {"gamma": 0.0}, "gamma"),
        ("cr_mogm", {"alpha": 1.0}, "alpha"),
        ("krum", {"num_selected": 0}, "num_selected"),
    ],
)
def test_options_are_checked(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        torchmto.make_method(name, **options)


FLAGS = [
    ("cagrad", "rescale"),
    ("mgda", "normalize_update"),
    ("pcgrad", "shuffle"),
    ("gradvac", "shuffle"),
    ("adatask", "adam_heads"),
    ("sequential", "shuffle"),
    ("connection_strength", "shuffle"),
    ("connection_strength", "record_layers"),
    ("f_mtl", "adaptive"),
    ("f_mtl", "apart"),
    ("samo", "adaptive"),
    ("task_groups", "measure_last"),
    ("task_groups", "noise_floor"),
]


@pytest.mark.parametrize(("name", "flag"), FLAGS)
def test_flags_are_true_or_false(name: str, flag: str) -> None:
    for value in (True, False):
        assert getattr(torchmto.make_method(name, **{flag: value}), flag) is value
    for wrong in ("false", 1, None):
        with pytest.raises(TypeError, match=f"Parameter `{flag}` should be True or False. Found `{flag} = {wrong!r}`"):
            torchmto.make_method(name, **{flag: wrong})


def test_every_flag_of_a_method_is_in_the_table() -> None:
    found = {
        (name, parameter.name)
        for name in torchmto.methods()
        for parameter in inspect.signature(method_class(name)).parameters.values()
        if isinstance(parameter.default, bool) and parameter.name != "higher_is_better"
    }
    assert found == set(FLAGS)


def test_numpy_numbers_are_numbers() -> None:
    assert made("pcgrad", refresh_every=np.int64(3)).refresh_every == 3
    assert torchmto.make_method("connection_strength", total_steps=np.int32(10)).total_steps == 10
    assert torchmto.make_method("famo", min_losses=np.float32(0.5)).lower_bounds([0]).item() == pytest.approx(0.5)
    toy.make(made("pcd", primary=np.int64(1)))
    with pytest.raises(TypeError, match="an int >= 1"):
        made("pcgrad", refresh_every=np.float64(2.0))


def test_wrong_types_are_named() -> None:
    with pytest.raises(TypeError, match="a Gramian method"):
        torchmto.make_method("cr_mogm", method="gd")
    with pytest.raises(TypeError, match="Parameter `preference` should be a mapping"):
        torchmto.make_method("upgrad", preference=1.0)
    with pytest.raises(TypeError, match="no hyper-parameter"):
        torchmto.make_method("cagrad", gamma=1.0)


# ---------------------------------------------------------------------- state across steps


def test_gradvac_targets() -> None:
    method = made("gradvac", beta=0.25, shuffle=False)
    gramian = torch.tensor([[1.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
    assert method.weights(gramian).tolist() == [1.0, 1.0]
    assert method.targets[0, 1].item() == pytest.approx(0.125)
    # A cosine of 0 is now below the target 0.125: each gradient is turned by t / sqrt(1 - t^2) of the other.
    turned = method.weights(torch.eye(2, dtype=torch.float64))
    assert turned[0].item() == pytest.approx(1 + 0.125 / (1 - 0.125**2) ** 0.5)
    assert method.targets[1, 0].item() == pytest.approx(0.75 * 0.125)


def test_gradvac_leaves_absent_tasks_alone() -> None:
    method = made("gradvac", beta=0.5)
    method.weights(torch.ones(3, 3))
    before = method.targets.clone()
    method.weights(torch.tensor([[1.0, -0.5], [-0.5, 1.0]]), indices=(0, 2))
    changed = (method.targets != before).nonzero().tolist()
    assert changed == [[0, 2], [2, 0]]


def test_sdmgrad_by_hand() -> None:
    method = made("sdmgrad", lam=0.5, num_steps=1, lr=0.1, momentum=0.0)
    cross = torch.tensor([[1.0, 0.2], [0.4, 1.0]], dtype=torch.float64)
    first = method.weights(cross)
    direction = cross @ torch.tensor([0.75, 0.75], dtype=torch.float64)
    moved = torch.tensor([0.5, 0.5], dtype=torch.float64) - 0.1 * direction
    moved += (1 - moved.sum()) / 2
    assert torch.allclose(method.shares, moved)
    assert torch.allclose(first, (moved + 0.25) / 1.5)
    second = method.weights(cross)
    assert not torch.equal(first, second), "the shares go on from step to step"


def test_modo_by_hand() -> None:
    method = made("modo", gamma=0.1, rho=1.0)
    gramian = torch.diag(torch.tensor([1.0, 3.0], dtype=torch.float64))
    assert method.weights(gramian).tolist() == pytest.approx([0.55, 0.45])
    moved = [0.55 - 0.1 * 0.55 * 2, 0.45 - 0.1 * 0.45 * 4]
    gap = (1 - sum(moved)) / 2
    assert method.weights(gramian).tolist() == pytest.approx([value + gap for value in moved])


@pytest.mark.parametrize("name", ["sdmgrad", "modo"])
def test_shares_of_absent_tasks(name: str) -> None:
    method = made(name)
    method.ensure_setup(3)
    weights = method.weights(torch.diag(torch.tensor([1.0, 100.0])), indices=(0, 2))
    assert weights.sum().item() == pytest.approx(1)
    assert method.shares[1].item() == pytest.approx(1 / 3)
    assert method.shares.sum().item() == pytest.approx(1)


def test_cr_mogm_smooths_any_weighting() -> None:
    first, second = torch.diag(torch.tensor([1.0, 3.0])), torch.diag(torch.tensor([3.0, 1.0]))
    method = made("cr_mogm", method="mgda", alpha=0.8)
    assert method.weights(first).tolist() == pytest.approx([0.8 * 0.5 + 0.2 * 0.75, 0.8 * 0.5 + 0.2 * 0.25])
    before = method.smoothed.clone()
    expected = 0.8 * before + 0.2 * torch.tensor([0.25, 0.75])
    assert torch.allclose(method.weights(second).double(), expected)
    method.weights(torch.eye(1), indices=(1,))
    assert method.smoothed[0].item() == pytest.approx(float(expected[0]))
    plain = made("cr_mogm", method=made("pcgrad", shuffle=False), alpha=0.0)
    assert torch.equal(plain.weights(first), made("pcgrad", shuffle=False).weights(first))


@pytest.mark.parametrize("heads", ["unit", "weighted"])
@pytest.mark.parametrize(
    ("name", "options", "bound"),
    [
        ("nash_mtl", {"max_norm": 0.7}, 0.7),
        ("fairgrad", {"scale": "released"}, 1.0),
        ("pivrg", {"scale": "released"}, 1.0),
    ],
)
def test_cr_mogm_smooths_what_its_method_would_clip_and_clips_that(
    name: str, options: dict[str, Any], bound: float, heads: str
) -> None:
    """The bound holds for the update, also where gradients grow and weights are reused; the mean is of weights without it."""
    G = [torch.diag(torch.tensor([c, 4 * c], dtype=torch.float64)) for c in (1.0, 1e4)]
    free = {"nash_mtl": made("nash_mtl", max_norm=0.0)}.get(name, made("fairgrad", alpha=2.0))
    times = 1 if name == "nash_mtl" else 2
    first, second = (times * free.weights(gramian) for gramian in G)
    method = made("cr_mogm", method=made(name, **options), alpha=0.5)
    method.weights(G[0])
    mean = 0.5 * (0.5 * (first + first.mean())) + 0.5 * second
    weights = method.weights(G[1])
    torch.testing.assert_close(weights / weights.sum(), mean / mean.sum())
    torch.testing.assert_close((weights @ G[1] @ weights).sqrt().item(), bound)

    method = made("cr_mogm", method=made(name, **options), refresh_every=2, heads=heads)
    model, optimizer, mt = toy.make(method)
    optimizer.param_groups[0]["lr"] = 0.0
    for step in range(4):
        losses = toy.closure(model, toy.batch(mt.tasks, seed=step))
        info = mt.step(lambda tasks, by=10.0**step, given=losses: {t: by * x for t, x in given(tasks).items()})
        assert toy.flat_grad(model.trunk.parameters()).norm().item() == pytest.approx(bound)
        assert (info.gramian is None) == bool(step % 2)


def test_cr_mogm_shows_its_method_the_network() -> None:
    def inside(layer: str) -> torchmto.Method:
        return made("cr_mogm", method=made("gradnorm", layer=layer), alpha=0.0)

    model, _, mt = toy.make(inside("trunk.0"))
    twin, _, alone = toy.make(made("gradnorm", layer="trunk.0"))
    for seed in (1, 2):
        data = toy.batch(mt.tasks, seed=seed)
        assert mt.step(toy.closure(model, data)).weights == alone.step(toy.closure(twin, data)).weights
    with pytest.raises(ValueError, match="the path of a module"):
        toy.make(inside("no.such.module"))


def test_cr_mogm_counts_the_fallbacks_of_its_method() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        method = made("cr_mogm", method="nash_mtl")
        method.weights(torch.tensor([[1.0, -1.0], [-1.0, 1.0]]))
    assert method.num_fallbacks == 1


# ---------------------------------------------------------------------- steps of a model


def independent(model: torch.nn.Module, tasks: tuple[str, ...], seed: int) -> Any:
    return toy.closure(model, toy.batch(tasks, seed=seed))


@pytest.mark.parametrize(("name", "options"), [(n, o) for n, o in ALL if n != "constant" and "preference" not in o])
def test_a_step_reports_its_weights(name: str, options: dict[str, Any]) -> None:
    model, _, mt = toy.make(torchmto.make_method(name, **options))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        info = mt.step(independent(model, mt.tasks, 1))
    assert info.weights is not None
    assert list(info.weights) == ["a", "b", "c"]
    assert (info.num_forward, info.num_backward, info.num_optimizer_steps) == (1, 3, 1)
    assert info.cosines is not None


@pytest.mark.parametrize("name", ["sdmgrad", "modo"])
@pytest.mark.parametrize("extra", [1, 2])
def test_independent_batches(name: str, extra: int) -> None:
    tasks = ("a", "b")
    options: dict[str, Any] = {"gamma": 0.1} if name == "modo" else {"lr": 0.1}
    model, _, mt = toy.make(torchmto.make_method(name, **options), tasks)
    batches = [toy.batch(tasks, seed=seed) for seed in (1, 2, 3)]
    shared = list(model.trunk.parameters())
    rows = []
    for batch in batches:
        losses = toy.closure(model, batch)(tasks)
        gradients = [torch.autograd.grad(loss, shared, retain_graph=True) for loss in losses.values()]
        rows.append(torch.stack([torch.cat([g.flatten() for g in entry]) for entry in gradients]))
    before = toy.flat(model.trunk)
    closures = [toy.closure(model, batch) for batch in batches]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        info = mt.step(closures[0], independent=closures[1 : 1 + extra])
    cross = rows[0] @ rows[1].T if extra == 1 else rows[1] @ rows[2].T
    weights = made(name, **options).weights(cross)
    assert info.weights is not None
    assert list(info.weights.values()) == pytest.approx(weights.tolist())
    assert torch.allclose(toy.flat(model.trunk), before - 0.05 * weights @ rows[0])
    assert (info.num_forward, info.num_backward, info.num_optimizer_steps) == (1 + extra, 2 * (1 + extra), 1)


@pytest.mark.parametrize("name", ["sdmgrad", "modo"])
def test_without_independent_batches_one_warning(name: str) -> None:
    model, _, mt = toy.make(name)
    with pytest.warns(UserWarning, match="independent mini-batches"):
        mt.step(independent(model, mt.tasks, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mt.step(independent(model, mt.tasks, 2))


def test_cr_mogm_uses_independent_batches_too() -> None:
    model, _, mt = toy.make(torchmto.make_method("cr_mogm", method="modo"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        info = mt.step(independent(model, mt.tasks, 1), independent=[independent(model, mt.tasks, s) for s in (2, 3)])
    assert info.num_backward == 9


STATEFUL: list[tuple[str, dict[str, Any]]] = [
    ("gradvac", {"beta": 0.3}),
    ("sdmgrad", {}),
    ("modo", {"gamma": 0.1}),
    ("cr_mogm", {"method": "gradvac"}),
    ("random", {}),
    ("nash_mtl", {"update_every": 3}),
]


@pytest.mark.parametrize(("name", "options"), STATEFUL)
def test_resume_bit_for_bit_with_missing_tasks(name: str, options: dict[str, Any]) -> None:
    def run(model: torch.nn.Module, mt: torchmto.MultiTask, steps: range) -> None:
        for step in steps:
            only = ("a", "b", "c") if step % 3 else ("a", "c")
            mt.step(toy.closure(model, toy.batch(mt.tasks, seed=step), only=only))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, _, mt = toy.make(torchmto.make_method(name, **options))
        run(model, mt, range(1, 4))
        saved = copy.deepcopy((model.state_dict(), mt.state_dict()))
        run(model, mt, range(4, 7))
        again, _, resumed = toy.make(torchmto.make_method(name, **options), seed=99)
        again.load_state_dict(saved[0])
        resumed.load_state_dict(saved[1])
        run(again, resumed, range(4, 7))
    assert torch.equal(toy.flat(model), toy.flat(again))
    assert toy.same(mt.state_dict(), resumed.state_dict())


def test_nash_mtl_update_every_saves_backwards() -> None:
    model, _, mt = toy.make(torchmto.make_method("nash_mtl", update_every=3))
    counts = [mt.step(independent(model, mt.tasks, seed)).num_backward for seed in range(1, 7)]
    assert counts == [3, 1, 1, 3, 1, 1]


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("heads", ["unit", "weighted"])
@pytest.mark.parametrize("max_norm", [0.0, 1.0, 1.5])
def test_nash_mtl_bounds_steps_that_reuse_its_weights(max_norm: float, heads: str, scaled: bool) -> None:
    """The bargain is kept, not the clipping: long gradients are clipped anew, short ones aren't shortened."""
    tasks = ("a", "b", "c")
    J = matrix(5, 3)
    free = made("nash_mtl", max_norm=0.0).weights(J @ J.T)
    trunk = torch.nn.Parameter(torch.zeros(8, dtype=torch.float64))
    own = torch.nn.ParameterDict({task: torch.nn.Parameter(torch.zeros(2, dtype=torch.float64)) for task in tasks})
    model = torch.nn.ParameterList([trunk, *own.values()])
    method = made("nash_mtl", max_norm=max_norm, update_every=9, heads=heads)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0) if scaled else None
    mt = torchmto.MultiTask(
        model, torch.optim.SGD(model.parameters(), lr=0.0), tasks=tasks, method=method, scaler=scaler
    )
    for step, size in enumerate((1.0, 100.0, 0.5, 1e-3, 3.0, 0.0)):
        halves = [
            lambda asked, size=size, half=half: {
                task: 1 + size * half * (J[tasks.index(task)] @ trunk + own[task].sum()) for task in asked
            }
            for half in (0.5, 1.5)
        ]
        info = mt.step(halves)
        assert info.num_backward == (2 if step else 6)
        norm = float((free @ J).norm()) * size
        factor = min(1.0, max_norm / norm) if max_norm and norm else 1.0
        assert trunk.grad is not None
        assert torch.allclose(trunk.grad, size * factor * (free @ J), rtol=1e-6)
        assert info.weights is not None
        assert list(info.weights.values()) == pytest.approx((factor * free).tolist())
        for task, weight in info.weights.items():
            expected = size * (weight if heads == "weighted" else 1.0)
            assert own[task].grad.tolist() == pytest.approx([expected] * 2)


@pytest.mark.parametrize("name", ["mgda", "cagrad", "nash_mtl", "fairgrad", "config", "upgrad", "imtl_g"])
def test_converges_to_the_pareto_set(name: str) -> None:
    """Two bowls around points p and q: the Pareto set is the segment between them."""
    p, q = torch.tensor([0.0, 0.0], dtype=torch.float64), torch.tensor([2.0, 1.0], dtype=torch.float64)
    x = torch.tensor([0.5, 3.0], dtype=torch.float64)
    method = made(name)
    rate = 0.05 if method.properties.homogeneity == 1 else 0.3
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step in range(300):
            J = torch.stack([2 * (x - p), 6 * (x - q)])
            x = x - rate / (1 + step / 10) * update(method, J)
    along = ((x - p) @ (q - p) / (q - p).square().sum()).clamp(0, 1)
    assert (x - p - along * (q - p)).norm() < 0.05
