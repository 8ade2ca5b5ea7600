"""The embedded digits: the splits share no source image, and everything follows from the seed."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from torchmto.lab.data import load_data
from torchmto.lab.data.digits import DIGIT, split_sources
from torchmto.lab.data.loading import BatchPlan


@pytest.fixture(scope="module")
def digits():
    return load_data("digits")


def source_windows(bundle, images):
    """Which source images occur in each split, found by their pixels where nothing overlaps."""
    found = {}
    for split in ("train", "validation", "test"):
        canvas = bundle.split(split).inputs[:, 0].numpy()
        patches = set()
        for y in range(5):
            for x in (*range(4), *range(5, 9)):
                patches |= {p.tobytes() for p in np.ascontiguousarray(canvas[:, y : y + DIGIT, x : x + DIGIT])}
        found[split] = {i for i, image in enumerate(images) if image.tobytes() in patches}
    return found


def test_no_digit_image_is_in_two_splits(digits):
    images = np.round(load_digits().images * (255 / 16)).astype(np.uint8)
    labels = load_digits().target
    parts = split_sources(labels, (0.6, 0.2, 0.2), 0)
    assert sorted(np.concatenate(parts)) == list(range(1797))
    found = source_windows(digits, images)
    for split, part in zip(("train", "validation", "test"), parts, strict=True):
        assert len(found[split]) > 0.3 * len(part)
        assert found[split] <= set(part)


def test_splits_are_stratified():
    labels = np.repeat(np.arange(5), 20)
    for part, count in zip(split_sources(labels, (0.5, 0.25, 0.25), 3), (10, 5, 5), strict=True):
        assert np.bincount(labels[part]).tolist() == [count] * 5


def test_samples(digits):
    batch = digits.train.batch(torch.arange(64))
    assert batch["input"].shape == (64, 1, 12, 16)
    assert batch["input"].dtype == torch.float32
    assert 0 <= batch["input"].min() <= batch["input"].max() <= 1
    assert batch["targets"]["left"].dtype == torch.int64
    assert batch["targets"]["offset"].shape == (64, 2)
    assert batch["targets"]["offset"][:, 1].min() >= 2
    assert len(digits.train) == 4000
    for task in digits.tasks[:2]:
        assert set(digits.test.targets[task.name].tolist()) == set(range(10))


def test_the_seed_decides_everything(digits):
    again, other = load_data("digits"), load_data("digits", seed=1)
    assert torch.equal(digits.train.inputs, again.train.inputs)
    assert not torch.equal(digits.train.inputs, other.train.inputs)


def test_normalisation_is_about_right(digits):
    inputs = digits.train.batch(torch.arange(1000))["input"]
    normal = digits.normalize(inputs)
    assert abs(normal.mean()) < 0.1
    assert abs(normal.std() - 1) < 0.1


def test_a_position_gives_the_same_batch_again(digits):
    loader = digits.loader("train", 32, seed=5)
    batches = list(loader.epoch(2))
    assert len(batches) == len(loader) == 4000 // 32
    resumed = next(digits.loader("train", 32, seed=5, workers=2).epoch(2, start=7))
    assert torch.equal(resumed["input"], batches[7]["input"])
    assert isinstance(loader.plan, BatchPlan)
