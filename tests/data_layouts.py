"""Small files in the layouts data sets are published in, written by the tests."""

import numpy as np
import scipy.io
from PIL import Image

GENERATOR = np.random.default_rng(0)


def rgb(height, width):
    return GENERATOR.integers(0, 256, (height, width, 3), dtype=np.uint8)


def save_picture(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def save_array(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, array)


def save_text(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def unit_normals(height, width):
    normals = GENERATOR.normal(size=(height, width, 3)).astype(np.float32)
    return normals / np.linalg.norm(normals, axis=-1, keepdims=True)


def write_mtan(root, counts, *, height=12, width=16, labels=("label",), normals=True):
    """MTAN's folders: floats in [0, 1], labels from -1, depth with a last axis of 1."""
    for split, count in counts.items():
        for index in range(count):
            name, folder = f"{index}.npy", root / split
            save_array(folder / "image" / name, rgb(height, width) / 255.0)
            for label in labels:
                classes = 19 if label == "label_19" else 13 if label == "label" else 7
                save_array(folder / label / name, GENERATOR.integers(-1, classes, (height, width)).astype(float))
            save_array(folder / "depth" / name, GENERATOR.random((height, width, 1)).astype(np.float32) + 1)
            if normals:
                save_array(folder / "normal" / name, unit_normals(height, width))
    return root


def write_nyud(root, names, *, image="png", maps="png", height=12, width=16):
    """InvPT's NYUDv2 folder, in which images, normals and edges are pictures; MTI-Net's has jpg and arrays."""
    for split, members in names.items():
        save_text(root / "gt_sets" / f"{split}.txt", members)
        for name in members:
            save_picture(root / "images" / f"{name}.{image}", rgb(height, width))
            labels = GENERATOR.integers(0, 41, (height, width), dtype=np.uint8)
            save_picture(root / "segmentation" / f"{name}.png", labels)
            save_array(root / "depth" / f"{name}.npy", GENERATOR.random((height, width)).astype(np.float32) + 1)
            edges = GENERATOR.random((height, width)) < 0.2
            if maps == "npy":
                save_array(root / "normals" / f"{name}.npy", unit_normals(height, width))
                save_array(root / "edge" / f"{name}.npy", edges.astype(np.float32))
            else:
                pixels = rgb(height, width)
                pixels[0, 0] = 127
                save_picture(root / "normals" / f"{name}.png", pixels)
                save_picture(root / "edge" / f"{name}.png", edges.astype(np.uint8) * 255)
    return root


def save_mat(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    scipy.io.savemat(path, content)


def struct_array(items):
    """A MATLAB struct array 1 x N, as the human parts are stored."""
    array = np.empty((1, len(items)), dtype=[(key, object) for key in items[0]])
    for k, item in enumerate(items):
        for key, value in item.items():
            array[0, k][key] = value
    return array


def write_pascal(root, names, height=20, width=30):
    """InvPT's PASCALContext folder. Every second image has a person with two parts beside an object without any."""
    number = 0
    for split, members in names.items():
        save_text(root / "ImageSets" / "Context" / f"{split}.txt", members)
        for name in members:
            save_picture(root / "JPEGImages" / f"{name}.jpg", rgb(height, width))
            semantic = GENERATOR.integers(0, 21, (height, width), dtype=np.uint8)
            semantic[0] = 255
            folder = "VOC12" if number % 3 else "pascal-context"
            save_picture(root / "semseg" / folder / f"{name}.png", semantic)
            context = np.full((height, width), 284, dtype=np.uint16)
            context[:, width // 2 :] = 420  # a tree, where normals aren't trusted
            save_mat(root / "pascal-context" / "trainval" / f"{name}.mat", {"LabelMap": context})
            save_picture(root / "normals_distill" / f"{name}.png", rgb(height, width))
            saliency = GENERATOR.integers(0, 256, (height, width), dtype=np.uint8)
            save_picture(root / "sal_distill" / f"{name}.png", saliency)
            mask = np.zeros((height, width), dtype=np.uint8)
            head, foot = mask.copy(), mask.copy()
            head[2:4, 3:6], foot[8:10, 3:6] = 1, 1
            parts = struct_array([{"part_name": "hair", "mask": head}, {"part_name": "lfoot", "mask": foot}])
            chair = {"class": "chair", "class_ind": 9, "mask": mask, "parts": np.zeros((0, 0))}
            person = {"class": "person", "class_ind": 15, "mask": head | foot, "parts": parts}
            objects = struct_array([chair, person] if number % 2 == 0 else [chair])
            anno = struct_array([{"imname": name, "objects": objects}])
            save_mat(root / "human_parts" / f"{name}.mat", {"anno": anno})
            number += 1
    return root


def write_taskonomy(folder_of, buildings, views=2, size=16, ranges=None):
    """``folder_of(domain, building)`` says where a building's pictures of a domain go; ``ranges`` what 16 bits reach."""
    eight_bit = ("reshading", "segment_unsup2d", "segment_unsup25d")
    sixteen_bit = ("edge_occlusion", "edge_texture", "keypoints2d", "keypoints3d", "depth_euclidean", "depth_zbuffer")
    for building in buildings:
        for view in range(views):
            for domain in ("rgb", "normal", "principal_curvature", *eight_bit, *sixteen_bit):
                path = folder_of(domain, building) / f"point_{view}_view_0_domain_{domain}.png"
                if domain in sixteen_bit:
                    highest = (ranges or {}).get(domain, 60000)
                    values = GENERATOR.integers(0, highest, (size, size), dtype=np.uint16)
                    values[0, 0] = 65535 if ranges is None else highest
                    save_picture(path, values)
                else:
                    picture = rgb(size, size)
                    picture[0, 0] = 127
                    save_picture(path, picture[..., 0] if domain in eight_bit else picture)


def write_celeba(root, count=12, attributes=("5_o_Clock_Shadow", "Smiling", "Young"), form="official"):
    """CelebA's files: in sub-folders as on its download page, "flat" in one folder, or "kaggle" with .csv tables."""
    image, anno, evaluation = {"official": ("Img", "Anno", "Eval"), "kaggle": ("img_align_celeba", "", "")}.get(
        form, ("", "", "")
    )
    names = [f"{i + 1:06d}.jpg" for i in range(count)]
    for name in names:
        save_picture(root / image / "img_align_celeba" / name, rgb(30, 20))
    signs = GENERATOR.choice([-1, 1], (count, len(attributes)))
    parts = [min(i * 3 // count, 2) for i in range(count)]
    if form == "kaggle":
        rows = [",".join(map(str, (name, *row))) for name, row in zip(names, signs, strict=True)]
        save_text(root / "list_attr_celeba.csv", [",".join(("image_id", *attributes)), *rows])
        rows = [f"{name},{part}" for name, part in zip(names, parts, strict=True)]
        save_text(root / "list_eval_partition.csv", ["image_id,partition", *rows])
        return signs
    rows = [f"{name}  {' '.join(f'{s:2d}' for s in row)}" for name, row in zip(names, signs, strict=True)]
    save_text(root / anno / "list_attr_celeba.txt", [str(count), " ".join(attributes), *rows])
    rows = [f"{name} {part}" for name, part in zip(names, parts, strict=True)]
    save_text(root / evaluation / "list_eval_partition.txt", rows)
    return signs
