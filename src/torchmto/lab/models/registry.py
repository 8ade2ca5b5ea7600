"""Ready-made models by name."""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from torchmto.checks import check_tasks, found, nearest, shown
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
from torchmto.lab.user_code import from_here
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


@dataclass(frozen=True)
class _Decoded:
    """A trunk under decoders: its options are the trunk's, a ``decoder``, and the ``decoder_width``.

    Args:
        trunk: ``(input_shape, **options) -> trunk``, or a class that takes the channels alone.
        decoder: What it has by default.
        width: Channels inside the decoders by default.
    """

    trunk: Callable[..., Trunk]
    decoder: str = "mlp"
    width: int = 128

    def __call__(self, tasks: Sequence[Task], input_shape: Sequence[int], **options: Any) -> MultiTaskModel:
        decoder, width = options.pop("decoder", self.decoder), options.pop("decoder_width", self.width)
        trunk = self.trunk(input_shape[0] if isinstance(self.trunk, type) else input_shape, **options)
        return with_decoders(trunk, tasks, decoder=decoder, width=width)


_BUILDERS: dict[str, Builder] = {
    "mlp": mlp,
    "convnet": convnet,
    "segnet": segnet,
    "efficientnet_lite0": _Decoded(EfficientNetTrunk, width=64),
    "hrnet18": _Decoded(HRNetTrunk, decoder="mti"),
    **{name: _Decoded(partial(named_backbone, name)) for name in BACKBONES},
    **{name: _Decoded(partial(vit, name)) for name in VITS},
    "backbone": _Decoded(local_backbone),
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
    builder: Callable[..., Any] = _BUILDERS[name]
    of_decoder = {}
    if isinstance(builder, _Decoded):
        of_decoder, builder = {"decoder": builder.decoder, "decoder_width": builder.width}, builder.trunk
    parameters = inspect.signature(builder).parameters.values()
    return of_decoder | {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def check_options(name: str, options: Iterable[str]) -> None:
    """Raise TypeError if a model has no such option, ValueError if there is no such model."""
    known = list(model_options(name))
    if unknown := [option for option in options if option not in known]:
        hint = nearest(unknown[0], known)
        raise TypeError(f"The model `{name}` has the options {', '.join(known)}. Found {', '.join(unknown)}.{hint}")


def _unbuilt(name: str, options: Mapping[str, Any], why: str) -> str:
    return f"The model `{name}` can't be built with {shown(options)}: {' '.join(why.split()).rstrip('.')}."


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
    and ``model.safetensors``; it has to hold all of them. Nothing is downloaded. ``config`` replaces entries of the
    Hugging Face configuration.

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
    check_options(name, options)
    names = check_tasks(task.name for task in tasks)
    try:
        model = _BUILDERS[name](tuple(tasks), tuple(input_shape), **options)
    except Exception as error:
        said = isinstance(error, ImportError | FileNotFoundError | TypeError | ValueError) and from_here(error)
        if said or isinstance(error, ImportError):
            raise
        raise ValueError(_unbuilt(name, options, f"{type(error).__name__} {error}")) from error
    if empty := [key for key, parameter in model.named_parameters() if not parameter.numel()]:
        raise ValueError(_unbuilt(name, options, f"`{empty[0]}` would be empty"))
    if task_norms:
        split_norms(model.trunk, names)
    if gradient_checkpointing:
        assert isinstance(model.trunk, Trunk)
        checkpoint_blocks(model.trunk.blocks())
    return model
