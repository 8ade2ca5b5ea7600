"""Resizing invents no labels; edges lie where labels change."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import adaptive_avg_pool2d

from torchmto.lab.data import Task
from torchmto.lab.data.dense import label_edges, pad_to, resize_image, resize_target

DEPTH, NORMALS = Task("depth", "depth", 1), Task("normals", "normals", 3)
LABELS = Task("segmentation", "segmentation", 5)
sizes = st.tuples(st.integers(2, 14), st.integers(2, 14))


@settings(max_examples=25)
@given(size=sizes, seed=st.integers(0, 1000))
def test_resizing_keeps_values_and_never_mixes_in_missing_ones(size, seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 5, (2, 8, 10), generator=generator).to(torch.uint8)
    assert torch.isin(resize_target(LABELS, labels, size), labels).all()
    depth = 2 + torch.rand(2, 1, 8, 10, generator=generator)
    depth[torch.rand(depth.shape, generator=generator) < 0.3] = 0
    smaller = resize_target(DEPTH, depth, size)
    assert ((smaller == 0) | ((smaller >= 2) & (smaller <= 3 + 1e-5))).all()
    normals = torch.nn.functional.normalize(torch.randn(2, 3, 8, 10, generator=generator), dim=1)
    length = resize_target(NORMALS, normals, size).norm(dim=1)
    assert ((length - 1).abs() < 1e-4).logical_or(length == 0).all()


def test_compact_types_stay():
    image = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    assert resize_image(image, (4, 4)).dtype == torch.uint8
    assert resize_image(image, (8, 8)) is image
    assert abs(resize_image(image, (4, 4)).float().mean() - image.float().mean()) < 5
    normals = torch.tensor([0, 0, 127], dtype=torch.int8).view(1, 3, 1, 1).expand(1, 3, 8, 8)
    resized = resize_target(NORMALS, normals, (4, 4))
    assert resized.dtype == torch.int8
    assert resized.unique().tolist() == [0, 127]
    depth = torch.full((1, 1, 8, 8), 2.5, dtype=torch.float16)
    assert torch.equal(resize_target(DEPTH, depth, (3, 5)), torch.full((1, 1, 3, 5), 2.5, dtype=torch.float16))


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.float16, torch.float32])
@pytest.mark.parametrize("size", [(3, 5), (16, 20)])
def test_resized_normals_point_where_the_pixels_they_cover_do(dtype, size):
    # Rounded to whole numbers a unit vector is longer than 127, and one near an axis then has no room in a byte.
    axes = torch.cat([torch.eye(3), -torch.eye(3)])
    generator = torch.Generator().manual_seed(0)
    near = axes[torch.arange(60) % 6, :, None, None] + 0.08 * torch.randn(60, 3, 8, 10, generator=generator)
    stored = (127 * torch.nn.functional.normalize(near, dim=1)).round().to(dtype)
    stored[:, :, :2] = 0
    resized = resize_target(NORMALS, stored, size)
    assert resized.dtype == dtype
    valid = (stored != 0).any(dim=1, keepdim=True).float()
    covered = adaptive_avg_pool2d(valid, size)[:, 0] >= 0.5
    assert torch.equal((resized != 0).any(dim=1), covered)
    mean = adaptive_avg_pool2d(stored.float(), size)
    cosine = torch.nn.functional.cosine_similarity(resized.float(), mean, dim=1)
    assert cosine[covered].min() > 0.9999


def test_edges_of_a_square():
    labels = torch.zeros(1, 6, 6, dtype=torch.uint8)
    labels[0, 2:4, 2:4] = 3
    labels[0, 5, 5] = 255
    edges = label_edges(labels)[0, 0]
    assert edges[5, 5] == 255
    expected = {(1, 2), (1, 3), (3, 2), (3, 3), (2, 1), (3, 1), (2, 3)}
    assert {tuple(p) for p in (edges == 1).nonzero().tolist()} == expected


def test_padding_keeps_proportions_and_marks_the_rest_as_missing():
    image = torch.full((1, 3, 10, 20), 200, dtype=torch.uint8)
    targets = {
        "segmentation": torch.ones(1, 10, 20, dtype=torch.uint8),
        "depth": torch.ones(1, 1, 10, 20),
    }
    padded, new = pad_to([LABELS, DEPTH], image, targets, (16, 16))
    assert padded.shape == (1, 3, 16, 16)
    assert (padded[..., :8, :] == 200).all()
    assert not padded[..., 8:, :].any()
    assert (new["segmentation"][:, :8] == 1).all()
    assert (new["segmentation"][:, 8:] == 255).all()
    assert not new["depth"][..., 8:, :].any()
    same, _ = pad_to([LABELS, DEPTH], image, targets, (10, 20))
    assert torch.equal(same, image)
