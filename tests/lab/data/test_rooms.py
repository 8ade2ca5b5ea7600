"""Rooms: every label is exact, and a room follows from its key alone."""

import pytest
import torch

from torchmto.lab.data import load_data
from torchmto.lab.data.loading import sample_keys
from torchmto.lab.data.rooms import BALL, BOX, CLASSES, FLOOR, FOCAL, LAMP, Rooms, render

HEIGHT, WIDTH = 48, 64


@pytest.fixture(scope="module")
def rooms():
    return render(sample_keys(0, 0, torch.arange(24)), (HEIGHT, WIDTH))


def points(depth):
    """Pixels at their depth, in the camera's frame, written out independently of the renderer."""
    u = ((torch.arange(WIDTH) + 0.5) / WIDTH - 0.5) * 2 / FOCAL
    v = ((torch.arange(HEIGHT) + 0.5) - HEIGHT / 2) * 2 / WIDTH / FOCAL
    return torch.stack([u * depth, v[:, None] * depth, depth], dim=1)


def test_what_is_rendered(rooms):
    assert rooms.rgb.shape == rooms.normals.shape == (24, 3, HEIGHT, WIDTH)
    assert rooms.rgb.dtype == rooms.segmentation.dtype == rooms.edges.dtype == torch.uint8
    assert set(rooms.segmentation.unique().tolist()) == set(range(len(CLASSES)))
    assert 0.3 < rooms.depth.min() < rooms.depth.max() < 12
    torch.testing.assert_close(rooms.normals.norm(dim=1), torch.ones(24, HEIGHT, WIDTH))
    assert 40 < rooms.rgb.float().mean() < 200
    assert rooms.rgb.float().std() > 30


def test_normals_face_the_camera(rooms):
    rays = points(torch.ones(1, HEIGHT, WIDTH))
    assert ((rays * rooms.normals).sum(1) < 1e-4).all()


def test_normals_are_the_derivative_of_depth_on_flat_surfaces(rooms):
    place = points(rooms.depth[:, 0])
    right, down = place[..., :-1, 1:] - place[..., :-1, :-1], place[..., 1:, :-1] - place[..., :-1, :-1]
    derived = torch.nn.functional.normalize(torch.linalg.cross(down, right, dim=1), dim=1)
    normals, labels = rooms.normals[..., :-1, :-1], rooms.segmentation[:, :-1, :-1]
    alike = (rooms.normals[..., :-1, 1:] - normals).norm(dim=1) + (rooms.normals[..., 1:, :-1] - normals).norm(dim=1)
    flat = (alike < 1e-3) & (rooms.edges[:, 0, :-1, :-1] == 0) & (labels != BALL) & (labels != LAMP)
    assert flat.float().mean() > 0.7
    cosine = (derived * normals).sum(1)[flat]
    assert (cosine > 0.999).float().mean() > 0.999


def test_balls_are_round(rooms):
    """Following the normals inwards by the radius ends at one point; two balls in a room have none."""
    for room in range(24):
        ball = rooms.segmentation[room] == BALL
        if ball.sum() < 20:
            continue
        place, normal = points(rooms.depth[:, 0])[room, :, ball], rooms.normals[room, :, ball]
        spread = [(place - radius * normal).var(dim=1).sum() for radius in torch.linspace(0.25, 0.55, 61)]
        if min(spread) < 1e-4:
            return
    pytest.fail("no single ball was found among 24 rooms")


def test_the_floor_is_flat_and_nothing_lies_below(rooms):
    for room in range(24):
        floor = rooms.segmentation[room] == FLOOR
        if floor.sum() < 50:
            continue
        normal = rooms.normals[room, :, floor][:, 0]
        height = (points(rooms.depth[:, 0])[room] * normal[:, None, None]).sum(0)
        assert height[floor].std() < 1e-4
        assert (height > height[floor].mean() - 1e-3).all()
        assert (height[rooms.segmentation[room] == BOX] < height[floor].mean() + 1.5).all()


def test_edges_surround_objects(rooms):
    changes = rooms.segmentation[:, :-1, :-1] != rooms.segmentation[:, :-1, 1:]
    assert (rooms.edges[:, 0, :-1, :-1][changes] == 1).all()
    assert 0.02 < (rooms.edges == 1).float().mean() < 0.2


def test_a_room_follows_from_its_key():
    keys = sample_keys(0, 0, torch.arange(6))
    together, alone = render(keys, (16, 24)), render(keys[4:5], (16, 24))
    assert torch.equal(together.segmentation[4], alone.segmentation[0])
    torch.testing.assert_close(together.depth[4], alone.depth[0])
    other = render(sample_keys(0, 1, torch.arange(6)), (16, 24))
    assert not torch.equal(other.rgb, together.rgb)


def test_the_order_of_asking_changes_nothing():
    first, second = Rooms(40, 3, 0, (16, 24)), Rooms(40, 3, 0, (16, 24))
    everything = first.batch(torch.arange(40))
    second.batch(torch.tensor([7, 3, 7]))
    again = second.batch(torch.arange(40))
    assert torch.equal(everything["targets"]["segmentation"], again["targets"]["segmentation"])
    torch.testing.assert_close(everything["targets"]["depth"], again["targets"]["depth"])
    assert again["input"].max() <= 1


def test_bundle():
    bundle = load_data("rooms", size=(16, 24), train=10, validation=4, test=4)
    batch = next(bundle.loader("train", 5, workers=2).epoch(0))
    assert batch["input"].shape == (5, *bundle.input_shape)
    assert {name: tuple(target.shape) for name, target in batch["targets"].items()} == {
        "segmentation": (5, 16, 24),
        "depth": (5, 1, 16, 24),
        "normals": (5, 3, 16, 24),
        "edges": (5, 1, 16, 24),
    }
    assert not torch.equal(bundle.train.batch(torch.arange(4))["input"], bundle.test.batch(torch.arange(4))["input"])
    straight = list(bundle.loader("train", 3, seed=2).epoch(1))
    resumed = list(bundle.loader("train", 3, seed=2, workers=2).epoch(1, start=1))
    for one, other in zip(straight[1:], resumed, strict=True):
        assert torch.equal(one["input"], other["input"])
        assert all(torch.equal(one["targets"][task.name], other["targets"][task.name]) for task in bundle.tasks)
    with pytest.raises(ValueError, match="`size` should be at least 8 x 8"):
        load_data("rooms", size=(4, 4))
