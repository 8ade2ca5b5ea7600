"""Small files in the layouts data sets are published in, written by the tests."""

import numpy as np
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
                save_array(
                    folder / label / name, GENERATOR.integers(-1, classes, (height, width)).astype(float)
                )
            save_array(folder / "depth" / name, GENERATOR.random((height, width, 1)).astype(np.float32) + 1)
            if normals:
                save_array(folder / "normal" / name, unit_normals(height, width))
    return root


def write_invpt_nyud(root, names, height=12, width=16):
    """InvPT's NYUDv2 folder: pictures and arrays listed in gt_sets."""
    for split, members in names.items():
        save_text(root / "gt_sets" / f"{split}.txt", members)
        for name in members:
            save_picture(root / "images" / f"{name}.jpg", rgb(height, width))
            labels = GENERATOR.integers(0, 41, (height, width), dtype=np.uint8)
            save_picture(root / "segmentation" / f"{name}.png", labels)
            save_array(
                root / "depth" / f"{name}.npy", GENERATOR.random((height, width)).astype(np.float32) + 1
            )
            save_array(root / "normals" / f"{name}.npy", unit_normals(height, width))
            save_array(
                root / "edge" / f"{name}.npy", (GENERATOR.random((height, width)) < 0.2).astype(np.float32)
            )
    return root
