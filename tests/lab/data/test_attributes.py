"""The embedded attributes: CelebA's shape, learnable, and decided by the seed."""

import pytest
import torch

from torchmto.lab.data import load_data


@pytest.fixture(scope="module")
def attributes():
    return load_data("attributes", train=2000, validation=50, test=1000)


def labels(data):
    return torch.cat([data.targets[task.name] for task in data.tasks], dim=1)


def test_samples(attributes):
    batch = attributes.train.batch(torch.arange(8))
    assert batch["input"].shape == (8, 3, 24, 24)
    assert 0 <= batch["input"].min() <= batch["input"].max() <= 1
    assert len(attributes.tasks) == 40
    assert all(batch["targets"][task.name].shape == (8, 1) for task in attributes.tasks)
    assert len(attributes.validation) == 50


def test_labels_are_imbalanced_and_correlated(attributes):
    targets = labels(attributes.train)
    rates = targets.mean(dim=0)
    assert set(targets.unique().tolist()) == {0.0, 1.0}
    assert 0.01 < rates.min() < 0.06
    assert 0.75 < rates.max() < 0.9
    assert rates.median() < 0.35
    correlations = torch.corrcoef(targets.T).fill_diagonal_(0)
    assert correlations.abs().max() > 0.3


def test_pictures_tell_the_attributes(attributes):
    """Least squares on pixels is better than chance on every attribute that isn't rare, on pictures it hasn't seen."""
    train, test = (
        torch.cat([part.inputs.flatten(1).double() / 255, torch.ones(len(part), 1).double()], dim=1)
        for part in (attributes.train, attributes.test)
    )
    targets = labels(attributes.train).double()
    penalty = torch.eye(train.shape[1], dtype=torch.float64)
    predicted = test @ torch.linalg.solve(train.T @ train + penalty, train.T @ targets)
    truth = labels(attributes.test).bool()
    better = [
        predicted[yes, task].mean() > predicted[~yes, task].mean() + 0.5 * predicted[:, task].std()
        for task, yes in enumerate(truth.T)
        if yes.sum() >= 20
    ]
    assert len(better) > 30
    assert all(better)


def test_the_seed_decides_everything(attributes):
    again, other = (load_data("attributes", seed, train=2000, validation=50, test=1000) for seed in (0, 1))
    assert torch.equal(attributes.train.inputs, again.train.inputs)
    assert torch.equal(labels(attributes.test), labels(again.test))
    assert not torch.equal(labels(attributes.train), labels(other.train))


def test_the_number_of_tasks():
    assert [task.name for task in load_data("attributes", num_tasks=2, train=4, validation=2, test=2).tasks] == [
        "attribute_00",
        "attribute_01",
    ]
    with pytest.raises(ValueError, match="Parameter `num_tasks` should be"):
        load_data("attributes", num_tasks=0)
