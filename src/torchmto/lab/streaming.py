"""The metrics of `torchmto.lab.metrics` at work: sums and counts over the data set."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from torchmto.lab.data.base import Task, positive

try:
    from torchmetrics import Metric
    from torchmetrics import classification as tm
    from torchmetrics.functional.classification import binary_auroc
    from torchmetrics.utilities import dim_zero_cat
except ImportError as error:  # pragma: no cover
    raise ImportError("The lab's metrics need torchmetrics: pip install 'torchmto[lab]'") from error

PixelError = Callable[[Tensor, Tensor], Tensor]


class _Counting(Metric):
    """A metric whose state is sums over the data set.

    Args:
        task: Tells where a target holds a label.
        counters: Names of the sums.
        size: Shape of each.
        dtype: Of each.
    """

    full_state_update = False

    def __init__(
        self, task: Task, *counters: str, size: tuple[int, ...] = (), dtype: torch.dtype = torch.int64, **options: Any
    ) -> None:
        super().__init__(**options)
        self.task = task
        for name in counters:
            self.add_state(name, torch.zeros(size, dtype=dtype), dist_reduce_fx="sum")


class Seen(_Counting):
    """Whether outputs have met labels at all, and none of those that have was NaN."""

    labels: Tensor
    undefined: Tensor

    def __init__(self, task: Task, **options: Any) -> None:
        super().__init__(task, "labels", "undefined", **options)

    def update(self, undefined: Tensor | None, target: Tensor) -> None:
        """Add a batch.

        Args:
            undefined: Where the output is NaN, shaped like it; None where nobody asks.
            target: The targets.
        """
        valid = self.task.valid(target)
        self.labels += valid.sum()
        if undefined is not None:
            if undefined.shape != valid.shape:  # a label has a logit per class, or three components
                undefined = undefined.any(dim=1, keepdim=undefined.dim() == valid.dim())
            self.undefined += (undefined & valid).sum()

    def compute(self) -> Tensor:
        """Share of NaN; NaN where nothing was labelled."""
        return self.undefined / self.labels


class MaskedMean(_Counting):
    """Mean of an elementwise error over all labelled entries of the data set.

    Args:
        task: Tells where a target holds a label.
        error: ``(prediction, target) -> error``, shaped like ``task.valid(target)``.
        root: Whether to take the square root of the mean.
    """

    total: Tensor
    count: Tensor

    def __init__(self, task: Task, error: PixelError, *, root: bool = False, **options: Any) -> None:
        super().__init__(task, "count", **options)
        self.error, self.root = error, root
        # In float32 a sum over 10^8 pixels would lose what a late batch adds.
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Add a batch."""
        valid = self.task.valid(target)
        errors = torch.where(valid, self.error(prediction.float(), target.float()), 0.0)
        self.total += errors.sum(dtype=torch.float64)
        self.count += valid.sum()

    def compute(self) -> Tensor:
        """The mean, or its root; NaN where nothing was labelled."""
        mean = self.total / self.count
        return mean.sqrt() if self.root else mean


def squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Elementwise squared difference."""
    return (prediction - target).square()


def absolute_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Elementwise absolute difference."""
    return (prediction - target).abs()


def relative_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Elementwise absolute difference divided by the target."""
    return (prediction - target).abs() / target


def within_ratio(prediction: Tensor, target: Tensor, *, threshold: float) -> Tensor:
    """1 where prediction and target differ by less than the factor; 0 for a negative depth."""
    ratio = torch.maximum(prediction / target, target / prediction)
    return ((ratio < threshold) & (prediction > 0)).float()


def angle(prediction: Tensor, target: Tensor) -> Tensor:
    """Angle in degrees between ``[B, 3, H, W]`` vectors of any length, ``[B, 1, H, W]``.

    By the arc tangent: the arc cosine of a float32 can't tell angles below 0.03 degrees apart. A prediction without a
    direction, the zero vector or an infinite one, is 90 degrees off.
    """
    length = prediction.abs().amax(dim=1, keepdim=True)
    aimless = (length == 0) | length.isinf()
    prediction = prediction / torch.where(aimless, 1.0, length)  # squares of 1e-20 would be 0, those of 1e20 infinite
    # Not .norm(dim=1): on the CPU it is fifty times slower along a dimension that isn't the last.
    sine = torch.linalg.cross(prediction, target, dim=1).square().sum(dim=1, keepdim=True).sqrt()
    cosine = (prediction * target).sum(dim=1, keepdim=True)
    return torch.where(aimless, 90.0, torch.rad2deg(torch.atan2(sine, cosine)))


def within_angle(prediction: Tensor, target: Tensor, *, threshold: float) -> Tensor:
    """1 where the angle is below ``threshold`` degrees."""
    return (angle(prediction, target) < threshold).float()


class MedianAngle(_Counting):
    """Median angle between normals in degrees, to 0.01 degrees: from a histogram, not from all angles."""

    higher_is_better = False
    counts: Tensor
    bins_per_degree = 100
    bins = 180 * bins_per_degree

    def __init__(self, task: Task, **options: Any) -> None:
        super().__init__(task, "counts", size=(self.bins,), **options)

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Add a batch."""
        angles = angle(prediction.float(), target.float())[self.task.valid(target)]
        bins = (angles * self.bins_per_degree).long().clamp(max=self.bins - 1)
        self.counts += torch.bincount(bins, minlength=self.bins)

    def compute(self) -> Tensor:
        """The median, interpolated inside its bin; NaN where nothing was labelled."""
        below = self.counts.cumsum(0)
        half = below[-1] / 2
        index = torch.searchsorted(below.to(half.dtype), half).clamp(max=self.bins - 1)
        inside = 1 - (below[index] - half) / self.counts[index]
        return torch.where(below[-1] > 0, (index + inside) / self.bins_per_degree, torch.nan)


class MeanAccuracy(tm.MulticlassConfusionMatrix):
    """Share of a class's pixels found, averaged over the classes that have pixels.

    torchmetrics' macro accuracy also counts, as 0, a class that is predicted somewhere but labelled nowhere.
    """

    higher_is_better = True

    def compute(self) -> Tensor:
        """The mean over classes."""
        matrix = self.confmat.double()
        return (matrix.diag() / matrix.sum(dim=1)).nanmean()


class R2(_Counting):
    """Coefficient of determination, averaged over outputs; entries may be missing.

    1 is perfect, 0 is as good as the mean of the labels. NaN where all labels of every output are equal.
    torchmetrics' ``R2Score`` knows no missing entries.
    """

    higher_is_better = True
    count: Tensor
    total: Tensor
    squares: Tensor
    residuals: Tensor

    def __init__(self, task: Task, **options: Any) -> None:
        names, size = ("count", "total", "squares", "residuals"), (task.channels,)
        super().__init__(task, *names, size=size, dtype=torch.float64, **options)

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Add a batch of ``[B, C]``."""
        valid = self.task.valid(target)
        labels = torch.where(valid, target, 0.0).double()
        self.count += valid.sum(dim=0)
        self.total += labels.sum(dim=0)
        self.squares += labels.square().sum(dim=0)
        self.residuals += torch.where(valid, prediction.double() - labels, 0.0).square().sum(dim=0)

    def compute(self) -> Tensor:
        """The mean over outputs whose labels vary."""
        variation = self.squares - self.total.square() / self.count
        varies = variation > 1e-12 * self.squares
        return torch.where(varies, 1 - self.residuals / variation, torch.nan).nanmean()


class _Answers(Metric):
    """Feeds yes/no answers, given as logits and with missing labels, to a torchmetrics metric.

    That metric would take logits too, but guesses from their range, batch by batch, whether they are logits.
    """

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Add a batch of ``[B, C]``."""
        valid = torch.isfinite(target)
        answers, labels = (prediction[valid] > 0).long(), positive(target[valid]).long()
        if len(labels) > 0:
            super().update(answers, labels)  # type: ignore[safe-super]


class BinaryAccuracy(_Answers, tm.BinaryAccuracy):
    """Share of right answers."""


class BinaryF1(_Answers, tm.BinaryF1Score):
    """F1 of the answer "yes"."""


class BinaryAuroc(tm.BinaryAUROC):
    """Area under the ROC curve, exact (keeps all scores); labels may be missing. NaN where all answers are the same."""

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Add a batch of ``[B, C]`` logits."""
        valid = torch.isfinite(target)
        self.preds.append(prediction[valid])
        self.target.append(positive(target[valid]).long())

    def compute(self) -> Tensor:  # type: ignore[override]
        """The area."""
        scores, labels = dim_zero_cat(self.preds), dim_zero_cat(self.target)
        if scores.isnan().any() or not 0 < labels.sum() < len(labels):
            return scores.new_tensor(torch.nan)
        # Probabilities of sure answers would all be 1: their order tells, not their values.
        _, order = torch.unique(scores, return_inverse=True)
        return binary_auroc(order / len(order), labels)


class _ScoreCounts(_Counting):
    """Counts of scores, binned so that "score >= k / bins" is known for every k."""

    higher_is_better = True

    def __init__(self, task: Task, bins: int, *counters: str, **options: Any) -> None:
        super().__init__(task, *counters, size=(bins,), **options)
        self.bins = bins

    def _bins(self, prediction: Tensor) -> Tensor:
        return (prediction.float().sigmoid() * self.bins).long().clamp(max=self.bins - 1)

    def _at_least(self, counts: Tensor) -> Tensor:
        """Along the last dimension: how many scores reach ``k / bins``, for k = 1, ..., bins - 1."""
        return counts.flip(-1).cumsum(-1).flip(-1)[..., 1:]


class MaxF(_ScoreCounts):
    r"""Maximal F-measure over thresholds of saliency maps, precision and recall taken over the data set.

    :math:`F = (1 + \beta^2) P R / (\beta^2 P + R)` at the thresholds 1/256, ..., 255/256.

    Args:
        task: A saliency task.
        beta_squared: Weight of recall; 0.3 is customary for saliency.
        bins: One more than the number of thresholds.

    Source: Achanta et al., Frequency-tuned Salient Region Detection, CVPR 2009.
    """

    positives: Tensor
    negatives: Tensor

    def __init__(self, task: Task, beta_squared: float = 0.3, bins: int = 256, **options: Any) -> None:
        super().__init__(task, bins, "positives", "negatives", **options)
        self.beta_squared = beta_squared

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Add a batch."""
        scores = self._bins(prediction)
        valid, salient = self.task.valid(target), positive(target)
        self.positives += torch.bincount(scores[valid & salient], minlength=self.bins)
        self.negatives += torch.bincount(scores[valid & ~salient], minlength=self.bins)

    def compute(self) -> Tensor:
        """The F-measure at the best threshold."""
        hits, false_alarms = self._at_least(self.positives), self._at_least(self.negatives)
        precision = hits / (hits + false_alarms).clamp(min=1)
        recall = hits / self.positives.sum().clamp(min=1)
        return _f_measure(precision, recall, self.beta_squared).max()


class SaliencyIoU(_ScoreCounts):
    """Intersection over union of the salient region, averaged over images, at the best of 15 thresholds.

    The thresholds are .2, .25, ..., .9.     An image without salient pixels counts 1 where none are
    predicted.

    Source: Maninis et al., Attentive Single-Tasking of Multiple Tasks, CVPR 2019 (thresholds, averaging).
    """

    total: Tensor
    count: Tensor

    def __init__(self, task: Task, **options: Any) -> None:
        super().__init__(task, 20, **options)
        self.add_state("total", torch.zeros(self.bins - 1, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Add a batch."""
        images = len(target)
        number = torch.arange(images, device=target.device).view(-1, 1, 1, 1)
        scores = self._bins(prediction) + self.bins * number

        def counts(where: Tensor) -> Tensor:
            return torch.bincount(scores[valid & where], minlength=self.bins * images).view(images, -1)

        valid, salient = self.task.valid(target), positive(target)
        positives, negatives = counts(salient), counts(~salient)
        hits = self._at_least(positives).double()
        union = self._at_least(negatives) + positives.sum(dim=1, keepdim=True)
        labelled = (positives + negatives).sum(dim=1) > 0
        self.total += torch.where(union > 0, hits / union, 1.0)[labelled].sum(dim=0)
        self.count += labelled.sum()

    def compute(self) -> Tensor:
        """The mean at the best threshold."""
        return (self.total[3:18] / self.count).max()  # entry k - 1 belongs to threshold k / 20


class OdsF(_ScoreCounts):
    """F-measure of edges at the best threshold for the whole data set (ODS), with a tolerance in position.

    A predicted edge pixel is right if a labelled edge lies within the tolerance; a labelled edge is found if
    a predicted edge pixel lies within it. Precision and recall over the data set, thresholds .01, .02, ...,
    .99.

    Args:
        task: An edge task.
        tolerance: In units of the image's diagonal.

    Source: Martin et al., Learning to Detect Natural Image Boundaries, PAMI 2004. Deviations: the benchmark's
    code thins the predicted edges and matches pixels one to one; here thick edges go unpunished inside the
    tolerance. It is fast and ranks methods; for figures to set beside published ones use that code.
    """

    predicted: Tensor
    correct: Tensor
    found: Tensor

    def __init__(self, task: Task, tolerance: float = 0.0075, **options: Any) -> None:
        super().__init__(task, 100, "predicted", "correct", "found", **options)
        self.tolerance = tolerance

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Add a batch."""
        valid = self.task.valid(target)
        edges = valid & positive(target)
        scores = torch.where(valid, self._bins(prediction), 0)
        height, width = target.shape[-2:]
        radius = self.tolerance * (height**2 + width**2) ** 0.5
        near = valid & (_dilate(edges.long(), radius) > 0)
        self.predicted += torch.bincount(scores[valid], minlength=self.bins)
        self.correct += torch.bincount(scores[near], minlength=self.bins)
        self.found += torch.bincount(_dilate(scores, radius)[edges], minlength=self.bins)

    def compute(self) -> Tensor:
        """The F-measure at the best threshold."""
        precision = self._at_least(self.correct) / self._at_least(self.predicted).clamp(min=1)
        recall = self._at_least(self.found) / self.found.sum().clamp(min=1)
        return _f_measure(precision, recall, 1.0).max()


def _f_measure(precision: Tensor, recall: Tensor, beta_squared: float) -> Tensor:
    divisor = beta_squared * precision + recall
    return torch.where(divisor > 0, (1 + beta_squared) * precision * recall / divisor, 0.0)


def _dilate(values: Tensor, radius: float) -> Tensor:
    """The maximum of non-negative ``[B, 1, H, W]`` values over a disc around each pixel."""
    reach = int(radius)
    height, width = values.shape[-2:]
    padded = functional.pad(values, (reach,) * 4)
    result = values
    for dy in range(-reach, reach + 1):
        for dx in range(-reach, reach + 1):
            if dy * dy + dx * dx <= radius * radius:
                top, left = reach + dy, reach + dx
                result = torch.maximum(result, padded[..., top : top + height, left : left + width])
    return result


MetricFactory = Callable[[Task], Metric]


def _multiclass(metric: type[Metric], **options: Any) -> MetricFactory:
    def make(task: Task) -> Metric:
        return metric(num_classes=task.channels, ignore_index=task.ignore_index, validate_args=False, **options)

    return make


def _mean(error: PixelError, *, root: bool = False) -> MetricFactory:
    return partial(MaskedMean, error=error, root=root)


def _answers(metric: type[Metric]) -> MetricFactory:
    return lambda _: metric(validate_args=False)


_ERRORS: dict[str, MetricFactory] = {"rmse": _mean(squared_error, root=True), "mae": _mean(absolute_error)}
METRICS: dict[str, dict[str, MetricFactory]] = {
    "classification": {
        "accuracy": _multiclass(tm.MulticlassAccuracy, average="micro"),
        "f1": _multiclass(tm.MulticlassF1Score, average="macro"),
    },
    "binary": {"accuracy": _answers(BinaryAccuracy), "f1": _answers(BinaryF1), "auroc": _answers(BinaryAuroc)},
    "regression": {**_ERRORS, "r2": R2},
    "segmentation": {
        "mIoU": _multiclass(tm.MulticlassJaccardIndex, average="macro"),
        "pixel_accuracy": _multiclass(tm.MulticlassAccuracy, average="micro"),
        "mean_accuracy": _multiclass(MeanAccuracy),
    },
    "depth": {
        "rmse": _ERRORS["rmse"],
        "abs_error": _ERRORS["mae"],
        "rel_error": _mean(relative_error),
        **{f"delta{k}": _mean(partial(within_ratio, threshold=1.25**k)) for k in (1, 2, 3)},
    },
    "normals": {
        "mean_angle": _mean(angle),
        "median_angle": MedianAngle,
        **{f"within_{limit:g}": _mean(partial(within_angle, threshold=limit)) for limit in (11.25, 22.5, 30.0)},
    },
    "edges": {"odsF": OdsF},
    "saliency": {"mIoU": SaliencyIoU, "maxF": MaxF},
    "map": _ERRORS,
    "own": {},
}
"""Kind -> metric -> how to make it, in the order of `torchmto.lab.metrics`."""
