"""A miniature of nuScenes in its official format: three scenes on one street, seen by six cameras of Rooms' ray caster."""

import json
from math import cos, pi, sin

import numpy as np
import torch
from PIL import Image

from torchmto.lab.data.nuscenes import CAMERAS
from torchmto.lab.data.rooms import BOX, FOCAL, _camera_rays, _Solid

SIZE = (96, 160)
EDGE, STREET = 120.0, 7.0  # metres of the map's sides, and of the street's half width around y = 60
LOCATION = "singapore-onenorth"
YAWS = {
    "FRONT": 0,
    "FRONT_LEFT": pi / 3,
    "FRONT_RIGHT": -pi / 3,
    "BACK_LEFT": 2 * pi / 3,
    "BACK_RIGHT": -2 * pi / 3,
    "BACK": pi,
}
# Category, attribute, place ahead and to the left of the car at first, size (width, length, height), yaw, speed, colour.
OBJECTS = (
    ("vehicle.car", "vehicle.moving", (12.0, 2.0), (1.9, 4.5, 1.6), 0.3, 4.0, (220, 30, 30)),
    ("vehicle.truck", "vehicle.parked", (-14.0, 1.0), (2.5, 7.0, 3.0), -0.2, 0.0, (30, 30, 220)),
    ("human.pedestrian.adult", "pedestrian.standing", (4.0, 8.0), (0.7, 0.7, 1.8), 1.0, 0.0, (240, 220, 20)),
    ("movable_object.trafficcone", "", (5.0, -7.0), (0.6, 0.6, 1.1), 0.0, 0.0, (250, 130, 0)),
    ("vehicle.bicycle", "cycle.with_rider", (-5.0, -9.0), (0.7, 1.8, 1.4), 2.0, 2.0, (200, 20, 200)),
    ("animal", "", (-6.0, 9.0), (0.8, 1.2, 1.0), 0.0, 0.0, (20, 200, 200)),
)
COLOURS = {category: colour for category, _, _, _, _, _, colour in OBJECTS}
ROAD, GRASS, SKY = (90, 90, 90), (60, 140, 60), (160, 200, 250)
TO_ROOMS = torch.tensor([[0.0, -1, 0], [0, 0, -1], [1, 0, 0]])


def about_z(yaw):
    return [cos(yaw / 2), 0.0, 0.0, sin(yaw / 2)]


def quaternion(matrix):
    """Of a rotation matrix without a half turn about a diagonal."""
    x, y, z = (
        (1 + 2 * matrix[i][i] - np.trace(matrix)) ** 0.5 / 2 if 1 + 2 * matrix[i][i] > np.trace(matrix) else 0
        for i in range(3)
    )
    w = max(0.0, 1 + np.trace(matrix)) ** 0.5 / 2
    x = np.copysign(x, matrix[2][1] - matrix[1][2])
    y = np.copysign(y, matrix[0][2] - matrix[2][0])
    z = np.copysign(z, matrix[1][0] - matrix[0][1])
    return [float(part) for part in (w, x, y, z)]


def facing(yaw):
    """A camera's axes (right, down, forward) as the columns of a rotation into the car's frame."""
    return np.array([[sin(yaw), 0.0, cos(yaw)], [-cos(yaw), 0.0, sin(yaw)], [0.0, -1.0, 0.0]])


def turned(yaw):
    return np.array([[cos(yaw), -sin(yaw), 0.0], [sin(yaw), cos(yaw), 0.0], [0.0, 0.0, 1.0]])


def photograph(rotation, origin, boxes):
    """What a camera sees from ``origin`` in the world: the boxes, the street, grass and sky."""
    direction = TO_ROOMS @ torch.as_tensor(rotation, dtype=torch.float32) @ _camera_rays(SIZE)
    direction[direction == 0] = 1e-9
    start = (TO_ROOMS @ torch.as_tensor(origin, dtype=torch.float32))[:, None, None]
    ahead = direction[:, None]
    ground = torch.where(ahead[1] > 0, -start[1] / ahead[1], torch.inf)
    hits = [ground]
    for centre, size, yaw, _ in boxes:
        solid = _Solid(
            kind=BOX,
            centre=(TO_ROOMS @ torch.as_tensor(centre, dtype=torch.float32))[:, None, None],
            half=torch.tensor([size[0] / 2, size[2] / 2, size[1] / 2])[:, None, None],
            angle=torch.tensor([[-yaw]]),
            color=torch.zeros(3, 1, 1),
            present=torch.tensor([[True]]),
        )
        hits.append(solid.hit(start, ahead))
    t, nearest = torch.stack(hits).min(0)
    north = -(start + t * ahead)[0]  # y in the world
    street = (north - EDGE / 2).abs() < STREET
    picture = np.where(street[0, :, None].numpy(), ROAD, GRASS)
    picture[t[0].isinf().numpy()] = SKY
    for number, (*_, colour) in enumerate(boxes, start=1):
        picture[(nearest[0] == number).numpy()] = colour
    return picture.reshape(*SIZE, 3).astype(np.uint8)


class Tables(dict):
    def add(self, table, **record):
        records = self.setdefault(table, [])
        token = f"{table[:12]}-{len(records):04d}"
        records.append({"token": token, **record})
        return token


def write_map(root, expansion):
    """The street as a mask, and as an expansion in which a square is cut out of it and holds a crossing of its own."""
    (root / "maps").mkdir(parents=True)
    rows = EDGE - (np.arange(int(EDGE * 10)) + 0.5) / 10
    mask = np.where(np.abs(rows - EDGE / 2) < STREET, 255, 0).astype(np.uint8)
    Image.fromarray(np.repeat(mask[:, None], len(rows), axis=1)).save(root / "maps" / "street.png")
    if expansion:
        nodes, polygons = [], []

        def ring(left, right, low, high):
            corners = [(left, low), (right, low), (right, high), (left, high)]
            first = len(nodes)
            nodes.extend({"token": f"n{first + i}", "x": x, "y": y} for i, (x, y) in enumerate(corners))
            return [node["token"] for node in nodes[-4:]]

        def polygon(outside, *holes):
            token = f"p{len(polygons)}"
            polygons.append(
                {"token": token, "exterior_node_tokens": outside, "holes": [{"node_tokens": h} for h in holes]}
            )
            return token

        middle = EDGE / 2
        street = polygon(ring(0, EDGE, middle - STREET, middle + STREET), ring(70, 76, middle - 3, middle + 3))
        crossing = polygon(ring(72, 74, middle - 1, middle + 1))
        layers = (
            "drivable_area",
            "road_segment",
            "road_block",
            "lane",
            "ped_crossing",
            "walkway",
            "stop_line",
            "carpark_area",
        )
        more = ("line", "road_divider", "lane_divider", "traffic_light", "lane_connector")
        content = {"version": "1.3", "canvas_edge": [EDGE, EDGE], "node": nodes, "polygon": polygons}
        content |= {name: [] for name in (*layers, *more)} | {"arcline_path_3": {}, "connectivity": {}}
        content["drivable_area"] = [{"token": "d", "polygon_tokens": [street]}]
        content["ped_crossing"] = [{"token": "c", "polygon_token": crossing, "road_segment_token": ""}]
        (root / "maps" / "expansion").mkdir()
        (root / "maps" / "expansion" / f"{LOCATION}.json").write_text(json.dumps(content))


def write_nuscenes(root, *, samples=3, expansion=False):
    """The folder of a data set: two training scenes and a validation scene of v1.0-mini, ``samples`` key frames each."""
    write_map(root, expansion)
    tables = Tables()
    log = tables.add("log", logfile="", vehicle="n015", date_captured="2018-01-01", location=LOCATION)
    tables.add("map", log_tokens=[log], category="semantic_prior", filename="maps/street.png")
    tables.add("visibility", level="v80-100", description="")
    categories = {entry[0]: tables.add("category", name=entry[0], description="") for entry in OBJECTS}
    attributes = {entry[1]: tables.add("attribute", name=entry[1], description="") for entry in OBJECTS if entry[1]}
    intrinsic = [[FOCAL * SIZE[1] / 2, 0, SIZE[1] / 2], [0, FOCAL * SIZE[1] / 2, SIZE[0] / 2], [0, 0, 1]]
    sensors = {}
    for channel in (*CAMERAS, "LIDAR_TOP"):
        camera = channel.startswith("CAM")
        rotation = facing(YAWS[channel.removeprefix("CAM_")]) if camera else np.eye(3)
        place = (rotation @ [0.0, 0.0, 0.5] + [0.0, 0.0, 1.5]).tolist() if camera else [0.0, 0.0, 1.8]
        sensors[channel] = (
            rotation,
            place,
            tables.add(
                "calibrated_sensor",
                sensor_token=tables.add("sensor", channel=channel, modality="camera" if camera else "lidar"),
                translation=place,
                rotation=quaternion(rotation),
                camera_intrinsic=intrinsic if camera else [],
            ),
        )
    for number, (name, heading) in enumerate((("scene-0061", 0.0), ("scene-0553", 0.4), ("scene-0103", -0.7))):
        write_scene(root, tables, (name, number, heading, log), (samples, sensors, categories, attributes))
    folder = root / "v1.0-mini"
    folder.mkdir()
    for table, records in tables.items():
        (folder / f"{table}.json").write_text(json.dumps(records))
    return root


def write_scene(root, tables, scene, common):
    name, number, heading, log = scene
    samples, sensors, categories, attributes = common
    token = f"scene-{number}"
    tables.setdefault("scene", []).append(
        {"token": token, "name": name, "description": "", "log_token": log, "nbr_samples": samples}
    )
    start, forward = np.array([50.0 + 4 * number, 59.0, 0.0]), turned(heading)

    def named(kind, index, of=""):
        return f"{kind}{of}-{number}-{index}" if 0 <= index < samples else ""

    for i in range(samples):
        time = 1_500_000_000_000_000 + number * 60_000_000 + i * 500_000
        links = {"prev": named("sample", i - 1), "next": named("sample", i + 1)}
        tables.setdefault("sample", []).append(
            {"token": named("sample", i), "timestamp": time, "scene_token": token, **links}
        )
        boxes = []
        for k, (_, attribute, place, size, yaw, speed, colour) in enumerate(OBJECTS):
            along = forward @ turned(yaw) @ [speed * 0.5 * i, 0.0, 0.0]
            centre = start + forward @ [*place, 0.0] + along + [0.0, 0.0, size[2] / 2]
            boxes.append((centre, size, heading + yaw, colour))
            tables.setdefault("sample_annotation", []).append(
                {
                    "token": named("annotation", i, k), "sample_token": named("sample", i),
                    "instance_token": f"instance-{number}-{k}", "visibility_token": "visibility-0000",
                    "attribute_tokens": [attributes[attribute]] if attribute else [],
                    "translation": centre.tolist(), "size": list(size), "rotation": about_z(heading + yaw),
                    "num_lidar_pts": 5, "num_radar_pts": 0,
                    "prev": named("annotation", i - 1, k), "next": named("annotation", i + 1, k),
                }
            )  # fmt: skip
        for channel, (rotation, offset, calibrated) in sensors.items():
            late = 0.0 if channel == "LIDAR_TOP" else 0.2  # metres that the car has driven when a camera is triggered
            car = start + forward @ [2.0 * 0.5 * i + late, 0.0, 0.0]
            pose = tables.add("ego_pose", translation=car.tolist(), rotation=about_z(heading), timestamp=time)
            ending = "pcd.bin" if channel == "LIDAR_TOP" else "png"
            file = f"samples/{channel}/{name}-{i}.{ending}"
            tables.setdefault("sample_data", []).append(
                {
                    "token": named("data", i, channel), "sample_token": named("sample", i), "ego_pose_token": pose,
                    "calibrated_sensor_token": calibrated, "filename": file, "fileformat": ending.partition(".")[0],
                    "width": SIZE[1], "height": SIZE[0], "timestamp": time, "is_key_frame": True,
                    "prev": named("data", i - 1, channel), "next": named("data", i + 1, channel),
                }
            )  # fmt: skip
            if channel != "LIDAR_TOP":
                (root / file).parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(photograph(forward @ rotation, car + forward @ offset, boxes)).save(root / file)
    tables["scene"][-1] |= {"first_sample_token": named("sample", 0), "last_sample_token": named("sample", samples - 1)}
    for k, entry in enumerate(OBJECTS):
        ends = {
            "first_annotation_token": named("annotation", 0, k),
            "last_annotation_token": named("annotation", samples - 1, k),
        }
        tables.setdefault("instance", []).append(
            {
                "token": f"instance-{number}-{k}",
                "category_token": categories[entry[0]],
                "nbr_annotations": samples,
                **ends,
            }
        )
