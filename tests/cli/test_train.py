"""What `torchmto train` says to whom."""

import pytest

from torchmto.cli.train import _launcher

ONE = {"TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "2"}
MANY = {**ONE, "GROUP_WORLD_SIZE": "3", "GROUP_RANK": "0", "MASTER_ADDR": "host", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("environment", "command"),
    [
        ({}, "torchmto"),
        (ONE, "torchrun --nproc-per-node 2 -m torchmto"),
        ({**ONE, "GROUP_WORLD_SIZE": "1", "GROUP_RANK": "0"}, "torchrun --nproc-per-node 2 -m torchmto"),
        (
            MANY,
            "torchrun --nnodes 3 --node-rank 0 --master-addr host --master-port 29500 --nproc-per-node 2 -m torchmto",
        ),
    ],
)
def test_the_command_that_goes_on_starts_as_many_processes(monkeypatch, environment, command):
    for name in MANY:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert " ".join(_launcher()) == command
