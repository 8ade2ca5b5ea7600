"""Every loss equals its plain numpy definition over the labelled entries, and never looks at the others."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchmto.lab import losses
from torchmto.lab.data.base import KINDS, Task
from torchmto.lab.losses import task_loss

SIZE = (3, 4, 5)  # B, H, W


def task_of(kind):
    channels = {"classification": 4, "segmentation": 4, "binary": 2, "regression": 2, "normals": 3, "map": 2}
    return Task("t", kind, channels.get(kind, 1))


def sample(kind, seed=0, missing=0.3):
    """A prediction, a target with missing entries, and the mask of entries that are there."""
    rng = torch.Generator().manual_seed(seed)
    batch, height, width = SIZE
    task = task_of(kind)
    shape = (batch, task.channels, height, width) if task.dense else (batch, task.channels)
    prediction = torch.randn(shape, generator=rng, dtype=torch.float64)
    label_shape = (batch, *shape[2:]) if kind in {"classification", "segmentation"} else shape
    match kind:
        case "classification" | "segmentation":
            target = torch.randint(task.channels, label_shape, generator=rng)
        case "binary" | "edges" | "saliency":
            target = torch.randint(2, label_shape, generator=rng).double()
        case "depth":
            target = torch.rand(label_shape, generator=rng, dtype=torch.float64) + 0.5
        case "normals":
            target = torch.nn.functional.normalize(torch.randn(label_shape, generator=rng, dtype=torch.float64), dim=1)
        case _:
            target = torch.randn(label_shape, generator=rng, dtype=torch.float64)
    drop_shape = (batch, 1, height, width) if kind == "normals" else label_shape
    drop = torch.rand(drop_shape, generator=rng) < missing
    return prediction, torch.where(drop, torch.tensor(task.missing, dtype=target.dtype), target), ~drop


def softmax_ce(prediction, target, valid):
    logits = np.moveaxis(prediction, 1, -1).reshape(-1, prediction.shape[1])
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    keep = valid.reshape(-1)
    return -log_p[np.flatnonzero(keep), target.reshape(-1)[keep]].mean()


def log_likelihood(prediction, target):
    p = 1 / (1 + np.exp(-prediction))
    return np.log(np.where(target == 1, p, 1 - p))


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def normals(difference):
    def reference(p, t, v):
        return difference(unit(p), t)[v[:, 0]].mean()

    return reference


def huber(p, t, v):
    error = np.abs(p - t)[v]
    return np.where(error <= 0.5, error**2 / 2, 0.5 * (error - 0.25)).mean()


REFERENCES = [
    ("classification", None, {}, softmax_ce),
    ("segmentation", None, {}, softmax_ce),
    ("binary", None, {}, lambda p, t, v: -log_likelihood(p, t)[v].mean()),
    ("regression", None, {}, lambda p, t, v: ((p - t)[v] ** 2).mean()),
    ("regression", "huber", {"delta": 0.5}, huber),
    ("regression", "l1", {}, lambda p, t, v: np.abs(p - t)[v].mean()),
    ("map", None, {}, lambda p, t, v: np.abs(p - t)[v].mean()),
    ("depth", None, {}, lambda p, t, v: np.abs(p - t)[v].mean()),
    ("normals", None, {}, normals(lambda p, t: np.abs(p - t).mean(1))),
    ("normals", "cosine", {}, normals(lambda p, t: 1 - (p * t).sum(1))),
    ("edges", None, {}, lambda p, t, v: -(np.where(t == 1, 0.95, 0.05) * log_likelihood(p, t))[v].mean()),
    ("edges", "binary_cross_entropy", {}, lambda p, t, v: -log_likelihood(p, t)[v].mean()),
    (
        "saliency",
        None,
        {},
        lambda p, t, v: -((1 - np.exp(log_likelihood(p, t))) ** 2 * log_likelihood(p, t))[v].mean(),
    ),
    (
        "saliency",
        "focal",
        {"alpha": 0.25, "gamma": 1.0},
        lambda p, t, v: (
            -(np.where(t == 1, 0.25, 0.75) * (1 - np.exp(log_likelihood(p, t))) * log_likelihood(p, t))[v].mean()
        ),
    ),
    (
        "saliency",
        "class_balanced",  # the released code's: the other class's share of the labels
        {},
        lambda p, t, v: -(np.where(t == 1, (t == 0)[v].mean(), (t == 1)[v].mean()) * log_likelihood(p, t))[v].mean(),
    ),
    ("saliency", "focal", {"gamma": 0.0}, lambda p, t, v: -log_likelihood(p, t)[v].mean()),
]


@pytest.mark.parametrize(("kind", "loss", "options", "reference"), REFERENCES)
def test_equals_definition(kind, loss, options, reference):
    prediction, target, valid = sample(kind)
    value, count = task_loss(task_of(kind), loss, **options)(prediction, target)
    assert float(value) == pytest.approx(reference(prediction.numpy(), target.numpy(), valid.numpy()), rel=1e-6)
    assert int(count) == int(valid.sum())


@pytest.mark.parametrize("kind", KINDS)
@given(seed=st.integers(0, 99), missing=st.floats(0.0, 0.9))
@settings(max_examples=8)
def test_missing_entries_have_no_influence(kind, seed, missing):
    prediction, target, valid = sample(kind, seed, missing)
    if not valid.any():
        return
    prediction.requires_grad_()
    loss = task_loss(task_of(kind))
    value, _ = loss(prediction, target)
    (gradient,) = torch.autograd.grad(value, prediction)
    assert torch.isfinite(gradient).all()
    spread = valid if valid.dim() == prediction.dim() else valid.unsqueeze(1)
    assert (gradient[~spread.expand_as(gradient)] == 0).all()
    moved = torch.where(spread, prediction, prediction + 3)
    assert torch.allclose(loss(moved, target)[0], value)


@pytest.mark.parametrize("kind", KINDS)
def test_counts_make_batches_add_up(kind):
    prediction, target, _ = sample(kind, seed=1)
    loss = task_loss(task_of(kind))
    whole, count = loss(prediction, target)
    parts = [loss(prediction[i : i + 1], target[i : i + 1]) for i in range(len(prediction))]
    parts = [part for part in parts if part is not None]
    assert sum(part[1] for part in parts) == count
    assert torch.allclose(sum(part[0] * part[1] for part in parts) / count, whole)


@pytest.mark.parametrize("kind", KINDS)
def test_no_label(kind):
    prediction, target, _ = sample(kind)
    task = task_of(kind)
    empty = torch.full_like(target, task.missing)
    assert task_loss(task)(prediction, empty) is None
    value, count = task_loss(task)(prediction.requires_grad_(), empty, labelled=True)
    assert (float(value), int(count)) == (0.0, 0)
    value.backward()
    assert (prediction.grad == 0).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_predictions(kind, dtype):
    prediction, target, _ = sample(kind)
    target = target if target.dtype == torch.int64 else target.float()
    value, _ = task_loss(task_of(kind))(prediction.to(dtype), target)
    assert value.dtype == torch.float32
    assert float(value) == pytest.approx(float(task_loss(task_of(kind))(prediction, target)[0]), rel=0.05)


def test_extreme_logits_stay_finite():
    logits = torch.tensor([[-200.0, 200.0]], requires_grad=True)
    value, _ = losses.focal(logits, torch.tensor([[1.0, 0.0]]), torch.ones(1, 2, dtype=torch.bool))
    value.backward()
    assert torch.isfinite(value)
    assert torch.isfinite(logits.grad).all()


def test_errors():
    with pytest.raises(ValueError, match=r"one of l1, mse, huber. Found `loss = 'cosine'`"):
        task_loss(task_of("depth"), "cosine")
    with pytest.raises(TypeError, match="delta"):
        task_loss(task_of("regression"), "huber", alpha=1)
    for kind, loss, option, values in (
        ("edges", "balanced_cross_entropy", "positive_weight", (95, 1, 0, -0.5)),
        ("binary", "focal", "gamma", (-2, float("nan"))),
        ("saliency", "focal", "alpha", (25, -1)),
        ("depth", "huber", "delta", (0, -1)),
        ("segmentation", "cross_entropy", "label_smoothing", (1.5, -0.5)),
    ):
        for value in values:
            with pytest.raises(ValueError, match=f"`{option}` should be a"):
                task_loss(task_of(kind), loss, **{option: value})
        with pytest.raises(TypeError, match=f"`{option}` should be a"):
            task_loss(task_of(kind), loss, **{option: "x"})
    assert task_loss(task_of("binary"), "focal", alpha=None, gamma=0)
    with pytest.raises(ValueError, match=r"shape \(3, 4\)"):
        task_loss(task_of("classification"))(torch.zeros(3, 5), torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match="task `t`"):
        task_loss(task_of("depth"))(torch.zeros(3, 4, 5), torch.ones(3, 1, 4, 5))
