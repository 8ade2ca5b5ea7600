"""A sample of `benchmarks/kill_verbs.py`."""

import pytest

from scripts import load_script

load_script("benchmarks/kill_training.py")  # which it imports
kill_verbs = load_script("benchmarks/kill_verbs.py")


@pytest.mark.slow
@pytest.mark.parametrize(("verb", "way"), [("train", "here"), ("compare", "local"), ("reproduce", "here")])
def test_three_kills_of_every_verb(tmp_path, verb, way):
    assert kill_verbs.cell((verb, way, "kill"), 3, 0, tmp_path) == 3


@pytest.mark.slow
@pytest.mark.parametrize("hazard", ["ctrl-c", "full disk", "clock", "two owners"])
def test_every_hazard_of_compare(tmp_path, hazard):
    assert kill_verbs.cell(("compare", "here", hazard), 1, 0, tmp_path)
