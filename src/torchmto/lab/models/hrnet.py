"""HRNet: branches at four resolutions that keep exchanging what they see."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from torchmto.lab.models.base import Trunk
from torchmto.lab.models.blocks import ConvNorm, init_convs
from torchmto.lab.models.weights import load_weights


class _Residual(nn.Module):
    """Convolutions with norm and ReLUs between, plus a shortcut."""

    def __init__(self, *convs: tuple[int, int, int]) -> None:
        """``convs``: channels before, channels after and kernel of each."""
        super().__init__()
        self.depth = len(convs)
        for number, (before, after, kernel) in enumerate(convs, start=1):
            self.add_module(f"conv{number}", nn.Conv2d(before, after, kernel, padding=kernel // 2, bias=False))
            self.add_module(f"bn{number}", nn.BatchNorm2d(after))
        inputs, outputs = convs[0][0], convs[-1][1]
        self.downsample = None if inputs == outputs else ConvNorm(inputs, outputs, 1, relu=False)

    def forward(self, x: Tensor) -> Tensor:
        """The convolutions' output plus the shortcut's."""
        shortcut = x if self.downsample is None else self.downsample(x)
        for number in range(1, self.depth + 1):
            x = self.get_submodule(f"bn{number}")(self.get_submodule(f"conv{number}")(x))
            x = functional.relu(x if number < self.depth else x + shortcut)
        return x


class BasicBlock(_Residual):
    """Two 3x3 convolutions."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__((inputs, width, 3), (width, width, 3))


class Bottleneck(_Residual):
    """A 3x3 convolution between two 1x1, the last four times as wide."""

    expansion = 4

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__((inputs, width, 1), (width, width, 3), (width, width * self.expansion, 1))


class _Exchange(nn.Module):
    """Every branch becomes the sum of all branches at its resolution."""

    def __init__(self, widths: Sequence[int], blocks: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            [nn.Sequential(*(BasicBlock(width, width) for _ in range(blocks))) for width in widths]
        )
        places = range(len(widths))
        paths = [nn.ModuleList([_path(widths, source, target) for source in places]) for target in places]
        self.fuse_layers = nn.ModuleList(paths)

    def forward(self, xs: Sequence[Tensor]) -> list[Tensor]:
        xs = [branch(x) for branch, x in zip(self.branches, xs, strict=True)]
        fused = []
        for target, paths in enumerate(self.fuse_layers):
            assert isinstance(paths, nn.ModuleList)
            size = xs[target].shape[-2:]
            total: Any = 0
            for path, x in zip(paths, xs, strict=True):
                y = path(x)
                total = total + (y if y.shape[-2:] == size else functional.interpolate(y, size))
            fused.append(functional.relu(total))
        return fused


def _path(widths: Sequence[int], source: int, target: int) -> nn.Module:
    """From one branch to another, up to the nearest-neighbour upsampling that a finer target still needs."""
    if source == target:
        return nn.Identity()
    if source > target:
        return ConvNorm(widths[source], widths[target], 1, relu=False)
    steps = target - source
    return nn.Sequential(
        *(ConvNorm(widths[source], widths[source], stride=2) for _ in range(steps - 1)),
        ConvNorm(widths[source], widths[target], stride=2, relu=False),
    )


class HRNetTrunk(Trunk):
    """HRNet with feature maps at 1/4, 1/8, 1/16 and 1/32 of the input.

    Modules are named as in the authors' release, so their weights load once saved as safetensors. The defaults are those of
    MTI-Net's code, the release's HRNet-W18-C-Small-v2: 3.86 million parameters. HRNet-W18-C has ``modules=(1, 4, 3)`` and
    ``blocks=4``: 9.56 million.

    Args:
        inputs: Channels of the image.
        width: Channels of the finest branch; the others have 2, 4 and 8 times as many.
        modules: Exchange units in stages 2, 3 and 4.
        blocks: Residual blocks per branch and unit, and in stage 1.
        stem: Channels of the first two convolutions, and of stage 1's bottlenecks.
        weights: A ``.safetensors`` file; random weights if None.

    Source: Wang et al., Deep High-Resolution Representation Learning for Visual Recognition, PAMI 2020.
    """

    def __init__(
        self,
        inputs: int = 3,
        *,
        width: int = 18,
        modules: Sequence[int] = (1, 3, 2),
        blocks: int = 2,
        stem: int = 64,
        weights: str | Path | None = None,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, stem, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        self.conv2 = nn.Conv2d(stem, stem, 3, stride=2, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(stem)
        wide = stem * Bottleneck.expansion
        self.layer1 = nn.Sequential(*(Bottleneck(stem if i == 0 else wide, stem) for i in range(blocks)))
        widths = [width * 2**i for i in range(4)]
        self.transition1 = nn.ModuleList(
            [ConvNorm(wide, widths[0]), nn.Sequential(ConvNorm(wide, widths[1], stride=2))]
        )
        self.stage2 = _stage(widths[:2], modules[0], blocks)
        self.transition2 = _one_more(widths[:3])
        self.stage3 = _stage(widths[:3], modules[1], blocks)
        self.transition3 = _one_more(widths)
        self.stage4 = _stage(widths, modules[2], blocks)
        self.channels = tuple(widths)
        init_convs(self)
        if weights is not None:
            load_weights(self, weights)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """``[B, inputs, H, W]`` to four feature maps, fine to coarse."""
        x = functional.relu(self.bn1(self.conv1(x)))
        x = functional.relu(self.bn2(self.conv2(x)))
        x = self.layer1(x)
        xs = self.stage2([transition(x) for transition in self.transition1])
        xs = self.stage3([*xs, self.transition2[-1](xs[-1])])
        xs = self.stage4([*xs, self.transition3[-1](xs[-1])])
        return tuple(xs)

    def blocks(self) -> Iterator[nn.Module]:
        """The residual blocks."""
        return (module for module in self.modules() if isinstance(module, _Residual))


def _stage(widths: Sequence[int], modules: int, blocks: int) -> nn.Sequential:
    return nn.Sequential(*(_Exchange(widths, blocks) for _ in range(modules)))


def _one_more(widths: Sequence[int]) -> nn.ModuleList:
    """The branches go on as they are, and a coarser one starts from the last of them."""
    new = nn.Sequential(ConvNorm(widths[-2], widths[-1], stride=2))
    return nn.ModuleList([*(nn.Identity() for _ in widths[:-1]), new])
