"""NYUv2 in its three layouts, and the real file where it lies beside the repository."""

import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from data_layouts import GENERATOR, rgb, save_array, write_mtan, write_nyud
from shared_data import data
from torchmto.lab.data import load_data


def write_npz(path, train=40, test=4, height=12, width=16):
    arrays = {}
    for split, count in (("train", train), ("test", test)):
        shape = (count, height, width)
        arrays[f"rgb_{split}"] = np.stack([rgb(height, width) for _ in range(count)])
        arrays[f"seg13_{split}"] = GENERATOR.integers(0, 14, shape, dtype=np.uint8)
        arrays[f"seg40_{split}"] = GENERATOR.integers(0, 41, shape, dtype=np.uint8)
        arrays[f"depth_m_{split}"] = (GENERATOR.random(shape) + 1).astype(np.float16)
        arrays[f"normal_{split}"] = GENERATOR.integers(-127, 128, (*shape, 3), dtype=np.int8)
    np.savez(path, **arrays)
    return path, arrays


def check(bundle, classes, size):
    names = ["segmentation", "depth", "normals", "edges"]
    assert [task.name for task in bundle.tasks] == names
    assert bundle.tasks[0].channels == classes
    assert bundle.input_shape == (3, *size)
    for split in ("train", "validation", "test"):
        batch = bundle.split(split).batch(torch.arange(2))
        assert batch["input"].shape == (2, 3, *size)
        assert 0 <= batch["input"].min() <= batch["input"].max() <= 1
        labels = batch["targets"]["segmentation"]
        assert labels.shape == (2, *size)
        assert set(labels.unique().tolist()) <= {*range(classes), 255}
        assert batch["targets"]["depth"].shape == (2, 1, *size)
        length = batch["targets"]["normals"].norm(dim=1)
        assert ((length - 1).abs() < 1e-3).logical_or(length == 0).all()
        assert set(batch["targets"]["edges"].unique().tolist()) <= {0.0, 1.0, 255.0}
    augmented = next(bundle.loader("train", 4).epoch(0))
    assert augmented["input"].shape == (4, 3, *size)


def test_npz(tmp_path):
    path, arrays = write_npz(tmp_path / "nyu.npz")
    bundle = load_data(f"nyuv2:{path}")
    check(bundle, 13, (12, 16))
    assert len(bundle.train) + len(bundle.validation) == 40
    assert len(bundle.test) == 4
    batch = bundle.test.batch(torch.arange(4))
    expected = arrays["seg13_test"].astype(int) - 1
    assert np.array_equal(batch["targets"]["segmentation"], np.where(expected < 0, 255, expected))
    assert np.allclose(batch["input"].permute(0, 2, 3, 1) * 255, arrays["rgb_test"], atol=1e-3)
    assert np.array_equal(batch["targets"]["depth"][:, 0], arrays["depth_m_test"].astype(np.float32))
    check(load_data(f"nyuv2:{path}", classes=40), 40, (12, 16))
    check(load_data(f"nyuv2:{path}", size=(6, 8)), 13, (6, 8))
    with pytest.raises(ValueError, match="`classes` should be 13 or 40"):
        load_data(f"nyuv2:{path}", classes=7)


def test_validation_is_part_of_the_official_training_images(tmp_path):
    path, arrays = write_npz(tmp_path / "nyu.npz", train=60)
    bundle = load_data(f"nyuv2:{path}", seed=3)
    images = {}
    for split in ("train", "validation"):
        batch = bundle.split(split).batch(torch.arange(len(bundle.split(split))))
        images[split] = {image.numpy().tobytes() for image in (batch["input"] * 255).round().to(torch.uint8)}
    assert not images["train"] & images["validation"]
    official = {np.ascontiguousarray(image.transpose(2, 0, 1)).tobytes() for image in arrays["rgb_train"]}
    assert images["train"] | images["validation"] == official


def test_mtan_folders(tmp_path):
    write_mtan(tmp_path, {"train": 25, "val": 3})
    bundle = load_data(f"nyuv2:{tmp_path}", size=(12, 16))
    check(bundle, 13, (12, 16))
    assert (len(bundle.train) + len(bundle.validation), len(bundle.test)) == (25, 3)
    stored = np.load(tmp_path / "val" / "label" / "1.npy")
    assert np.array_equal(bundle.test[1]["targets"]["segmentation"], np.where(stored < 0, 255, stored))
    image = np.load(tmp_path / "val" / "image" / "1.npy")
    assert np.allclose(bundle.test[1]["input"].permute(1, 2, 0), image, atol=1e-3)
    with pytest.raises(ValueError, match="`classes` should be 13 for this layout"):
        load_data(f"nyuv2:{tmp_path}", size=(12, 16), classes=40)
    (tmp_path / "val" / "depth" / "2.npy").unlink()
    with pytest.raises(FileNotFoundError, match=r"depth/2\.npy.*lorenmt/mtan"):
        load_data(f"nyuv2:{tmp_path}")


def test_pickles_among_mtans_files_are_refused(tmp_path):
    write_mtan(tmp_path, {"train": 25, "val": 1})
    save_array(tmp_path / "val" / "label" / "0.npy", np.array([[{"a": 1}]]))
    with pytest.raises(ValueError, match="isn't a plain NumPy array"):
        load_data(f"nyuv2:{tmp_path}").test[0]


@pytest.mark.parametrize(
    ("archive", "image", "maps"),
    [(None, "png", "png"), ("NYUDv2.tar.gz", "png", "png"), ("NYUD_MT.tgz", "jpg", "npy"), (None, "jpg", "png")],
)
def test_nyud_as_invpt_and_mtinet_read_it(tmp_path, archive, image, maps):
    names = {"train": [str(i) for i in range(25)], "val": ["0101", "0102"]}
    root = write_nyud(tmp_path / "NYUDv2", names, image=image, maps=maps)
    path = root
    if archive:
        path = tmp_path / archive
        with tarfile.open(path, "w:gz") as tar:
            tar.add(root, "NYUDv2")
    bundle = load_data(f"nyuv2:{path}", size=(12, 16))
    check(bundle, 40, (12, 16))
    targets = bundle.test[1]["targets"]
    if maps == "png":
        edges = np.asarray(Image.open(root / "edge" / "0102.png"), dtype=np.float32) / 255
        normals = 2 * np.asarray(Image.open(root / "normals" / "0102.png"), dtype=np.float32) / 255 - 1
        normals[0, 0] = 0  # a vector of no length is stored as 127
    else:
        edges, normals = (np.load(root / kind / "0102.npy") for kind in ("edge", "normals"))
    assert np.array_equal(targets["edges"][0], edges)
    lengths = np.linalg.norm(normals, axis=-1, keepdims=True).clip(min=1e-6)
    assert np.allclose(targets["normals"].permute(1, 2, 0), normals / lengths, atol=2e-3)
    labels = np.asarray(Image.open(root / "segmentation" / "0102.png")).astype(int)
    assert np.array_equal(targets["segmentation"], np.where(labels == 0, 255, labels - 1))
    assert np.allclose(targets["depth"][0], np.load(root / "depth" / "0102.npy"), atol=2e-3)
    assert load_data(f"nyuv2:{path}", size=(6, 8)).train[0]["targets"]["depth"].shape == (1, 6, 8)


def test_other_folders_are_refused(tmp_path):
    with pytest.raises(ValueError, match="which is none of these"):
        load_data(f"nyuv2:{tmp_path}")


def test_the_real_file():
    bundle = load_data(f"nyuv2:{data('nyuv2/nyuv2_96x128.npz')}", size=(24, 32))
    assert (len(bundle.train), len(bundle.validation), len(bundle.test)) == (715, 80, 654)
    check(bundle, 13, (24, 32))
    batch = bundle.test.batch(torch.arange(654))
    void = (batch["targets"]["segmentation"] == 255).float().mean()
    assert 0.08 < void < 0.2
    assert 0.5 < batch["targets"]["depth"].min() <= batch["targets"]["depth"].max() < 10.5
    assert (batch["targets"]["normals"][:, 2].mean()) < -0.4  # z is forward and normals face the camera
    inputs = bundle.normalize(batch["input"])
    assert abs(inputs.mean()) < 0.6
    assert 0.7 < inputs.std() < 1.4
