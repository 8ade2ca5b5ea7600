"""Which task should lead a group of channels, measured instead of estimated."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from torchmto.checks import check_number
from torchmto.gradients.rows import wide_dtype
from torchmto.structure.layers import StructuredLayer
from torchmto.structure.strength import channels_first
from torchmto.task_norms import active_task, has_split_norms
from torchmto.undo import undisturbed

Closure = Callable[[tuple[str, ...]], Mapping[str, Tensor]]
ChannelGroup = tuple[StructuredLayer, Sequence[int]]
Result = TypeVar("Result")


class OraclePriority(NamedTuple):
    """What :func:`oracle_priority` measured.

    Attributes:
        top: int64 ``[num_groups]``, the leading task of each group, -1 where the best two are equal.
        decrease: ``[num_groups, T]``, by how much the weighted total loss fell with each task's step.
    """

    top: Tensor
    decrease: Tensor


def oracle_priority(
    model: nn.Module,
    closure: Closure,
    groups: Sequence[ChannelGroup],
    tasks: Sequence[str],
    *,
    weights: Mapping[str, float] | None = None,
    step_size: float = 1e-3,
) -> OraclePriority:
    """Task priority by its definition: whose step on a channel group alone lowers the total loss most.

    For a group of channels θ and each task m, θ is moved by ``-step_size * gradient of task m``, everything
    else staying, and the weighted sum of all losses is computed again. Parameters, buffers and torch's random
    state are afterwards exactly as before; every forward pass starts from the same random state and the same
    buffers.

    It costs a forward pass per (group, task), K of them where norms are split: an instrument to check
    connection strengths against, not for training. Differences of losses drown in rounding for small steps in
    float32: where the two largest differ by no more than that, no task leads. Use a float64 copy of the model
    where it matters.

    Args:
        model: The model with split or plain norms.
        closure: ``closure(tasks) -> {task: loss}``. With split norms it is called for one task at a time,
            with that task's norms active.
        groups: Pairs of a layer from :func:`torchmto.structure.find_norm_pairs` and the indices of its output
            channels. The bias entries of the channels belong to them; what is frozen stays.
        tasks: T names.
        weights: Of the losses in the total; default 1 for every task.
        step_size: Of the gradient step, positive.

    Returns:
        :class:`OraclePriority`.

    Raises:
        ValueError: No tasks, a step size that isn't positive, or a channel that doesn't exist.

    Source: Definition 3 of "Quantifying Task Priority for Multi-Task Optimization" (arXiv 2406.02996).
    """
    if not tasks:
        raise ValueError("Parameter `tasks` should name at least one task. Found none.")
    check_number("step_size", step_size, above=0)
    for layer, channels in groups:
        if not all(0 <= channel < layer.num_channels for channel in channels):
            raise ValueError(
                f"Parameter `groups` should hold channels of {layer.name} below {layer.num_channels}. "
                f"Found {list(channels)}."
            )
    factors = [1.0 if weights is None else float(weights[task]) for task in tasks]
    everything = dict.fromkeys(parameter for layer, _ in groups for parameter in layer.parameters)
    parameters = [parameter for parameter in everything if parameter.requires_grad]

    def gradient(loss: Tensor) -> dict[nn.Parameter, Tensor | None]:
        found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True) if parameters else ()
        return dict(zip(parameters, found, strict=True))

    with undisturbed(model), torch.enable_grad():
        by_task = per_task(model, closure, tasks, gradient)
        gradients = [by_task[task] for task in tasks]

    def total() -> float:
        with undisturbed(model), torch.no_grad():
            losses = per_task(model, closure, tasks, float)
            return sum(factor * losses[task] for factor, task in zip(factors, tasks, strict=True))

    before = total()
    decrease = torch.zeros(len(groups), len(tasks), dtype=wide_dtype(torch.device("cpu")))
    with torch.no_grad():
        for row, (layer, channels) in enumerate(groups):
            originals = [parameter.clone() for parameter in layer.parameters]
            for column, task_gradients in enumerate(gradients):
                try:
                    _move(layer, list(channels), task_gradients, step_size)
                    decrease[row, column] = before - total()
                finally:
                    for parameter, original in zip(layer.parameters, originals, strict=True):
                        parameter.copy_(original)
    largest = decrease.amax(dim=1, keepdim=True)
    rounding = max((torch.finfo(parameter.dtype).eps for parameter in parameters), default=0.0) * abs(before)
    is_largest = largest - decrease <= rounding
    top = torch.where(is_largest.sum(dim=1) == 1, decrease.argmax(dim=1), -1)
    return OraclePriority(top, decrease)


def per_task(
    model: nn.Module, closure: Closure, tasks: Sequence[str], read: Callable[[Tensor], Result]
) -> dict[str, Result]:
    """What ``read`` makes of every task's loss; with split norms while the task is active, as a backward may need it.

    Checkpointed regions run their forward again inside the backward.
    """
    results: dict[str, Result] = {}
    for names in [(task,) for task in tasks] if has_split_norms(model) else [tuple(tasks)]:
        with active_task(names[0]) if len(names) == 1 else contextlib.nullcontext():
            losses = closure(names)
            results |= {task: read(losses[task]) for task in names if task in losses}
    return results


def _move(
    layer: StructuredLayer,
    channels: list[int],
    gradients: Mapping[nn.Parameter, Tensor | None],
    step_size: float,
) -> None:
    chosen = torch.zeros(layer.num_channels, dtype=torch.bool, device=layer.weight.device)
    chosen[channels] = True
    for parameter in layer.parameters:
        gradient = gradients.get(parameter)
        if gradient is not None:
            moved = chosen
            if parameter is layer.weight:
                index = torch.arange(parameter.numel(), device=parameter.device).view(parameter.shape)
                by_channel = channels_first(index, groups=layer.groups, transposed=layer.transposed)
                moved = torch.zeros(parameter.numel(), dtype=torch.bool, device=parameter.device)
                moved[by_channel[chosen].flatten()] = True
            parameter.sub_(step_size * gradient * moved.view(parameter.shape))
