"""nuScenes: six cameras around a car, boxes of ten classes and a map, both seen from above; read from the official tables.

Each key frame is told in the frame of the car at the time of its lidar sweep: x forward, y left, z up, in metres.
"""

import json
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy.spatial.transform import Rotation
from torch import Tensor
from torch.utils.data import Dataset

from torchmto.checks import check_integer, found
from torchmto.lab.data.base import Task
from torchmto.lab.data.bev import MOST, NUMBERS, CentreLoss, Grid, decode
from torchmto.lab.data.dense import resize_image
from torchmto.lab.data.files import check_names, load_rgb, validation_split
from torchmto.lab.data.registry import register, require, unknown_layout
from torchmto.lab.problem import Problem

CAMERAS = ("CAM_FRONT_LEFT", "CAM_FRONT", "CAM_FRONT_RIGHT", "CAM_BACK_LEFT", "CAM_BACK", "CAM_BACK_RIGHT")
RANGES = {
    "car": 50, "truck": 50, "bus": 50, "trailer": 50, "construction_vehicle": 50, "pedestrian": 40, "motorcycle": 40,
    "bicycle": 40, "traffic_cone": 30, "barrier": 30,
}  # fmt: skip
"""The classes of the detection task, and within how many metres of the car each is judged."""
CLASSES = tuple(RANGES)
_CATEGORIES = {
    "vehicle.car": "car", "vehicle.truck": "truck", "vehicle.bus.bendy": "bus", "vehicle.bus.rigid": "bus",
    "vehicle.trailer": "trailer", "vehicle.construction": "construction_vehicle", "vehicle.motorcycle": "motorcycle",
    "vehicle.bicycle": "bicycle", "human.pedestrian.adult": "pedestrian", "human.pedestrian.child": "pedestrian",
    "human.pedestrian.construction_worker": "pedestrian", "human.pedestrian.police_officer": "pedestrian",
    "movable_object.trafficcone": "traffic_cone", "movable_object.barrier": "barrier",
}  # fmt: skip
LAYERS = ("drivable_area", "carpark_area", "walkway", "ped_crossing", "stop_line")
"""Layers of the map expansion, each drawn over those before it."""
_VALIDATION = """
3 12-18 35-36 38-39 92-110 221 268-278 329-332 344-346 519-524 552-565 625-627 629-630 632-638 770-771 775 777-778 780-784
794-800 802 904-917 919-931 962-963 966-969 971-972 1059-1073
"""
_VERSIONS = {"v1.0-trainval": _VALIDATION, "v1.0-mini": "103 916"}
"""The official validation scenes of each version, by their number."""
_ATTRIBUTES = {
    "traffic_cone": ("", ""), "barrier": ("", ""), "pedestrian": ("pedestrian.standing", "pedestrian.moving"),
    **dict.fromkeys(("bicycle", "motorcycle"), ("cycle.without_rider", "cycle.with_rider")),
}  # fmt: skip
"""Of what stands and of what moves, where it isn't a vehicle's."""
_PIXELS = 2  # of a map, per metre; the official masks have 10
CITATION = "Caesar et al., nuScenes: a multimodal dataset for autonomous driving, CVPR 2020"
Array = NDArray[np.float64]
Record = Mapping[str, Any]


@dataclass(frozen=True)
class Frame:
    """A key frame.

    Attributes:
        token: Of the sample.
        scene: Its scene's name.
        location: Which map.
        mask: File of the map's mask.
        translation: Of the car in the world.
        rotation: Quaternion of the car in the world.
        cameras: File, and projection ``[3, 4]`` from the car's frame to the stored pixels, of each camera.
        boxes: ``[M, 10]``, as in `torchmto.lab.data.bev`.
    """

    token: str
    scene: str
    location: str
    mask: str
    translation: Array
    rotation: Array
    cameras: tuple[tuple[str, Array], ...]
    boxes: Array


def rotation_matrix(quaternion: Sequence[float]) -> Array:
    """The rotation ``[3, 3]`` of a quaternion (w, x, y, z)."""
    matrix: Array = Rotation.from_quat(np.roll(quaternion, -1)).as_matrix()  # SciPy's w is last
    return matrix


def _pose(record: Record) -> Array:
    """From a sensor's or car's frame to the one that it is told in, ``[4, 4]``."""
    pose = np.eye(4)
    pose[:3, :3], pose[:3, 3] = rotation_matrix(record["rotation"]), record["translation"]
    return pose


def _inverse(pose: Array) -> Array:
    inverse: Array = np.linalg.inv(pose).astype(np.float64)
    return inverse


def _table(folder: Path, name: str) -> dict[str, Record]:
    path = require(folder / f"{name}.json", "nuscenes")
    try:
        return {record["token"]: record for record in json.loads(path.read_text(encoding="utf-8"))}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"`{path}` isn't a table of nuScenes: {error!r}") from error


def read_frames(root: Path, version: str) -> list[Frame]:
    """The key frames of a version, scene by scene in their order in time.

    Args:
        root: The folder with ``v1.0-...``, ``samples`` and ``maps``.
        version: Which tables.

    Raises:
        FileNotFoundError: If a table is missing.
        ValueError: If a table isn't one, or a record doesn't lead where it should.
    """
    names = ("scene", "log", "map", "sample", "sensor", "calibrated_sensor", "ego_pose", "sample_data")
    tables = {name: _table(root / version, name) for name in (*names, "category", "instance", "sample_annotation")}
    try:
        return _linked(tables)
    except KeyError as error:
        raise ValueError(f"The tables in `{root / version}` have no record or entry {error}.") from error


def _linked(tables: Mapping[str, Mapping[str, Record]]) -> list[Frame]:
    masks = {log: entry["filename"] for entry in tables["map"].values() for log in entry["log_tokens"]}
    data: dict[str, dict[str, Record]] = defaultdict(dict)
    for record in tables["sample_data"].values():
        if record["is_key_frame"]:
            calibrated = tables["calibrated_sensor"][record["calibrated_sensor_token"]]
            data[record["sample_token"]][tables["sensor"][calibrated["sensor_token"]]["channel"]] = record
    annotations = defaultdict(list)
    for record in tables["sample_annotation"].values():
        annotations[record["sample_token"]].append(record)
    frames = []
    for scene in sorted(tables["scene"].values(), key=lambda record: record["name"]):
        log, token = tables["log"][scene["log_token"]], scene["first_sample_token"]
        while token:
            channels = data[token]
            car = tables["ego_pose"][channels["LIDAR_TOP"]["ego_pose_token"]]
            to_world = _pose(car)
            cameras = []
            for name in CAMERAS:
                calibrated = tables["calibrated_sensor"][channels[name]["calibrated_sensor_token"]]
                camera = _pose(tables["ego_pose"][channels[name]["ego_pose_token"]]) @ _pose(calibrated)
                projection: Array = np.asarray(calibrated["camera_intrinsic"]) @ (_inverse(camera) @ to_world)[:3]
                (file,) = check_names([channels[name]["filename"]], Path("sample_data.json"))
                cameras.append((file, projection))
            place = np.asarray(car["translation"]), np.asarray(car["rotation"])
            boxes = _boxes(annotations[token], _inverse(to_world), tables)
            mask = masks[log["token"]]
            frames.append(Frame(token, scene["name"], log["location"], mask, *place, tuple(cameras), boxes))
            token = tables["sample"][token]["next"]
    return frames


def _boxes(annotations: Iterable[Record], to_car: Array, tables: Mapping[str, Mapping[str, Record]]) -> Array:
    """Of the ten classes, and seen by lidar or radar, as those that the official evaluation counts; the nearest first."""
    boxes = []
    for record in annotations:
        category = tables["category"][tables["instance"][record["instance_token"]]["category_token"]]["name"]
        if category in _CATEGORIES and record["num_lidar_pts"] + record["num_radar_pts"]:
            pose = to_car @ _pose(record)
            velocity = to_car[:2, :3] @ _velocity(record, tables)
            yaw = np.arctan2(pose[1, 0], pose[0, 0])
            boxes.append([CLASSES.index(_CATEGORIES[category]), *pose[:3, 3], *record["size"], yaw, *velocity])
    array = np.array(boxes, dtype=np.float64).reshape(-1, NUMBERS)
    return array[np.argsort(np.hypot(array[:, 1], array[:, 2]), kind="stable")]


def _velocity(record: Record, tables: Mapping[str, Mapping[str, Record]]) -> Array:
    """Metres per second between the annotations before and after; NaN where none is within 1.5 s, as in the evaluation."""
    ends = [tables["sample_annotation"][record[key]] if record[key] else record for key in ("prev", "next")]
    first, last = (tables["sample"][end["sample_token"]]["timestamp"] * 1e-6 for end in ends)
    neighbours = bool(record["prev"]) + bool(record["next"])
    if not neighbours or last - first > 1.5 * neighbours:
        return np.full(3, np.nan)
    return (np.asarray(ends[1]["translation"]) - ends[0]["translation"]) / (last - first)  # type: ignore[no-any-return]


def read_map(root: Path, location: str, mask: str, layers: Sequence[str]) -> NDArray[np.uint8]:
    """A location's map at two pixels per metre, north at the top: 0, or the number of the last layer there, from 1.

    Args:
        root: The data set's folder.
        location: Which map expansion, where there are layers.
        mask: File of the mask otherwise, whose streets and pavements become 1.
        layers: The layers to draw.
    """
    if layers:
        path = require(root / "maps" / "expansion" / f"{location}.json", "nuscenes")
        return _drawn(json.loads(path.read_text(encoding="utf-8")), layers)
    path = require(root / mask, "nuscenes")
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None  # the official masks have up to 1.2 billion
    try:
        with Image.open(path) as picture:
            return (np.asarray(picture.convert("L").reduce(10 // _PIXELS)) > 127).astype(np.uint8)
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _drawn(content: Mapping[str, Any], layers: Sequence[str]) -> NDArray[np.uint8]:
    width, height = (round(edge * _PIXELS) for edge in content["canvas_edge"])
    canvas = np.zeros((height, width), dtype=np.uint8)
    nodes = {node["token"]: (node["x"] * _PIXELS, height - node["y"] * _PIXELS) for node in content["node"]}
    polygons = {polygon["token"]: polygon for polygon in content["polygon"]}
    for number, layer in enumerate(layers, start=1):
        for record in content[layer]:
            for token in record["polygon_tokens"] if "polygon_tokens" in record else [record["polygon_token"]]:
                rings = [polygons[token]["exterior_node_tokens"]]
                rings += [hole["node_tokens"] for hole in polygons[token]["holes"]]
                points = [np.array([nodes[node] for node in ring]) for ring in rings if len(ring) > 2]
                if points:
                    # Each polygon by itself: its holes mustn't hide another one.
                    low = np.clip(np.floor(points[0].min(0)).astype(int), 0, (width, height))
                    high = np.clip(np.ceil(points[0].max(0)).astype(int) + 1, 0, (width, height))
                    shape = Image.new("1", tuple(np.maximum(high - low, 1)))
                    pen = ImageDraw.Draw(shape)
                    for i, ring in enumerate(points):
                        pen.polygon([tuple(point) for point in ring - low], fill=int(i == 0))
                    window = canvas[low[1] : high[1], low[0] : high[0]]
                    window[np.asarray(shape)[: window.shape[0], : window.shape[1]]] = number
    return canvas


@dataclass(frozen=True, eq=False)
class Frames(Dataset[tuple[Tensor, dict[str, Tensor]]]):
    """Key frames as samples: cameras, boxes, and the map around the car.

    The input is ``[cameras, 3, H + 1, W]``: pictures in ``[0, 1]``, under each of which a last row holds, in its first four
    pixels, the camera's projection ``[3, 4]`` from the car's frame to these pixels. So whatever takes a tensor takes it.

    Args:
        root: The data set's folder.
        frames: The key frames.
        maps: Location -> map, as `read_map` gives it.
        size: Height and width of the pictures.
        grid: The cells of the map.
    """

    root: Path
    frames: Sequence[Frame]
    maps: Mapping[str, NDArray[np.uint8]]
    size: tuple[int, int]
    grid: Grid

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        frame = self.frames[index]
        boxes = torch.full((MOST, NUMBERS), torch.nan)
        inside = frame.boxes[(np.abs(frame.boxes[:, 1:3]) < self.grid.reach).all(1)][:MOST]
        boxes[: len(inside)] = torch.from_numpy(inside).float()
        views = torch.stack([self._view(file, projection) for file, projection in frame.cameras])
        return views, {"detection": boxes, "map": self._map(frame)}

    def _view(self, file: str, projection: Array) -> Tensor:
        picture = load_rgb(self.root / file, "nuscenes")
        height, width = self.size
        scale = np.diag([width / picture.shape[-1], height / picture.shape[-2], 1.0])
        below = torch.zeros(3, 1, width)
        below[:, 0, :4] = torch.from_numpy(scale @ projection).float()
        return torch.cat([resize_image(picture, self.size)[0].float() / 255, below], dim=1)

    def _map(self, frame: Frame) -> Tensor:
        """Labels ``[cells, cells]``; nothing is known beyond the map's edges."""
        canvas, xy = self.maps[frame.location], self.grid.centres().double().numpy()
        world = xy @ rotation_matrix(tuple(frame.rotation))[:2, :2].T + frame.translation[:2]
        column = np.floor(world[..., 0] * _PIXELS).astype(int)
        row = np.floor(len(canvas) - world[..., 1] * _PIXELS).astype(int)
        on_map = (row >= 0) & (row < canvas.shape[0]) & (column >= 0) & (column < canvas.shape[1])
        labels = np.where(on_map, canvas[np.where(on_map, row, 0), np.where(on_map, column, 0)], 255)
        return torch.from_numpy(labels).long()


@register(
    "nuscenes",
    "driving, 6 cameras: 3D detection (10 classes) and map segmentation from above; 700 + 150 scenes",
    source="https://www.nuscenes.org/nuscenes#download (v1.0-trainval or v1.0-mini, samples, maps; map expansion 1.3)",
    layouts=("a folder with v1.0-trainval/ or v1.0-mini/, samples/ and maps/",),
)
def load(
    path: Path,
    seed: int = 0,
    *,
    size: tuple[int, int] = (256, 448),
    reach: float = 51.2,
    cells: int = 128,
    validation: float = 0.1,
    limit: int | None = None,
) -> Problem:
    """Key frames of nuScenes, cameras alone.

    The official validation scenes are the test split; a validation split is carved out of the training scenes, by whole
    scenes. Boxes are the ten classes of the detection task with lidar or radar points in them. The map's classes are the
    layers `LAYERS` of the map expansion over nothing, where ``maps/expansion`` is there; otherwise streets and pavements, as in
    the masks. NDS and its mAP are the official evaluation's (`submission`); ``mAP`` here is over the grid's boxes.

    Args:
        path: Folder.
        seed: Decides the validation split.
        size: Height and width of the pictures, multiples of 32.
        reach: Metres around the car.
        cells: Cells along a side of the map.
        validation: Share of the training scenes held out for validation.
        limit: How many key frames of each split to use, evenly spaced; all by default.

    Returns:
        The data set, with tasks ``detection`` and ``map``.
    """
    from torchmto.lab.data.centre_ap import CentreAP  # noqa: PLC0415  torchmetrics takes seconds to import

    version = next((name for name in _VERSIONS if (path / name).is_dir()), None)
    if version is None:
        raise unknown_layout(path, "nuscenes")
    if min(size) < 32 or any(side % 32 for side in size):
        raise ValueError(found("size", "multiples of 32", tuple(size)))
    if limit is not None:
        check_integer("limit", limit, minimum=1)
    frames = read_frames(path, version)
    locations = {frame.location: frame.mask for frame in frames}
    layers = LAYERS if all((path / "maps" / "expansion" / f"{name}.json").is_file() for name in locations) else ()
    maps = {location: read_map(path, location, mask, layers) for location, mask in locations.items()}
    grid = Grid(float(reach), check_integer("cells", cells, minimum=8))
    held_back = {f"scene-{number:04d}" for number in _numbers(_VERSIONS[version])}
    names = sorted({frame.scene for frame in frames} - held_back)
    kept, held_out = ({names[i] for i in part} for part in validation_split(len(names), validation, seed))

    def split(scenes: set[str]) -> Frames:
        chosen = [frame for frame in frames if frame.scene in scenes]
        step = 1 if limit is None else max(1, -(-len(chosen) // limit))
        return Frames(path, chosen[::step], maps, size, grid)

    seen = ("nothing", *(layers or ("street",)))
    tasks = (
        Task("detection", "own", len(CLASSES), {"classes": CLASSES, "grid": grid}),
        Task("map", "segmentation", len(seen), {"classes": seen, "grid": grid}),
    )
    parts = split(kept), split(held_out), split(held_back)
    return Problem(
        tasks,
        *parts,
        "bev",
        losses={"detection": CentreLoss(grid, len(CLASSES))},
        metrics={"detection": {"mAP": CentreAP(grid, tuple(RANGES.values()))}},
        input_shape=(len(CAMERAS), 3, size[0] + 1, size[1]),
        citation=CITATION,
    )


def _numbers(ranges: str) -> list[int]:
    pairs = [(int(first), int(last or first)) for first, _, last in (word.partition("-") for word in ranges.split())]
    return [number for first, last in pairs for number in range(first, last + 1)]


def submission(data: Frames, outputs: Iterable[Tensor], path: Path | str | None = None) -> dict[str, Any]:
    """Detections in the format of the official evaluation (``python -m nuscenes.eval.detection.evaluate``).

    Attributes are guessed by speed: whatever moves faster than .2 m/s is moving, and a cycle has a rider.

    Args:
        data: The key frames.
        outputs: The model's output of ``detection`` for each of them, in order, batched in any way.
        path: File to write it to.

    Returns:
        What the file holds.
    """
    boxes = (box for output in outputs for box in decode(output, data.grid, len(CLASSES)).double().cpu().numpy())
    results = {}
    for frame, rows in zip(data.frames, boxes, strict=True):
        turn = rotation_matrix(tuple(frame.rotation))
        results[frame.token] = [_result(frame, turn, row) for row in rows]
    meta = {f"use_{sensor}": sensor == "camera" for sensor in ("camera", "lidar", "radar", "map", "external")}
    content = {"meta": meta, "results": results}
    if path is not None:
        Path(path).write_text(json.dumps(content) + os.linesep, encoding="utf-8")
    return content


def _result(frame: Frame, turn: Array, row: Array) -> dict[str, Any]:
    score, kind, centre, size, yaw, velocity = row[0], int(row[1]), row[2:5], row[5:8], row[8], row[9:]
    rotation = Rotation.from_matrix(turn) * Rotation.from_euler("z", yaw)
    moving = bool(np.hypot(*velocity) > 0.2)
    return {
        "sample_token": frame.token,
        "translation": (turn @ centre + frame.translation).tolist(),
        "size": size.tolist(),
        "rotation": np.roll(rotation.as_quat(), 1).tolist(),
        "velocity": (turn[:2, :2] @ velocity).tolist(),
        "detection_name": CLASSES[kind],
        "detection_score": float(score),
        "attribute_name": _ATTRIBUTES.get(CLASSES[kind], ("vehicle.parked", "vehicle.moving"))[moving],
    }
