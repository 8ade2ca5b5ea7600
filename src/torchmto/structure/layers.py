"""A shared conv or linear layer together with the norms that give its channels their priorities."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.func import functional_call

from torchmto.checks import check_choice
from torchmto.gradients.ranks import whole
from torchmto.gradients.rows import wide_dtype
from torchmto.gradients.torch_private import InstanceNorm, NormBase
from torchmto.structure.priority import Degenerate, channel_dots, group_coefficients, sum_of_products, weighted_channels
from torchmto.structure.strength import MEASURES, Measure, channels_first, gradient_strength, scaled_strength
from torchmto.task_norms import SplitNorm

_OFFSETS: WeakKeyDictionary[nn.Module, float] = WeakKeyDictionary()
"""What norms add to their weights, as far as it was looked at."""


@dataclass(frozen=True, eq=False)
class StructuredLayer:
    """A layer whose output channels are grouped by the task that leads them.

    Attributes:
        name: Path of the layer in the model; ``<path>.in_proj`` for the packed projections of an attention.
        weight: The shared parameter.
        bias: The shared bias, whose entries follow their channels; None if the layer has none.
        norm_out: The norm that the layer's output goes through, if any.
        norm_in: The norm that the layer's input comes from, if any.
        groups: Of a grouped convolution.
        transposed: Whether the output channels lie on dimension 1 of the weight (transposed convolutions).
        spatial: Whether the layer is a convolution, so that its channels are dimension 1 of its output.
        source: How the pair was found: ``"explicit"``, ``"fx"``, ``"recorded"`` or ``"module order"``.
        out_start: Where ``norm_out`` takes a concatenation: its first channel that is one of the layer's.
    """

    name: str
    weight: nn.Parameter
    bias: nn.Parameter | None
    norm_out: nn.Module | None
    norm_in: nn.Module | None
    groups: int = 1
    transposed: bool = False
    spatial: bool = False
    source: str = "explicit"
    out_start: int | None = None

    @property
    def num_channels(self) -> int:
        """The number of output channels."""
        return self.weight.shape[1] * self.groups if self.transposed else self.weight.shape[0]

    @property
    def num_inputs(self) -> int:
        """The number of input channels."""
        return self.weight.shape[0] if self.transposed else self.weight.shape[1] * self.groups

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        """The weight and, if there is one, the bias."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    def strengths(
        self, tasks: Sequence[str], *, measure: Measure = "parameters", task_grads: Tensor | None = None
    ) -> Tensor:
        """Every task's strength of every output channel, from what the norms hold now.

        Args:
            tasks: T names. A norm that isn't split serves all of them.
            measure: ``"parameters"``, the paper's; ``"gradients"`` or ``"saliency"``.
            task_grads: ``[T, *weight.shape]``, needed by the other two measures.

        Returns:
            ``[T, C_out]``, without a graph.

        Raises:
            ValueError: An unknown measure, or missing gradients.
        """
        check_choice("measure", measure, MEASURES)
        if measure == "parameters":
            out_scale = None if self.norm_out is None else self._scales(self.norm_out, tasks, incoming=False)
            in_scale = None if self.norm_in is None else self._scales(self.norm_in, tasks, incoming=True)
            strength = scaled_strength(
                whole(self.weight), out_scale, in_scale, groups=self.groups, transposed=self.transposed
            )
            return strength.expand(len(tasks), -1)
        if task_grads is None:
            raise ValueError(f"Parameter `task_grads` is needed for `measure = {measure!r}`. Found None.")
        grads = channels_first(task_grads, groups=self.groups, transposed=self.transposed, batch_dims=1)
        weight = channels_first(self.weight, groups=self.groups, transposed=self.transposed)
        return gradient_strength(grads, weight if measure == "saliency" else None)

    def coefficients(self, task_grads: Sequence[Tensor], top: Tensor, *, degenerate: Degenerate = "sum") -> Tensor:
        """Phase 2's multiplier of each task's gradient of each channel.

        Args:
            task_grads: For each of :attr:`parameters`, the tasks' gradients ``[T, *shape]``.
            top: int64 ``[C_out]``.
            degenerate: See :func:`torchmto.structure.group_coefficients`.

        Returns:
            ``[T, C_out]``.
        """
        return group_coefficients(self.dots(task_grads, top), top, degenerate=degenerate)

    def dots(self, task_grads: Sequence[Tensor], top: Tensor) -> Tensor:
        """Inner products of every task's gradient with the leading task's, channel by channel, ``[T, C_out]``."""
        weight, *bias = task_grads
        dots = channel_dots(channels_first(weight, groups=self.groups, transposed=self.transposed, batch_dims=1), top)
        for grads in bias:
            dots = dots + channel_dots(grads, top)
        return dots

    def combine(self, task_grads: Sequence[Tensor], coefficients: Tensor) -> list[Tensor]:
        """The layer's combined gradients: for each of :attr:`parameters` a tensor of its shape.

        Args:
            task_grads: For each of :attr:`parameters`, the tasks' gradients ``[T, *shape]``.
            coefficients: ``[T, C_out]`` from :meth:`coefficients`.
        """
        weight, *bias = task_grads
        if self.transposed:
            by_group = torch.unflatten(coefficients, 1, (self.groups, 1, -1))
            per_weight = by_group.expand(-1, -1, self.num_inputs // self.groups, -1).flatten(1, 2)
            kernel = [1] * (weight.dim() - 3)
            combined = sum_of_products(weight, per_weight.reshape(*per_weight.shape, *kernel))
        else:
            combined = weighted_channels(weight, coefficients)
        return [combined, *(weighted_channels(grads, coefficients) for grads in bias)]

    def _scales(self, norm: nn.Module, tasks: Sequence[str], *, incoming: bool) -> Tensor:
        copies = [norm.copy_for(task) if isinstance(norm, SplitNorm) else norm for task in tasks]
        channels = self.num_inputs if incoming else self.num_channels
        scales = [
            norm_scale(norm, self.weight.device, spatial=self.spatial, with_variance=not incoming) for norm in copies
        ]
        places = norm_places(norm, channels, None if incoming else self.out_start, spatial=self.spatial)
        return torch.stack(scales)[:, places.to(scales[0].device)]


def norm_scale(norm: nn.Module, device: torch.device, *, spatial: bool = True, with_variance: bool = True) -> Tensor:
    """What a norm multiplies each channel by, as far as it differs between channels.

    BatchNorm: ``gamma / sqrt(running_var + eps)``; GroupNorm, and what has no running statistics, the same with the
    tracked variance of the channel's group; LayerNorm, RMSNorm and others: ``gamma``, the scale per token or example
    being common to all channels. Where a norm scales by ``1 + weight`` (Gemma's RMSNorm), ``gamma`` is that.

    Args:
        norm: One norm, not a split one.
        device: Where to put the result.
        spatial: For a LayerNorm over several dimensions, whether the channel is the first or the last of
            them.
        with_variance: False gives ``gamma`` alone, the size of the channels that leave the norm.

    Returns:
        ``[C]``, in float64 where the device has it.
    """
    dtype = wide_dtype(device)
    gamma = _gamma(norm)
    scale = torch.ones(norm_channels(norm, spatial=spatial), device=device, dtype=dtype)
    if gamma is not None:
        wide = whole(gamma.detach()).to(device, dtype) + _offset(norm)
        if wide.dim() > 1:
            others = tuple(range(1, wide.dim())) if spatial else tuple(range(wide.dim() - 1))
            wide = wide.square().mean(dim=others).sqrt()
        scale = wide
    if with_variance:
        variance = getattr(norm, "running_var", None)
        if variance is None:
            variance = getattr(norm, "running_group_var", None)
        if variance is not None:
            wide_variance = variance.detach().to(device, dtype).repeat_interleave(scale.shape[0] // variance.shape[0])
            scale = scale / (wide_variance + float(getattr(norm, "eps", 1e-5))).sqrt()
    return scale


def norm_channels(norm: nn.Module, *, spatial: bool = True) -> int:
    """How many channels a norm (or a split norm's copies) scales."""
    if isinstance(norm, SplitNorm):
        norm = norm.copy_for(norm.task_names[0])
    if isinstance(norm, NormBase):
        return int(norm.num_features)  # type: ignore[arg-type]
    if isinstance(norm, nn.GroupNorm):
        return norm.num_channels
    if isinstance(norm, (nn.LayerNorm, nn.RMSNorm)):
        shape = norm.normalized_shape
        return shape[0] if spatial and len(shape) > 1 else shape[-1]
    gamma = _gamma(norm)
    return 0 if gamma is None else gamma.shape[0]


def norm_places(norm: nn.Module, channels: int, start: int | None = None, *, spatial: bool) -> Tensor:
    """Which of a norm's channels each of a layer's is, int64; ``start`` is that of the first in a concatenation.

    A norm over the width of a head serves every head; one over maps that a linear layer put out as one vector each channel's.
    """
    places, width = torch.arange(channels, device="cpu"), norm_channels(norm, spatial=spatial)
    if start is not None or channels == width:
        return places + (start or 0)
    if isinstance(norm, SplitNorm):
        norm = norm.copy_for(norm.task_names[0])
    return places // (channels // width) if isinstance(norm, (NormBase, nn.GroupNorm)) else places % width


def norm_axes(norm: nn.Module, *, spatial: bool) -> tuple[int, ...]:
    """The dimensions that a norm's channels may be in its input; of another library's it is the second or the last."""
    if isinstance(norm, SplitNorm):
        norm = norm.copy_for(norm.task_names[0])
    if isinstance(norm, (NormBase, nn.GroupNorm)):
        return (1, 0) if isinstance(norm, InstanceNorm) else (1,)  # a single sample has no dimension of samples
    if type(norm) in (nn.LayerNorm, nn.RMSNorm):
        return (-len(norm.normalized_shape) if spatial else -1,)  # type: ignore[arg-type]
    return (1, -1)


def _gamma(norm: nn.Module) -> Tensor | None:
    own = dict(norm.named_parameters(recurse=False))
    named: Tensor | None = next((own[name] for name in ("weight", "gamma", "scale") if name in own), None)
    if named is None and isinstance(norm, (NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)):
        # Computed, where it is parametrized; else there is none.
        named = getattr(norm, "weight", None)
    elif named is None:
        named = next(iter(own.values()), None)
    return named


def _offset(norm: nn.Module) -> float:
    """What a norm adds to its weight: its outputs for weights of 0 and of 1, all other parameters being 0, tell."""
    gamma = _gamma(norm)
    if gamma is None or type(norm).forward.__module__.startswith("torch."):
        return 0.0
    if norm not in _OFFSETS:
        _OFFSETS[norm] = 0.0
        # Channels may be the last dimension, or the one after the first.
        inputs = torch.linspace(-1, 2, 2 * gamma.numel()).to(gamma.device, gamma.dtype).view(2, *gamma.shape)
        for shape in (inputs.shape, (*inputs.shape, 1), (*inputs.shape, 1, 1), (*inputs.shape, 1, 1, 1)):
            with contextlib.suppress(Exception), torch.no_grad():
                zero, one = (_with_weight(norm, gamma, weight, inputs.view(shape)) for weight in (0.0, 1.0))
                scaled = zero != one
                if zero.shape == shape and bool(scaled.any()):
                    _OFFSETS[norm] = float((zero[scaled] / (one - zero)[scaled]).median())
                    break
    return _OFFSETS[norm]


def _with_weight(norm: nn.Module, gamma: Tensor, weight: float, x: Tensor) -> Tensor:
    """What a norm makes of ``x`` with another number for all of ``gamma``, and 0 for its other parameters."""
    state = {name: buffer.clone() for name, buffer in norm.named_buffers()}
    for name, parameter in norm.named_parameters():
        number = weight if parameter is gamma else 0.0
        state[name] = torch.full(parameter.shape, number, dtype=parameter.dtype, device=parameter.device)
    output: Tensor = functional_call(norm, state, x)
    return output
