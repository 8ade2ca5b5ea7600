"""A shared trunk and one head per task, and the convention that the lab's trainer relies on."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from torchmto.lab.data.base import Task
from torchmto.lab.models.blocks import fill, resize
from torchmto.structure import active_task, has_split_norms, stacked

Features = Any  # one tensor, or a tuple of feature maps from fine to coarse


class Trunk(nn.Module, ABC):
    """Layers that all tasks share: ``forward(x)`` gives features.

    Attributes:
        channels: Channels of the feature map, or of each map from fine to coarse.
        multiple: The sides of the pictures that the maps show are filled up to multiples of it, right and below.
        statistics: Mean and standard deviation of the inputs that its weights were trained on, where that is known.
    """

    channels: tuple[int, ...]
    multiple: int = 1
    statistics: tuple[tuple[float, ...], tuple[float, ...]] | None = None

    @abstractmethod
    def blocks(self) -> Iterator[nn.Module]:
        """The blocks that gradient checkpointing recomputes, each as a whole."""


class Heads(nn.ModuleDict):
    """One head per task, by the task's name.

    Raises:
        ValueError: If a name can't be part of a state key.
    """

    def __init__(self, heads: Mapping[str, nn.Module]) -> None:
        for name in heads:
            if not name or "." in name or hasattr(nn.ModuleDict, name):
                raise ValueError(
                    "The name of a task should be able to be part of a state key: not empty, no dot, no attribute "
                    f"of a module. Found {name!r}."
                )
        super().__init__(dict(heads))


class MultiTaskModel(nn.Module):
    """A trunk that runs once, and the heads of the tasks that are asked for.

    With norms split by `torchmto.structure.split_norms` the trunk's features differ between tasks: one task runs
    with its own norms, several run as one stacked pass, so no caller needs to care.

    Args:
        trunk: Any module; its output goes to every head as it is.
        heads: One module per task. A dense task's output is resized to the input's height and width.
        tasks: The tasks, in the order of the output.

    Example:
        >>> import torch
        >>> tasks = [Task("digit", "classification", 10), Task("size", "regression", 1)]
        >>> model = MultiTaskModel(nn.Linear(5, 8), {"digit": nn.Linear(8, 10), "size": nn.Linear(8, 1)}, tasks)
        >>> {name: tuple(output.shape) for name, output in model(torch.zeros(2, 5)).items()}
        {'digit': (2, 10), 'size': (2, 1)}
        >>> list(model(torch.zeros(2, 5), ("size",)))
        ['size']
    """

    def __init__(self, trunk: nn.Module, heads: Mapping[str, nn.Module], tasks: Sequence[Task]) -> None:
        super().__init__()
        names = [task.name for task in tasks]
        if sorted(names) != sorted(heads):
            raise ValueError(f"Parameter `heads` should have one head for each of {names}. Found {list(heads)}.")
        self.trunk = trunk
        self.heads = Heads({name: heads[name] for name in names})
        self.tasks = tuple(tasks)
        self._dense = {task.name for task in tasks if task.dense}

    def forward(self, x: Tensor, tasks: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Outputs of the asked tasks.

        Args:
            x: A batch of inputs.
            tasks: Names of tasks; all by default.

        Returns:
            One output per name, in the order asked, shaped as `torchmto.lab.data.base` says.

        Raises:
            ValueError: If a name is unknown.
        """
        names = self.asked(tasks)
        features = self.features(x, names)
        return {name: self.output(name, features[name], x) for name in names}

    def asked(self, tasks: Sequence[str] | None) -> tuple[str, ...]:
        """``tasks``, checked, or all of them."""
        names = tuple(self.heads) if tasks is None else tuple(tasks)
        for name in names:
            if name not in self.heads:
                raise ValueError(f"Parameter `tasks` should hold some of {list(self.heads)}. Found {name!r}.")
        return names

    def features(self, x: Tensor, tasks: Sequence[str]) -> dict[str, Features]:
        """The trunk's features for each task: the same object for all unless norms are split."""
        if not tasks:
            return {}
        if has_split_norms(self.trunk):
            return stacked(self.trunk)(x, tasks)
        return dict.fromkeys(tasks, self.trunk(x))

    def output(self, task: str, features: Features, x: Tensor) -> Tensor:
        """One task's output from its features; maps get the height and width of ``x``."""
        with active_task(task):
            output: Tensor = self.heads[task](features)
        return self.resized(task, output, x)

    def resized(self, task: str, output: Tensor, x: Tensor) -> Tensor:
        """A dense task's output at the height and width of ``x``."""
        if task not in self._dense:
            return output
        filled = fill(x, getattr(self.trunk, "multiple", 1))
        output = resize(output, filled)
        return output if filled is x else output[..., : x.shape[-2], : x.shape[-1]]
