"""The scripts of "Many processes" run under torchrun, and leave the same parameters on all ranks."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "scaling.md"
CHECK = """
full = [getattr(parameter, "full_tensor", lambda p=parameter: p)() for parameter in model.parameters()]
mine = torch.cat([parameter.detach().flatten() for parameter in full])
all_of_them = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
dist.all_gather(all_of_them, mine)
assert dist.get_world_size() == 2 and all(torch.equal(one, mine) for one in all_of_them)
"""


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True], ids=["replicated", "sharded"])
def test_scripts_run_under_torchrun(sharded, tmp_path):
    script, fsdp = re.findall(r"^```python\n(?!>>>)(.*?)^```$", PAGE.read_text("utf-8"), re.DOTALL | re.MULTILINE)
    if sharded:
        script = script.replace("optimizer =", f"{fsdp}optimizer =")
    end = "dist.destroy_process_group()\n"
    (tmp_path / "train.py").write_text(script.replace(end, CHECK + end))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py"]
    done = subprocess.run(
        command, check=False, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
