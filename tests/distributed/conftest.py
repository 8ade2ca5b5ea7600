"""One pool of four processes for the whole folder."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from pool import Pool


@pytest.fixture(scope="session")
def pool(tmp_path_factory):
    made = Pool(4, tmp_path_factory.mktemp("pool"))
    yield made
    made.close()
