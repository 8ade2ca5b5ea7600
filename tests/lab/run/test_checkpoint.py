"""Checkpoints are whole or absent, and nothing in them runs."""

import errno
import hashlib
import io
import os
import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torchmto.lab.run.checkpoint import (
    HEADER_SIZE,
    MAGIC,
    CheckpointError,
    CheckpointFolder,
    read_checkpoint,
    write_checkpoint,
)


def state(number: int = 0) -> dict[str, object]:
    return {"model": {"weight": torch.arange(6.0).view(2, 3) + number}, "progress": {"step": number}, "none": None}


def test_round_trip(tmp_path):
    path = tmp_path / "a.ckpt"
    write_checkpoint(path, state(3))
    loaded = read_checkpoint(path)
    assert torch.equal(loaded["model"]["weight"], state(3)["model"]["weight"])
    assert loaded["progress"] == {"step": 3}
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.ckpt"]


@settings(max_examples=20)
@given(st.data())
def test_any_damage_is_found(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("damage") / "a.ckpt"
    write_checkpoint(path, state())
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    else:
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"damaged|isn't a checkpoint"):
        read_checkpoint(path)


def test_foreign_files_are_refused(tmp_path):
    path = tmp_path / "a.ckpt"
    torch.save(state(), path)
    with pytest.raises(CheckpointError, match="isn't a checkpoint of torchmto"):
        read_checkpoint(path)
    with pytest.raises(CheckpointError, match="There is no checkpoint"):
        read_checkpoint(tmp_path / "b.ckpt")


class Evil:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (self.target,)


@pytest.mark.parametrize("saved_by", ["torch", "pickle"])
def test_code_in_a_checkpoint_does_not_run(tmp_path, saved_by):
    buffer, target = io.BytesIO(), tmp_path / "ran"
    if saved_by == "torch":
        torch.save({"model": Evil(str(target))}, buffer)
    else:
        pickle.dump({"model": Evil(str(target))}, buffer)
    payload = buffer.getvalue()
    path = tmp_path / "evil.ckpt"
    path.write_bytes(MAGIC + hashlib.sha256(payload).hexdigest().encode() + b"\n" + payload)
    with pytest.raises(CheckpointError, match="other than plain data"):
        read_checkpoint(path)
    assert not target.exists()


@pytest.mark.parametrize("where", ["write", "fsync", "rename"])
def test_full_disk_leaves_the_older_checkpoint(tmp_path, monkeypatch, where):
    folder = CheckpointFolder(tmp_path)
    old = folder.save(1, state(1), best=True)
    before = old.read_bytes()

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    if where == "write":
        monkeypatch.setattr(torch, "save", full)
    elif where == "fsync":
        monkeypatch.setattr(os, "fsync", full)
    else:
        monkeypatch.setattr("pathlib.Path.replace", full)
    with pytest.raises(CheckpointError, match=r"the disk is full.*step-00000001.ckpt`, is untouched"):
        folder.save(2, state(2), best=True)
    monkeypatch.undo()
    assert old.read_bytes() == before
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["best.ckpt", "step-00000001.ckpt"]
    assert folder.read_last()[1]["progress"] == {"step": 1}
    folder.save(2, state(2))
    assert folder.read_last()[1]["progress"] == {"step": 2}


def test_full_disk_for_real(tmp_path):
    """/dev/full takes everything and then has no room."""
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    path = tmp_path / "a.ckpt"
    write_checkpoint(path, state(1))
    before = path.read_bytes()
    original = os.fdopen
    try:
        os.fdopen = lambda descriptor, mode: (os.close(descriptor), original(os.open("/dev/full", os.O_RDWR), mode))[1]
        with pytest.raises(CheckpointError, match="the disk is full"):
            write_checkpoint(path, state(2) | {"big": torch.zeros(100_000)})
    finally:
        os.fdopen = original
    assert path.read_bytes() == before


def test_keeps_the_latest_and_the_best(tmp_path):
    folder = CheckpointFolder(tmp_path, keep=2)
    for step in range(1, 6):
        folder.save(step, state(step), best=step == 2)
    assert [path.name for path in folder.steps()] == ["step-00000004.ckpt", "step-00000005.ckpt"]
    assert read_checkpoint(folder.best)["progress"] == {"step": 2}
    folder.mark_best(folder.path(5))
    folder.mark_best(folder.path(5))
    assert read_checkpoint(folder.best)["progress"] == {"step": 5}
    assert not list(tmp_path.glob(".*"))


def test_best_without_hard_links(tmp_path, monkeypatch):
    def no_links(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr("pathlib.Path.hardlink_to", no_links)
    folder = CheckpointFolder(tmp_path)
    folder.save(1, state(1), best=True)
    assert read_checkpoint(folder.best)["progress"] == {"step": 1}


def test_a_damaged_last_checkpoint_offers_an_older_one(tmp_path):
    folder = CheckpointFolder(tmp_path)
    folder.save(1, state(1))
    path = folder.save(2, state(2))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"step-00000002.ckpt` is damaged.*--checkpoint .*step-00000001.ckpt"):
        folder.read_last()
    folder.path(1).write_bytes(b"x" * (HEADER_SIZE + 5))
    with pytest.raises(CheckpointError, match="No other one is whole"):
        folder.read_last()


def test_leftovers_of_a_kill_are_removed_and_never_read(tmp_path):
    folder = CheckpointFolder(tmp_path)
    folder.save(1, state(1))
    (tmp_path / ".step-00000002.ckpt.abc.tmp").write_bytes(b"half")
    (tmp_path / ".best.ckpt.tmp").write_bytes(b"half")
    assert folder.read_last()[1]["progress"] == {"step": 1}
    folder.clean()
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001.ckpt"]


def test_checkpoints_of_later_steps_are_set_aside(tmp_path):
    folder = CheckpointFolder(tmp_path, keep=3)
    for step in (1, 2, 3):
        folder.save(step, state(step))
    folder.set_aside_after(1)
    assert [path.name for path in folder.steps()] == ["step-00000001.ckpt"]
    assert len(list(tmp_path.glob("*.old"))) == 2


def test_a_resumed_run_knows_its_best_again(tmp_path):
    """Any checkpoint of the best step serves; without one the progress forgets it."""
    folder = CheckpointFolder(tmp_path, keep=9)
    for step in (1, 2, 3):
        folder.save(step, state(step), best=True)
    progress = {"step": 2, "best_step": 1, "best_score": 0.5, "history": [{}, {}]}
    assert len(folder.go_on_from(progress)) == 1
    assert read_checkpoint(folder.best)["progress"]["step"] == progress["best_step"] == 1
    folder.path(1).unlink()
    assert not folder.go_on_from(progress)
    folder.mark_best(folder.path(2))
    renamed, lost = folder.go_on_from(progress)
    assert "isn't there any more" in lost
    assert "of another step" in renamed
    assert not folder.best.exists()
    assert progress == {"step": 2, "best_step": -1, "best_score": None, "history": [{}, {}], "lost": 2}
    folder.mark_best(folder.path(2))
    assert "of another step" in folder.go_on_from({**progress, "step": 1, "lost": 0})[1]  # before the first validation
    assert not folder.best.exists()
