"""A multi-layer perceptron for vectors."""

from collections.abc import Iterator, Sequence
from math import prod

from torch import Tensor, nn

from torchmto.lab.data.base import Task
from torchmto.lab.models.base import MultiTaskModel, Trunk

_NORMS: dict[str, type[nn.LayerNorm] | type[nn.BatchNorm1d]] = {"layer": nn.LayerNorm, "batch": nn.BatchNorm1d}


class MLPTrunk(Trunk):
    """Linear layers with norm and ReLU; the input is flattened.

    Args:
        inputs: Number of input features.
        widths: Width of each layer.
        norm: ``"layer"``, ``"batch"`` (needs two samples per batch in training) or None.
        dropout: After each layer.
    """

    def __init__(
        self, inputs: int, widths: Sequence[int] = (128, 128), *, norm: str | None = "layer", dropout: float = 0.0
    ) -> None:
        super().__init__()
        if norm is not None and norm not in _NORMS:
            raise ValueError(f"Parameter `norm` should be 'layer', 'batch' or None. Found `norm = {norm!r}`.")
        if not widths:
            raise ValueError("Parameter `widths` should hold at least one width. Found none.")
        self.layers = nn.Sequential()
        for before, width in zip((inputs, *widths), widths, strict=False):
            layers = [
                nn.Linear(before, width),
                *([_NORMS[norm](width)] if norm else []),
                nn.ReLU(),
                *([nn.Dropout(dropout)] if dropout else []),
            ]
            self.layers.append(nn.Sequential(*layers))
        self.channels = (widths[-1],)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, ...]`` to ``[B, widths[-1]]``."""
        return self.layers(x.flatten(1))  # type: ignore[no-any-return]

    def blocks(self) -> Iterator[nn.Module]:
        """Each layer with its norm."""
        yield from self.layers


def mlp(
    tasks: Sequence[Task],
    input_shape: Sequence[int],
    *,
    widths: Sequence[int] = (128, 128),
    norm: str | None = "layer",
    dropout: float = 0.0,
) -> MultiTaskModel:
    """A perceptron with one linear head per task; for options see `MLPTrunk`."""
    if dense := [task.name for task in tasks if task.dense]:
        raise ValueError(f"The model `mlp` has no output maps, which the dense tasks {dense} need.")
    trunk = MLPTrunk(prod(input_shape), widths, norm=norm, dropout=dropout)
    return MultiTaskModel(trunk, {task.name: nn.Linear(widths[-1], task.channels) for task in tasks}, tasks)
