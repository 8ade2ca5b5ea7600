"""What every data set of the lab offers: tasks, samples with targets, and three splits.

A *batch* is ``{"input": Tensor, "targets": {task name: Tensor}}``. Target tensors by the task's kind, and how a missing value
looks, are in the table of docs/your-problem.md, *Kinds of tasks*.

A task without a label for a sample (disjoint data sets, partial labels) has its kind's missing value there,
so the tensors of a batch always have the full batch size.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypedDict, get_args

import torch
from torch import Tensor
from torch.utils.data import Dataset

from torchmto.checks import check_choice, check_integer, found

Kind = Literal[
    "classification", "binary", "regression", "segmentation", "depth", "normals", "edges", "saliency", "map", "own"
]
KINDS: tuple[str, ...] = tuple(kind for kind in get_args(Kind) if kind != "own")
"""The kinds that have losses and metrics by default."""
DENSE_KINDS = frozenset({"segmentation", "depth", "normals", "edges", "saliency", "map"})
Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
_MISSING: dict[str, float] = {
    "classification": -1,
    **dict.fromkeys(("segmentation", "edges", "saliency"), 255),
    **dict.fromkeys(("depth", "normals"), 0.0),
    **dict.fromkeys(("binary", "regression", "map", "own"), float("nan")),
}


class Batch(TypedDict):
    """One or many samples: the model's input and one target per task."""

    input: Tensor
    targets: dict[str, Tensor]


@dataclass(frozen=True)
class Task:
    """One task: what a model has to put out, and how its targets are to be read.

    Args:
        name: The key in ``targets``, in losses and in tables.
        kind: What the target is: the table *Kinds of tasks* in docs/your-problem.md.
        channels: Number of outputs: classes, yes/no questions, or regressed numbers.
        extra: Anything a plot or a metric may want, such as ``{"classes": (...)}``; ``"loss"`` names a loss of the kind to
            use by default.
        unit: Of the values, for tables.

    Example:
        >>> task = Task("segmentation", "segmentation", 13)
        >>> task.ignore_index, task.dense
        (255, True)
    """

    name: str
    kind: Kind
    channels: int = 1
    extra: Mapping[str, Any] = field(default_factory=dict, compare=False)
    unit: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ValueError(found("name", "the non-empty name of a task", self.name))
        check_choice("kind", self.kind, (*KINDS, "own"))
        # Of a segmentation the missing value is a number behind those of the classes.
        most = self.missing if self.kind == "segmentation" else math.inf
        check_integer("channels", self.channels, minimum=1, maximum=most)

    @property
    def missing(self) -> float:
        """The value that marks a missing target; NaN where the kind says NaN."""
        return _MISSING[self.kind]

    @property
    def ignore_index(self) -> int | None:
        """The integer that marks a missing target, or None for kinds that mark it another way."""
        return int(self.missing) if self.kind in {"classification", "segmentation", "edges", "saliency"} else None

    @property
    def dense(self) -> bool:
        """Whether the target is a map over the pixels."""
        return self.kind in DENSE_KINDS

    def valid(self, target: Tensor) -> Tensor:
        """Where ``target`` holds a label.

        Args:
            target: A batch of this task's targets.

        Returns:
            A bool tensor shaped like ``target``; for normals ``[B, 1, H, W]``.
        """
        match self.kind:
            case "binary" | "regression" | "map":
                return torch.isfinite(target)
            case "depth":
                return torch.isfinite(target) & (target > 0)
            case "normals":
                return (target != 0).any(dim=1, keepdim=True)
            case "own":
                return torch.ones(len(target), dtype=torch.bool, device=target.device)
            case _:
                return target != int(self.missing)


def positive(target: Tensor) -> Tensor:
    """Which answers of yes/no kinds are a yes: 1, or what interpolation or smoothing has left of it."""
    return target >= 0.5


def labelled_tasks(batch: Batch, tasks: Sequence[Task]) -> tuple[str, ...]:
    """Names of the tasks with a label for at least one sample of the batch, in the order of ``tasks``."""
    targets = batch["targets"]
    return tuple(t.name for t in tasks if t.name in targets and bool(t.valid(targets[t.name]).any()))


class MultiTaskDataset(Dataset[Batch], ABC):
    """A torch data set that fetches whole batches at once.

    Subclasses implement ``__len__`` and ``batch``; images come as float32 in ``[0, 1]`` (``[B, channels, H,
    W]``), vectors standardised with the statistics of the training split.

    Args:
        tasks: The tasks of every sample.
    """

    def __init__(self, tasks: Sequence[Task]) -> None:
        self.tasks = tuple(tasks)

    @abstractmethod
    def __len__(self) -> int:
        """Number of samples."""

    @abstractmethod
    def batch(self, indices: Tensor) -> Batch:
        """The samples ``indices`` (int64 ``[B]``), in that order."""

    def __getitem__(self, index: int) -> Batch:
        if not -len(self) <= index < len(self):
            raise IndexError(f"Sample {index} of a data set with {len(self)} samples.")
        return self.__getitems__([index % len(self)])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Batch]:
        batch = self.batch(torch.as_tensor(indices, dtype=torch.int64))
        targets = batch["targets"].items()
        return [
            Batch(input=x, targets={name: target[i] for name, target in targets}) for i, x in enumerate(batch["input"])
        ]


class TensorData(MultiTaskDataset):
    """Samples held in memory in a compact type and converted batch by batch.

    Args:
        tasks: The tasks of every sample.
        inputs: ``[N, ...]``. uint8 images become float32 in ``[0, 1]``, anything else float32.
        targets: One ``[N, ...]`` tensor per task in any type; ``batch`` converts to the type its kind asks
            for.

    Raises:
        ValueError: If the targets don't belong to the tasks, or lengths differ.
    """

    def __init__(self, tasks: Sequence[Task], inputs: Tensor, targets: Mapping[str, Tensor]) -> None:
        super().__init__(tasks)
        names = [task.name for task in self.tasks]
        if sorted(names) != sorted(targets):
            raise ValueError(f"Parameter `targets` should have the keys {names}. Found {sorted(targets)}.")
        for name, target in targets.items():
            if len(target) != len(inputs):
                raise ValueError(f"Task `{name}` should have {len(inputs)} targets. Found {len(target)}.")
        self.inputs = inputs
        self.targets = dict(targets)

    def __len__(self) -> int:
        return len(self.inputs)

    def batch(self, indices: Tensor) -> Batch:
        """The samples ``indices``, converted to float32 and int64."""
        return Batch(
            input=as_input(self.inputs.index_select(0, indices)),
            targets={
                task.name: as_target(task, self.targets[task.name].index_select(0, indices)) for task in self.tasks
            },
        )


class Subset(MultiTaskDataset):
    """Some samples of another data set, without a copy.

    Args:
        dataset: Where the samples are.
        indices: Which of them, int64 ``[N]``.
    """

    def __init__(self, dataset: MultiTaskDataset, indices: Tensor) -> None:
        super().__init__(dataset.tasks)
        self.dataset = dataset
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    def batch(self, indices: Tensor) -> Batch:
        """The samples ``indices`` of this subset."""
        return self.dataset.batch(self.indices[indices])


def as_input(stored: Tensor) -> Tensor:
    """A stored input as float32; uint8 images are scaled to ``[0, 1]``."""
    return stored.float().div_(255) if stored.dtype == torch.uint8 else stored.float()


def as_target(task: Task, stored: Tensor) -> Tensor:
    """A batch of stored targets in the type its kind asks for; normals get unit length."""
    if task.kind == "own":
        return stored
    if task.kind in {"classification", "segmentation"}:
        return stored.long()
    if stored.dim() == 1 and task.channels == 1 and not task.dense:
        stored = stored[:, None]
    if task.kind == "normals":
        normals = stored.float()
        return normals * normals.square().sum(dim=1, keepdim=True).clamp(min=1e-12).rsqrt()
    return stored.float()


Augment = Callable[[Batch, Sequence[Task], Tensor], Batch]
"""``(batch, tasks, sample keys) -> batch``."""
