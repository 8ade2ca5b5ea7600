"""What the page on nuScenes shows: a run's submission, and the optimizer hook under a stand-in for mmcv's runner."""

import json
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
from torch import nn

import torchmto
from nuscenes_miniature import write_nuscenes
from torchmto.lab.data.nuscenes import CLASSES
from torchmto.lab.run.config import DataConfig, ModelConfig, RunConfig
from torchmto.lab.run.single import train

PAGE = (Path(__file__).parents[2] / "docs" / "how-to" / "nuscenes.md").read_text("utf-8")
SUBMIT, HOOK = re.findall(r"^```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
CONFIG = re.search(r"^```text\noptimizer_config = (.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)[1]


def test_a_runs_detections_become_a_submission(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = {"size": [32, 64], "reach": 24.0, "cells": 16, "validation": 0.5, "limit": 1}
    data = DataConfig(f"nuscenes:{write_nuscenes(tmp_path / 'data', samples=2)}", options, batch_size=1)
    train(RunConfig(data=data, model=ModelConfig("bev", {"width": 8, "blocks": 1}), epochs=1), "runs/nuscenes")
    exec(SUBMIT, {})
    content = json.loads(Path("submission.json").read_text())
    assert content["meta"] == {
        "use_camera": True,
        **dict.fromkeys(("use_lidar", "use_radar", "use_map", "use_external"), False),
    }
    (token, results), *others = content["results"].items()
    assert not others
    assert len(results) == 100
    assert all(entry["sample_token"] == token and entry["detection_name"] in CLASSES for entry in results)


class Registry:
    def register_module(self):
        return lambda cls: cls


class OptimizerHook:
    """mmcv's, as far as its users rely on it."""

    def __init__(self, grad_clip=None):
        self.grad_clip = grad_clip

    def clip_grads(self, parameters):
        return nn.utils.clip_grad_norm_(parameters, **self.grad_clip)


class Detector(nn.Module):
    """A detector in mmdet's form: named losses, some of them lists, added up for the runner."""

    def __init__(self):
        super().__init__()
        self.trunk, self.box, self.seg = nn.Linear(4, 8), nn.Linear(8, 3), nn.Linear(8, 2)

    def forward(self, x):
        features = self.trunk(x).tanh()
        boxes = self.box(features)
        return {
            "loss_cls": (boxes[:, 0] - 1).square(),
            "d0.loss_bbox": [boxes[:, 1].abs().mean(), boxes[:, 2].square().mean()],
            "accuracy": boxes.detach().mean(),
            "loss_seg": (self.seg(features) + x[:, :2]).square().mean(),
        }

    def _parse_losses(self, losses):
        means = {k: sum(v) if isinstance(v, list) else v.mean() for k, v in losses.items()}
        return sum(value for key, value in means.items() if "loss" in key), {
            key: float(v.detach()) for key, v in means.items()
        }

    def train_step(self, x):
        loss, log_vars = self._parse_losses(self(x))
        return {"loss": loss, "log_vars": log_vars, "num_samples": len(x)}


def test_the_hook_under_a_runner_does_what_a_step_does(monkeypatch):
    mmcv = ModuleType("mmcv.runner")
    mmcv.HOOKS, mmcv.OptimizerHook = Registry(), OptimizerHook
    monkeypatch.setitem(sys.modules, "mmcv", ModuleType("mmcv"))
    monkeypatch.setitem(sys.modules, "mmcv.runner", mmcv)
    names = {}
    exec(HOOK, names)
    settings = eval(CONFIG)
    hook = names[settings.pop("type")](**settings)
    torch.manual_seed(0)
    models = [Detector(), Detector()]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in models]
    runner = SimpleNamespace(model=models[0], optimizer=optimizers[0])
    hook.before_run(runner)
    method = torchmto.make_method("wpcgrad", priority="loss")
    mt = torchmto.MultiTask(models[1], optimizers[1], tasks=["detection", "map"], method=method, clip=35.0)

    def closure(x):
        losses = models[1](x)
        return {
            "detection": losses["loss_cls"].mean() + sum(losses["d0.loss_bbox"]),
            "map": losses["loss_seg"],
        }

    for epoch in range(2):
        for x in torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(epoch)):
            runner.outputs = models[0].train_step(x)
            hook.after_train_iter(runner)
            mt.step(lambda _, x=x: closure(x))
        hook.after_train_epoch(runner)
        mt.end_window()
    for mine, theirs in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)
    assert not torch.equal(models[0].box.weight, Detector().box.weight)
