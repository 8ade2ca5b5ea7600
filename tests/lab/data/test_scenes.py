"""Cityscapes, PASCAL-Context, Taskonomy and CelebA from small files in their official layouts."""

import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from data_layouts import save_mat, save_text, write_celeba, write_mtan, write_pascal, write_taskonomy
from torchmto.lab.data import load_data
from torchmto.lab.data.pascal_context import PARTS
from torchmto.lab.data.taskonomy import BUILDINGS, TASKS
from torchmto.lab.losses import task_loss


@pytest.mark.parametrize("classes", [7, 19])
def test_cityscapes(tmp_path, classes):
    write_mtan(tmp_path, {"train": 25, "val": 2}, labels=("label_7", "label_19"), normals=False)
    bundle = load_data(f"cityscapes:{tmp_path}", classes=classes, size=(12, 16))
    assert [(task.name, task.channels) for task in bundle.tasks] == [("segmentation", classes), ("depth", 1)]
    assert (len(bundle.train) + len(bundle.validation), len(bundle.test)) == (25, 2)
    stored = np.load(tmp_path / "val" / f"label_{classes}" / "1.npy")
    assert np.array_equal(bundle.test[1]["targets"]["segmentation"], np.where(stored < 0, 255, stored))
    batch = next(bundle.loader("train", 4).epoch(0))
    assert batch["input"].shape == (4, 3, 12, 16)
    assert batch["targets"]["depth"].max() > 2  # disparity grows when the picture is enlarged


def test_cityscapes_misuse(tmp_path):
    with pytest.raises(ValueError, match="`classes` should be 7 or 19"):
        load_data(f"cityscapes:{tmp_path}", classes=2)
    with pytest.raises(ValueError, match="none of these"):
        load_data(f"cityscapes:{tmp_path}")
    write_mtan(tmp_path, {"train": 25}, labels=("label_7",), normals=False)
    with pytest.raises(FileNotFoundError, match="val/image"):
        load_data(f"cityscapes:{tmp_path}")


NAMES = {"train": [f"2008_{i:06d}" for i in range(8)], "val": ["2008_000100", "2008_000101"]}


@pytest.mark.parametrize("packed", [False, True])
def test_pascal_context(tmp_path, packed):
    root = write_pascal(tmp_path / "PASCALContext", NAMES)
    path = root
    if packed:
        path = tmp_path / "PASCALContext.tar.gz"
        with tarfile.open(path, "w:gz") as tar:
            tar.add(root, "PASCALContext")
    bundle = load_data(f"pascal_context:{path}", size=(24, 32), validation=0.25)
    assert (len(bundle.train), len(bundle.validation), len(bundle.test)) == (6, 2, 2)
    sample = bundle.test[0]
    assert sample["input"].shape == (3, 24, 32)
    assert not sample["input"][:, 20:].any()
    targets = sample["targets"]
    labels = targets["segmentation"]
    assert (labels[20:] == 255).all()
    assert (labels[:, 30:] == 255).all()
    assert (labels[0] == 255).all()
    assert labels[1:20, :30].max() < 21
    assert set(targets["parts"][:20, :30].unique().tolist()) == {0, PARTS["hair"], PARTS["lfoot"]} == {0, 1, 6}
    assert (targets["parts"][2:4, 3:6] == 1).all()
    length = targets["normals"].norm(dim=0)
    assert (length[:20, :15] - 1).abs().max() < 1e-3
    assert not length[:, 15:].any()
    assert set(targets["saliency"][:, :20, :30].unique().tolist()) == {0.0, 1.0}
    assert (targets["saliency"][:, 20:] == 255).all()
    edges = targets["edges"][0, :20, :30]
    assert edges[:, 14].all()
    assert edges.sum() == 20
    assert (bundle.test[1]["targets"]["parts"] == 255).all()
    smaller = load_data(f"pascal_context:{path}", size=(10, 10), validation=0.25)
    assert next(smaller.loader("train", 3).epoch(0))["targets"]["edges"].shape == (3, 1, 10, 10)


def test_pascal_context_misuse(tmp_path):
    with pytest.raises(ValueError, match="none of these"):
        load_data(f"pascal_context:{tmp_path}")
    root = write_pascal(tmp_path, NAMES)
    save_mat(root / "human_parts" / f"{NAMES['val'][0]}.mat", {"other": 1})
    (root / "sal_distill" / f"{NAMES['val'][1]}.png").unlink()
    test = load_data(f"pascal_context:{root}", size=(24, 32)).test
    with pytest.raises(ValueError, match="isn't a MAT file with `anno`"):
        test[0]
    with pytest.raises(FileNotFoundError, match=r"sal_distill/2008_000101\.png.*Get it from"):
        test[1]


LAYOUTS = {
    "omnidata": lambda root: lambda domain, building: root / domain / "taskonomy" / building,
    "by domain": lambda root: lambda domain, building: root / domain / building,
    "by building": lambda root: lambda domain, building: root / building / domain,
}


def rescaled(top, clip=True):
    """The released code's: values of ``[0, top]``, clipped or not, become ``[-1, 1]``."""
    return lambda x: (np.clip(x, 0, top) if clip else x)[None] / top * 2 - 1


RELEASED = {
    "keypoints2d": rescaled(0.005 * 2**16),
    "keypoints3d": rescaled(2**16),
    "edge_texture": rescaled(0.08 * 2**16),
    "edge_occlusion": rescaled(0.00625 * 2**16, clip=False),
    "reshading": rescaled(255),
    "segment_unsup2d": rescaled(255),
    "segment_unsup25d": rescaled(255),
    "principal_curvature": lambda x: ((x[..., :2] - (123.572, 120.1)) / (31.922, 21.658)).transpose(2, 0, 1),
}


@pytest.mark.filterwarnings("ignore:Taskonomy")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_taskonomy(tmp_path, layout):
    folder_of = LAYOUTS[layout](tmp_path)
    write_taskonomy(folder_of, ["allensville", "woodbine", "darden", "uvalda"])
    bundle = load_data(f"taskonomy:{tmp_path}", size=(16, 16))
    assert len(TASKS) == 11
    assert (len(bundle.train), len(bundle.validation), len(bundle.test)) == (4, 2, 2)
    targets = bundle.test[1]["targets"]
    for task in TASKS:
        target = targets[task.name]
        assert torch.isfinite(target).all()
        assert target.shape == (task.channels, 16, 16)
    file = folder_of("depth_zbuffer", "uvalda") / "point_1_view_0_domain_depth_zbuffer.png"
    stored = np.asarray(Image.open(file)).astype(np.float32)
    stored[0, 0] = 0
    assert np.allclose(targets["depth_zbuffer"][0], stored / 512)
    assert not targets["normal"][:, 0, 0].any()
    for name, expected in RELEASED.items():
        stored = np.asarray(Image.open(folder_of(name, "uvalda") / f"point_1_view_0_domain_{name}.png"))
        assert np.allclose(targets[name], expected(stored.astype(np.float64)), rtol=2e-3, atol=2e-3), name
    few = load_data(f"taskonomy:{tmp_path}", size=(8, 8), limit={"train": 3, "test": 1})
    assert (len(few.train), len(few.validation), len(few.test)) == (3, 2, 1)
    assert len(load_data(f"taskonomy:{tmp_path}", size=(8, 8), limit=1).train) == 1
    assert next(bundle.loader("train", 2).epoch(0))["targets"]["normal"].shape == (2, 3, 16, 16)


def test_taskonomys_official_buildings():
    sizes = {split: len(names.split()) for split, names in BUILDINGS.items()}
    assert sizes == {"train": 25, "val": 5, "test": 5}
    assert len({name for names in BUILDINGS.values() for name in names.split()}) == 35


def test_what_taskonomy_leaves_out_is_counted_once(tmp_path):
    folder_of = LAYOUTS["omnidata"](tmp_path)
    buildings = [name for names in BUILDINGS.values() for name in names.split() if name != "woodbine"]
    write_taskonomy(folder_of, buildings, views=1, size=4)
    write_taskonomy(folder_of, ["wiconisco", "muleshoe"], views=3, size=4)
    for domain, building, view in (
        ("edge_texture", "wiconisco", 1),
        ("rgb", "wiconisco", 2),
        ("normal", "muleshoe", 0),
    ):
        (folder_of(domain, building) / f"point_{view}_view_0_domain_{domain}.png").unlink()
    with pytest.warns(UserWarning, match="3 images that lack a file of a task") as caught:
        bundle = load_data(f"taskonomy:{tmp_path}", size=(4, 4))
    assert len(caught) == 1
    assert "(of wiconisco, muleshoe) and buildings without files: 1 (woodbine)." in str(caught[0].message)
    assert caught[0].filename == __file__
    assert (len(bundle.train), len(bundle.validation), len(bundle.test)) == (24, 5, 6)
    for split in (bundle.validation, bundle.test):
        split.batch(torch.arange(len(split)))


def test_taskonomys_losses_are_the_released_ones():
    names = {task.name: task_loss(task)._function.__name__ for task in TASKS}
    others = {name for name in names if name not in {"normal", "principal_curvature"}}
    assert (names["normal"], names["principal_curvature"]) == ("normals_cosine", "mse")
    assert {names[name] for name in others} == {"l1"}
    assert task_loss(TASKS[6], "l1")._function.__name__ == "normals_l1"


@pytest.mark.filterwarnings("ignore:Taskonomy")
def test_taskonomy_misuse(tmp_path):
    with pytest.raises(ValueError, match="none of these"):
        load_data(f"taskonomy:{tmp_path}")
    folder_of = LAYOUTS["by domain"](tmp_path)
    write_taskonomy(folder_of, ["allensville", "darden"], views=1)
    with pytest.raises(FileNotFoundError, match="rgb/ihlen"):
        load_data(f"taskonomy:{tmp_path}")
    write_taskonomy(folder_of, ["ihlen"], views=1)
    (folder_of("normal", "ihlen") / "point_0_view_0_domain_normal.png").unlink()
    with pytest.raises(FileNotFoundError, match="domain_normal"):
        load_data(f"taskonomy:{tmp_path}")
    with pytest.raises(ValueError, match="`limit` should be"):
        load_data(f"taskonomy:{tmp_path}", limit=0)
    with pytest.raises(ValueError, match="`limit` should be"):
        load_data(f"taskonomy:{tmp_path}", limit={"val": 3})


@pytest.mark.parametrize("form", ["official", "flat", "kaggle"])
def test_celeba(tmp_path, form):
    signs = write_celeba(tmp_path, form=form)
    bundle = load_data(f"celeba:{tmp_path}", size=(16, 16))
    assert [task.name for task in bundle.tasks] == ["5_o_Clock_Shadow", "Smiling", "Young"]
    assert [len(bundle.split(split)) for split in ("train", "validation", "test")] == [4, 4, 4]
    batch = bundle.validation.batch(torch.tensor([2, 0]))
    assert batch["input"].shape == (2, 3, 16, 16)
    assert batch["targets"]["Smiling"].tolist() == [[float(signs[6, 1] > 0)], [float(signs[4, 1] > 0)]]
    assert next(bundle.loader("train", 2).epoch(0))["input"].shape == (2, 3, 16, 16)


@pytest.mark.parametrize(
    ("name", "lines", "message"),
    [
        ("list_attr_celeba.txt", ["x"], "aren't the official CelebA files"),
        ("list_attr_celeba.txt", ["1", "A B", "000001.jpg 1"], "should have 1 rows of 2 numbers"),
        ("list_eval_partition.txt", ["000001.jpg 0"], "aren't the official CelebA files"),
        ("list_eval_partition.txt", [f"{i + 1:06d}.jpg 0" for i in range(12)], "files in partition 1"),
    ],
)
def test_celeba_misuse(tmp_path, name, lines, message):
    write_celeba(tmp_path, form="flat")
    save_text(tmp_path / name, lines)
    with pytest.raises(ValueError, match=message):
        load_data(f"celeba:{tmp_path}")


def test_celebas_missing_files_are_named(tmp_path):
    write_celeba(tmp_path)
    (tmp_path / "Img" / "img_align_celeba" / "000012.jpg").unlink()
    bundle = load_data(f"celeba:{tmp_path}")
    with pytest.raises(FileNotFoundError, match=r"000012\.jpg"):
        bundle.test[3]
    (tmp_path / "Eval" / "list_eval_partition.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"list_eval_partition\.txt.*mmlab"):
        load_data(f"celeba:{tmp_path}")
