"""A regression target's deviation, as a loader gives it, is one that a network can learn at weight 1."""

import pytest
import torch

from data_layouts import write_mtan, write_nyud, write_pascal, write_taskonomy
from shared_data import data
from torchmto.lab.data import datasets, load_data

FEW = {"train": list("abcdefghijklmnopqrstuvw"), "val": ["x"]}
RANGES = {
    "keypoints2d": 0.005 * 2**16,
    "edge_texture": 0.08 * 2**16,
    "edge_occlusion": 0.00625 * 2**16,
    "depth_euclidean": 6 * 512,
    "depth_zbuffer": 6 * 512,
}
"""What Taskonomy's 16 bits reach in the released code's eyes; depth up to six metres."""


def taskonomy(root):
    write_taskonomy(lambda domain, name: root / domain / name, ["allensville", "collierville", "ihlen"], ranges=RANGES)
    return load_data(f"taskonomy:{root}", size=(16, 16))


LOADERS = {
    "digits": lambda tmp: load_data("digits"),
    "rooms": lambda tmp: load_data("rooms", train=20, validation=4, test=4),
    "nyuv2": lambda tmp: load_data(f"nyuv2:{data('nyuv2/nyuv2_96x128.npz')}"),
    "nyuv2 of InvPT": lambda tmp: load_data(f"nyuv2:{write_nyud(tmp, FEW)}"),
    "nyuv2 of MTAN": lambda tmp: load_data(f"nyuv2:{write_mtan(tmp, {'train': 25, 'val': 1})}"),
    "cityscapes": lambda tmp: load_data(f"cityscapes:{write_mtan(tmp, {'train': 25, 'val': 1}, labels=('label_7',))}"),
    "pascal_context": lambda tmp: load_data(f"pascal_context:{write_pascal(tmp, FEW)}"),
    "taskonomy": taskonomy,
    "rf1": lambda tmp: load_data(f"rf1:{data('tabular/rf1.arff')}"),
    "school": lambda tmp: load_data(f"school:{data('tabular/school.mat')}"),
}
OTHERS = {
    "without a regression": [
        "attributes",
        "cifar100",
        "celeba",
        "multimnist",
        "multifashion",
        "multi_fashion_mnist",
        "tox21",
        "sider",
    ],
    "a target of its own kind, which its loss scales": ["nuscenes"],
}


@pytest.mark.filterwarnings("ignore:Taskonomy")
@pytest.mark.parametrize("name", LOADERS)
def test_deviations(name, tmp_path):
    lowest, highest = (0.15, 3) if name == "taskonomy" else (0.05, 20)
    bundle = LOADERS[name](tmp_path)
    count = min(len(bundle.train), 200 if bundle.tasks[0].dense else 20_000)
    targets = bundle.train.batch(torch.linspace(0, len(bundle.train) - 1, count).long())["targets"]
    checked = 0
    for task in bundle.tasks:
        if task.kind in {"regression", "depth", "normals", "map"}:
            values = targets[task.name]
            known = values[task.valid(values).expand_as(values)]
            if len(known) > 20:
                assert lowest <= float(known.std()) <= highest, task.name
                checked += 1
    assert checked


def test_every_data_set_is_looked_at():
    looked = {name.partition(" ")[0] for name in LOADERS} | {name for names in OTHERS.values() for name in names}
    assert set(datasets()) <= looked
