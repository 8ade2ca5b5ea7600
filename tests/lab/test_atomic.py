"""Files are whole or absent, and damage is noticed."""

import json
import os

import numpy as np
import pytest
import torch

from torchmto.lab.atomic import BrokenFileError, plain, read_json, write_bytes, write_json


def test_written_and_read_back(tmp_path):
    content = {"a": [1, 2.5, None], "b": {"c": "ü"}}
    write_json(tmp_path / "x.json", "a kind", 3, content)
    assert read_json(tmp_path / "x.json", "a kind", 3) == content
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "x"
    write_bytes(path, b"old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text[: len(text) // 2], "isn't JSON"),
        (lambda text: text.replace("2.5", "2.6"), "checksum"),
        (lambda text: text.replace("a kind", "another"), "isn't a file of this program"),
        (lambda text: text.replace('"schema_version": 3', '"schema_version": 4'), "version 4"),
        (lambda text: "[]", "isn't a file of this program"),
        (lambda text: "\0" * 100, "isn't JSON"),
    ],
)
def test_damage_is_noticed(tmp_path, damage, message):
    path = tmp_path / "x.json"
    write_json(path, "a kind", 3, {"a": 2.5})
    path.write_text(damage(path.read_text()))
    with pytest.raises(BrokenFileError, match=message):
        read_json(path, "a kind", 3)


def test_plain_is_json():
    value = {"t": torch.ones(2), "n": np.float32(0.5), "nan": float("nan"), "inf": np.array([np.inf]), 3: (True, "s")}
    assert plain(value) == {"t": [1.0, 1.0], "n": 0.5, "nan": None, "inf": [None], "3": [True, "s"]}
    json.dumps(plain(value), allow_nan=False)
