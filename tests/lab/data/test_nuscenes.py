"""nuScenes: a miniature in the official format is read right, trains, and is scored by the official evaluation."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from nuscenes_miniature import COLOURS, EDGE, GRASS, ROAD, STREET, write_nuscenes
from torchmto.lab.data import load_data
from torchmto.lab.data.bev import MOST, CentreLoss, Grid, centre_heatmap, decode
from torchmto.lab.data.centre_ap import CentreAP
from torchmto.lab.data.nuscenes import CLASSES, LAYERS, RANGES, read_frames, rotation_matrix, submission
from torchmto.lab.models import build_model
from torchmto.lab.models.bev import lift

GRID = Grid(24.0, 48)
# Of a frame, the nearest first.
KINDS = {"car": "vehicle.car", "truck": "vehicle.truck", "bicycle": "vehicle.bicycle"}
KINDS |= {"pedestrian": "human.pedestrian.adult", "traffic_cone": "movable_object.trafficcone"}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_nuscenes(tmp_path_factory.mktemp("nuscenes") / "data")


def problem_of(root, **options):
    return load_data(f"nuscenes:{root}", size=(96, 160), reach=GRID.reach, cells=GRID.cells, validation=0.5, **options)


def ideal(boxes, wrong=0.0):
    """The network's output that stands for some boxes, each moved by about ``wrong`` metres; the farther, the less sure."""
    boxes = boxes.clone()
    boxes[..., 1:3] += wrong * torch.randn(boxes[..., 1:3].shape, generator=torch.Generator().manual_seed(0))
    heat = centre_heatmap(boxes, GRID, len(CLASSES)) ** 4 * 0.9
    output = torch.zeros(len(boxes), len(CLASSES) + 10, GRID.cells, GRID.cells)
    output[:, : len(CLASSES)] = torch.logit(heat.clamp(1e-6, 0.999))
    for sample, row in ((s, row) for s in range(len(boxes)) for row in boxes[s] if row[0].isfinite()):
        cell = GRID.place(row[1:3])
        y, x = cell.round().long().tolist()
        numbers = [*(cell - cell.round()), row[3], *row[4:7].log(), row[7].sin(), row[7].cos(), *row[8:].nan_to_num()]
        output[sample, len(CLASSES) :, y, x] = torch.stack([torch.as_tensor(number) for number in numbers])
        output[sample, int(row[0]), y, x] -= row[1:3].norm() / 50
    return output


def test_cameras_boxes_and_map_fit_together(root):
    """Boxes projected by the cameras' own matrices lie on their pictures, in the cars' colours; the map on the street."""
    problem = problem_of(root)
    assert [len(problem.split(name)) for name in ("train", "validation", "test")] == [3, 3, 3]
    assert {frame.scene for frame in problem.test.frames} == {"scene-0103"}
    seen = set()
    for split in (problem.train, problem.validation, problem.test):
        for i, frame in enumerate(split.frames):
            x, targets = split[i]
            pictures, projections = x[:, :, :-1], x[:, :, -1, :4]
            boxes = targets["detection"][targets["detection"][:, 0].isfinite()]
            assert [CLASSES[int(k)] for k in boxes[:, 0]].count("car") == 1
            assert len(boxes) == 5  # no animal
            assert (boxes[1:, 1:3].norm(dim=1) >= boxes[:-1, 1:3].norm(dim=1)).all()
            for box in boxes:
                u, v, depth = (projections @ torch.cat([box[1:4], torch.ones(1)])).T
                inside = (depth > 1) & (u / depth > 1) & (u / depth < 159) & (v / depth > 1) & (v / depth < 95)
                for camera in inside.nonzero().flatten().tolist():
                    row, column = int(v[camera] / depth[camera]), int(u[camera] / depth[camera])
                    colour = tuple((pictures[camera, :, row, column] * 255).round().int().tolist())
                    assert colour == COLOURS[KINDS[CLASSES[int(box[0])]]]
                    seen.add(CLASSES[int(box[0])])
            turn = rotation_matrix(frame.rotation)
            world = GRID.centres().double().numpy() @ turn[:2, :2].T + frame.translation[:2]
            off = np.abs(world[..., 1] - EDGE / 2) - STREET
            clear = np.abs(off) > 0.5
            assert (targets["map"].numpy()[clear] == (off < 0)[clear]).all()
            # The ground under the cells is street or grass in the pictures, too.
            points = torch.cat([GRID.centres().flatten(0, 1), torch.zeros(GRID.cells**2, 1)], dim=1)
            colours = lift(pictures[None], projections[None], points, (96, 160))[0].T * 255
            street = (colours - torch.tensor(ROAD)).abs().amax(1) < 3
            grass = (colours - torch.tensor(GRASS)).abs().amax(1) < 3
            labels = targets["map"].flatten()
            sure = torch.from_numpy(np.abs(off) > 2).flatten()
            assert (street & sure).sum() > 100
            assert (labels[street & sure] == 1).all()
            assert (grass & sure).sum() > 100
            assert (labels[grass & sure] == 0).all()
    assert seen == set(KINDS)


def test_velocities_are_in_the_cars_frame(root):
    frames = [frame for frame in read_frames(root, "v1.0-mini") if frame.scene == "scene-0553"]
    cars = [frame.boxes[frame.boxes[:, 0] == 0][0] for frame in frames]
    for car in cars:
        np.testing.assert_allclose(car[8:], [4 * np.cos(0.3), 4 * np.sin(0.3)], atol=1e-6)
        assert car[7] == pytest.approx(0.3)
    np.testing.assert_allclose(cars[1][1:3] - cars[0][1:3], cars[0][8:] * 0.5 - [1.0, 0.0], atol=1e-6)


def test_the_expansions_layers_are_drawn_with_their_holes(tmp_path):
    problem = problem_of(write_nuscenes(tmp_path / "data", samples=1, expansion=True))
    assert problem.task_list[1].extra["classes"] == ("nothing", *LAYERS)
    data = next(data for data in (problem.train, problem.validation) if data.frames[0].scene == "scene-0061")
    labels = data[0][1]["map"].numpy()
    world = GRID.centres().numpy() + data.frames[0].translation[:2]  # this car looks east

    def inside(left, right, half, margin):
        return (
            (world[..., 0] > left + margin)
            & (world[..., 0] < right - margin)
            & (np.abs(world[..., 1] - 60) < half - margin)
        )

    crossing, hole = inside(72, 74, 1, 0.3), inside(70, 76, 3, 0.3) & ~inside(72, 74, 1, -0.6)
    assert crossing.any()
    assert hole.any()
    assert (labels[crossing] == 1 + LAYERS.index("ped_crossing")).all()
    assert (labels[hole] == 0).all()
    assert (labels[inside(30, 69, STREET, 0.6)] == 1).all()


def test_boxes_come_out_of_their_heatmaps(root):
    problem = problem_of(root)
    boxes = torch.stack([sample[1]["detection"] for sample in problem.train])
    output = ideal(boxes)
    found = decode(output, GRID, len(CLASSES), count=5)[..., 1:]
    for mine, real in zip(found, boxes[:, :5].nan_to_num(), strict=True):
        torch.testing.assert_close(mine[mine[:, 0].argsort()], real[real[:, 0].argsort()], atol=2e-3, rtol=0)
    loss, count = CentreLoss(GRID, len(CLASSES))(output, boxes)
    worse, _ = CentreLoss(GRID, len(CLASSES))(ideal(boxes, wrong=3.0), boxes)
    assert int(count) == int(boxes[..., 0].isfinite().sum())
    assert loss < worse / 5
    none, count = CentreLoss(GRID, len(CLASSES))(output, torch.full((3, MOST, 10), torch.nan))
    assert none.isfinite()
    metric = CentreAP(GRID, tuple(RANGES.values()))
    metric.update(output, boxes)
    assert float(metric.compute()) == pytest.approx(0.5, abs=0.01)  # five of ten classes are there, and right


@pytest.mark.parametrize("method", ["wpcgrad", "connection_strength"])
def test_every_parameter_learns(root, method):
    """Of a network whose norms may be split by task, as the input is one tensor."""
    problem = problem_of(root, limit=2)
    split = method == "connection_strength"
    model = build_model("bev", problem.task_list, problem.shape, width=8, blocks=1, task_norms=split)
    x = torch.stack([problem.train[i][0] for i in range(2)])
    outputs = model(x)
    assert outputs["detection"].shape == (2, 20, GRID.cells, GRID.cells)
    assert outputs["map"].shape == (2, 2, GRID.cells, GRID.cells)
    sum(output.square().mean() for output in outputs.values()).backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_misuse(root, tmp_path):
    with pytest.raises(ValueError, match="`size` should be multiples of 32"):
        load_data(f"nuscenes:{root}", size=(90, 160))
    with pytest.raises(ValueError, match="none of these"):
        load_data(f"nuscenes:{tmp_path}")
    (tmp_path / "v1.0-mini").mkdir()
    with pytest.raises(FileNotFoundError, match=r"scene\.json"):
        load_data(f"nuscenes:{tmp_path}")
    with pytest.raises(ValueError, match="`bev` is for cameras"):
        build_model("bev", problem_of(root).task_list, (3, 32, 32))


PACKAGES = """nuscenes-devkit numpy pyquaternion shapely tqdm cachetools matplotlib scikit-learn scipy pillow
opencv-python-headless descartes fire joblib threadpoolctl contourpy cycler fonttools kiwisolver packaging pyparsing
python-dateutil six cloudpickle narwhals pycocotools parameterized"""
SCORE = """
import json, sys
from nuscenes.nuscenes import NuScenes
from nuscenes.eval.common.config import config_factory
from nuscenes.eval.detection.evaluate import DetectionEval
from nuscenes.map_expansion.map_api import NuScenesMap
root, out, *files = sys.argv[1:]
data = NuScenes("v1.0-mini", root, verbose=False)
NuScenesMap(root, "singapore-onenorth")
scores = []
for file in files:
    judge = DetectionEval(data, config_factory("detection_cvpr_2019"), file, "mini_val", out, verbose=False)
    scores.append(judge.evaluate()[0].serialize())
print("SCORES", json.dumps([{key: score[key] for key in ("mean_ap", "nd_score", "tp_errors")} for score in scores]))
"""


@pytest.mark.slow
def test_the_official_evaluation_scores_our_submission(tmp_path):
    """Right boxes get what right boxes get, and our mAP is theirs, also of boxes that are off; in an environment of its own."""
    python = tmp_path / "env" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "env"], check=True)
    install = [python, "-m", "pip", "install", "--no-deps", "--quiet", *PACKAGES.split()]
    made = subprocess.run(install, check=False, capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"nuscenes-devkit can't be installed here: {made.stderr.strip().splitlines()[-1]}")
    root = write_nuscenes(tmp_path / "data", expansion=True)
    data = problem_of(root).test
    boxes = torch.stack([sample[1]["detection"] for sample in data])
    ours, files = [], []
    for wrong in (0.0, 0.8, 2.0):
        files.append(tmp_path / f"{wrong}.json")
        submission(data, [ideal(boxes, wrong)], files[-1])
        metric = CentreAP(GRID, tuple(RANGES.values()))
        metric.update(ideal(boxes, wrong), boxes)
        ours.append(float(metric.compute()))
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [python, "-c", SCORE, root, tmp_path / "out", *files]
    scored = subprocess.run(command, check=False, capture_output=True, text=True, env=clean)
    assert scored.returncode == 0, scored.stderr
    theirs = json.loads(scored.stdout.partition("SCORES ")[2])
    assert [score["mean_ap"] for score in theirs] == pytest.approx(ours, abs=1e-6)
    assert theirs[0]["mean_ap"] == pytest.approx(0.5, abs=0.01)
    errors = theirs[0]["tp_errors"]
    # The five classes that aren't there count as errors of 1: half of the ten (cones and barriers aside) are right.
    assert errors["trans_err"] == pytest.approx(0.5, abs=0.01)
    assert errors["scale_err"] == pytest.approx(0.5, abs=0.01)
    assert theirs[0]["nd_score"] > theirs[1]["nd_score"] > theirs[2]["nd_score"]
