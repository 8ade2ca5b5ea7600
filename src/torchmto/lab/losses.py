"""Losses of the lab's tasks: each averages over the labelled entries only and tells how many there were.

The pure functions take a prediction, a target and a bool mask of the labelled entries and return
``(mean loss, count)``, both 0-dimensional tensors on the prediction's device. `task_loss` picks one for a
task. The count is what `MultiTask` weights micro-batches and ranks by: a mean over half as many pixels counts
half.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from torchmto.checks import check_number, nearest
from torchmto.lab.data.base import Task, positive

Loss = tuple[Tensor, Tensor]
LossFunction = Callable[..., Loss]


def cross_entropy(prediction: Tensor, target: Tensor, valid: Tensor, *, label_smoothing: float = 0.0) -> Loss:
    """Mean cross-entropy over labelled samples or pixels.

    Args:
        prediction: Logits ``[B, C]`` or ``[B, C, H, W]``.
        target: Class numbers ``[B]`` or ``[B, H, W]``.
        valid: Where ``target`` holds a label, shaped like ``target``.
        label_smoothing: Share of the probability spread evenly over all classes.

    Returns:
        The loss in nats and the number of labels.

    >>> logits = torch.zeros(2, 4)
    >>> loss, count = cross_entropy(logits, torch.tensor([1, -1]), torch.tensor([True, False]))
    >>> round(float(loss), 4), int(count)
    (1.3863, 1)
    """
    ignored = -100
    entries = torch.where(valid, target.long(), ignored)
    total = functional.cross_entropy(
        _full(prediction), entries, ignore_index=ignored, reduction="sum", label_smoothing=label_smoothing
    )
    count = valid.sum()
    return total / count.clamp(min=1), count


def binary_cross_entropy(prediction: Tensor, target: Tensor, valid: Tensor) -> Loss:
    """Mean cross-entropy of yes/no answers, from logits; all tensors have the same shape."""
    return _weighted_binary(prediction, target, valid)


def balanced_cross_entropy(prediction: Tensor, target: Tensor, valid: Tensor, *, positive_weight: float = 0.95) -> Loss:
    """Binary cross-entropy in which positives weigh ``positive_weight`` and negatives the rest.

    Edges cover a few percent of an image; unweighted, "no edge anywhere" is nearly optimal.

    Args:
        prediction: Logits.
        target: 0 or 1, shaped like ``prediction``.
        valid: Where ``target`` holds a label.
        positive_weight: Weight of a positive in ``(0, 1)``.

    Returns:
        The weighted sum divided by the number of labels, and that number.

    Source: Xie and Tu, Holistically-Nested Edge Detection, ICCV 2015, equation 2. Deviation: a fixed weight
    instead of each image's share of negatives, as the multi-task papers use it.
    """
    weight = torch.where(positive(target), positive_weight, 1 - positive_weight)
    return _weighted_binary(prediction, target, valid, weight)


def class_balanced(prediction: Tensor, target: Tensor, valid: Tensor) -> Loss:
    """Binary cross-entropy in which each class weighs the other's share of the batch's labels.

    Args:
        prediction: Logits.
        target: 0 or 1, shaped like ``prediction``.
        valid: Where ``target`` holds a label.

    Returns:
        The weighted sum divided by the number of labels, and that number. As the weights are those of the batch at hand,
        micro-batches and ranks each use their own: unlike other losses, parts don't add up to the loss of the whole.

    Source: Xie and Tu, Holistically-Nested Edge Detection, ICCV 2015, equation 2; shares of the batch instead of each image,
    as the released code of MTI-Net and of arXiv 2502.11986 takes them for saliency.

    >>> loss, _ = class_balanced(torch.zeros(4), torch.tensor([1.0, 0, 0, 0]), torch.ones(4, dtype=torch.bool))
    >>> torch.isclose(loss, (0.75 * 1 + 0.25 * 3) / 4 * torch.tensor(2.0).log())
    tensor(True)
    """
    negatives = (~positive(target) & valid).sum() / valid.sum().clamp(min=1)
    return _weighted_binary(prediction, target, valid, torch.where(positive(target), negatives, 1 - negatives))


def focal(prediction: Tensor, target: Tensor, valid: Tensor, *, gamma: float = 2.0, alpha: float | None = None) -> Loss:
    r"""Mean focal loss :math:`-\alpha_t (1 - p_t)^\gamma \log p_t` of yes/no answers, from logits.

    Args:
        prediction: Logits.
        target: 0 or 1, shaped like ``prediction``.
        valid: Where ``target`` holds a label.
        gamma: How strongly well-classified entries are played down; 0 gives the cross-entropy.
        alpha: Weight of positives, with ``1 - alpha`` for negatives; None weighs both 1.

    Returns:
        The loss and the number of labels.

    Source: Lin et al., Focal Loss for Dense Object Detection, ICCV 2017, equation 5. Deviations: divided by
    the number of entries, not of positives, and no class weight by default.
    """
    logits = _full(prediction)
    yes = positive(target)
    log_p = functional.logsigmoid(torch.where(yes, logits, -logits))
    weight = (-torch.expm1(log_p)).clamp(min=0) ** gamma
    if alpha is not None:
        weight = weight * torch.where(yes, alpha, 1 - alpha)
    return _masked_mean(-weight * log_p, valid)


def l1(prediction: Tensor, target: Tensor, valid: Tensor) -> Loss:
    """Mean absolute error over valid entries; all tensors have the same shape."""
    return _masked_mean((_full(prediction) - _filled(target, valid)).abs(), valid)


def mse(prediction: Tensor, target: Tensor, valid: Tensor) -> Loss:
    """Mean squared error over valid entries; all tensors have the same shape."""
    return _masked_mean((_full(prediction) - _filled(target, valid)).square(), valid)


def huber(prediction: Tensor, target: Tensor, valid: Tensor, *, delta: float = 1.0) -> Loss:
    """Mean Huber loss: half the squared error up to ``delta``, linear beyond."""
    errors = functional.huber_loss(_full(prediction), _filled(target, valid), reduction="none", delta=delta)
    return _masked_mean(errors, valid)


def normals_l1(prediction: Tensor, target: Tensor, valid: Tensor) -> Loss:
    """Mean absolute difference of unit vectors, over components and valid pixels.

    Args:
        prediction: ``[B, 3, H, W]`` of any length; scaled to unit length first.
        target: Unit vectors of the same shape.
        valid: ``[B, 1, H, W]``.

    Returns:
        The loss and the number of valid pixels.
    """
    prediction = _full(prediction)
    # functional.normalize, which along a dimension that isn't the last is fifty times slower on the CPU.
    unit = prediction * prediction.square().sum(dim=1, keepdim=True).clamp(min=1e-24).rsqrt()
    return _masked_mean((unit - target).abs().mean(dim=1, keepdim=True), valid)


def normals_cosine(prediction: Tensor, target: Tensor, valid: Tensor) -> Loss:
    """Mean of one minus the cosine between vectors, over valid pixels; shapes as in `normals_l1`."""
    similarity = functional.cosine_similarity(_full(prediction), target, dim=1).unsqueeze(1)
    return _masked_mean(1 - similarity, valid)


_CHOICES: dict[str, dict[str, LossFunction]] = {
    "classification": {"cross_entropy": cross_entropy},
    "binary": {"binary_cross_entropy": binary_cross_entropy, "focal": focal},
    "regression": {"mse": mse, "huber": huber, "l1": l1},
    "segmentation": {"cross_entropy": cross_entropy},
    "depth": {"l1": l1, "mse": mse, "huber": huber},
    "normals": {"l1": normals_l1, "cosine": normals_cosine},
    "edges": {
        "balanced_cross_entropy": balanced_cross_entropy,
        "class_balanced": class_balanced,
        "focal": focal,
        "binary_cross_entropy": binary_cross_entropy,
    },
    "saliency": {
        "focal": focal,
        "class_balanced": class_balanced,
        "balanced_cross_entropy": balanced_cross_entropy,
        "binary_cross_entropy": binary_cross_entropy,
    },
    "map": {"l1": l1, "mse": mse, "huber": huber},
    "own": {},
}


_RANGES: dict[str, dict[str, float]] = {
    "label_smoothing": {"minimum": 0, "maximum": 1},
    "positive_weight": {"above": 0, "below": 1},
    "gamma": {"minimum": 0},
    "alpha": {"minimum": 0, "maximum": 1},
    "delta": {"above": 0},
}
"""What the losses' options may be."""


class TaskLoss:
    """One task's loss on a batch whose labels may be partly or wholly missing; see `task_loss`."""

    def __init__(self, task: Task, function: LossFunction, options: Mapping[str, Any]) -> None:
        self.task = task
        self._function = function
        self._options = dict(options)

    def __call__(
        self, prediction: Tensor | tuple[Tensor, ...], target: Tensor, *, labelled: bool | None = None
    ) -> Loss | None:
        """The mean loss over the labelled entries.

        Args:
            prediction: The model's output, shaped as `torchmto.lab.data.base` says for the task's kind; or several, whose
                losses are added (deep supervision).
            target: The batch's target, likewise.
            labelled: Whether the batch has a label of this task, where the caller knows (see
                `labelled_tasks`, best called before the batch goes to the device). If None it is read from
                the target, at the price of one wait for the device.

        Returns:
            The loss and the number of labels behind it, or None where there is no label.

        Raises:
            ValueError: If the shapes don't fit.
        """
        if isinstance(prediction, tuple):
            return _added(self, prediction, target, labelled)
        check_shape(self.task, prediction, target)
        valid = self.task.valid(target)
        if labelled is None:
            labelled = bool(valid.any())
        return self._function(prediction, target, valid, **self._options) if labelled else None


def check_shape(task: Task, prediction: Any, target: Tensor) -> None:
    """Raise ValueError if a prediction hasn't the shape that the task's kind asks for; a smaller one would be spread."""
    labels = task.kind in {"classification", "segmentation"}
    expected = (len(target), task.channels, *target.shape[1:]) if labels else tuple(target.shape)
    shape = tuple(prediction.shape) if isinstance(prediction, Tensor) else type(prediction).__name__
    if shape != expected:
        raise ValueError(
            f"Parameter `prediction` of task `{task.name}` ({task.kind}) should have the shape {expected}. Found {shape}."
        )


class OwnLoss:
    """A user's loss, called with the labelled samples only; see `torchmto.lab.problem.Problem`.

    Args:
        task: Its task.
        function: ``(output, target) -> loss or (loss, count)``; one that takes ``mask`` gets where values are valid.
    """

    def __init__(self, task: Task, function: Callable[..., Any]) -> None:
        self.task = task
        self.function = function
        try:
            self._masked = "mask" in inspect.signature(function).parameters
        except ValueError:  # some built-in functions don't tell
            self._masked = False

    def __call__(self, prediction: Any, target: Tensor, *, labelled: bool | None = None) -> Loss | None:
        """The loss and the number of labels behind it, or None where there is no label.

        Of several predictions, a tuple, it is the sum; but a task of its own kind may have any output, which goes to its loss
        as it is.
        """
        own = self.task.kind == "own"
        if isinstance(prediction, tuple) and not own:
            return _added(self, prediction, target, labelled)
        valid, rows = labelled_rows(self.task, target)
        if not (bool(rows.any()) if labelled is None else labelled):
            return None
        more = {"mask": valid[rows]} if self._masked else {}
        value = self.function(prediction if own else prediction[rows], target[rows], **more)
        return value if isinstance(value, tuple) else (value, valid.sum())


def _added(
    loss: TaskLoss | OwnLoss, predictions: tuple[Tensor, ...], target: Tensor, labelled: bool | None
) -> Loss | None:
    """The sum of several predictions' losses, which have the same labels behind them."""
    parts = [part for prediction in predictions if (part := loss(prediction, target, labelled=labelled)) is not None]
    return (torch.stack([value for value, _ in parts]).sum(), parts[0][1]) if parts else None


def labelled_rows(task: Task, target: Tensor) -> tuple[Tensor, Tensor]:
    """Where a target is valid, and which samples have any label, bool ``[B]``."""
    valid = task.valid(target)
    return valid, valid.flatten(1).any(dim=1) if valid.dim() > 1 else valid


def task_loss(task: Task, loss: str | None = None, **options: Any) -> TaskLoss:
    """The loss of a task: ``callable(prediction, target) -> (mean loss, count) | None``.

    =============  ==========================================================
    kind           losses, the default first
    =============  ==========================================================
    classification cross_entropy
    binary         binary_cross_entropy, focal
    regression     mse, huber, l1
    segmentation   cross_entropy
    depth          l1, mse, huber
    normals        l1, cosine (predictions are scaled to unit length)
    edges          balanced_cross_entropy, class_balanced, focal, binary_cross_entropy
    saliency       focal, class_balanced, balanced_cross_entropy, binary_cross_entropy
    map            l1, mse, huber
    =============  ==========================================================

    Args:
        task: The task.
        loss: A name from the table; if None that in ``task.extra``, or else the kind's default.
        options: The function's keyword arguments, such as ``positive_weight`` or ``delta``.

    Returns:
        A `TaskLoss`.

    Raises:
        ValueError: If the kind has no such loss, or an option is out of range.
        TypeError: If the loss has no such option.

    >>> regression = task_loss(Task("flow", "regression", 2))
    >>> target = torch.tensor([[1.0, float("nan")]])
    >>> regression(torch.tensor([[3.0, 7.0]]), target)
    (tensor(4.), tensor(1))
    >>> regression(torch.zeros(1, 2), target * float("nan")) is None
    True
    """
    choices = _CHOICES[task.kind]
    if not choices:
        raise ValueError(f"The task `{task.name}` has no kind, and so needs a loss of its own (`losses=`).")
    name = task.extra.get("loss", next(iter(choices))) if loss is None else loss
    if name not in choices:
        raise ValueError(
            f"Parameter `loss` of the {task.kind} task `{task.name}` should be one of {', '.join(choices)}. "
            f"Found `loss = {name!r}`.{nearest(name, choices)}"
        )
    function = choices[name]
    known = {p.name: p.default for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY}
    for option, value in options.items():
        if option not in known:
            raise TypeError(f"The loss `{name}` has the options {[*known]}. Found `{option} = {value!r}`.")
        if value is not known[option]:  # None, too, where that is the default
            check_number(option, value, **_RANGES[option])
    return TaskLoss(task, function, options)


def _weighted_binary(prediction: Tensor, target: Tensor, valid: Tensor, weight: Tensor | None = None) -> Loss:
    losses = functional.binary_cross_entropy_with_logits(
        _full(prediction), _filled(target, valid), weight=weight, reduction="none"
    )
    return _masked_mean(losses, valid)


def _masked_mean(losses: Tensor, valid: Tensor) -> Loss:
    """The mean of ``losses`` where ``valid``; 0 with gradient 0 where nothing is."""
    count = valid.sum()
    return torch.where(valid, losses, 0.0).sum() / count.clamp(min=1), count


def _filled(target: Tensor, valid: Tensor) -> Tensor:
    """``target`` with zeros where it isn't valid: a NaN behind a mask would still reach the gradient."""
    return torch.where(valid, target, 0.0)


def _full(prediction: Tensor) -> Tensor:
    """At least float32: sums over a million pixels overflow in half precision."""
    return prediction.float() if prediction.dtype in {torch.float16, torch.bfloat16} else prediction
