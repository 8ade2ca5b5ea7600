"""A sample of `benchmarks/fuzz_ranks.py`, and what it has found."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "fuzz_ranks.py"


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ("--cases", "20", "--start", "500"),
        # Statistics of norms are averaged while a graph that knows their version is still to be walked backwards.
        ("--seed", "25"),
    ],
)
def test_processes_of_which_one_fails(arguments):
    done = subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
