"""Overlapping pictures from IDX files."""

import gzip
import struct

import numpy as np
import pytest
import torch

from torchmto.lab.data import load_data
from torchmto.lab.data.multimnist import DEBIAN, read_idx

GENERATOR = np.random.default_rng(0)
COUNTS = {"train": 60, "validation": 20, "test": 20}


def idx(array):
    return b"\x00\x00\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_idx(folder, packed, counts=(100, 30)):
    folder.mkdir(parents=True)
    images = {}
    for split, count in zip(("train", "t10k"), counts, strict=True):
        images[split] = GENERATOR.integers(1, 256, (count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        for name, array in (("images-idx3-ubyte", images[split]), ("labels-idx1-ubyte", labels)):
            if packed:
                (folder / f"{split}-{name}.gz").write_bytes(gzip.compress(idx(array)))
            else:
                (folder / f"{split}-{name}").write_bytes(idx(array))
    return images


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["multimnist", "multifashion"])
def test_composed_pictures_keep_the_official_split(tmp_path, name, packed):
    images = write_idx(tmp_path / "data", packed)
    bundle = load_data(f"{name}:{tmp_path / 'data'}", held_out=0.2, **COUNTS)
    assert bundle.input_shape == (1, 36, 36)
    corners = {split: {p[:8, :8].tobytes(): i for i, p in enumerate(images[split])} for split in images}
    used = {}
    for split, count in COUNTS.items():
        data = bundle.split(split)
        assert len(data) == count
        pixels = data.inputs[:, 0].numpy()
        known = corners["t10k" if split == "test" else "train"]
        used[split] = [known[np.ascontiguousarray(p[:8, :8]).tobytes()] for p in pixels]
        left = data.batch(torch.arange(count))["targets"]["left"]
        assert left.tolist() == [source % 10 for source in used[split]]
    assert not set(used["train"]) & set(used["validation"])


def test_the_brighter_value_stays(tmp_path):
    images = write_idx(tmp_path / "mnist", packed=False)["t10k"]
    fashion = write_idx(tmp_path / "fashion", packed=True)["t10k"]
    test = load_data(f"multi_fashion_mnist:{tmp_path}", **COUNTS).test
    canvas = test.inputs[0, 0].numpy()
    first = next(p for p in images if np.array_equal(p[:8, :8], canvas[:8, :8]))
    second = next(p for p in fashion if np.array_equal(p[-8:, -8:], canvas[-8:, -8:]))
    assert np.array_equal(canvas[8:28, 8:28], np.maximum(first[8:, 8:], second[:20, :20]))
    assert not canvas[:8, 28:].any()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "isn't an IDX file"),
        (b"\x00\x00\x0d\x01\x00\x00\x00\x01\x00\x00\x00\x00", "isn't an IDX file"),
        (b"\x00\x00\x08\x02\x00\x00", "isn't an IDX file"),
        (b"\x00\x00\x08\x01\x00\x00\x00\x05\x01", "should hold 5 values. Found 1"),
        (b"\x00\x00\x08\x03" + b"\xff" * 12, "should hold"),
    ],
)
def test_broken_idx_files(tmp_path, content, message):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_idx(tmp_path / "file")
    (tmp_path / "file.gz").write_bytes(b"not gzip")
    with pytest.raises(ValueError, match="isn't a readable gzip file"):
        read_idx(tmp_path / "file.gz")


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"train-images-idx3-ubyte\.gz.*Get it from"):
        load_data(f"multimnist:{tmp_path}")
    with pytest.raises(FileNotFoundError, match="mnist"):
        load_data(f"multi_fashion_mnist:{tmp_path}")
    write_idx(tmp_path / "data", packed=False)
    with pytest.raises(ValueError, match=r"`held_out` should be in \(0, 1\)"):
        load_data(f"multimnist:{tmp_path / 'data'}", held_out=1.0)


def test_debians_folder_is_found_by_itself(tmp_path, monkeypatch):
    images = write_idx(tmp_path / "debian", packed=True)["t10k"]
    monkeypatch.setattr("torchmto.lab.data.multimnist.DEBIAN", tmp_path / "debian")
    canvas = load_data("multifashion", **COUNTS).test.inputs[0, 0].numpy()
    assert any(np.array_equal(picture[:8, :8], canvas[:8, :8]) for picture in images)
    monkeypatch.setattr("torchmto.lab.data.multimnist.DEBIAN", tmp_path / "nowhere")
    with pytest.raises(ValueError, match="needs a path: `multifashion:PATH`"):
        load_data("multifashion", **COUNTS)


@pytest.mark.skipif(not DEBIAN.is_dir(), reason="needs Debian's package dataset-fashion-mnist")
def test_debians_files():
    bundle = load_data("multifashion", train=500, validation=100, test=100)
    assert bundle.train[0]["input"].shape == (1, 36, 36)
