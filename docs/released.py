"""What released code sets, line by line, beside the recipes of `torchmto train`: the page docs/recipes.md."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

RECIPES = Path(__file__).resolve().parents[1] / "recipes" / "train"


@dataclass(frozen=True)
class Line:
    """One fact of a released configuration.

    Args:
        what: What it is about.
        released: Its value there.
        file: The file that says so.
        setting: The recipe's setting that stands for it, by its dotted name; an unset one is the default, None.
        ours: What this library does, where no setting has the same value.
        same: That it is the same all the same.
    """

    what: str
    released: Any
    file: str
    setting: str = ""
    ours: str = ""
    same: bool = False


@dataclass(frozen=True)
class Released:
    """The released code of a recipe: where it is, what else to know, and its lines."""

    repository: str
    remark: str
    lines: tuple[Line, ...]


_COMMON = "utils/common_config.py"


def _optimizer(config: str, lr: float, decay: float) -> tuple[Line, ...]:
    return (
        Line("batch size", 8, config, "data.batch_size"),
        Line("optimizer", "adam", config, "optimizer.name"),
        Line("learning rate", lr, config, "optimizer.lr"),
        Line("weight decay", decay, config, "optimizer.weight_decay"),
        Line("schedule", "poly", config, "optimizer.schedule"),
        Line("its power", 0.9, _COMMON, "optimizer.power"),
    )


def _selective(config: str, size: list[int], decay: float, *more: Line) -> Released:
    """Of arXiv 2502.11986: one file per data set, of one size of ViT."""
    return Released(
        "wooseong97/sel-update-mtl (folder sel-update-mtl)",
        "The released files are for ViT-Ti alone; what else the paper's runs of ViT-S, B and L changed is not confirmed.",
        (
            Line("height and width", size, "utils/config.py", "data.options.size"),
            *_optimizer(config, 2e-5, 1e-6),
            Line(
                "backbone",
                "vitT: ViT-Ti/16, ImageNet weights at 384",
                _COMMON,
                "model.name",
                "weights by `model.options.weights`",
            ),
            Line("drop path", 0.15, _COMMON, "model.options.drop_path"),
            Line(
                "stages",
                "after layers 3, 6, 9 (ViT-L: 6, 12, 18) and the last norm",
                "models/transformers/vit.py",
                ours="the same",
                same=True,
            ),
            Line(
                "head",
                "1x1 convolution of the four stages together",
                "models/transformer_net.py",
                "model.options.decoder",
                same=True,
            ),
            Line("affinity decay", decay, config, "method.options.decay"),
            Line(
                "batches before grouping",
                "prepos: 100, counted from 0: 101",
                config,
                "method.options.warmup",
                "`attribution: official` has 101",
            ),
            Line(
                "credit for a change of the losses",
                "the next group",
                "utils/train_utils.py",
                ours="the group that stepped, as in the paper; by `attribution: official` as in the code",
            ),
            Line(
                "affinities before grouping",
                "normalised in place, so that only the upper triangle is",
                "utils/train_utils.py",
                ours="normalised as printed in the paper; by `normalization: official` as in the code",
            ),
            Line(
                "groups",
                "affinity propagation, again up to 10 times",
                "utils/train_utils.py",
                ours="the same",
                same=True,
            ),
            Line(
                "a single group",
                "updated twice by each batch",
                "utils/train_utils.py",
                ours="updated once and measured; by `single: twice` as in the code",
            ),
            *more,
            Line("precision", "32 bits", "main.py", "precision"),
            Line("result", "last batch", "utils/train_utils.py", ours="best epoch of the validation split"),
        ),
    )


def _images(of_data: int, kept: int) -> Line:
    return Line(
        "training images", f"{of_data:,}", "the data's list", ours=f"{kept:,}; the others are the validation split"
    )


def _scenes(config: str, images: tuple[int, int], epochs: int, heads: int, losses: str) -> tuple[Line, ...]:
    kept = images[1]
    return (
        Line("batches", 40_000, config, "epochs", f"{kept // 8} batches each: {epochs * (kept // 8):,}"),
        _images(*images),
        Line("tasks, losses", losses, _COMMON, ours="the same", same=True),
        Line("rate of the heads", float(heads), _COMMON, "optimizer.head_rate"),
        Line("weights of the losses", "1 each", config, "method.weights", "1 each", same=True),
        Line("positive pixels in the loss of edges", 0.95, config, "losses.edges.positive_weight"),
        Line(
            "augmentation",
            "scale .5 to 2, crop, mirror, distorted colours",
            _COMMON,
            "data.options.augmentation",
            same=True,
        ),
        Line(
            "crop",
            "drawn again, up to 10 times, while one value fills .75 of the first map, that of edges",
            "data/transforms.py",
            ours="drawn once",
        ),
        Line("images of other sizes", "padded", _COMMON, ours="as the loader's `size` says"),
    )


def _mti(config: str, weights: dict[str, float], images: tuple[int, int], *more: Line) -> Released:
    """Of arXiv 2406.02996, which names HRNet-18 and MTI-Net: the code of the latter."""
    return Released(
        "SimonVandenhende/Multi-Task-Learning-PyTorch",
        "No code of arXiv 2406.02996 was found, so this is that of MTI-Net; the method's settings are not confirmed.",
        (
            *_optimizer(config, 1e-4, 1e-4),
            Line("epochs", 100, config, "epochs"),
            Line("steps of the schedule", "once an epoch", _COMMON, ours="once a batch"),
            Line("backbone", "hrnet_w18, ImageNet weights", config, "model.name", "weights by `model.options.weights`"),
            Line("its modules", [1, 3, 2], "models/model_info/hrnet_w18.yml", "model.options.modules"),
            Line("its blocks", 2, "models/model_info/hrnet_w18.yml", "model.options.blocks"),
            Line("model", "mti_net", config, "model.options.decoder", same=True),
            Line("weights of the losses", weights, config, "method.weights"),
            Line("predictions at four scales", "in the losses", "losses/loss_schemes.py", ours="the same", same=True),
            Line("positive pixels in the loss of edges", 0.95, config, "losses.edges.positive_weight"),
            _images(*images),
            *more,
            Line("precision", "32 bits", "train/train_utils.py", "precision"),
            Line(
                "result",
                "best of the last ten epochs on the test set",
                "main.py",
                ours="best epoch of the validation split",
            ),
        ),
    )


_UNKNOWN = (
    "Not confirmed: arXiv 2409.01793, whose experiment this is, has released no code that its page or a search of public "
    "repositories (November 2026) shows, so network and settings are this project's."
)
NYUD = "40 classes, cross-entropy; depth, L1; normals, L1 of unit vectors; edges, balanced cross-entropy"
PASCAL = (
    "21 classes and 7 parts, cross-entropy; saliency, cross-entropy balanced by the batch; normals, L1 of unit vectors; edges, "
    "balanced cross-entropy"
)
_TASKONOMY = "util_taskonomy/dataset_taskonomy.py"
RELEASED: dict[str, Released | str] = {
    "nyud-vit": _selective(
        "configs/sel/nyud.yml", [448, 576], 1e-3, *_scenes("configs/sel/nyud.yml", (795, 715), 450, 4, NYUD)
    ),
    "pascal-vit": _selective(
        "configs/sel/pascal.yml", [512, 512], 1e-3, *_scenes("configs/sel/pascal.yml", (4998, 4498), 71, 5, PASCAL)
    ),
    "taskonomy-vit": _selective(
        "configs/sel/taskonomy.yml",
        [256, 256],
        1e-4,
        Line("batches", 40_000, "configs/sel/taskonomy.yml", "data.options.limit.train", "images, each once"),
        Line("rate of the heads", 1.0, "configs/sel/taskonomy.yml", "optimizer.head_rate"),
        Line("augmentation", "mirror", _COMMON, ours="mirror", same=True),
        Line("reshading", "3 channels", "utils/config.py", ours="1 channel"),
        Line(
            "tasks, losses",
            "11: normals, cosine; curvature, squares; others, L1",
            "util_taskonomy/engine_mt.py",
            ours="the same",
            same=True,
        ),
        Line("depth", "logarithm of the 16 bits", _TASKONOMY, ours="metres"),
        Line("occlusion edges", "blurred, sigma 4", _TASKONOMY, ours="as stored"),
        Line(
            "training buildings",
            "those of training and validation, without woodbine and wiconisco",
            _TASKONOMY,
            ours="those of training, without woodbine and what wiconisco lacks",
        ),
        Line("test", "the first tenth of the test buildings' images", _TASKONOMY, ours="all of them"),
    ),
    "nyud-hrnet18": _mti(
        "configs/nyud/hrnet18/mti_net+edges_normals.yml",
        {"segmentation": 1.0, "depth": 1.0, "normals": 10.0, "edges": 50.0},
        (795, 715),
        Line("height and width", [480, 640], "utils/config.py", "data.options.size"),
        Line(
            "edges and normals",
            "auxiliary, without an output",
            "configs/nyud/hrnet18/mti_net+edges_normals.yml",
            ours="tasks",
        ),
        Line("augmentation", "mirror, scale 1, 1.2 or 1.5", _COMMON, ours="mirror, scale 1 to 1.5, colours by 20 %"),
    ),
    "pascal-hrnet18": _mti(
        "configs/pascal/hrnet18/mti_net.yml",
        {"segmentation": 1.0, "parts": 2.0, "saliency": 5.0, "edges": 50.0, "normals": 10.0},
        (4998, 4498),
        Line("height and width", [512, 512], "utils/config.py", "data.options.size"),
        Line(
            "augmentation",
            "mirror, rotation by 20 degrees, scale .75 to 1.25",
            _COMMON,
            ours="mirror, scale 1 to 1.5, colours by 20 %",
        ),
    ),
    "cityscapes-segnet": Released(
        "Cranial-XIX/CAGrad (folder cityscapes), and lorenmt/mtan (folder im2im_pred) for the network",
        "No code of arXiv 2406.02996 was found, so this is what others compare in; the method's settings are not confirmed.",
        (
            *(
                Line(what, value, "model_segnet_mt.py", setting)
                for what, value, setting in (
                    ("optimizer", "adam", "optimizer.name"),
                    ("learning rate", 1e-4, "optimizer.lr"),
                    ("schedule", "step", "optimizer.schedule"),
                    ("epochs to a fall", 100, "optimizer.step_epochs"),
                    ("factor of a fall", 0.5, "optimizer.gamma"),
                    ("epochs", 200, "epochs"),
                    ("batch size", 8, "data.batch_size"),
                    ("classes", 7, "data.options.classes"),
                )
            ),
            Line(
                "network",
                "SegNet with MTAN's attention",
                "model_segnet_mt.py",
                "model.name",
                "no attention, as below",
            ),
            Line("its width", 64, "im2im_pred/model_segnet_split.py", "model.options.width"),
            Line("augmentation", "mirror, scale 1, 1.2 or 1.5", "create_dataset.py", ours="mirror, scale 1 to 1.5"),
            Line(
                "disparity in it", "divided by the scale", "create_dataset.py", ours="times the scale: nearer is larger"
            ),
            Line("result", "every epoch on the test set", "utils.py", ours="best epoch of the validation split"),
        ),
    ),
    "celeba-resnet18": _UNKNOWN,
    "cifar100-resnet18": _UNKNOWN,
    "nuscenes-bev": _UNKNOWN,
}
DEFAULTS = {"optimizer.head_rate": 1.0, "precision": "32"}


def setting(recipe: dict[str, Any], dotted: str) -> Any:
    """A recipe's value of a setting, or None."""
    value: Any = recipe
    for key in dotted.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return DEFAULTS.get(dotted) if value is None else value


def shown(value: Any) -> str:
    """A value as a cell of the table."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {entry:g}" for key, entry in value.items())
    if isinstance(value, list):
        return " x ".join(map(str, value)) if len(value) == 2 else ", ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def row(line: Line, recipe: dict[str, Any]) -> str:
    """One line of the table."""
    value = setting(recipe, line.setting) if line.setting else None
    parts = [f"`{line.setting}: {shown(value)}`"] if value is not None else []
    same = "=" if line.same or value == line.released else ""
    ours = ", ".join([*parts, *([line.ours] if line.ours else [])])
    return f"| {line.what} | {shown(line.released)} | `{line.file}` | {ours} | {same} |"


def page() -> str:
    """docs/recipes.md."""
    text = [
        "# Recipes beside released code",
        "",
        "<!-- Generated by docs/generate.py from docs/released.py and recipes/train; don't edit. -->",
        "",
        "What `torchmto train --config recipes/train/NAME.yaml` sets, beside what each paper's released code sets, as read",
        "in the files that are named. `=` marks the same value. What could be read nowhere is called not confirmed.",
        "The ViT recipes train the other sizes with `--model.name vit_small`, `vit_base` or `vit_large`.",
    ]
    for path in sorted(RECIPES.glob("*.yaml")):
        recipe, released = yaml.safe_load(path.read_text(encoding="utf-8")), RELEASED[path.stem]
        text += ["", f"## {path.stem}", ""]
        if isinstance(released, str):
            text.append(released)
            continue
        text += [f"Released code: {released.repository}. {released.remark}", ""]
        text += ["| | released | in | recipe | |", "|---|---|---|---|---|"]
        text += [row(line, recipe) for line in released.lines]
    return "\n".join([*text, ""])
