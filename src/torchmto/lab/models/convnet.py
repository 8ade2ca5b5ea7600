"""A small convolutional net for small images, and the SegNet of the dense-prediction literature."""

from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from torchmto.lab.data.base import Task
from torchmto.lab.models.base import MultiTaskModel, Trunk
from torchmto.lab.models.blocks import ConvNorm, DenseHead, PooledHead, init_convs


class ConvNetTrunk(Trunk):
    """3x3 convolutions with BatchNorm and ReLU, and a pooling after each that leaves at least 2 pixels.

    Args:
        inputs: Channels of the image.
        size: Height and width of the image.
        widths: Channels of each layer.
    """

    def __init__(self, inputs: int, size: tuple[int, int], widths: Sequence[int] = (32, 64, 128)) -> None:
        super().__init__()
        if not widths:
            raise ValueError("Parameter `widths` should hold at least one width. Found none.")
        self.layers = nn.Sequential()
        side = min(size)
        for before, width in zip((inputs, *widths), widths, strict=False):
            layer = ConvNorm(before, width)
            if side >= 4:
                layer.append(nn.MaxPool2d(2))
                side //= 2
            self.layers.append(layer)
        self.channels = (widths[-1],)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, inputs, H, W]`` to ``[B, widths[-1], h, w]``."""
        return self.layers(x)  # type: ignore[no-any-return]

    def blocks(self) -> Iterator[nn.Module]:
        """Each convolution with norm and pooling."""
        yield from self.layers


def convnet(
    tasks: Sequence[Task],
    input_shape: Sequence[int],
    *,
    widths: Sequence[int] = (32, 64, 128),
    grid: int = 2,
) -> MultiTaskModel:
    """A small net with one head per task: linear on a grid of pooled cells, or convolutional for a dense task.

    Args:
        tasks: The tasks.
        input_shape: ``(channels, H, W)``.
        widths: Channels of each layer.
        grid: Cells along height and width that a linear head sees; above 1 it can tell left from right.

    Returns:
        The model.
    """
    channels, height, width = input_shape
    trunk = ConvNetTrunk(channels, (height, width), widths)
    return MultiTaskModel(trunk, small_heads(tasks, trunk.channels, grid), tasks)


def small_heads(tasks: Sequence[Task], channels: Sequence[int], grid: int) -> dict[str, nn.Module]:
    """A convolutional head for each dense task, for the others a linear one on a grid of cells of the last map."""

    def head(task: Task) -> nn.Module:
        return DenseHead(channels[-1], task.channels) if task.dense else PooledHead(channels, task.channels, grid=grid)

    return {task.name: head(task) for task in tasks}


def _stage(inputs: int, outputs: int, depth: int) -> nn.Sequential:
    """The convolutions between two poolings of a SegNet."""
    return nn.Sequential(*(ConvNorm(inputs if i == 0 else outputs, outputs) for i in range(depth)))


class SegNetTrunk(Trunk):
    """An encoder as VGG-16's and its mirror image, which puts values back where the maxima were pooled from.

    Args:
        inputs: Channels of the image.
        width: Channels of the first stage; the others have 2, 4, 8 and 8 times as many. 64 is the full size.

    Source: Badrinarayanan et al., SegNet, PAMI 2017; as the shared network of Liu et al., End-to-End Multi-Task
    Learning with Attention (MTAN), CVPR 2019.
    """

    def __init__(self, inputs: int, width: int = 64) -> None:
        super().__init__()
        widths = [width, 2 * width, 4 * width, 8 * width, 8 * width]
        depths = [2, 2, 3, 3, 3]
        self.encoder = nn.ModuleList(map(_stage, [inputs, *widths], widths, depths))
        narrower = [widths[0], *widths[:-1]]
        self.decoder = nn.ModuleList([*map(_stage, widths, narrower, depths)][::-1])
        self.pool = nn.MaxPool2d(2, return_indices=True)
        self.unpool = nn.MaxUnpool2d(2)
        self.channels = (width,)
        init_convs(self)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, inputs, H, W]`` with H, W >= 32 to ``[B, width, H, W]``."""
        trail = []
        for stage in self.encoder:
            x = stage(x)
            size = x.shape[-2:]
            x, indices = self.pool(x)
            trail.append((indices, size))
        for stage, (indices, size) in zip(self.decoder, reversed(trail), strict=True):
            x = stage(self.unpool(x, indices, output_size=size))
        return x

    def blocks(self) -> Iterator[nn.Module]:
        """The stages of encoder and decoder."""
        yield from self.encoder
        yield from self.decoder


def segnet(tasks: Sequence[Task], input_shape: Sequence[int], *, width: int = 64) -> MultiTaskModel:
    """MTAN's SegNet with hard parameter sharing: a 3x3 and a 1x1 convolution per dense task.

    Args:
        tasks: The tasks; one that isn't dense gets a linear head on the averaged features.
        input_shape: ``(channels, H, W)``, both sides at least 32.
        width: Channels of the first stage; 64 is the full size (25 million parameters), 16 a small one.

    Returns:
        The model.
    """
    if min(input_shape[1:]) < 32:
        raise ValueError(
            f"The model `segnet` halves images five times, so both sides should be at least 32. "
            f"Found `input_shape = {tuple(input_shape)}`."
        )
    trunk = SegNetTrunk(input_shape[0], width)

    def head(task: Task) -> nn.Module:
        if not task.dense:
            return PooledHead(trunk.channels, task.channels)
        return nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, task.channels, 1))

    return MultiTaskModel(trunk, {task.name: head(task) for task in tasks}, tasks)
