"""A regression target's deviation, as a loader gives it, is one that a network can learn at weight 1."""

import pytest
import torch

from data_layouts import write_mtan, write_nyud
from shared_data import data
from torchmto.lab.data import load_data

LOADERS = {
    "digits": lambda tmp: load_data("digits"),
    "rooms": lambda tmp: load_data("rooms", train=20, validation=4, test=4),
    "NYUv2": lambda tmp: load_data(f"nyuv2:{data('nyuv2/nyuv2_96x128.npz')}"),
    "NYUv2 of InvPT": lambda tmp: load_data(
        f"nyuv2:{write_nyud(tmp, {'train': list('abcdefghijklmnopqrstuvw'), 'val': ['x']})}"
    ),
    "NYUv2 of MTAN": lambda tmp: load_data(f"nyuv2:{write_mtan(tmp, {'train': 25, 'val': 1})}"),
    "River Flow": lambda tmp: load_data(f"rf1:{data('tabular/rf1.arff')}"),
    "School": lambda tmp: load_data(f"school:{data('tabular/school.mat')}"),
}


@pytest.mark.parametrize("name", LOADERS)
def test_deviations(name, tmp_path):
    bundle = LOADERS[name](tmp_path)
    count = min(len(bundle.train), 200 if bundle.tasks[0].dense else 20_000)
    targets = bundle.train.batch(torch.linspace(0, len(bundle.train) - 1, count).long())["targets"]
    checked = 0
    for task in bundle.tasks:
        if task.kind in {"regression", "depth", "normals", "map"}:
            values = targets[task.name]
            known = values[task.valid(values).expand_as(values)]
            if len(known) > 20:
                assert 0.05 <= float(known.std()) <= 20, task.name
                checked += 1
    assert checked
