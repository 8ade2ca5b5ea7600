"""Tasks, batches, plans and loaders: what every data set shares."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchmto.lab.data import Batch, Task, dataset_info, datasets, labelled_tasks, load_data
from torchmto.lab.data.base import KINDS, Subset, TensorData, as_target
from torchmto.lab.data.loading import BatchPlan, Loader, sample_keys, uniform

SHAPES = {
    "classification": (),
    "binary": (4,),
    "regression": (4,),
    "segmentation": (3, 5),
    "depth": (1, 3, 5),
    "normals": (3, 3, 5),
    "edges": (1, 3, 5),
    "saliency": (1, 3, 5),
    "map": (4, 3, 5),
}


@pytest.mark.parametrize("kind", KINDS)
def test_missing_values_aren_t_valid_and_labels_are(kind):
    task = Task("t", kind, 4)
    dtype = torch.int64 if kind in {"classification", "segmentation"} else torch.float32
    label = torch.ones(2, *SHAPES[kind], dtype=dtype)
    missing = torch.full_like(label, task.missing)
    assert task.valid(label).all()
    assert not task.valid(missing).any()
    batch = Batch(input=torch.zeros(2, 1), targets={"t": missing})
    assert labelled_tasks(batch, [task]) == ()
    assert labelled_tasks(Batch(input=torch.zeros(2, 1), targets={"t": label}), [task]) == ("t",)
    assert as_target(task, label.to(torch.uint8)).dtype == dtype


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("a", "colour", 3), "`kind` should be one of"),
        (("a", "depth", 0), "`channels` should be an int >= 1"),
        (("a", "segmentation", 256), "`channels` should be an int from 1 to 255"),
    ],
)
def test_bad_tasks(arguments, message):
    with pytest.raises(ValueError, match=message):
        Task(*arguments)


@pytest.fixture
def small():
    tasks = (Task("a", "classification", 10), Task("b", "regression", 1))
    targets = {"a": torch.arange(10).to(torch.uint8), "b": torch.arange(10.0)[:, None]}
    return TensorData(tasks, torch.arange(10, dtype=torch.uint8)[:, None] * 25, targets)


def test_a_data_set_works_with_a_plain_torch_loader(small):
    loader = torch.utils.data.DataLoader(small, batch_size=4)
    batches = list(loader)
    assert [len(batch["input"]) for batch in batches] == [4, 4, 2]
    expected = small.batch(torch.tensor([4, 5, 6, 7]))
    assert torch.equal(batches[1]["input"], expected["input"])
    assert torch.equal(batches[1]["targets"]["b"], expected["targets"]["b"])
    assert small[-1]["targets"]["a"] == 9
    with pytest.raises(IndexError):
        small[10]
    assert Subset(small, torch.tensor([3, 7])).batch(torch.tensor([1, 0]))["targets"]["a"].tolist() == [7, 3]


def test_targets_have_to_fit_the_tasks(small):
    with pytest.raises(ValueError, match="should have the keys"):
        TensorData(small.tasks, small.inputs, {"a": small.targets["a"]})
    with pytest.raises(ValueError, match="should have 10 targets"):
        TensorData(small.tasks, small.inputs, {**small.targets, "b": torch.zeros(3, 1)})


@settings(max_examples=40)
@given(
    size=st.integers(1, 40),
    batch_size=st.integers(1, 9),
    epoch=st.integers(0, 5),
    shuffle=st.booleans(),
)
def test_every_sample_comes_once_per_epoch(size, batch_size, epoch, shuffle):
    one = BatchPlan(size, batch_size, seed=3, shuffle=shuffle, drop_last=False)
    batches = [one.indices(epoch, position).tolist() for position in range(len(one))]
    assert all(0 < len(batch) <= batch_size for batch in batches)
    assert sorted(i for batch in batches for i in batch) == list(range(size))


@settings(max_examples=40)
@given(
    size=st.integers(1, 40),
    batch_size=st.integers(1, 9),
    world=st.integers(1, 4),
    epoch=st.integers(0, 3),
    drop_last=st.booleans(),
)
def test_ranks_share_the_batches_of_one_process(size, batch_size, world, epoch, drop_last):
    drop_last = drop_last and size >= batch_size
    one, *ranks = (
        BatchPlan(size, batch_size, drop_last=drop_last, rank=rank, world_size=number)
        for rank, number in [(0, 1), *((rank, world) for rank in range(world))]
    )
    assert {len(plan) for plan in ranks} == {len(one)}
    for position in range(len(one)):
        pieces = [plan.indices(epoch, position) for plan in ranks]
        assert torch.cat(pieces).equal(one.indices(epoch, position))
        assert torch.cat([plan.keys(epoch, position) for plan in ranks]).equal(one.keys(epoch, position))
        sizes = [len(piece) for piece in pieces]
        assert max(sizes) - min(sizes) <= 1


def test_plans_of_other_seeds_and_epochs_differ():
    orders = [BatchPlan(50, 5, seed=seed).order(epoch).tolist() for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 0, "batch_size": 1}, "`size` should be an int >= 1"),
        ({"size": 5, "batch_size": 0}, "`batch_size` should be an int >= 1"),
    ],
)
def test_bad_plans(arguments, message):
    with pytest.raises(ValueError, match=message):
        BatchPlan(**arguments)
    with pytest.raises(IndexError):
        BatchPlan(5, 5).indices(0, 1)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_workers_change_nothing_and_any_position_can_be_resumed(small, workers):
    def fetch(indices, keys):
        batch = small.batch(indices)
        return Batch(input=batch["input"] + uniform(keys, 0)[:, None], targets=batch["targets"])

    plan = BatchPlan(10, 3, seed=1)
    reference = list(Loader(fetch, plan).epoch(4))
    for start in range(4):
        loader = Loader(fetch, plan, workers=workers)
        resumed = list(loader.epoch(4, start))
        assert len(resumed) == 3 - start
        for batch, expected in zip(resumed, reference[start:], strict=True):
            assert torch.equal(batch["input"], expected["input"])
        assert (loader.wait_seconds > 0) == (start < 3)
    with pytest.raises(ValueError, match="`workers` should be an int >= 0"):
        Loader(fetch, plan, workers=-1)


def test_an_error_in_a_thread_reaches_the_caller():
    def fetch(indices, keys):
        raise OSError("disk gone")

    with pytest.raises(OSError, match="disk gone"):
        next(Loader(fetch, BatchPlan(4, 2), workers=2).epoch(0))


def test_random_numbers_are_uniform_independent_and_belong_to_the_sample():
    indices = torch.arange(20000)
    keys = sample_keys(0, 3, indices)
    assert len(set(keys.tolist())) == 20000
    first, second = uniform(keys, 0), uniform(keys, 1)
    for draw in (first, second):
        assert 0 <= draw.min() < draw.max() < 1
        assert abs(draw.mean() - 0.5) < 0.01
        assert abs(draw.var() - 1 / 12) < 0.003
    assert abs(torch.corrcoef(torch.stack([first, second]))[0, 1]) < 0.03
    assert abs(torch.corrcoef(torch.stack([first[1:], first[:-1]]))[0, 1]) < 0.03
    assert torch.equal(uniform(sample_keys(0, 3, indices[500:510]), 0), first[500:510])
    for other in (sample_keys(1, 3, indices), sample_keys(0, 4, indices)):
        assert abs(torch.corrcoef(torch.stack([first, uniform(other, 0)]))[0, 1]) < 0.03
    assert math.isclose(uniform(keys, 2, -2.0, 4.0).mean().item(), 1.0, abs_tol=0.05)


@pytest.mark.parametrize(
    ("spec", "options", "error", "message"),
    [
        ("nyu", {}, ValueError, "should be one of digits, .*Found `name = 'nyu'`"),
        ("digits:file.npz", {}, ValueError, "built in and takes no path"),
        ("digits", {"classes": 3}, TypeError, "has no option `classes`. It takes: train, validation, test"),
        ("nyuv2", {}, ValueError, "needs a path: `nyuv2:PATH`"),
        (
            "nyuv2:/nowhere/nyu.npz",
            {},
            FileNotFoundError,
            "needs `/nowhere/nyu.npz`, which doesn.t exist. Get it from https://",
        ),
    ],
)
def test_misuse_is_explained(spec, options, error, message):
    with pytest.raises(error, match=message):
        load_data(spec, **options)


@pytest.mark.parametrize("name", datasets())
def test_every_data_set_says_what_it_is(name):
    info = dataset_info(name)
    assert info.name == name
    assert info.summary
    assert bool(info.source) == bool(info.layouts)
