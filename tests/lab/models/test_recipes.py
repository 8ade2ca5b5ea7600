"""The recipes for `torchmto train` name models, options and methods that there are, and every parameter of each learns."""

from pathlib import Path

import pytest
import torch
import yaml

import torchmto
from torchmto.lab.data import dataset_info
from torchmto.lab.data.base import Task
from torchmto.lab.models import build_model

RECIPES = sorted((Path(__file__).parents[3] / "recipes" / "train").glob("*.yaml"))
DENSE = (Task("segmentation", "segmentation", 5), Task("depth", "depth", 1))
FACES = (Task("smiling", "binary", 1), Task("young", "binary", 1))


@pytest.mark.parametrize("path", RECIPES, ids=[path.stem for path in RECIPES])
def test_recipe(path):
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
