"""A sample of `benchmarks/long_runs.py`."""

import pytest

from scripts import load_script

long_runs = load_script("benchmarks/long_runs.py")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["connection_strength", "nash_mtl", "pcgrad", "task_groups", "uw"])
def test_nothing_builds_up(name):
    result = long_runs.run(name, 60)
    assert long_runs.judge(result) == ""
    for precision in long_runs.NEAR:
        assert long_runs.compare(result, long_runs.run(name, 60, precision), precision) == ""
