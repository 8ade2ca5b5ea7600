"""Connection strength: how strongly each task uses each output channel of a shared layer."""

from typing import Literal

import torch
from torch import Tensor

from torchmto.checks import check_number
from torchmto.gradients.rows import wide_dtype

Measure = Literal["parameters", "gradients", "saliency"]
MEASURES: tuple[Measure, ...] = ("parameters", "gradients", "saliency")


def connection_strength(weight: Tensor, gamma: Tensor, running_var: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """Strength of every output channel of a conv or linear layer that a norm follows, for one task.

    ``S[p] = sum_q,m,n weight[p,q,m,n]^2 * gamma[p]^2 / (running_var[p] + eps)``

    Args:
        weight: ``[C_out, ...]``, shared by the tasks.
        gamma: ``[C_out]``, the scale of the task's norm.
        running_var: ``[C_out]``, the running variance of the task's BatchNorm. None for norms whose variance
            is common to all channels (LayerNorm, RMSNorm): it cancels in :func:`normalized_strength`.
        eps: The norm's ``eps``; only used with ``running_var``.

    Returns:
        ``[C_out]``, non-negative, without a graph.

    Raises:
        ValueError: Shapes that don't fit, or a negative ``eps``.

    Source: "Quantifying Task Priority for Multi-Task Optimization" (arXiv 2406.02996), task-specific
    connection strength. ``running_var=None`` is our generalisation.

    Example:
        >>> connection_strength(torch.ones(2, 3, 1, 1), torch.tensor([1.0, 2.0]))
        tensor([ 3., 12.])
    """
    if weight.dim() < 1 or gamma.shape != weight.shape[:1]:
        raise ValueError(
            "Parameter `gamma` should hold one number per output channel of `weight`. Found shapes "
            f"{tuple(gamma.shape)} and {tuple(weight.shape)}."
        )
    if running_var is not None and running_var.shape != gamma.shape:
        raise ValueError(
            "Parameter `running_var` should have the shape of `gamma`. Found shapes "
            f"{tuple(running_var.shape)} and {tuple(gamma.shape)}."
        )
    check_number("eps", eps, minimum=0)
    weight, gamma = weight.detach(), gamma.detach()
    strength = _squared_norm(at_least_float32(weight).reshape(weight.shape[0], -1))
    strength = strength * at_least_float32(gamma).square()
    return strength if running_var is None else strength / (at_least_float32(running_var.detach()) + eps)


def scaled_strength(
    weight: Tensor,
    out_scale: Tensor | None = None,
    in_scale: Tensor | None = None,
    *,
    groups: int = 1,
    transposed: bool = False,
) -> Tensor:
    """The general form of connection strength, for T tasks at once.

    ``S[t,p] = out_scale[t,p]^2 * sum_q weight[p,q]^2 * in_scale[t,q]^2``, where q runs over the inputs (and
    kernel positions) that output channel p is connected to. With ``out_scale = gamma / sqrt(running_var +
    eps)`` and no ``in_scale`` it is the paper's :func:`connection_strength`; everything else is our
    generalisation.

    Args:
        weight: ``[C_out, C_in / groups, ...]``; ``[C_in, C_out / groups, ...]`` for transposed convolutions.
        out_scale: ``[T, C_out]``, the scale of the norm that follows, per task.
        in_scale: ``[T, C_in]``, the scale of the norm that precedes, per task.
        groups: Of a grouped convolution.
        transposed: Whether the weight belongs to a transposed convolution.

    Returns:
        ``[T, C_out]`` in float64 (float32 on devices without it), so that tasks with equal scales have
        exactly or nearly (to 1e-15) equal strengths; T is 1 if no scale is given.
    """
    by_channel = at_least_float32(channels_first(weight.detach(), groups=groups, transposed=transposed))
    wide = wide_dtype(weight.device)
    if in_scale is None:
        strength = _squared_norm(by_channel.flatten(1)).to(wide).unsqueeze(0)
    else:
        kernels = by_channel.flatten(2) if by_channel.dim() > 2 else by_channel.unsqueeze(2)
        squares = _squared_norm(kernels).to(wide)
        inputs = torch.unflatten(in_scale.detach().to(wide).square(), 1, (groups, -1))
        weights = torch.unflatten(squares, 0, (groups, -1))
        strength = torch.einsum("tgi,goi->tgo", inputs, weights).flatten(1)
    return strength if out_scale is None else strength * out_scale.detach().to(wide).square()


def gradient_strength(task_grads: Tensor, weight: Tensor | None = None) -> Tensor:
    """Strength read from the tasks' gradients instead of the parameters' magnitude.

    Args:
        task_grads: ``[T, C_out, ...]``, every task's gradient of the layer's weight.
        weight: ``[C_out, ...]``. Given: saliency, ``sum |weight * gradient|`` per channel. None: ``sum
            gradient^2``.

    Returns:
        ``[T, C_out]``.

    Source: not in the paper, whose strength is parameter magnitude; offered for comparison.
    """
    grads = at_least_float32(task_grads.detach()).reshape(*task_grads.shape[:2], -1)
    if weight is None:
        strength = _squared_norm(grads)
    else:
        magnitudes = at_least_float32(weight.detach()).reshape(weight.shape[0], -1).abs()
        strength = torch.stack([(row.abs() * magnitudes).sum(1) for row in grads])
    return strength.to(wide_dtype(strength.device))


def normalized_strength(strengths: Tensor) -> Tensor:
    """Each task's strengths as shares of the layer, which makes tasks comparable.

    Args:
        strengths: ``[T, C_out]``, non-negative.

    Returns:
        ``[T, C_out]``, rows summing to 1. A task without any strength in the layer gets equal shares.

    Raises:
        ValueError: ``strengths`` isn't a matrix with at least one channel.

    Example:
        >>> normalized_strength(torch.tensor([[1.0, 3.0], [0.0, 0.0]]))
        tensor([[0.2500, 0.7500],
                [0.5000, 0.5000]])
    """
    if strengths.dim() != 2 or strengths.shape[1] == 0:
        raise ValueError(f"Parameter `strengths` should have shape [T, C_out]. Found {tuple(strengths.shape)}.")
    strengths = at_least_float32(strengths)
    # The largest entry first, so that a sum neither overflows nor underflows.
    largest = strengths.amax(dim=1, keepdim=True)
    scaled = torch.where(largest > 0, strengths / largest, torch.ones_like(strengths))
    return scaled / scaled.sum(dim=1, keepdim=True)


def top_priority(normalized: Tensor, *, tie: float = 1e-12) -> Tensor:
    """The task that leads each channel.

    Args:
        normalized: ``[T, C_out]``, from :func:`normalized_strength`.
        tie: Shares that differ by no more than this part are equal. The default is for strengths of parameters,
            which are exact; those of gradients are as uncertain as these.

    Returns:
        int64 ``[C_out]``: the index of the task with the largest share, -1 where the two largest are equal (as
        they are for all channels at initialisation) or a share isn't a number.

    Raises:
        ValueError: ``normalized`` isn't a matrix with at least one task.

    Example:
        >>> top_priority(torch.tensor([[0.25, 0.50, 0.25], [0.10, 0.50, 0.40]]))
        tensor([ 0, -1,  1])
    """
    if normalized.dim() != 2 or normalized.shape[0] == 0:
        raise ValueError(f"Parameter `normalized` should have shape [T, C_out]. Found {tuple(normalized.shape)}.")
    if normalized.shape[0] == 1:
        return torch.zeros(normalized.shape[1], dtype=torch.int64, device=normalized.device)
    largest, tasks = normalized.topk(2, dim=0)
    leads = largest[0] - largest[1] > tie * largest[0]
    return torch.where(leads, tasks[0], torch.full_like(tasks[0], -1))


def channels_first(tensor: Tensor, *, groups: int = 1, transposed: bool = False, batch_dims: int = 0) -> Tensor:
    """A weight with its output channels in front: ``[..., C_out, C_in / groups, ...]``.

    A view, except for a transposed convolution in groups, whose output channels don't lie on one dimension.

    Args:
        tensor: A weight, or T gradients of it with ``batch_dims=1``.
        groups: Of a grouped convolution.
        transposed: Whether the weight is ``[C_in, C_out / groups, ...]``, as transposed convolutions store
            it.
        batch_dims: Leading dimensions to leave alone.

    Returns:
        The same numbers, output channel first.
    """
    if not transposed:
        return tensor
    by_group = torch.unflatten(tensor, batch_dims, (groups, -1)).transpose(batch_dims + 1, batch_dims + 2)
    return by_group.flatten(batch_dims, batch_dims + 1)


def _squared_norm(tensor: Tensor) -> Tensor:
    """Over the last dimension, without a temporary of the tensor's size."""
    norm: Tensor = torch.linalg.vector_norm(tensor, dim=-1)
    return norm.square()


def at_least_float32(tensor: Tensor) -> Tensor:
    """Half-precision numbers as float32: sums of squares leave their range."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
