"""A sample of `benchmarks/fuzz_files.py`, and what it has found."""

import pytest
import torch

from scripts import load_script
from torchmto.lab.run.checkpoint import CheckpointError, read_checkpoint
from toy import make, same, state

fuzz = load_script("benchmarks/fuzz_files.py")


def test_a_sample():
    ends, findings = fuzz.run(range(90_000, 90_150))
    assert not findings
    assert ends["refused"] > ends["read"] > 0


ODD = {"a tensor": torch.ones(2), "an empty tensor": torch.ones(0), "10,000 characters": "x" * 10_000, "nothing": None}


@pytest.mark.parametrize("key", ["version", "tasks", "method", "method_state", "roles"])
@pytest.mark.parametrize("odd", list(ODD))
def test_a_state_with_an_odd_entry_is_refused_in_a_line(key, odd):
    """Whether a tensor equals something isn't a yes or no, and what doesn't fit can raise anything."""
    _, _, mt = make("wpcgrad")
    before = state(mt)
    with pytest.raises(ValueError, match="state") as caught:
        mt.load_state_dict({**mt.state_dict(), key: ODD[odd]})
    assert len(str(caught.value)) < 1000
    assert len(str(caught.value).splitlines()) == 1
    assert same(state(mt), before)


@pytest.mark.parametrize("body", [fuzz._saved({"a": fuzz.Payload()}), b"", b"PK\x03\x04" + bytes(40), b"\x80\x02."])
def test_a_checkpoint_with_a_right_checksum_and_a_wrong_body(tmp_path, body):
    (tmp_path / "x.ckpt").write_bytes(fuzz._checked(body))
    with pytest.raises(CheckpointError, match=r"other than plain data\.$"):
        read_checkpoint(tmp_path / "x.ckpt")
