"""Backbones of Hugging Face transformers: built from a configuration or from local files, never downloaded."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from torchmto.checks import check_number, needed
from torchmto.lab.models.base import Trunk
from torchmto.lab.models.blocks import DropPath
from torchmto.lab.models.weights import load_weights

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
        for name, parameter in backbone.named_parameters():
            # What no feature map passes through: a norm that SwinBackbone leaves out, masks of pretraining.
            if name.startswith("swin.layernorm.") or name.endswith("mask_token"):
                parameter.requires_grad_(False)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """``[B, channels, H, W]`` to feature maps, fine to coarse."""
        return tuple(self.backbone(x).feature_maps)

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
        self.patch = config.patch_size
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
        """``[B, channels, H, W]`` to four maps ``[B, hidden_size, H / patch, W / patch]``."""
        output = self.vit(
            pixel_values=x,
            output_hidden_states=True,
            interpolate_pos_encoding=tuple(x.shape[-2:]) != self.made_for,
        )
        after_layers = output.hidden_states[-self.every * STAGES :]
        inner = after_layers[self.every - 1 :: self.every][:-1]
        height, width = x.shape[-2] // self.patch, x.shape[-1] // self.patch

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
        weights: A ``.safetensors`` file for this configuration, or a folder as Hugging Face lays it out, which then
            also gives the configuration; random weights if None.
        config: Entries that replace those of the configuration.

    Returns:
        The trunk.
    """
    transformers = needed("This model", "transformers")
    if weights is not None and Path(weights).is_dir():
        return local_backbone(input_shape, weights=weights, config=config)
    kind, entries = BACKBONES[name]
    entries = {"num_channels": input_shape[0], **entries, **(config or {})}
    if kind == "swin":
        entries.setdefault("image_size", tuple(input_shape[1:]))
    if kind == "resnet":
        entries.setdefault("embedding_size", 64)
    settings = transformers.AutoConfig.for_model(
        kind, **entries, out_features=[f"stage{i}" for i in range(1, STAGES + 1)]
    )
    backbone = transformers.AutoBackbone.from_config(settings)
    if weights is not None:
        load_weights(backbone, weights, prefixes=(f"{kind}.",))
    return HuggingFaceTrunk(backbone)


def local_backbone(
    _input_shape: Sequence[int], *, weights: str | Path, config: Mapping[str, Any] | None = None
) -> HuggingFaceTrunk:
    """Any backbone of transformers, from files on this machine; runs no code from there and downloads nothing.

    Of a backbone with more than four stages, such as DINOv2 with one per layer, four evenly spaced ones are used.

    Args:
        _input_shape: Not used: the files decide.
        weights: A folder with ``config.json`` and ``model.safetensors``, or the name of a model in Hugging Face's cache
            (``facebook/dinov2-small``). A ``timm_backbone`` needs timm.
        config: Entries that replace those of ``config.json``, such as ``{"drop_path_rate": 0.15}`` of DINOv2, Swin, ConvNeXt.

    Raises:
        FileNotFoundError: If one of the files is missing.
    """
    transformers = needed("This model", "transformers")
    folder = Path(weights) if Path(weights).is_dir() else _cached(str(weights))
    for file in ("config.json", "model.safetensors"):
        if not (folder / file).is_file():
            raise FileNotFoundError(
                f"{folder / file} is missing. Save it with `model.save_pretrained({str(folder)!r})`."
            )
    settings = transformers.AutoConfig.from_pretrained(
        str(folder), local_files_only=True, trust_remote_code=False, **(config or {})
    )
    if names := [name for name in getattr(settings, "stage_names", None) or () if name != "stem"]:
        settings.out_features = [names[i * len(names) // STAGES - 1] for i in range(1, STAGES + 1)]
    # `AutoBackbone.from_pretrained` looks the folder's name up on the hub; the class it would choose doesn't.
    chosen = type(transformers.AutoBackbone.from_config(settings))
    return HuggingFaceTrunk(
        chosen.from_pretrained(str(folder), config=settings, local_files_only=True, use_safetensors=True)
    )


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
        input_shape: ``(channels, H, W)``, both sides multiples of ``patch``.
        patch: Side of a patch in pixels.
        drop_path: Stochastic depth of the last layer, linear from 0 at the first, as in timm.
        weights: A folder as Hugging Face lays it out, which then also gives the configuration, or a
            ``.safetensors`` file for this one; random weights if None.
        config: Entries that replace those of the configuration.

    Returns:
        The trunk.
    """
    transformers = needed("This model", "transformers")
    check_number("drop_path", drop_path, minimum=0, below=1)
    channels, height, width = input_shape
    if height % patch or width % patch:
        raise ValueError(
            f"A ViT's input should have sides that are multiples of `patch = {patch}`. Found {height} x {width}."
        )
    own = config or {}
    if weights is not None and Path(weights).is_dir():
        model = transformers.ViTModel.from_pretrained(
            str(weights), add_pooling_layer=False, local_files_only=True, use_safetensors=True, **own
        )
        return ViTTrunk(model, drop_path)
    image = {"num_channels": channels, "image_size": (height, width), "patch_size": patch}
    model = transformers.ViTModel(transformers.ViTConfig(**{**image, **VITS[name], **own}), add_pooling_layer=False)
    if weights is not None:
        load_weights(model, weights, prefixes=("vit.",))
    return ViTTrunk(model, drop_path)


def _repeated(module: nn.Module) -> Iterator[nn.Module]:
    """Elements of module lists that hold no module list themselves and aren't single layers."""
    for child in module.modules():
        if isinstance(child, nn.ModuleList):
            for block in child:
                inside = list(block.modules())[1:]
                if inside and not any(isinstance(inner, nn.ModuleList) for inner in inside):
                    yield block
