"""CIFAR-100 in its three layouts; pickles that want to run code are refused."""

import io
import os
import pickle
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from shared_data import data
from torchmto.lab.data import labelled_tasks, load_data
from torchmto.lab.data.cifar100 import SUPERCLASSES, _from_pickle

GENERATOR = np.random.default_rng(0)


def make_images(per_class=4):
    """All 100 classes; the superclass of class c is c % 20, so the fine labels of a superclass aren't consecutive."""
    fine = np.repeat(np.arange(100), per_class)
    order = GENERATOR.permutation(len(fine))
    pixels = GENERATOR.integers(0, 256, (len(fine), 32, 32, 3), dtype=np.uint8)
    return pixels, fine[order], fine[order] % 20


def official(images):
    """The dict of the official pickles, written with bytes keys as Python 2 did."""
    pixels, fine, coarse = images
    return {
        b"filenames": [b"a.png"] * len(fine),
        b"data": pixels.transpose(0, 3, 1, 2).reshape(len(fine), -1),
        b"fine_labels": fine.tolist(),
        b"coarse_labels": coarse.tolist(),
        b"batch_label": b"training batch 1 of 1",
    }


def write_python(folder, train, test, protocol=2):
    folder.mkdir(parents=True)
    for name, images in (("train", train), ("test", test)):
        (folder / name).write_bytes(pickle.dumps(official(images), protocol=protocol))
    return folder


def write_parquet(folder, train, test):
    folder.mkdir(parents=True)
    for name, (pixels, fine, coarse) in (("train", train), ("test", test)):
        pictures = []
        for image in pixels:
            buffer = io.BytesIO()
            Image.fromarray(image).save(buffer, "PNG")
            pictures.append({"bytes": buffer.getvalue(), "path": None})
        table = pa.table({"img": pictures, "fine_label": fine, "coarse_label": coarse})
        pq.write_table(table, folder / f"{name}-00000-of-00001.parquet")
    return folder


@pytest.fixture(scope="module", params=["folder", "archive", "parquet", "parquet in data", "npz", "npz int64"])
def layout(request, tmp_path_factory):
    name, _, kind = request.param.partition(" ")
    root = tmp_path_factory.mktemp("cifar")
    train, test = make_images(), make_images(1)
    if request.param in {"folder", "archive"}:
        path = write_python(root / "cifar-100-python", train, test)
        if request.param == "archive":
            with tarfile.open(root / "c.tar.gz", "w:gz") as tar:
                tar.add(path, "cifar-100-python")
            path = root / "c.tar.gz"
    elif name == "npz":
        path = root / "c.npz"
        x, fine, coarse = (np.concatenate(pair) for pair in zip(train, test, strict=True))
        is_test = (np.arange(len(x)) >= len(train[0])).astype(kind or bool)
        np.savez(path, x=x, fine=fine.astype(np.uint8), coarse=coarse.astype(np.uint8), is_test=is_test)
    else:
        write_parquet(root / "data", train, test)
        path = root / "data" if request.param == "parquet" else root
    return path, train, test


def test_every_layout_gives_the_same_tasks(layout):
    path, _, test = layout
    bundle = load_data(f"cifar100:{path}", validation=0.25)
    assert [task.name for task in bundle.tasks] == list(SUPERCLASSES)
    assert {task.channels for task in bundle.tasks} == {5}
    assert (len(bundle.train), len(bundle.validation), len(bundle.test)) == (300, 100, 100)
    batch = bundle.test.batch(torch.arange(100))
    pixels, fine, coarse = test
    assert np.array_equal((batch["input"] * 255).round().permute(0, 2, 3, 1), pixels)
    labels = torch.stack([batch["targets"][name] for name in SUPERCLASSES], dim=1)
    assert ((labels >= 0).sum(1) == 1).all()
    assert np.array_equal((labels >= 0).long().argmax(1), coarse)
    assert np.array_equal(labels.amax(1), fine // 20)
    for split in ("train", "validation"):
        data = bundle.split(split)
        labels = data.batch(torch.arange(len(data)))["targets"]["fish"]
        assert set(torch.bincount(labels[labels >= 0]).tolist()) == {3 if split == "train" else 1}


def test_a_batch_has_labels_for_some_tasks_only(layout):
    bundle = load_data(f"cifar100:{layout[0]}", validation=0.25)
    batch = next(bundle.loader("train", 6).epoch(0))
    assert 1 <= len(labelled_tasks(batch, bundle.tasks)) <= 6


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_pickles_of_older_protocols(protocol):
    images = make_images(1)
    for content in (official(images), {key.decode(): value for key, value in official(images).items()}):
        pixels, fine, coarse = _from_pickle(pickle.dumps(content, protocol=protocol))
        assert np.array_equal(pixels, images[0])
        assert np.array_equal(fine, images[1])
        assert np.array_equal(coarse, images[2])


class Evil:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 5])
@pytest.mark.parametrize(
    "function", [os.system, eval, exec, __import__, getattr, pickle.loads, np.load, io.open], ids=lambda f: f.__name__
)
def test_pickles_that_want_to_run_code_are_refused(tmp_path, function, protocol):
    evil = pickle.dumps({b"data": Evil(function, "touch evil")}, protocol=protocol)
    with pytest.raises(ValueError, match="isn't an official CIFAR-100 pickle: it asks for"):
        _from_pickle(evil)
    (tmp_path / "train").write_bytes(evil)
    (tmp_path / "test").write_bytes(evil)
    with pytest.raises(ValueError, match="it asks for"):
        load_data(f"cifar100:{tmp_path}")


@pytest.mark.parametrize(
    "content",
    [b"", b"garbage", pickle.dumps([1, 2]), pickle.dumps({"data": [1]}), pickle.dumps(np.array([{}], dtype=object))],
)
def test_other_pickles_are_refused(content):
    with pytest.raises(ValueError, match="CIFAR-100 pickle"):
        _from_pickle(content)


def test_other_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match="none of these"):
        load_data(f"cifar100:{tmp_path}")
    (tmp_path / "file.txt").write_text("text")
    with pytest.raises(ValueError, match="none of these"):
        load_data(f"cifar100:{tmp_path / 'file.txt'}")
    with tarfile.open(tmp_path / "empty.tar", "w"):
        pass
    with pytest.raises(ValueError, match="none of these"):
        load_data(f"cifar100:{tmp_path / 'empty.tar'}")


def test_the_real_file():
    bundle = load_data(f"cifar100:{data('cifar100/cifar100_25000.npz')}")
    assert (len(bundle.train), len(bundle.validation), len(bundle.test)) == (18000, 2000, 5000)
    assert {task.channels for task in bundle.tasks} == {5}
    batch = next(bundle.loader("train", 128).epoch(0))
    assert len(labelled_tasks(batch, bundle.tasks)) > 15
    assert abs(batch["input"].mean()) < 0.3
    counts = sum((bundle.test.targets[name] >= 0).long() for name in SUPERCLASSES)
    assert (counts == 1).all()
