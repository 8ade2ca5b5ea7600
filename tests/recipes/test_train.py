"""Each recipe for `torchmto train` names what there is, every parameter of its model learns, and it runs from end to end."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_pre_hook

import torchmto
from data_layouts import GENERATOR, write_celeba, write_mtan, write_nyud, write_pascal, write_taskonomy
from nuscenes_miniature import write_nuscenes
from torchmto.cli import main
from torchmto.lab.data import dataset_info
from torchmto.lab.data.base import Task
from torchmto.lab.data.taskonomy import BUILDINGS
from torchmto.lab.models import build_model
from torchmto.lab.reproduce import load_recipe
from torchmto.lab.run.config import DataConfig, MethodConfig, ModelConfig, RunConfig
from torchmto.lab.run.single import train
from torchmto.lab.specs import parse_method

RECIPES = sorted((Path(__file__).parents[2] / "recipes" / "train").glob("*.yaml"))
DENSE = (Task("segmentation", "segmentation", 5), Task("depth", "depth", 1))
FACES = (Task("smiling", "binary", 1), Task("young", "binary", 1))


def write_cifar100(folder):
    fine = np.repeat(np.arange(40), 5)
    x = GENERATOR.integers(0, 256, (len(fine), 32, 32, 3), dtype=np.uint8)
    np.savez(folder / "cifar.npz", x=x, fine=fine, coarse=fine % 20, is_test=np.arange(len(fine)) % 5 == 0)
    return folder / "cifar.npz"


def write_tiny_taskonomy(root):
    for split, buildings in BUILDINGS.items():
        some = buildings.split()[: 2 if split == "train" else 1]
        write_taskonomy(lambda domain, name: root / domain / "taskonomy" / name, some)
    return root


# What a recipe's data set is at toy size: its files, and the settings that keep it small.
SCENES = {"train": [f"a{i:02}" for i in range(24)], "val": ["b0", "b1"]}
FEW = SCENES | {"train": SCENES["train"][:6]}
TOY = {
    "celeba": (lambda root: write_celeba(root) is not None and root, {"size": [32, 32]}, 2),
    "cifar100": (write_cifar100, {"validation": 0.25}, 60),
    "cityscapes": (
        lambda root: write_mtan(root, {"train": 24, "val": 2}, labels=("label_7",), normals=False),
        {"size": [32, 32], "validation": 0.8},
        2,
    ),
    "nyuv2": (lambda root: write_nyud(root, SCENES), {"size": [32, 32], "validation": 0.8}, 2),
    "pascal_context": (lambda root: write_pascal(root, FEW), {"size": [32, 32], "validation": 0.34}, 2),
    "taskonomy": (write_tiny_taskonomy, {"size": [32, 32]}, 2),
    "nuscenes": (
        lambda root: write_nuscenes(root / "nuscenes", samples=4),
        {"size": [32, 64], "reach": 24.0, "cells": 16, "validation": 0.5},
        2,
    ),
}
NARROW = {
    "resnet18": {"config": {"hidden_sizes": [8, 8, 16, 16], "embedding_size": 8}, "decoder_width": 8},
    "segnet": {"width": 4},
    "bev": {"width": 8, "blocks": 1, "pretrained": False},
    "hrnet18": {"width": 2, "modules": [1, 1, 1], "blocks": 1, "stem": 8, "decoder_width": 8},
}


@pytest.mark.parametrize("path", [path for path in RECIPES if path.stem != "nuscenes-bev"], ids=lambda path: path.stem)
def test_every_parameter_learns(path):
    recipe = yaml.safe_load(path.read_text())
    info = dataset_info(recipe["data"]["name"].partition(":")[0])
    assert set(recipe["data"].get("options", {})) <= set(info.options)
    torchmto.method_class(recipe["method"]["name"])
    tasks = FACES if info.name in {"celeba", "cifar100"} else DENSE
    model = build_model(recipe["model"]["name"], tasks, (3, 64, 64), **recipe["model"].get("options", {}))
    outputs = model(torch.randn(2, 3, 64, 64))
    parts = [part for output in outputs.values() for part in (output if isinstance(output, tuple) else (output,))]
    sum(part.square().mean() for part in parts).backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


@pytest.mark.slow
def test_every_method_of_nuscenes_trains(tmp_path):
    """Those of the recipe of `torchmto reproduce`, on the miniature: PCGrad and wPCGrad with every priority."""
    write, options, batch_size = TOY["nuscenes"]
    data = DataConfig(f"nuscenes:{write(tmp_path)}", options, batch_size=batch_size)
    methods = {method for arm in load_recipe("nuscenes").arms for method in arm.methods}
    assert len(methods) == 16
    for number, method in enumerate(sorted(methods)):
        spec = parse_method(method)
        settings = MethodConfig(spec.name, dict(spec.hyperparameters))
        if settings.options.get("priority") == "performance":
            settings.options["baseline"] = {"detection": 0.3, "map": 0.5}
        config = RunConfig(
            data=data, model=ModelConfig("bev", NARROW["bev"]), method=settings, epochs=2, loggers=["csv"]
        )
        results, _ = train(config, tmp_path / str(number))
        assert results["cost"]["steps"] == 4
        assert set(results["test"]) == {"detection", "map"}


@pytest.mark.filterwarnings("ignore:Taskonomy")
@pytest.mark.parametrize("path", RECIPES, ids=[path.stem for path in RECIPES])
def test_recipe_runs(path, tmp_path):
    """The recipe's own file, two batches of its data set's own format at toy size; in 32 bits, as CPUs emulate fewer.

    Every parameter is handed to the optimizer, and gets a gradient.
    """
    recipe = yaml.safe_load(path.read_text())
    dataset = recipe["data"]["name"].partition(":")[0]
    write, options, batch_size = TOY[dataset]
    (tmp_path / "data").mkdir()
    recipe["data"].update(
        name=f"{dataset}:{write(tmp_path / 'data')}", options=recipe["data"].get("options", {}) | options
    )
    recipe["data"].update(batch_size=batch_size, workers=0)
    recipe.update(epochs=1, loggers=["csv"], precision="32")
    recipe["model"]["options"] = recipe["model"].get("options", {}) | NARROW.get(recipe["model"]["name"], {})
    if recipe["method"]["name"] == "task_groups":
        recipe["method"]["options"]["warmup"] = 1
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(recipe))
    out = tmp_path / "run"
    learnt: dict[int, bool] = {}

    def note(optimizer, *_):
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            learnt[id(p)] = learnt.get(id(p), False) or p.grad is not None

    hook = register_optimizer_step_pre_hook(note)
    try:
        assert main(["train", "--config", str(tmp_path / "toy.yaml"), "--out", str(out)]) == 0
    finally:
        hook.remove()
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    assert len(learnt) == sum(not name.endswith(buffers) for name in load_file(out / "model.safetensors"))
    assert all(learnt.values())
    results = json.loads((out / "results.json").read_text())
    assert results["cost"]["steps"] == 2
    assert (out / "model.safetensors").is_file()
