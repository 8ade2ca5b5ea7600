"""Small building blocks: convolution with norm, heads and decoders from feature maps to one task's output."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional


def resize(x: Tensor, like: Tensor) -> Tensor:
    """``x`` at the height and width of ``like``, bilinear."""
    if x.shape[-2:] == like.shape[-2:]:
        return x
    return functional.interpolate(x, like.shape[-2:], mode="bilinear", align_corners=False)


def fill(x: Tensor, multiple: int) -> Tensor:
    """``x`` with zeros right and below, so that its height and width are multiples of a number."""
    below, right = (-side % multiple for side in x.shape[-2:])
    return functional.pad(x, (0, right, 0, below)) if below or right else x


def init_convs(module: nn.Module) -> None:
    """He initialisation of every convolution in ``module``, for the ReLUs that follow."""
    for child in module.modules():
        if isinstance(child, nn.Conv2d):
            nn.init.kaiming_normal_(child.weight, mode="fan_out", nonlinearity="relu")
            if child.bias is not None:
                nn.init.zeros_(child.bias)


class DropPath(nn.Module):
    """Leaves a residual branch out for some samples in training, and scales it for the others by ``1 / (1 - rate)``.

    Args:
        rate: Probability that a sample goes without the branch.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, branch: Tensor) -> Tensor:
        """The branch's output ``[B, ...]``."""
        kept = branch.new_ones(len(branch), *[1] * (branch.dim() - 1))
        return branch * functional.dropout(kept, self.rate, self.training)


class ConvNorm(nn.Sequential):
    """Convolution without bias that keeps the size at stride 1, BatchNorm, and a ReLU unless told otherwise."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int = 3, *, stride: int = 1, dilation: int = 1, relu: bool = True
    ) -> None:
        padding = dilation * (kernel // 2)
        layers: list[nn.Module] = [
            nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation, bias=False),
            nn.BatchNorm2d(outputs),
        ]
        super().__init__(*layers, *([nn.ReLU(inplace=True)] if relu else []))


class PooledHead(nn.Module):
    """A vector from feature maps: averages over a grid of cells of the last map, then a linear layer.

    Args:
        channels: Channels of each map; the last is used.
        outputs: Length of the vector.
        grid: Cells along height and width; 1 forgets where something was.
    """

    def __init__(self, channels: Sequence[int], outputs: int, *, grid: int = 1) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(grid)
        self.linear = nn.Linear(channels[-1] * grid * grid, outputs)

    def forward(self, features: Tensor | Sequence[Tensor]) -> Tensor:
        """``[B, C, H, W]``, or several with the coarsest last, to ``[B, outputs]``."""
        last = features if isinstance(features, Tensor) else features[-1]
        return self.linear(self.pool(last).flatten(1))  # type: ignore[no-any-return]


class DenseHead(nn.Sequential):
    """A map from a feature map of the same size: 3x3 convolution with norm, then 1x1."""

    def __init__(self, channels: int, outputs: int) -> None:
        super().__init__(ConvNorm(channels, channels), nn.Conv2d(channels, outputs, 1))


class MLPDecoder(nn.Module):
    """A 1x1 layer on each stage, all resized to the finest, joined by another two.

    Args:
        channels: Channels of each feature map, fine to coarse.
        outputs: Channels of the output.
        width: Channels inside.

    Source: the decoder of Xie et al., SegFormer, NeurIPS 2021.
    """

    def __init__(self, channels: Sequence[int], outputs: int, *, width: int = 128) -> None:
        super().__init__()
        self.stages = nn.ModuleList([nn.Conv2d(inputs, width, 1) for inputs in channels])
        self.fuse = ConvNorm(width * len(channels), width, 1)
        self.predict = nn.Conv2d(width, outputs, 1)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Feature maps to a map at the finest resolution."""
        maps = [stage(x) for stage, x in zip(self.stages, features, strict=True)]
        joined = torch.cat([resize(x, maps[0]) for x in maps], dim=1)
        return self.predict(self.fuse(joined))  # type: ignore[no-any-return]


class FPNDecoder(nn.Module):
    """A feature pyramid: coarse maps are added to finer ones on the way down, all levels are summed.

    Args:
        channels: Channels of each feature map, fine to coarse.
        outputs: Channels of the output.
        width: Channels inside.

    Source: Lin et al., Feature Pyramid Networks, CVPR 2017; summing the levels as in Kirillov et al., Panoptic
    Feature Pyramid Networks, CVPR 2019, with one convolution per level.
    """

    def __init__(self, channels: Sequence[int], outputs: int, *, width: int = 128) -> None:
        super().__init__()
        self.lateral = nn.ModuleList([nn.Conv2d(inputs, width, 1) for inputs in channels])
        self.smooth = nn.ModuleList([ConvNorm(width, width) for _ in channels])
        self.predict = nn.Conv2d(width, outputs, 1)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Feature maps to a map at the finest resolution."""
        maps = [lateral(x) for lateral, x in zip(self.lateral, features, strict=True)]
        for level in range(len(maps) - 2, -1, -1):
            maps[level] = maps[level] + resize(maps[level + 1], maps[level])
        levels = [smooth(x) for smooth, x in zip(self.smooth, maps, strict=True)]
        total = levels[0]
        for level in levels[1:]:
            total = total + resize(level, total)
        return self.predict(total)  # type: ignore[no-any-return]


class DeepLabDecoder(nn.Module):
    """Parallel dilated convolutions on the coarsest map (ASPP), joined with the finest map.

    Args:
        channels: Channels of each feature map, fine to coarse.
        outputs: Channels of the output.
        width: Channels inside.
        dilations: Of the 3x3 convolutions.

    Source: Chen et al., Encoder-Decoder with Atrous Separable Convolution (DeepLabv3+), ECCV 2018. Deviations:
    ordinary convolutions; no norm after global pooling, where a batch of one has no variance.
    """

    def __init__(
        self, channels: Sequence[int], outputs: int, *, width: int = 128, dilations: Sequence[int] = (6, 12, 18)
    ) -> None:
        super().__init__()
        coarse, fine = channels[-1], channels[0]
        self.branches = nn.ModuleList(
            [ConvNorm(coarse, width, 1), *(ConvNorm(coarse, width, dilation=rate) for rate in dilations)]
        )
        self.scene = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(coarse, width, 1), nn.ReLU(inplace=True))
        self.join = ConvNorm(width * (len(dilations) + 2), width, 1)
        self.reduce = ConvNorm(fine, max(width // 4, 1), 1)
        self.refine = ConvNorm(width + max(width // 4, 1), width)
        self.predict = nn.Conv2d(width, outputs, 1)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Feature maps to a map at the finest resolution."""
        coarse, fine = features[-1], features[0]
        context = [branch(coarse) for branch in self.branches]
        context.append(self.scene(coarse).expand(-1, -1, *coarse.shape[-2:]))
        x = resize(self.join(torch.cat(context, dim=1)), fine)
        return self.predict(self.refine(torch.cat([x, self.reduce(fine)], dim=1)))  # type: ignore[no-any-return]


class LinearDecoder(nn.Module):
    """One 1x1 layer on all stages, resized to the finest.

    Args:
        channels: Channels of each feature map, fine to coarse.
        outputs: Channels of the output.
        width: Not used.

    Source: the head of the released code of "Selective Task Group Updates" (arXiv 2502.11986).
    """

    def __init__(self, channels: Sequence[int], outputs: int, *, width: int = 128) -> None:
        super().__init__()
        self.predict = nn.Conv2d(sum(channels), outputs, 1)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Feature maps to a map at the finest resolution."""
        return self.predict(torch.cat([resize(x, features[0]) for x in features], dim=1))  # type: ignore[no-any-return]


DECODERS = {"mlp": MLPDecoder, "fpn": FPNDecoder, "deeplab": DeepLabDecoder, "linear": LinearDecoder}
