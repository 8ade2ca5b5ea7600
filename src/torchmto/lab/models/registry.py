"""Ready-made models by name."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from torchmto.checks import check_tasks, found, nearest
from torchmto.lab.data.base import Task
from torchmto.lab.models.base import MultiTaskModel, Trunk
from torchmto.lab.models.bev import bev
from torchmto.lab.models.blocks import DECODERS, PooledHead
from torchmto.lab.models.checkpointing import checkpoint_blocks
from torchmto.lab.models.convnet import convnet, segnet
from torchmto.lab.models.cross_stitch import cross_stitch
from torchmto.lab.models.efficientnet import EfficientNetTrunk
from torchmto.lab.models.hrnet import HRNetTrunk
from torchmto.lab.models.huggingface import BACKBONES, VITS, local_backbone, named_backbone, vit
from torchmto.lab.models.mlp import mlp
from torchmto.lab.models.mtinet import MTINet
from torchmto.lab.models.weights import load_weights
from torchmto.structure import split_norms

Builder = Callable[..., MultiTaskModel]


def with_decoders(trunk: Trunk, tasks: Sequence[Task], *, decoder: str = "mlp", width: int = 128) -> MultiTaskModel:
    """A model from a trunk with several feature maps.

    Args:
        trunk: Gives feature maps, fine to coarse.
        tasks: The tasks; one that isn't dense gets a linear head on the averages of the coarsest map.
        decoder: ``"mlp"``, ``"fpn"``, ``"deeplab"`` or ``"linear"``, one per dense task, or ``"mti"``: MTI-Net's distillation.
        width: Channels inside a decoder.

    Returns:
        The model.

    Raises:
        ValueError: If there is no such decoder.
    """
    if decoder == "mti":
        return MTINet(trunk, tasks, width=width)
    if decoder not in DECODERS:
        known = (*DECODERS, "mti")
        raise ValueError(found("decoder", f"one of {', '.join(known)}", decoder) + nearest(decoder, known))

    def head(task: Task) -> nn.Module:
        if task.dense:
            return DECODERS[decoder](trunk.channels, task.channels, width=width)
        return PooledHead(trunk.channels, task.channels)

    return MultiTaskModel(trunk, {task.name: head(task) for task in tasks}, tasks)


def _named(name: str) -> Builder:
    def build(
        tasks: Sequence[Task],
        input_shape: Sequence[int],
        *,
        decoder: str = "mlp",
        decoder_width: int = 128,
        weights: str | Path | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> MultiTaskModel:
        trunk = named_backbone(name, input_shape, weights=weights, config=config)
        return with_decoders(trunk, tasks, decoder=decoder, width=decoder_width)

    return build


def _vit(name: str) -> Builder:
    def build(
        tasks: Sequence[Task],
        input_shape: Sequence[int],
        *,
        decoder: str = "mlp",
        decoder_width: int = 128,
        patch: int = 16,
        drop_path: float = 0.0,
        weights: str | Path | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> MultiTaskModel:
        trunk = vit(name, input_shape, patch=patch, drop_path=drop_path, weights=weights, config=config)
        return with_decoders(trunk, tasks, decoder=decoder, width=decoder_width)

    return build


def _backbone(
    tasks: Sequence[Task],
    input_shape: Sequence[int],  # noqa: ARG001  every builder takes it; this one's folder decides
    *,
    weights: str | Path,
    decoder: str = "mlp",
    decoder_width: int = 128,
    config: Mapping[str, Any] | None = None,
) -> MultiTaskModel:
    return with_decoders(local_backbone(weights, config), tasks, decoder=decoder, width=decoder_width)


def _hrnet18(
    tasks: Sequence[Task],
    input_shape: Sequence[int],
    *,
    decoder: str = "mti",
    decoder_width: int = 128,
    width: int = 18,
    modules: Sequence[int] = (1, 3, 2),
    blocks: int = 2,
    stem: int = 64,
    weights: str | Path | None = None,
) -> MultiTaskModel:
    trunk = HRNetTrunk(input_shape[0], width=width, modules=modules, blocks=blocks, stem=stem)
    if weights is not None:
        load_weights(trunk, weights)
    return with_decoders(trunk, tasks, decoder=decoder, width=decoder_width)


def _efficientnet_lite0(
    tasks: Sequence[Task],
    input_shape: Sequence[int],
    *,
    pretrained: bool = False,
    decoder: str = "mlp",
    decoder_width: int = 64,
    weights: str | Path | None = None,
) -> MultiTaskModel:
    trunk = EfficientNetTrunk(input_shape[0], pretrained=pretrained)
    if weights is not None:
        load_weights(trunk, weights)
    return with_decoders(trunk, tasks, decoder=decoder, width=decoder_width)


_BUILDERS: dict[str, Builder] = {
    "mlp": mlp,
    "convnet": convnet,
    "segnet": segnet,
    "efficientnet_lite0": _efficientnet_lite0,
    "hrnet18": _hrnet18,
    **{name: _named(name) for name in BACKBONES},
    **{name: _vit(name) for name in VITS},
    "backbone": _backbone,
    "bev": bev,
    "cross_stitch": cross_stitch,
}


def models() -> tuple[str, ...]:
    """Names that `build_model` knows."""
    return tuple(_BUILDERS)


def model_options(name: str) -> dict[str, Any]:
    """The options of a model and their defaults; an option without default has ``inspect.Parameter.empty``.

    Args:
        name: One of `models`.

    Raises:
        ValueError: If the name is unknown.

    Example:
        >>> sorted(model_options("cross_stitch"))
        ['own', 'widths']
    """
    if name not in _BUILDERS:
        raise ValueError(found("name", f"one of {', '.join(_BUILDERS)}", name) + nearest(name, _BUILDERS))
    parameters = inspect.signature(_BUILDERS[name]).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def build_model(
    name: str,
    tasks: Sequence[Task],
    input_shape: Sequence[int],
    *,
    task_norms: bool = False,
    gradient_checkpointing: bool = False,
    **options: Any,
) -> MultiTaskModel:
    """A ready-made multi-task model with random weights, or local ones.

    ==================================  ================================================================
    name                                options
    ==================================  ================================================================
    mlp                                 widths, norm, dropout
    convnet                             widths, grid
    segnet                              width (64 is MTAN's; 16 is a small one)
    resnet18, resnet34, resnet50,       decoder (mlp, fpn, deeplab, linear, mti), decoder_width,
    swin_tiny, convnext_tiny            weights, config
    efficientnet_lite0                  pretrained (ImageNet), decoder, decoder_width, weights
    vit_tiny, vit_small, vit_base,      the same as resnet18, and patch, drop_path
    vit_large
    hrnet18                             decoder, decoder_width, weights, width, modules, blocks, stem
    backbone                            weights (a Hugging Face folder, or name in its cache), decoder, decoder_width, config
    bev                                 width, heights, blocks, pretrained (cameras seen from above: nuscenes)
    cross_stitch                        widths, own
    ==================================  ================================================================

    ``weights`` is a ``.safetensors`` file for the trunk, or for transformers' models a folder with ``config.json``
    and ``model.safetensors``. Nothing is downloaded. ``config`` replaces entries of the Hugging Face configuration.

    Args:
        name: One of `models`.
        tasks: The tasks.
        input_shape: ``(channels, H, W)`` or ``(features,)``, without batch dimension.
        task_norms: Whether the trunk's norms get one copy per task (`torchmto.structure.split_norms`).
        gradient_checkpointing: Whether the trunk's blocks are run again in the backward pass, to save memory.
        options: See the table.

    Returns:
        A model with ``model(x, tasks=None) -> {task: output}``, ``model.trunk`` and ``model.heads``.

    Raises:
        ValueError: If the name is unknown, or an option has no sensible value.
        TypeError: If the model has no such option.
        ImportError: If the model needs a package that isn't installed; says what to type.

    Example:
        >>> model = build_model("mlp", [Task("flow", "regression", 8)], (64,), widths=(32,))
        >>> sum(p.numel() for p in model.parameters())
        2408
    """
    known = list(model_options(name))
    names = check_tasks(task.name for task in tasks)
    if unknown := sorted(set(options) - set(known)):
        raise TypeError(
            f"The model `{name}` has the options {', '.join(known)}. Found {', '.join(unknown)}."
            + nearest(unknown[0], known)
        )
    model = _BUILDERS[name](tuple(tasks), tuple(input_shape), **options)
    if task_norms:
        split_norms(model.trunk, names)
    if gradient_checkpointing:
        assert isinstance(model.trunk, Trunk)
        checkpoint_blocks(model.trunk.blocks())
    return model
