"""Common test set-up: one thread, so that results and timings don't depend on the machine's load."""

import gc
import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

sys.path.insert(0, str(Path(__file__).parent))
torch.set_num_threads(1)
settings.register_profile("torchmto", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("torchmto")


def pytest_addoption(parser):
    about = (
        "cuda: the tests of the core make their models and data there; auto: a GPU is there for the tests that want one"
    )
    parser.addoption("--device", default="cpu", help=about)


def pytest_configure(config):
    """Before any file is read: files make tensors, too."""
    device = config.getoption("--device")
    if device == "cpu":
        # Runs would choose a GPU by themselves, and CUDA doesn't survive the forks of these tests.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif device != "auto":
        from on_device import put_everything_on  # noqa: PLC0415  it changes PyTorch

        put_everything_on(device)


def pytest_collection_modifyitems(config, items):
    if config.getoption("--device") != "cpu":
        for item in items:
            if item.get_closest_marker("cpu"):
                item.add_marker(pytest.mark.skip(reason="only on the CPU"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """A file stays in one worker, for the fixtures of its module; so does the folder that shares a pool of processes."""
    from xdist.scheduler import LoadScopeScheduling  # noqa: PLC0415  a run in one process needs no xdist

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file = nodeid.partition("::")[0]
            return "tests/distributed" if file.startswith("tests/distributed/") else file

    return ByFile(config, log)


@pytest.fixture(autouse=True, scope="module")
def _only_young_garbage():
    """Every Run collects garbage, which takes long beside everything that tests import and keep."""
    gc.collect()
    gc.freeze()
