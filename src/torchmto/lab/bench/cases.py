"""The models that are timed, in plain PyTorch: a shared trunk, one head and one target per task."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass
class Case:
    """One model with one batch.

    Attributes:
        trunk: The shared part.
        heads: One per task.
        inputs: The batch.
        targets: One tensor per task: class indices by default.
        criterion: (outputs, targets) -> loss.
    """

    trunk: nn.Module
    heads: nn.ModuleList
    inputs: Tensor
    targets: list[Tensor]
    criterion: Callable[[Tensor, Tensor], Tensor] = nn.functional.cross_entropy

    @property
    def num_tasks(self) -> int:
        """K."""
        return len(self.heads)

    @property
    def num_shared(self) -> int:
        """P, the number of shared parameters' elements."""
        return sum(p.numel() for p in self.trunk.parameters())

    def parameters(self) -> list[nn.Parameter]:
        """All parameters, the trunk's first."""
        return [*self.trunk.parameters(), *self.heads.parameters()]

    def loss(self, task: int, features: Tensor) -> Tensor:
        """The loss of one task."""
        return self.criterion(self.heads[task](features), self.targets[task])

    def losses(self) -> list[Tensor]:
        """The losses of all tasks, from one forward."""
        features = self.trunk(self.inputs)
        return [self.loss(task, features) for task in range(self.num_tasks)]


def _mlp(num_tasks: int, device: torch.device) -> Case:
    """1.0M parameters, batch 64."""
    trunk = nn.Sequential(
        nn.Linear(256, 700), nn.ReLU(), nn.Linear(700, 700), nn.ReLU(), nn.Linear(700, 512), nn.ReLU()
    )
    return _with_linear_heads(trunk, 512, torch.randn(64, 256), num_tasks, device)


def _mlp512(num_tasks: int, device: torch.device) -> Case:
    """1.3M parameters, five layers of 512, batch 64."""
    trunk = nn.Sequential(*[layer for _ in range(5) for layer in (nn.Linear(512, 512), nn.ReLU())])
    return _with_linear_heads(trunk, 512, torch.randn(64, 512), num_tasks, device)


def _pinn(num_tasks: int, device: torch.device) -> Case:
    """480 parameters, 2-20-20-1, batch 64: what a step costs whatever the network."""
    trunk = nn.Sequential(nn.Linear(2, 20), nn.Tanh(), nn.Linear(20, 20), nn.Tanh()).to(device)
    heads = nn.ModuleList([nn.Linear(20, 1) for _ in range(num_tasks)]).to(device)
    targets = [torch.randn(64, 1, device=device) for _ in range(num_tasks)]
    return Case(trunk, heads, torch.randn(64, 2, device=device), targets, nn.functional.mse_loss)


def _conv(num_tasks: int, device: torch.device) -> Case:
    """2.8M parameters: eight 3 x 3 convolutions with batch norms, 64 x 64 pixels, batch 16."""
    shapes = ((64, 1), (64, 2), (128, 2), (256, 2), (256, 1), (256, 1), (256, 1), (256, 1))
    trunk = nn.Sequential(*_convolutions(3, shapes), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return _with_linear_heads(trunk, 256, torch.randn(16, 3, 64, 64), num_tasks, device)


def _convolutions(channels: int, shapes: Iterable[tuple[int, int]]) -> list[nn.Module]:
    """3 x 3 with batch norms, from so many channels; each with its width and stride."""
    layers: list[nn.Module] = []
    for width, stride in shapes:
        layers += [nn.Conv2d(channels, width, 3, stride, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
        channels = width
    return layers


class _Transformer(nn.Module):
    """A pre-norm encoder over tokens."""

    def __init__(self, tokens: int, width: int, layers: int, length: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(tokens, width)
        self.places = nn.Parameter(torch.randn(length, width) * 0.02)
        layer = nn.TransformerEncoderLayer(width, 8, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden: Tensor = self.encoder(self.tokens(tokens) + self.places)
        normed: Tensor = self.norm(hidden.mean(dim=1))
        return normed


def _transformer(num_tasks: int, device: torch.device) -> Case:
    """25M parameters: 8 layers of width 480, 64 tokens, batch 4."""
    trunk = _Transformer(tokens=5000, width=480, layers=8, length=64)
    return _with_linear_heads(trunk, 480, torch.randint(0, 5000, (4, 64)), num_tasks, device)


class _SegNet(nn.Module):
    """The SegNet of the NYUv2 experiments: a VGG-16 with batch norms and its mirror image, unpooling by indices."""

    WIDTHS = (64, 128, 256, 512, 512)
    DEPTHS = (2, 2, 3, 3, 3)

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        channels = 3
        for width, depth in zip(self.WIDTHS, self.DEPTHS, strict=True):
            self.down.append(nn.Sequential(*_convolutions(channels, [(width, 1)] * depth)))
            channels = width
        for level in reversed(range(5)):
            out = self.WIDTHS[max(level - 1, 0)]
            self.up.append(nn.Sequential(*_convolutions(channels, [(out, 1)] * self.DEPTHS[level])))
            channels = out

    def forward(self, x: Tensor) -> Tensor:
        places = []
        for stage in self.down:
            x, indices = nn.functional.max_pool2d(stage(x), 2, return_indices=True)
            places.append(indices)
        for stage in self.up:
            x = stage(nn.functional.max_unpool2d(x, places.pop(), (2, 2)))
        return x


def _segnet(num_tasks: int, device: torch.device, height: int = 288, width: int = 384) -> Case:
    """25M parameters, NYUv2's 288 x 384 pixels, batch 2, 13 classes per pixel."""
    heads = nn.ModuleList([nn.Conv2d(64, 13, 1) for _ in range(num_tasks)])
    inputs = torch.randn(2, 3, height, width)
    targets = [torch.randint(0, 13, (2, height, width), device=device) for _ in range(num_tasks)]
    return Case(_SegNet().to(device), heads.to(device), inputs.to(device), targets)


def _segnet_third(num_tasks: int, device: torch.device) -> Case:
    """The same on a third of the height and width, for a processor's patience."""
    return _segnet(num_tasks, device, 96, 128)


def _with_linear_heads(trunk: nn.Module, width: int, inputs: Tensor, num_tasks: int, device: torch.device) -> Case:
    heads = nn.ModuleList([nn.Linear(width, 10) for _ in range(num_tasks)])
    targets = [torch.randint(0, 10, (len(inputs),), device=device) for _ in range(num_tasks)]
    return Case(trunk.to(device), heads.to(device), inputs.to(device), targets)


CASES: dict[str, Callable[[int, torch.device], Case]] = {
    "mlp": _mlp,
    "mlp512": _mlp512,
    "pinn": _pinn,
    "conv": _conv,
    "transformer": _transformer,
    "segnet": _segnet,
    "segnet_third": _segnet_third,
}


def make_case(name: str, num_tasks: int, device: str = "cpu", seed: int = 0) -> Case:
    """Build a case.

    Args:
        name: One of `CASES`.
        num_tasks: K.
        device: Where it runs.
        seed: Of the weights and the batch.
    """
    torch.manual_seed(seed)
    return CASES[name](num_tasks, torch.device(device))
