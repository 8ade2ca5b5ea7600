"""Combining task gradients channel by channel so that the task that leads a channel keeps its gradient."""

from typing import Literal

import torch
from torch import Tensor

from torchmto.checks import check_choice
from torchmto.structure.strength import at_least_float32

Degenerate = Literal["sum", "project"]


def channel_dots(task_grads: Tensor, top: Tensor) -> Tensor:
    """Inner products of every task's gradient with the leading task's, channel by channel.

    Args:
        task_grads: ``[T, C_out, ...]``.
        top: int64 ``[C_out]``, the leading task of each channel, -1 for none.

    Returns:
        ``[T, C_out]``; zeros in channels nobody leads. Sums over the parameters of a layer (weight and bias)
        are the layer's products.

    Raises:
        ValueError: Shapes that don't fit.
    """
    if task_grads.dim() < 2 or top.shape != task_grads.shape[1:2]:
        raise ValueError(
            "Parameter `top` should hold one task per channel of `task_grads`. Found shapes "
            f"{tuple(top.shape)} and {tuple(task_grads.shape)}."
        )
    grads = task_grads.detach()
    channels = torch.arange(top.shape[0], device=top.device)
    leading = at_least_float32(grads[top.clamp(min=0), channels])
    # One task after the other: the only temporary is of one task's size.
    dots = torch.stack([(row * leading).reshape(top.shape[0], -1).sum(1) for row in grads])
    return dots * (top >= 0)


def group_coefficients(dots: Tensor, top: Tensor, *, degenerate: Degenerate = "sum") -> Tensor:
    """What each task's gradient is multiplied by, from the products of :func:`channel_dots`.

    Channels led by the same task form a group. In the group of task i, every conflicting task j loses its
    component along i's gradient, ``G_ij -= <G_ii, G_ij> / ||G_ii||^2 G_ii``, and the rows are summed. G_ii
    never changes, so the sum is ``(1 + sum_j max(0, -<G_ii, G_ij>) / ||G_ii||^2) G_ii + sum_j G_ij``: one
    number per group.

    Args:
        dots: ``[T, C_out]`` from :func:`channel_dots`, summed over the layer's parameters.
        top: int64 ``[C_out]``.
        degenerate: Where one task leads every channel of the layer, ``"sum"`` adds the gradients plainly, as
            the paper's released code does; ``"project"`` applies the formula as printed.

    Returns:
        ``[T, C_out]``: 1, except for the leading task of each channel. A group whose leading gradient is zero
        keeps 1.

    Raises:
        ValueError: ``degenerate`` is something else.
    """
    check_choice("degenerate", degenerate, ("sum", "project"))
    num_tasks = dots.shape[0]
    leads = top == torch.arange(num_tasks, device=top.device).unsqueeze(1)  # [T, C_out]
    products = leads.to(dots.dtype) @ dots.T  # [i, j]: <G_ii, G_ij>
    squared_norm = products.diagonal()
    extra = (-products).clamp(min=0).sum(dim=1) / torch.where(squared_norm > 0, squared_norm, 1)
    extra = torch.where(squared_norm > 0, extra, 0)
    if degenerate == "sum":
        extra = extra * ~leads.all(dim=1)
    return 1 + leads * extra.unsqueeze(1)


def priority_coefficients(task_grads: Tensor, top: Tensor, *, degenerate: Degenerate = "sum") -> Tensor:
    """The numbers by which phase 2 multiplies each task's gradient of each channel before summing.

    One pass over the gradients for the inner products; nothing of their size is kept but the leading rows.

    Args:
        task_grads: ``[T, C_out, ...]``.
        top: int64 ``[C_out]``, the leading task of each channel, -1 for none.
        degenerate: See :func:`group_coefficients`.

    Returns:
        ``[T, C_out]``.

    Raises:
        ValueError: Shapes that don't fit, or an unknown ``degenerate``.
    """
    return group_coefficients(channel_dots(task_grads, top), top, degenerate=degenerate)


def project_by_priority(task_grads: Tensor, top: Tensor, *, degenerate: Degenerate = "sum") -> Tensor:
    """Phase 2 of connection strength for one layer: the gradient that conserves the tasks' priorities.

    In the channels that task i leads, the gradients of tasks in conflict with i's (over the whole channel
    group) are projected onto its normal plane; then all are summed. The result doesn't depend on the order of
    the tasks.

    Args:
        task_grads: ``[T, C_out, ...]``, each task's gradient of the layer.
        top: int64 ``[C_out]``, the leading task of each channel; channels with -1 are summed plainly.
        degenerate: Where one task leads every channel, ``"sum"`` (default, as released) or ``"project"`` (as
            printed).

    Returns:
        ``[C_out, ...]``. Scale: sum of the tasks' gradients, homogeneous of degree 1.

    Raises:
        ValueError: Shapes that don't fit, a task in ``top`` that doesn't exist, or an unknown ``degenerate``.

    Source: "Quantifying Task Priority for Multi-Task Optimization" (arXiv 2406.02996), phase 2.

    Example:
        >>> grads = torch.tensor([[[1.0, 0.0], [1.0, 0.0]], [[-1.0, 1.0], [0.0, 1.0]]])
        >>> project_by_priority(grads, torch.tensor([0, 1]))
        tensor([[1., 1.],
                [1., 1.]])
    """
    if top.numel() and not -1 <= int(top.min()) <= int(top.max()) < len(task_grads):
        raise ValueError(
            f"Parameter `top` should hold tasks from 0 to {len(task_grads) - 1}, or -1. Found {top.tolist()}."
        )
    coefficients = priority_coefficients(task_grads, top, degenerate=degenerate)
    return weighted_channels(task_grads, coefficients)


def weighted_channels(task_grads: Tensor, coefficients: Tensor) -> Tensor:
    """``sum_t coefficients[t, c] * task_grads[t, c, ...]`` in one pass: ``[C_out, ...]``."""
    num_tasks, num_channels, *rest = task_grads.shape
    return sum_of_products(task_grads, coefficients.reshape(num_tasks, num_channels, *[1] * len(rest)))


def sum_of_products(task_grads: Tensor, coefficients: Tensor) -> Tensor:
    """``sum_t coefficients[t] * task_grads[t]`` for broadcastable rows, without a temporary of T rows."""
    rows, factors = task_grads.detach(), coefficients.to(task_grads.dtype)
    total = rows[0] * factors[0]
    for row, factor in zip(rows[1:], factors[1:], strict=True):
        total.addcmul_(row, factor)
    return total
