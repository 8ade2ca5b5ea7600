"""MTI-Net: tasks inform each other at every scale."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchmto.lab.data.base import Task
from torchmto.lab.models.base import Heads, MultiTaskModel, Trunk
from torchmto.lab.models.blocks import ConvNorm, MLPDecoder, resize
from torchmto.lab.models.hrnet import BasicBlock
from torchmto.structure import active_task, has_split_norms


class _InitialPrediction(nn.Module):
    """At one scale: features for each task from the trunk's map and what the coarser scale passes on."""

    def __init__(self, channels: int, extra: int, tasks: Sequence[Task]) -> None:
        super().__init__()
        refine = {t.name: [BasicBlock(channels + extra, channels), BasicBlock(channels, channels)] for t in tasks}
        self.refine = Heads({task: nn.Sequential(*blocks) for task, blocks in refine.items()})
        self.predict = Heads({task.name: nn.Conv2d(channels, task.channels, 1) for task in tasks})

    def forward(self, x: Tensor, passed_on: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        def joined(task: str) -> Tensor:
            return x if passed_on is None else torch.cat([x, resize(passed_on[task], x)], dim=1)

        return {task: refine(joined(task)) for task, refine in self.refine.items()}


class _Propagation(nn.Module):
    """Feature propagation from one scale to the next finer: what all tasks share, weighted for each, plus its own."""

    def __init__(self, channels: int, tasks: Sequence[str]) -> None:
        super().__init__()
        total = channels * len(tasks)
        self.shared = nn.Sequential(ConvNorm(total, channels, 1), BasicBlock(channels, channels))
        self.attention = nn.Conv2d(total, total, 1)
        self.gates = Heads({task: _ChannelGate(channels) for task in tasks})

    def forward(self, features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        joined = torch.cat(list(features.values()), dim=1)
        shared = self.shared(joined)
        weights = self.attention(joined).unflatten(1, (len(features), -1)).softmax(dim=1).unbind(dim=1)
        return {
            task: self.gates[task](weight * shared) + own
            for (task, own), weight in zip(features.items(), weights, strict=True)
        }


class _ChannelGate(nn.Module):
    """Scales each channel by a factor in (0, 1) computed from all channels' averages (squeeze and excitation)."""

    def __init__(self, channels: int, reduction: int = 4) -> None:
        super().__init__()
        inner = max(channels // reduction, 1)
        self.scale = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(channels, inner, 1),
            nn.ReLU(inplace=True),
            nn.Conv2d(inner, channels, 1),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale(x)  # type: ignore[no-any-return]


class _Distillation(nn.Module):
    """One task's features at one scale plus what it lets through, by spatial attention, from every other task."""

    def __init__(self, channels: int, others: Sequence[str]) -> None:
        super().__init__()
        self.gates = Heads({task: nn.Conv2d(channels, channels, 3, padding=1) for task in others})
        self.messages = Heads({task: nn.Conv2d(channels, channels, 3, padding=1) for task in others})

    def forward(self, own: Tensor, features: Mapping[str, Tensor]) -> Tensor:
        for task, gate in self.gates.items():
            own = own + gate(features[task]).sigmoid() * self.messages[task](features[task])
        return own


class MTINet(MultiTaskModel):
    """Multi-scale multi-modal distillation between dense tasks on any trunk with several feature maps.

    From the coarsest map to the finest: features for each task (with a first prediction), then, at each scale, every
    task takes from the others what attention lets through. A task's head joins its distilled features of all scales.
    A task's output thus depends on the other tasks' layers. With norms split in the trunk it still comes from the
    features of its own pass alone, so asking for one task or for all gives the same.

    Args:
        trunk: Gives feature maps, fine to coarse.
        tasks: Dense tasks.
        width: Channels inside the heads.

    Source: Vandenhende et al., MTI-Net: Multi-Scale Task Interaction Networks, ECCV 2020. Deviations: heads join the
    scales by 1x1 convolutions as `MLPDecoder` does; attention between scales is per channel and pixel.
    """

    def __init__(self, trunk: Trunk, tasks: Sequence[Task], *, width: int = 128) -> None:
        names = [task.name for task in tasks]
        if sparse := [task.name for task in tasks if not task.dense]:
            raise ValueError(f"The decoder `mti` is for dense tasks. Found {sparse}, which aren't dense.")
        channels = trunk.channels
        super().__init__(trunk, {task.name: MLPDecoder(channels, task.channels, width=width) for task in tasks}, tasks)
        coarser = (*channels[1:], 0)
        self.initial: Any = nn.ModuleList(
            [_InitialPrediction(own, extra, tasks) for own, extra in zip(channels, coarser, strict=True)]
        )
        self.propagation = nn.ModuleList([_Propagation(own, names) for own in channels[1:]])
        others = {name: [other for other in names if other != name] for name in names}
        self.distillation = Heads(
            {name: nn.ModuleList([_Distillation(own, others[name]) for own in channels]) for name in names}
        )

    def forward(  # type: ignore[override]
        self, x: Tensor, tasks: Sequence[str] | None = None
    ) -> dict[str, Tensor] | dict[str, tuple[Tensor, ...]]:
        """Outputs of the asked tasks; see `MultiTaskModel.forward`.

        Args:
            x: A batch of images.
            tasks: Names of tasks; all by default.

        Returns:
            One output per name. In training, a tuple per name: the output, and the first predictions behind it at every
            scale, fine to coarse, at the height and width of ``x``, all of which have the task's loss.
        """
        names = self.asked(tasks)
        trunk_features = self.features(x, names)
        split = has_split_norms(self)
        outputs: dict[str, Any] = {}
        by_task: list[dict[str, Tensor]] = []
        for name in names:
            with active_task(name):
                if split or not by_task:
                    by_task = self._task_features(trunk_features[name])
                layers: Any = self.distillation[name]
                distilled = [distil(own[name], own) for distil, own in zip(layers, by_task, strict=True)]
                output = self.resized(name, self.heads[name](distilled), x)
                # The paper supervises the first predictions, too.
                scales = zip(self.initial, by_task, strict=True)
                first = (self.resized(name, scale.predict[name](features[name]), x) for scale, features in scales)
                outputs[name] = (output, *first) if self.training else output
        return outputs

    def _task_features(self, maps: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        """Features of all tasks at every scale, fine to coarse."""
        passed_on: dict[str, Tensor] | None = None
        found: list[dict[str, Tensor]] = []
        for scale in range(len(maps) - 1, -1, -1):
            features: dict[str, Tensor] = self.initial[scale](maps[scale], passed_on)
            found.insert(0, features)
            if scale > 0:
                passed_on = self.propagation[scale - 1](features)
        return found
