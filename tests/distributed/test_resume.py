"""A checkpoint written by two processes goes on with one, two and four; a rank that raises or dies ends the others."""

import subprocess
import sys
from pathlib import Path

import cases
import pytest
import torch

RESUMED = {
    "task_groups": ("task_groups", {"warmup": 1, "decay": 0.5}, {}),
    "moco": ("moco", {}, {}),
    "wpcgrad, rows divided": ("wpcgrad", {"priority": "uw"}, {"mt_options": {"shard_gradients": True}}),
    "wpcgrad, layerwise": ("wpcgrad", {"priority": "uw"}, {"mt_options": {"gradients": "layerwise"}}),
    "wpcgrad, parameters sharded": ("wpcgrad", {"priority": "uw"}, {"fsdp": "all"}),
}


@pytest.mark.parametrize("name", RESUMED)
def test_saved_on_two_goes_on_with_one_two_and_four(pool, name, tmp_path):
    method, options, arguments = RESUMED[name]
    expected = cases.train(0, 1, None, method, options, steps=5, **arguments)["parameters"]
    folder = str(tmp_path)
    pool.run(2, cases.train_case, method, options, {**arguments, "save": folder})
    rest = {**arguments, "first": 3, "steps": 2, "load": folder}
    alone = cases.train(0, 1, None, method, options, **rest)["parameters"]
    torch.testing.assert_close(alone, expected, rtol=1e-9, atol=1e-9)
    for size in (2, 4):
        for result in pool.run(size, cases.train_case, method, options, rest):
            torch.testing.assert_close(result["parameters"], expected, rtol=1e-9, atol=1e-9)


SCRIPT = """
import os, signal, sys
import torch, torch.distributed as dist, torchmto
dist.init_process_group("gloo")
torch.manual_seed(0)
rank = dist.get_rank()
model = torch.nn.ModuleDict({k: torch.nn.Linear(3, 3 if k == "trunk" else 1) for k in ("trunk", "a", "b")})
mt = torchmto.MultiTask(model, torch.optim.SGD(model.parameters(), lr=0.1), tasks=["a", "b"], method="pcgrad")
for step in range(100):
    def closure(tasks):
        if rank == 1 and step == 3:
            if sys.argv[1] == "raises":
                raise ValueError("the disk is full")
            os.kill(os.getpid(), signal.SIGKILL)
        x = model["trunk"](torch.ones(2, 3))
        return {t: model[t](x).square().mean() for t in tasks}
    mt.step(closure)
"""


def test_a_rank_that_raises_or_dies_ends_all_under_torchrun(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    runs = {
        how: subprocess.Popen([*torchrun, how], stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parent)
        for how in ("raises", "dies")
    }
    try:
        errors = {how: run.communicate()[1] for how, run in runs.items()}
    finally:
        for run in runs.values():
            run.terminate()
    assert all(run.returncode != 0 for run in runs.values())
    assert "ValueError: the disk is full" in errors["raises"]
    assert (
        "RankFailedError: Rank 1 failed, so the step ended on all ranks. ValueError: the disk is full"
        in errors["raises"]
    )
    assert "Signal 9 (SIGKILL) received" in errors["dies"]
