"""Every metric equals a plain numpy definition over the whole data set, in batches and over processes."""

import math
import os
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import distributed, multiprocessing
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from torchmto.lab.data.base import KINDS, Task
from torchmto.lab.metrics import higher_is_better, primary_metric, task_metrics
from torchmto.lab.run.evaluation import Measures, merged_values, metric_states
from torchmto.lab.streaming import OdsF

BATCH, HEIGHT, WIDTH, CLASSES = 5, 12, 16, 4
CHANNELS = {
    "classification": CLASSES,
    "segmentation": CLASSES,
    "binary": 2,
    "regression": 3,
    "normals": 3,
    "map": 2,
}


def task_of(kind):
    return Task("t", kind, CHANNELS.get(kind, 1))


def sample(kind):
    """Predictions and targets with missing entries; class 3 is never labelled."""
    rng = torch.Generator().manual_seed(KINDS.index(kind))
    task = task_of(kind)
    pixels = (HEIGHT, WIDTH) if task.dense else ()
    batch = BATCH if task.dense else 40
    shape = (batch, task.channels, *pixels)
    label_shape = (batch, *pixels) if kind in {"classification", "segmentation"} else shape
    prediction = torch.randn(shape, generator=rng)
    match kind:
        case "classification" | "segmentation":
            target = torch.randint(CLASSES - 1, label_shape, generator=rng)
        case "binary" | "edges" | "saliency":
            target = (torch.rand(label_shape, generator=rng) < 0.1 + 0.2 * (kind != "edges")).float()
        case "depth":
            target = torch.rand(label_shape, generator=rng) + 0.5
            prediction = target + 0.4 * prediction
        case "normals":
            target = torch.nn.functional.normalize(torch.randn(label_shape, generator=rng), dim=1)
            prediction = (target + 0.3 * prediction) * 2
        case _:
            target = 3 + torch.randn(label_shape, generator=rng)
            prediction = target + prediction
    drop = torch.rand((batch, 1, *pixels) if kind == "normals" else label_shape, generator=rng) < 0.2
    return prediction, torch.where(drop, torch.tensor(task.missing, dtype=target.dtype), target)


@pytest.mark.parametrize("kind", ["binary", "edges", "saliency"])
def test_softened_answers_are_still_answers(kind):
    """Labels between 0 and 1, as interpolation leaves them, are a yes from a half on: never dropped, never cut to a no."""
    prediction, hard = sample(kind)
    task = task_of(kind)
    soft = torch.where(task.valid(hard), 0.2 + 0.7 * hard, hard)
    for name, metric in task_metrics(task).items():
        figures = []
        for target in (hard, soft):
            metric.reset()
            metric.update(prediction, target)
            figures.append(float(metric.compute()))
        assert figures[0] == figures[1], name


def class_counts(p, t):
    p = p.argmax(1)
    keep = (t >= 0) & (t < 255)
    p, t = p[keep], t[keep]
    both = np.array([((p == c) & (t == c)).sum() for c in range(CLASSES)])
    predicted = np.array([(p == c).sum() for c in range(CLASSES)])
    return both, predicted, np.array([(t == c).sum() for c in range(CLASSES)])


def pixel_accuracy(p, t):
    both, _, labelled = class_counts(p, t)
    return both.sum() / labelled.sum()


def mean_iou(p, t):
    both, predicted, labelled = class_counts(p, t)
    return np.mean(both / (predicted + labelled - both))


def mean_accuracy(p, t):
    both, _, labelled = class_counts(p, t)
    return np.mean((both / np.maximum(labelled, 1))[labelled > 0])


def macro_f1(p, t):
    both, predicted, labelled = class_counts(p, t)
    return np.mean(2 * both / (predicted + labelled))


def answers(function):
    def reference(p, t):
        keep = np.isfinite(t)
        return function(p[keep], t[keep] == 1)

    return reference


def f1(p, t):
    return 2 * ((p > 0) & t).sum() / ((p > 0).sum() + t.sum())


def auroc(p, t):
    return np.mean(p[t][:, None] > p[~t][None, :])


def r2(p, t):
    scores = []
    for column in range(t.shape[1]):
        keep = np.isfinite(t[:, column])
        label, guess = t[keep, column], p[keep, column]
        scores.append(1 - ((label - guess) ** 2).sum() / ((label - label.mean()) ** 2).sum())
    return np.mean(scores)


def over(error, reduce=np.mean):
    def reference(p, t):
        keep = np.isfinite(t) & (t > 0 if t.shape[1:2] == (1,) else True)
        return reduce(error(p[keep].astype(float), t[keep].astype(float)))

    return reference


def rms(errors):
    return math.sqrt(np.mean(errors**2))


def ratio(power):
    return lambda p, t: (p > 0) & (np.maximum(p / t, t / p) < 1.25**power)


def angles(reduce):
    def reference(p, t):
        keep = (t != 0).any(1)
        p, t = np.moveaxis(p, 1, -1)[keep].astype(float), np.moveaxis(t, 1, -1)[keep].astype(float)
        cosine = (p * t).sum(1) / np.linalg.norm(p, axis=1) / np.linalg.norm(t, axis=1)
        return reduce(np.degrees(np.arccos(np.clip(cosine, -1, 1))))

    return reference


def sigmoid(p):
    return 1 / (1 + np.exp(-p))


def max_f(p, t):
    keep = t != 255
    score, label = sigmoid(p[keep]), t[keep] == 1
    best = 0
    for k in range(1, 256):
        hits = (label & (score >= k / 256)).sum()
        if hits:
            precision, recall = hits / (score >= k / 256).sum(), hits / label.sum()
            best = max(best, 1.3 * precision * recall / (0.3 * precision + recall))
    return best


def saliency_iou(p, t):
    means = []
    for threshold in np.arange(4, 19) / 20:
        ious = []
        for score, label in zip(sigmoid(p), t, strict=True):
            guess, truth = (score >= threshold) & (label != 255), label == 1
            ious.append((guess & truth).sum() / (guess | truth).sum() if (guess | truth).any() else 1.0)
        means.append(np.mean(ious))
    return max(means)


TOLERANCE = 0.08  # 1.6 pixels here: the eight neighbours


def ods_f(p, t):
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    y, x = rows.ravel(), columns.ravel()
    distance = np.hypot(y[:, None] - y, x[:, None] - x)
    close = distance <= TOLERANCE * math.hypot(HEIGHT, WIDTH)
    score, label = sigmoid(p).reshape(BATCH, -1), t.reshape(BATCH, -1)
    edge, valid, best = label == 1, label != 255, 0
    for k in range(1, 100):
        guess = (score >= k / 100) & valid
        correct = (guess & (edge @ close)).sum()
        found = (edge & (guess @ close)).sum()
        if correct:
            precision, recall = correct / guess.sum(), found / edge.sum()
            best = max(best, 2 * precision * recall / (precision + recall))
    return best


def difference(p, t):
    return p - t


REFERENCES = {
    ("classification", "accuracy"): pixel_accuracy,
    ("classification", "f1"): macro_f1,
    ("binary", "accuracy"): answers(lambda p, t: np.mean((p > 0) == t)),
    ("binary", "f1"): answers(f1),
    ("binary", "auroc"): answers(auroc),
    ("regression", "rmse"): over(difference, rms),
    ("regression", "mae"): over(lambda p, t: abs(p - t)),
    ("regression", "r2"): r2,
    ("segmentation", "mIoU"): mean_iou,
    ("segmentation", "pixel_accuracy"): pixel_accuracy,
    ("segmentation", "mean_accuracy"): mean_accuracy,
    ("depth", "rmse"): over(difference, rms),
    ("depth", "abs_error"): over(lambda p, t: abs(p - t)),
    ("depth", "rel_error"): over(lambda p, t: abs(p - t) / t),
    ("depth", "delta1"): over(ratio(1)),
    ("depth", "delta2"): over(ratio(2)),
    ("depth", "delta3"): over(ratio(3)),
    ("normals", "mean_angle"): angles(np.mean),
    ("normals", "median_angle"): angles(np.median),
    ("normals", "within_11.25"): angles(lambda a: np.mean(a < 11.25)),
    ("normals", "within_22.5"): angles(lambda a: np.mean(a < 22.5)),
    ("normals", "within_30"): angles(lambda a: np.mean(a < 30)),
    ("edges", "odsF"): ods_f,
    ("saliency", "mIoU"): saliency_iou,
    ("saliency", "maxF"): max_f,
    ("map", "rmse"): over(difference, rms),
    ("map", "mae"): over(lambda p, t: abs(p - t)),
}
TOLERANCES = {"median_angle": 0.02}


def metrics_of(kind):
    task = task_of(kind)
    return {"odsF": OdsF(task, TOLERANCE)} if kind == "edges" else task_metrics(task)


def check(kind, values):
    prediction, target = sample(kind)
    assert {(kind, name) for name in values} == {key for key in REFERENCES if key[0] == kind}
    for name, value in values.items():
        expected = REFERENCES[kind, name](prediction.numpy(), target.numpy())
        assert value == pytest.approx(expected, rel=1e-5, abs=TOLERANCES.get(name, 1e-6)), name
        assert 0 < abs(expected) < 200  # the sample tells something


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cuts", [(), (1,), (2, 3)])
def test_equals_definition_in_any_batches(kind, cuts):
    prediction, target = sample(kind)
    metrics = metrics_of(kind)
    for p, t in zip(torch.tensor_split(prediction, cuts), torch.tensor_split(target, cuts), strict=True):
        for metric in metrics.values():
            metric.update(p, t)
    check(kind, {name: float(metric.compute()) for name, metric in metrics.items()})


def worker(rank, port_file, results):
    distributed.init_process_group("gloo", init_method=f"file://{port_file}", rank=rank, world_size=2)
    for kind in KINDS:
        prediction, target = sample(kind)
        mine = slice(0, 2) if rank == 0 else slice(2, None)
        values = {}
        for name, metric in metrics_of(kind).items():
            metric.update(prediction[mine], target[mine])
            values[name] = float(metric.compute())
        results[rank, kind] = values
    distributed.destroy_process_group()


@pytest.mark.skipif(not distributed.is_gloo_available(), reason="needs torch.distributed with gloo")
def test_two_processes(tmp_path):
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    context = multiprocessing.get_context("fork")
    with context.Manager() as manager:
        results = manager.dict()
        arguments = (str(tmp_path / "rendezvous"), results)
        multiprocessing.start_processes(worker, arguments, 2, start_method="fork")
        results = dict(results)
    assert len(results) == 2 * len(KINDS)
    for (_, kind), values in results.items():
        check(kind, values)


@pytest.mark.parametrize("scale", [1e-12, 1.0, 60.0, 1e30])
def test_sure_answers_are_told_apart(scale):
    random = np.random.default_rng(0)
    label = random.integers(0, 2, 200).astype(np.float32)
    logits = (random.normal(size=200) + label).astype(np.float32)
    metrics = metrics_of("binary")
    for metric in metrics.values():
        metric.update(torch.tensor(scale * logits)[:, None], torch.tensor(label)[:, None])
    for name, metric in metrics.items():
        assert float(metric.compute()) == pytest.approx(REFERENCES["binary", name](logits, label), rel=1e-6), name


@pytest.mark.parametrize("label", [0.0, 1.0, 0.5, torch.nan])
def test_the_order_of_equal_answers_says_nothing(label):
    metric = metrics_of("binary")["auroc"]
    metric.update(torch.randn(5, 1), torch.full((5, 1), label))
    assert metric.compute().isnan()


@pytest.mark.parametrize("kind", KINDS)
def test_perfect_prediction_is_best(kind):
    task = task_of(kind)
    _, target = sample(kind)
    if kind in {"classification", "segmentation"}:
        prediction = torch.nn.functional.one_hot(target.clamp(0, CLASSES - 1), CLASSES).movedim(-1, 1).float()
    elif kind in {"binary", "edges", "saliency"}:
        prediction = torch.where(target == 1, 20.0, -20.0)
    else:
        prediction = target.nan_to_num()
    for name, metric in task_metrics(task).items():
        metric.update(prediction, target)
        best = 1.0 if higher_is_better(task, name) else 0.0
        # On a tiny image the tolerance is below a pixel, so edges must match exactly as well.
        assert float(metric.compute()) == pytest.approx(best, abs=0.01), name


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_and_reset(kind):
    prediction, target = sample(kind)
    for name, metric in metrics_of(kind).items():
        metric.update(prediction.bfloat16(), target)
        half = float(metric.compute())
        metric.reset()
        metric.update(prediction, target)
        assert half == pytest.approx(float(metric.compute()), rel=0.1, abs=0.1), name
        assert float(deepcopy(metric).compute()) == float(metric.compute())


def test_a_batch_without_labels_changes_nothing():
    for kind in KINDS:
        prediction, target = sample(kind)
        for name, metric in metrics_of(kind).items():
            metric.update(prediction, target)
            before = float(metric.compute())
            metric.update(prediction, torch.full_like(target, task_of(kind).missing))
            assert float(metric.compute()) == before, name


def test_negative_depth_is_never_within():
    metric = task_metrics(task_of("depth"))["delta1"]
    metric.update(torch.full((1, 1, 1, 2), -1.0), torch.ones(1, 1, 1, 2))
    assert metric.compute() == 0


def test_small_angles_are_resolved():
    metric = task_metrics(task_of("normals"))["mean_angle"]
    target = torch.tensor([0.0, 0.6, 0.8]).view(1, 3, 1, 1)
    metric.update(target + torch.tensor([1e-4, 0.0, 0.0]).view(1, 3, 1, 1), target)
    assert float(metric.compute()) == pytest.approx(math.degrees(1e-4), rel=1e-3)


@pytest.mark.parametrize("factor", [1e-38, 1e-20, 1.0, 1e20, 1e38])
def test_the_length_of_a_predicted_normal_says_nothing(factor):
    prediction, target = sample("normals")
    metrics = metrics_of("normals")
    prediction = torch.nn.functional.normalize(prediction, dim=1)
    values = []
    for size in (1.0, factor):
        for metric in metrics.values():
            metric.reset()
            metric.update(size * prediction, target)
        values.append({name: float(metric.compute()) for name, metric in metrics.items()})
    assert values[0] == pytest.approx(values[1], rel=1e-5)


@pytest.mark.parametrize("aimless", [0.0, -0.0, math.inf, -math.inf])
def test_a_normal_without_direction_is_90_degrees_off(aimless):
    """An untrained head that begins at zero isn't perfect."""
    _, target = sample("normals")
    expected = {"mean_angle": 90, "median_angle": 90, "within_11.25": 0, "within_22.5": 0, "within_30": 0}
    for name, metric in metrics_of("normals").items():
        metric.update(torch.full_like(target, aimless), target)
        assert float(metric.compute()) == pytest.approx(expected[name], abs=0.01), name


def measured(kind, *batches, own=None):
    task = task_of(kind)
    measures = Measures(replace(task, extra={"metrics": own}) if own else task)
    for prediction, target in batches:
        measures.update(prediction, target)
    return {"t": measures}


def values_of(kind, *batches, **options):
    return merged_values(measured(kind, *batches, **options))["t"]


@pytest.mark.parametrize("kind", KINDS)
def test_figures_of_outputs_that_are_nan_are_nan(kind):
    """An argmax takes NaN for the highest logit, no NaN is above a threshold: figures could be finite, and even perfect."""
    task, (prediction, target) = task_of(kind), sample(kind)
    valid = task.valid(target)
    if valid.shape != prediction.shape:
        valid = (valid if valid.dim() == prediction.dim() else valid[:, None]).expand_as(prediction)
    assert 0 < valid.sum() < valid.numel()
    place = tuple(valid.nonzero()[-1])
    broken = prediction.clone()
    broken[place] = torch.nan
    plain = values_of(kind, (prediction, target))
    for wrong in (broken, torch.where(valid, torch.nan, prediction), broken.bfloat16()):
        values = values_of(kind, (prediction, target), (wrong, target))
        assert values.keys() == plain.keys()
        assert all(math.isnan(value) for value in values.values()), values
    hidden = torch.where(valid, prediction, torch.nan)
    assert values_of(kind, (hidden, target)) == pytest.approx(plain, nan_ok=True)
    shares = [measured(kind, (p, target)) for p in (prediction, broken)]
    values = merged_values(shares[0], [metric_states(shares[1])])["t"]
    assert all(math.isnan(value) for value in values.values()), values


@pytest.mark.parametrize("kind", KINDS)
def test_figures_without_a_label_are_nan(kind):
    prediction, target = sample(kind)
    missing = (prediction, torch.full_like(target, task_of(kind).missing))
    own = {"mean": MeanMetric(), "share": MulticlassAccuracy(3)}
    for values in (values_of(kind), values_of(kind, missing), values_of(kind, missing, own=own)):
        assert values
        assert all(math.isnan(value) for value in values.values()), values
    shares = [measured(kind, missing), measured(kind, (prediction, target))]
    assert merged_values(shares[0], [metric_states(shares[1])])["t"] == values_of(kind, (prediction, target))


def test_own_metrics_judge_nan_themselves():
    class Undefined(MeanMetric):
        def update(self, output, target):
            super().update(output.isnan().float())

    batch = torch.tensor([[1.0], [torch.nan]]), torch.ones(2, 1)
    assert values_of("regression", batch, own={"undefined": Undefined()}) == {"undefined": 0.5}


def test_primary_metric():
    expected = {
        "classification": ("accuracy", True),
        "binary": ("accuracy", True),
        "regression": ("rmse", False),
        "segmentation": ("mIoU", True),
        "depth": ("rmse", False),
        "normals": ("mean_angle", False),
        "edges": ("odsF", True),
        "saliency": ("mIoU", True),
        "map": ("rmse", False),
    }
    assert {kind: primary_metric(task_of(kind)) for kind in KINDS} == expected
    assert all(primary_metric(task_of(kind))[0] in task_metrics(task_of(kind)) for kind in KINDS)
    assert primary_metric(Task("t", "saliency", 1, {"primary_metric": "maxF"})) == ("maxF", True)
    with pytest.raises(ValueError, match="one of rmse, abs_error"):
        primary_metric(Task("t", "depth", 1, {"primary_metric": "mIoU"}))
