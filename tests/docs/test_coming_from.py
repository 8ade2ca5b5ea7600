"""Both sides of every pair in "Coming from" train a model to the same parameters."""

import re
import sys
from pathlib import Path

import pytest
import torch

from docs.stand_ins import MODULES

TEXT = (Path(__file__).parents[2] / "docs" / "coming-from.md").read_text("utf-8")
SETTING, *SECTIONS = re.split(r"^## ", TEXT, flags=re.MULTILINE)
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def trained(block):
    names = {}
    for code in (*BLOCK.findall(SETTING), block):
        exec(code, names)
    return torch.cat([p.detach().flatten() for p in names["model"].parameters()])


@pytest.mark.parametrize("section", SECTIONS, ids=lambda text: text.partition("\n")[0])
def test_before_and_after_are_the_same(section, monkeypatch):
    if "torchjd" in section:
        pytest.importorskip("torchjd", reason="TorchJD isn't installed: pip install 'torchmto[bench]'")
    for name, stand_in in MODULES.items():
        monkeypatch.setitem(sys.modules, name, stand_in)
    before, after = map(trained, BLOCK.findall(section))
    assert not torch.equal(before, trained(""))
    # Adam divides a gradient by its size plus 1e-8: up to that, factors of the whole gradient don't count.
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-4)
