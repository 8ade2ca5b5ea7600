"""Files: archives that try to escape are refused, missing things are named."""

import io
import tarfile

import numpy as np
import pytest
import torch

from torchmto.lab.data import Task, files
from torchmto.lab.data.files import FileData, extract, find_root, load_array, read_npz, validation_split


def write_tar(path, members):
    with tarfile.open(path, "w:gz") as tar:
        for info, data in members:
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def link(name, target, kind):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize(
    "member",
    [
        tarfile.TarInfo("../evil"),
        tarfile.TarInfo("a/../../evil"),
        tarfile.TarInfo("/tmp/evil"),
        tarfile.TarInfo("c:\\evil"),
        link("link", "/etc", tarfile.SYMTYPE),
        link("hard", "../evil", tarfile.LNKTYPE),
        link("pipe", "", tarfile.FIFOTYPE),
        link("device", "", tarfile.CHRTYPE),
    ],
    ids=lambda member: member.name,
)
def test_an_archive_that_tries_to_escape_is_refused(tmp_path, member):
    archive = write_tar(tmp_path / "data.tgz", [(tarfile.TarInfo("fine"), b"1"), (member, b"")])
    with pytest.raises(ValueError, match=r"outside its folder|neither a file nor a folder"):
        extract(archive)
    assert [path.name for path in tmp_path.iterdir()] == ["data.tgz"]


def test_an_archive_is_unpacked_once(tmp_path):
    archive = write_tar(tmp_path / "data.tgz", [(tarfile.TarInfo("root/gt_sets/train.txt"), b"1\n")])
    folder = extract(archive)
    assert folder == tmp_path / "data.tgz.extracted"
    assert find_root(folder, "gt_sets") == folder / "root"
    assert find_root(folder, "nothing") is None
    (folder / "root" / "gt_sets" / "train.txt").unlink()
    assert extract(archive) == folder
    assert not (folder / "root" / "gt_sets" / "train.txt").exists()


@pytest.mark.parametrize("noted", [True, False])
def test_another_archive_is_not_what_was_unpacked(tmp_path, noted):
    folder = extract(write_tar(tmp_path / "data.tgz", [(tarfile.TarInfo("a"), b"old")]))
    if noted:
        write_tar(tmp_path / "data.tgz", [(tarfile.TarInfo("a"), b"newer")])
    else:
        (folder / ".unpacked_from").unlink()
    with pytest.raises(ValueError, match="Remove the folder"):
        extract(tmp_path / "data.tgz")
    assert (folder / "a").read_bytes() == b"old"


@pytest.mark.parametrize("content", [b"", b"not a tar", b"\x1f\x8b\x08\x00 broken"])
def test_a_damaged_archive_is_refused(tmp_path, content):
    (tmp_path / "data.tgz").write_bytes(content)
    with pytest.raises(ValueError, match="isn't a readable tar archive"):
        extract(tmp_path / "data.tgz")
    assert [path.name for path in tmp_path.iterdir()] == ["data.tgz"]


def test_pickled_arrays_are_refused(tmp_path):
    np.save(tmp_path / "a.npy", np.array([{"x": 1}]), allow_pickle=True)
    with pytest.raises(ValueError, match="isn't a plain NumPy array"):
        load_array(tmp_path / "a.npy", "nyuv2")
    np.savez(tmp_path / "a.npz", x=np.array([{"x": 1}]), y=np.zeros(2))
    with pytest.raises(ValueError, match=r"isn't a readable `.npz` file"):
        read_npz(tmp_path / "a.npz", ["x"])
    with pytest.raises(ValueError, match=r"should have an array `z`. Found x, y"):
        read_npz(tmp_path / "a.npz", ["y", "z"])
    (tmp_path / "a.npz").write_bytes(b"PK broken")
    with pytest.raises(ValueError, match="isn't a readable"):
        read_npz(tmp_path / "a.npz", ["y"])


def test_validation_split():
    kept, held_out = validation_split(100, 0.2, seed=3)
    assert sorted([*kept, *held_out]) == list(range(100))
    assert len(held_out) == 20
    _, blocks = validation_split(100, 0.2, seed=3, block=10)
    assert len(blocks) == 20
    assert len({i // 10 for i in blocks}) == 2
    for fraction in (0.0, 1.0):
        with pytest.raises(ValueError, match=r"should be in \(0, 1\)"):
            validation_split(10, fraction, seed=0)
    with pytest.raises(ValueError, match="too few"):
        validation_split(3, 0.5, seed=0, block=20)


@pytest.mark.parametrize(("memory", "reads"), [(0, 6), (100, 5), (10_000, 3)])
def test_samples_are_kept_while_there_is_room(monkeypatch, memory, reads):
    monkeypatch.setattr(files, "KEPT_BYTES", memory)
    count = 0

    def read(name):
        nonlocal count
        count += 1
        image = torch.full((1, 1, 5, 10), int(name), dtype=torch.uint8)
        return image, {"a": torch.full((1, 1, 5, 10), int(name), dtype=torch.uint8)}

    data = FileData([Task("a", "edges", 1)], ["1", "2", "3"], read)
    for _ in range(2):
        batch = data.batch(torch.tensor([2, 0, 1]))
    assert batch["targets"]["a"][:, 0, 0, 0].tolist() == [3, 1, 2]
    assert count == reads
