"""Joint augmentation: geometry stays consistent, randomness belongs to the sample."""

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from torchmto.lab.data import Batch, Task
from torchmto.lab.data.augment import JointAugment, color_jitter, hflip, photometric, shift, zoom
from torchmto.lab.data.dense import IMAGENET_MEAN, scene_augment
from torchmto.lab.data.loading import sample_keys

TASKS = (
    Task("segmentation", "segmentation", 5),
    Task("depth", "depth", 1),
    Task("normals", "normals", 3),
    Task("edges", "edges", 1),
    Task("map", "map", 2),
    Task("label", "classification", 3),
)
HEIGHT, WIDTH = 9, 13
seeds = st.integers(0, 2**31)


def make_batch(seed=0, size=4):
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.rand(size, *shape, generator=generator)

    normals = torch.nn.functional.normalize(rand(3, HEIGHT, WIDTH) - 0.5, dim=1)
    hole = rand(1, HEIGHT, WIDTH) < 0.1
    return Batch(
        input=rand(3, HEIGHT, WIDTH),
        targets={
            "segmentation": torch.where(rand(HEIGHT, WIDTH) < 0.1, 255, (rand(HEIGHT, WIDTH) * 5).long()),
            "depth": torch.where(hole, 0.0, 1 + rand(1, HEIGHT, WIDTH)),
            "normals": torch.where(hole, 0.0, normals),
            "edges": (rand(1, HEIGHT, WIDTH) < 0.5).float(),
            "map": torch.where(hole, torch.nan, rand(2, HEIGHT, WIDTH)),
            "label": torch.arange(size) % 3,
        },
    )


def assert_same(a, b, **tolerance):
    torch.testing.assert_close(a["input"], b["input"], **tolerance)
    for name in b["targets"]:
        torch.testing.assert_close(a["targets"][name], b["targets"][name], equal_nan=True, **tolerance)


@hypothesis_settings(max_examples=15)
@given(seed=seeds, chosen=st.lists(st.booleans(), min_size=4, max_size=4))
def test_two_flips_are_none_and_unchosen_samples_stay(seed, chosen):
    batch, chosen = make_batch(seed), torch.tensor(chosen)
    once = hflip(batch, TASKS, chosen)
    assert_same(hflip(once, TASKS, chosen), batch, rtol=0, atol=0)
    for name, target in once["targets"].items():
        torch.testing.assert_close(target[~chosen], batch["targets"][name][~chosen], equal_nan=True)
    normals, before = once["targets"]["normals"][chosen], batch["targets"]["normals"][chosen].flip(-1)
    assert torch.equal(normals[:, 0], -before[:, 0])
    assert torch.equal(normals[:, 1:], before[:, 1:])
    assert torch.equal(once["targets"]["label"], batch["targets"]["label"])


@hypothesis_settings(max_examples=15)
@given(seed=seeds, factor=st.floats(1.0, 3.0), x=st.floats(0, 1), y=st.floats(0, 1))
def test_zoom_divides_depth_and_invents_no_value(seed, factor, x, y):
    batch = make_batch(seed)
    factors, corner = torch.full((4,), factor), torch.tensor([[x, y]]).expand(4, 2)
    zoomed = zoom(batch, TASKS, factors, corner)["targets"]
    for task in TASKS[:5]:
        old, new = batch["targets"][task.name], zoomed[task.name]
        assert new.shape == old.shape
        assert new.dtype == old.dtype
        expected = old / torch.tensor(factor) if task.kind == "depth" else old
        for sample in range(4):
            assert torch.isin(new[sample].nan_to_num(-9), expected[sample].nan_to_num(-9)).all()
    length = zoomed["normals"].norm(dim=1)
    assert ((length - 1).abs() < 1e-5).logical_or(length == 0).all()


def test_zoom_of_one_changes_nothing_and_of_two_shows_the_window():
    batch = make_batch()
    assert_same(zoom(batch, TASKS, torch.ones(4), torch.rand(4, 2)), batch, rtol=0, atol=1e-5)
    ramp = torch.arange(WIDTH).float().expand(4, 3, HEIGHT, WIDTH) / 20
    corner = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.5, 1.0], [0.25, 0.5]])
    shown = zoom(Batch(input=ramp, targets={}), TASKS, torch.full((4,), 2.0), corner)["input"]
    start = corner[:, 0] * (WIDTH - 1) / 2
    expected = (start[:, None] + torch.arange(WIDTH) / 2) / 20
    torch.testing.assert_close(shown[:, 0, 0], expected)


def test_zoom_keeps_image_and_targets_together():
    batch = make_batch()
    picture = torch.nn.functional.interpolate(torch.rand(4, 3, 3, 4), (HEIGHT, WIDTH), mode="bilinear")
    task = Task("copy", "map", 3)
    both = Batch(input=picture, targets={"copy": picture.clone()})
    zoomed = zoom(both, [task], torch.tensor([1.0, 1.3, 1.7, 2.5]), torch.rand(4, 2))
    assert (zoomed["input"] - zoomed["targets"]["copy"]).abs().max() < 0.2
    assert batch["input"].shape == zoomed["input"].shape


@hypothesis_settings(max_examples=15)
@given(seed=seeds, factor=st.floats(0.3, 1.0, exclude_max=True))
def test_a_shrunk_sample_stands_in_a_frame_without_labels(seed, factor):
    batch, factors = make_batch(seed), torch.full((4,), factor)
    shrunk = zoom(batch, TASKS, factors, torch.rand(4, 2), fill=(2.0, 3.0, 4.0))
    inside = shrunk["input"][:, :1] != 2.0
    rows, columns = inside[0, 0].any(1), inside[0, 0].any(0)
    assert torch.equal(inside, (rows[:, None] & columns).expand_as(inside))
    assert torch.equal(rows, rows.flip(0))
    assert torch.equal(columns, columns.flip(0))
    assert abs(int(columns.sum()) - (WIDTH - 1) * factor) <= 2
    for task in TASKS[:5]:
        old, new = batch["targets"][task.name], shrunk["targets"][task.name]
        framed = new if new.dim() == 4 else new[:, None]
        missing = torch.tensor(task.missing).to(new.dtype)
        assert (framed.masked_fill(inside, missing).nan_to_num(-9) == missing.nan_to_num(-9)).all()
        expected = old / torch.tensor(factor) if task.kind == "depth" else old
        for sample in range(4):
            known = torch.cat([expected[sample].flatten(), missing.view(1)]).nan_to_num(-9)
            assert torch.isin(new[sample].nan_to_num(-9), known).all()


def test_distorted_colours_are_those_of_the_released_code():
    """Each distortion alone, as OpenCV's HSV of the released code defines it, and none on half of the samples."""
    keys = sample_keys(0, 0, torch.arange(4000))
    gray = photometric(torch.full((4000, 3, 1, 1), 0.5), keys)
    assert torch.allclose(gray.amax(1), gray.amin(1), atol=1e-6)  # neither hue nor saturation changes a gray
    assert 0.2 < (gray[:, 0] == 0.5).float().mean() < 0.3  # neither brightness nor contrast
    assert 0.18 < gray.min() < 0.21
    assert 0.9 < gray.max() < 0.94
    red = photometric(torch.tensor([0.5, 0.25, 0.25]).view(1, 3, 1, 1).expand(4000, 3, 1, 1), keys)
    high, low = red.amax(1), red.amin(1)
    saturation = ((high - low) / high).flatten()
    assert 0 < saturation.min() < 0.3
    kept = red.argmax(1).flatten() == 0
    assert kept.all()  # hue turns by up to 36 degrees, less than the 60 to the next colour
    assert (red[:, 1] > red[:, 2]).any()
    assert (red[:, 1] < red[:, 2]).any()


def test_augmentations_by_name():
    batch, augment = make_batch(), scene_augment("atrc")
    batch["input"] = torch.rand(4, 3, HEIGHT, WIDTH)
    keys = sample_keys(1, 0, torch.arange(4))
    together = augment(batch, TASKS, keys)
    alone = Batch(input=batch["input"][2:3], targets={name: target[2:3] for name, target in batch["targets"].items()})
    torch.testing.assert_close(augment(alone, TASKS, keys[2:3])["input"][0], together["input"][2])
    assert (augment.shrink, augment.zoom, augment.fill) == (0.5, 2.0, IMAGENET_MEAN)
    with pytest.raises(ValueError, match="`augmentation` should be one of 'plain', 'atrc'"):
        scene_augment("strong")


def test_disparity_grows():
    disparity = Task("depth", "depth", 1, {"inverse": True})
    batch = Batch(input=torch.zeros(1, 3, 4, 4), targets={"depth": torch.ones(1, 1, 4, 4)})
    zoomed = zoom(batch, [disparity], torch.tensor([2.0]), torch.zeros(1, 2))
    assert torch.equal(zoomed["targets"]["depth"], torch.full((1, 1, 4, 4), 2.0))


def test_shift_moves_whole_pixels():
    images = torch.rand(3, 2, 5, 6)
    moved = shift(images, torch.tensor([[0, 0], [2, 0], [-1, 3]]))
    assert torch.equal(moved[0], images[0])
    assert torch.equal(moved[1, :, :, 2:], images[1, :, :, :-2])
    assert not moved[1, :, :, :2].any()
    assert torch.equal(moved[2, :, 3:, :-1], images[2, :, :-3, 1:])
    assert torch.equal(shift(images, torch.zeros(3, 2, dtype=torch.int64)), images)


def test_color_jitter_keeps_the_range_and_factors_of_one_change_nothing():
    images, ones = torch.rand(5, 3, 4, 4), torch.ones(5)
    torch.testing.assert_close(color_jitter(images, ones, ones, ones), images)
    strong = color_jitter(images, ones * 1.9, ones * 1.9, ones * 0.1)
    assert 0 <= strong.min() <= strong.max() <= 1
    gray = torch.rand(2, 1, 4, 4)
    torch.testing.assert_close(color_jitter(gray, ones[:2], ones[:2], ones[:2] * 0), gray)


def test_a_sample_is_augmented_alike_in_any_batch():
    batch, augment = make_batch(), JointAugment(zoom=2.0, color=0.3)
    keys = sample_keys(1, 2, torch.arange(4))
    together = augment(batch, TASKS, keys)
    alone = Batch(input=batch["input"][2:3], targets={name: target[2:3] for name, target in batch["targets"].items()})
    alone = augment(alone, TASKS, keys[2:3])
    torch.testing.assert_close(alone["input"][0], together["input"][2])
    assert torch.equal(alone["targets"]["segmentation"][0], together["targets"]["segmentation"][2])
    other = augment(batch, TASKS, sample_keys(1, 3, torch.arange(4)))
    assert not torch.equal(other["input"], together["input"])


def test_a_shift_that_targets_would_not_follow_is_refused():
    with pytest.raises(ValueError, match=r"`shift` should be 0 with dense tasks \(segmentation"):
        JointAugment(shift=2)(make_batch(), TASKS, sample_keys(0, 0, torch.arange(4)))


def test_images_without_dense_targets_are_shifted():
    task = Task("label", "classification", 3)
    batch = Batch(input=torch.rand(8, 3, 6, 6), targets={"label": torch.arange(8) % 3})
    new = JointAugment(shift=2)(batch, [task], sample_keys(0, 0, torch.arange(8)))
    assert new["input"].shape == batch["input"].shape
    assert not torch.equal(new["input"], batch["input"])
