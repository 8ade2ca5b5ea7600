"""Backbones of Hugging Face transformers: built from a configuration or from local files, never downloaded."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from torchmto.checks import check_integer, check_number, nearest, needed
from torchmto.lab.models.base import Trunk
from torchmto.lab.models.blocks import DropPath, fill
from torchmto.lab.models.weights import read_weights

# name -> (model type, configuration)
BACKBONES: dict[str, tuple[str, dict[str, Any]]] = {
    "resnet18": ("resnet", {"layer_type": "basic", "depths": [2, 2, 2, 2], "hidden_sizes": [64, 128, 256, 512]}),
    "resnet34": ("resnet", {"layer_type": "basic", "depths": [3, 4, 6, 3], "hidden_sizes": [64, 128, 256, 512]}),
    "resnet50": (
        "resnet",
        {"layer_type": "bottleneck", "depths": [3, 4, 6, 3], "hidden_sizes": [256, 512, 1024, 2048]},
    ),
    "swin_tiny": ("swin", {"embed_dim": 96, "depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24], "window_size": 7}),
    "convnext_tiny": ("convnext", {"depths": [3, 3, 9, 3], "hidden_sizes": [96, 192, 384, 768]}),
}
VITS: dict[str, dict[str, int]] = {
    f"vit_{size}": {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 64,
    }
    for size, width, layers in (("tiny", 192, 12), ("small", 384, 12), ("base", 768, 12), ("large", 1024, 24))
}
STAGES = 4


class HuggingFaceTrunk(Trunk):
    """The feature maps of an ``AutoBackbone``.

    Args:
        backbone: What ``AutoBackbone`` gives.
    """

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.channels = tuple(backbone.channels)  # type: ignore[arg-type]
        self.multiple = _multiple(backbone.config)
        for name, parameter in backbone.named_parameters():
            # What no feature map passes through: a norm that SwinBackbone leaves out, masks of pretraining.
            if name.startswith("swin.layernorm.") or name.endswith("mask_token"):
                parameter.requires_grad_(False)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """``[B, channels, H, W]`` to feature maps, fine to coarse."""
        return tuple(self.backbone(fill(x, self.multiple)).feature_maps)

    def blocks(self) -> Iterator[nn.Module]:
        """The innermost repeated blocks."""
        yield from _repeated(self.backbone)


class ViTTrunk(Trunk):
    """A vision transformer's patches as four maps of one size, from four evenly spaced layers.

    The last has passed the final LayerNorm, the others come as they leave their layer. Position embeddings made for
    another, square, image size are interpolated.

    Args:
        vit: A ``ViTModel``.
        drop_path: Rate at which the last layer's two residual branches are dropped (`DropPath`); linear from 0 at the first.
    """

    def __init__(self, vit: nn.Module, drop_path: float = 0.0) -> None:
        super().__init__()
        self.vit = vit
        config: Any = vit.config
        layers = config.num_hidden_layers
        if layers % STAGES:
            raise ValueError(f"A ViT should have a multiple of {STAGES} layers. Found `num_hidden_layers = {layers}`.")
        self.channels = (config.hidden_size,) * STAGES
        self.every = layers // STAGES
        self.multiple = _multiple(config)
        size = config.image_size
        self.made_for = (size, size) if isinstance(size, int) else tuple(size)
        if drop_path:
            for index, layer in enumerate(self.blocks()):
                # Each branch ends in a dropout: the layer's one, or in transformers 4 those of its parts.
                ends: Any = (
                    [layer] if hasattr(layer, "dropout") else [layer.get_submodule("attention.output"), layer.output]
                )
                for end in ends:
                    end.dropout = nn.Sequential(end.dropout, DropPath(drop_path * index / (layers - 1)))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """``[B, channels, H, W]`` to four maps ``[B, hidden_size, H / patch, W / patch]``, rounded up."""
        x = fill(x, self.multiple)
        output = self.vit(
            pixel_values=x,
            output_hidden_states=True,
            interpolate_pos_encoding=tuple(x.shape[-2:]) != self.made_for,
        )
        after_layers = output.hidden_states[-self.every * STAGES :]
        inner = after_layers[self.every - 1 :: self.every][:-1]
        height, width = x.shape[-2] // self.multiple, x.shape[-1] // self.multiple

        def as_map(tokens: Tensor) -> Tensor:
            patches = tokens[:, 1:]  # the first token is the class token
            return patches.transpose(1, 2).reshape(len(x), -1, height, width)

        return tuple(as_map(tokens) for tokens in (*inner, output.last_hidden_state))

    def blocks(self) -> Iterator[nn.Module]:
        """The transformer layers."""
        yield from _repeated(self.vit)


def named_backbone(
    name: str,
    input_shape: Sequence[int],
    *,
    weights: str | Path | None = None,
    config: Mapping[str, Any] | None = None,
) -> HuggingFaceTrunk:
    """A backbone of `BACKBONES` with four feature maps at 1/4, 1/8, 1/16 and 1/32 of the input.

    Args:
        name: A key of `BACKBONES`.
        input_shape: ``(channels, H, W)``.
        weights: A folder as Hugging Face lays it out, which then also gives the configuration, or a ``.safetensors``
            file for this one; random weights if None.
        config: Entries that replace those of the configuration; ``{"drop_path_rate": 0.0}`` turns off Swin's
            stochastic depth, which is 0.1 by default.

    Returns:
        The trunk.
    """
    kind, entries = BACKBONES[name]
    entries = {"num_channels": input_shape[0], **entries}
    if kind == "swin":
        entries["image_size"] = tuple(input_shape[1:])
    return _backbone(weights, _settings(weights, config, kind, entries))


def local_backbone(
    _input_shape: Sequence[int], *, weights: str | Path, config: Mapping[str, Any] | None = None
) -> HuggingFaceTrunk:
    """Any backbone of transformers, from files on this machine; runs no code from there and downloads nothing.

    Of a backbone with more than four stages, such as DINOv2 with one per layer, four evenly spaced ones are used.

    Args:
        _input_shape: Not used: the files decide.
        weights: A folder with ``config.json`` and ``model.safetensors``, or the name of a model in Hugging Face's cache
            (``facebook/dinov2-small``). A ``timm_backbone`` needs timm. Of its ``preprocessor_config.json`` nothing is
            used; where that normalises otherwise than the problem, a run warns.
        config: Entries that replace those of ``config.json``, such as ``{"drop_path_rate": 0.15}`` of DINOv2, Swin, ConvNeXt.

    Raises:
        FileNotFoundError: If one of the files is missing.
    """
    folder = Path(weights) if Path(weights).is_dir() else _cached(str(weights))
    return _backbone(folder, _settings(folder, config))


def _backbone(weights: str | Path | None, settings: Any) -> HuggingFaceTrunk:
    """The trunk of a configuration, with four stages."""
    if names := [name for name in getattr(settings, "stage_names", None) or () if name != "stem"]:
        settings.out_features = [names[i * len(names) // STAGES - 1] for i in range(1, STAGES + 1)]
    backbone = needed("This model", "transformers").AutoBackbone.from_config(settings)
    if weights is None:
        return HuggingFaceTrunk(backbone)
    # `AutoBackbone.from_pretrained` looks the folder's name up on the hub; the class that it chose doesn't.
    trunk = HuggingFaceTrunk(_loaded(type(backbone), weights, settings))
    trunk.statistics = _statistics(weights)
    return trunk


def _cached(name: str) -> Path:
    """The folder of a model in Hugging Face's cache."""
    from huggingface_hub import snapshot_download  # noqa: PLC0415  comes with transformers
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError  # noqa: PLC0415

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError) as error:
        raise FileNotFoundError(
            f"There is no folder {name}, nor a model of this name in Hugging Face's cache."
        ) from error


def vit(
    name: str,
    input_shape: Sequence[int],
    *,
    patch: int = 16,
    drop_path: float = 0.0,
    weights: str | Path | None = None,
    config: Mapping[str, Any] | None = None,
) -> ViTTrunk:
    """A vision transformer of `VITS`.

    Args:
        name: A key of `VITS`.
        input_shape: ``(channels, H, W)``.
        patch: Side of a patch in pixels; a folder says its own.
        drop_path: Stochastic depth of the last layer, linear from 0 at the first, as in timm.
        weights: A folder as Hugging Face lays it out, which then also gives the configuration, or a
            ``.safetensors`` file for this one; random weights if None.
        config: Entries that replace those of the configuration.

    Returns:
        The trunk.
    """
    kind = needed("This model", "transformers").ViTModel
    check_number("drop_path", drop_path, minimum=0, below=1)
    check_integer("patch", patch, minimum=1)
    channels, *sides = input_shape
    filled = tuple(side + -side % patch for side in sides)
    entries = {"num_channels": channels, "image_size": filled, "patch_size": patch, **VITS[name]}
    settings = _settings(weights, config, "vit", entries)
    if weights is None:
        return ViTTrunk(kind(settings, add_pooling_layer=False), drop_path)
    trunk = ViTTrunk(_loaded(kind, weights, settings, add_pooling_layer=False), drop_path)
    trunk.statistics = _statistics(weights)
    return trunk


def _settings(
    weights: str | Path | None,
    config: Mapping[str, Any] | None,
    kind: str | None = None,
    entries: Mapping[str, Any] | None = None,
) -> Any:
    """The configuration of a folder, of the ``kind`` if one is asked for, or else of that kind, with entries replaced."""
    auto = needed("This model", "transformers").AutoConfig
    own = dict(config or {})
    if weights is not None and Path(weights).is_dir():
        for file in ("config.json", "model.safetensors"):
            if not (Path(weights) / file).is_file():
                raise FileNotFoundError(
                    f"{Path(weights) / file} is missing. Save it with `model.save_pretrained({str(weights)!r})`."
                )
        settings, unknown = auto.from_pretrained(
            str(weights), local_files_only=True, trust_remote_code=False, return_unused_kwargs=True, **own
        )
        known = settings
        if kind not in {None, settings.model_type}:
            raise ValueError(
                f"Parameter `weights` should be a folder of a {kind}. Found a {settings.model_type} in {weights}; the "
                "model `backbone` takes any that transformers has a backbone of."
            )
    else:
        settings, known = auto.for_model(kind, **{**(entries or {}), **own}), auto.for_model(kind)
        unknown = {key: own[key] for key in own if not hasattr(known, key)}
    for key in unknown:
        should = f"entries of the configuration of a {settings.model_type}"
        raise ValueError(f"Parameter `config` should hold {should}. Found `{key}`.{nearest(key, known.to_dict())}")
    return settings


def _loaded(kind: Any, weights: str | Path, settings: Any, **more: Any) -> Any:
    """A model of a class with the weights of a folder or file, all of them, in single precision like the heads."""
    folder = Path(weights).is_dir()
    model, report = kind.from_pretrained(
        str(weights) if folder else None,
        config=settings,
        state_dict=None if folder else read_weights(weights),
        local_files_only=True,
        use_safetensors=True,
        output_loading_info=True,
        **more,
    )
    # What a backbone adds to the model that was pretrained: norms of the maps it gives.
    missing = sorted(key for key in report["missing_keys"] if not key.startswith("hidden_states_norms."))
    if missing:
        raise ValueError(
            f"{weights} doesn't fit the model: {len(missing)} keys are missing ({', '.join(missing[:3])})."
        )
    return model.float()


def _statistics(weights: str | Path) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Mean and standard deviation by which the folder's own preprocessing normalises pictures."""
    file = Path(weights) / "preprocessor_config.json"
    stated = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if not stated.get("do_normalize", True) or not {"image_mean", "image_std"} <= set(stated):
        return None
    return tuple(stated["image_mean"]), tuple(stated["image_std"])


def _multiple(config: Any) -> int:
    """The side of the pixels behind one place of the coarsest map, where patches are cut out and a rest would be cut off."""
    sides: Any = getattr(config, "patch_stride", None) or getattr(config, "patch_size", 1)
    patch: int = sides if isinstance(sides, int) else max(sides)
    halvings = max(len(getattr(config, "depths", ())) - 1, 0)
    return patch << halvings


def _repeated(module: nn.Module) -> Iterator[nn.Module]:
    """Elements of module lists that hold no module list themselves and aren't single layers."""
    for child in module.modules():
        if isinstance(child, nn.ModuleList):
            for block in child:
                inside = list(block.modules())[1:]
                if inside and not any(isinstance(inner, nn.ModuleList) for inner in inside):
                    yield block
