"""N steps, save, load in a new process and N more steps equal 2N steps bit for bit, for every method."""

import copy
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from battery.resume import HALF, TASKS, VARIANTS, build_run, everything, steps
from torchmto import MultiTask
from torchmto.methods import Method
from toy import same


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The results of the run without a break, of its first half, and of its second half in a new process."""
    path = tmp_path_factory.mktemp("resume")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for key in VARIANTS:
            torch.manual_seed(0)
            model, optimizer, scaler, mt = build_run(key)
            losses = steps(model, mt, 0, HALF)
            torch.save(everything(model, optimizer, scaler, mt, losses), path / f"{key}.half.pt")
            losses = steps(model, mt, HALF, 2 * HALF)
            torch.save(everything(model, optimizer, scaler, mt, losses), path / f"{key}.whole.pt")
    torch.set_num_threads(threads)
    script = Path(__file__).with_name("resume.py")
    done = subprocess.run([sys.executable, str(script), str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return path


@pytest.mark.cpu  # as the other process
@pytest.mark.parametrize("key", list(VARIANTS))
def test_resume(key, folder):
    whole = torch.load(folder / f"{key}.whole.pt", weights_only=True)
    resumed = torch.load(folder / f"{key}.resumed.pt", weights_only=True)
    for part in whole:
        assert same(whole[part], resumed[part]), part


@pytest.mark.parametrize("key", list(VARIANTS))
def test_another_multitask_goes_on_with_what_a_method_has_learnt(key):
    model, optimizer, _, mt = build_run(key)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        steps(model, mt, 0, HALF)

    def learnt(owner):
        states = [part.state_dict() for part in (owner.method, owner.weights) if isinstance(part, Method)]
        # What connection strength knows of a network is found anew in each.
        return [{name: value for name, value in state.items() if name != "priorities"} for state in states]

    before = copy.deepcopy(learnt(mt))
    assert same(before, learnt(MultiTask(model, optimizer, tasks=TASKS, method=mt.method, weights=mt.weights)))
