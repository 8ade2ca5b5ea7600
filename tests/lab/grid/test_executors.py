"""The same results from this process, local processes, Ray and submitit; workers and main processes that are killed."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from torchmto import lab
from torchmto.lab.grid import FailedRunsError, executors
from torchmto.lab.grid.executors import Job, Outcome, execute, make_executor
from torchmto.lab.references import load_problem
from torchmto.lab.run.build import problem_of
from torchmto.lab.run.checkpoint import CheckpointFolder, read_checkpoint
from torchmto.lab.run.config import ConfigError, RunConfig, config_of
from torchmto.lab.run.loop import Trainer
from torchmto.lab.run.scores import Measure

FARM = str(Path(__file__).parents[1] / "farm.py")
METHODS = ["gd", "wpcgrad"]


def results_of(folder):
    """Everything in a comparison's files but times, memory and the like, by file."""
    found = {}
    for path in sorted((folder / "runs").glob("*.json")):
        result = json.loads(path.read_text())["content"]["result"]
        for entry in result["history"]:
            entry.pop("seconds")
        result["cost"] = {name: result["cost"][name] for name in ("num_forward", "num_backward", "num_optimizer_steps")}
        result.pop("seconds")
        result.pop("made")
        found[path.name] = result
    return found


def run(folder, problem, executor="local", jobs=1, **more):
    settings = {"seeds": 1, "epochs": 2, "batch_size": 16, "progress": False, **more}
    return lab.compare(problem, METHODS, out=folder, executor=executor, jobs=jobs, **settings)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    folder = tmp_path_factory.mktemp("here") / "x"
    run(folder, f"{FARM}:farm")
    return results_of(folder)


@pytest.fixture(scope="module")
def as_object():
    """The same problem without a reference that another process could follow: it travels pickled."""
    problem = load_problem(f"{FARM}:farm", {})
    object.__setattr__(problem.origin, "loadable", False)
    return problem


def test_a_run_that_exits_ends_no_other(tmp_path, as_object, monkeypatch):
    monkeypatch.setattr("torchmto.lab.grid.experiment.check_first_batch", lambda *_: None)  # which it would end, too

    def leave(output, target):
        sys.exit("no licence")

    with pytest.raises(FailedRunsError, match="single-task yield, seed 0: no licence") as failed:
        run(tmp_path, replace(as_object, losses={"yield": leave}))
    assert [config.data.tasks for config, _ in failed.value.failures] == [["yield"]]
    assert [path.name[:11] for path in (tmp_path / "runs").iterdir()] == ["single-crop"]
    assert executors._lost(KeyError()) == Outcome(None, "KeyError")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("executor", ["local", "ray", "slurm:local"])
def test_every_executor_gives_the_same_results(tmp_path, reference, as_object, executor):
    if executor != "local":
        pytest.importorskip({"ray": "ray", "slurm:local": "submitit"}[executor])
    run(tmp_path / "reference", f"{FARM}:farm", executor, jobs=2)
    assert results_of(tmp_path / "reference") == reference
    if executor != "slurm:local":
        run(tmp_path / "object", as_object, executor, jobs=2)
        assert results_of(tmp_path / "object") == reference


@pytest.mark.slow
def test_any_executor_resumes_anothers_folder(tmp_path, reference):
    run(tmp_path / "x", f"{FARM}:farm")
    for path in list((tmp_path / "x" / "runs").glob("*.json"))[::2]:
        path.unlink()
    run(tmp_path / "x", f"{FARM}:farm", "local", jobs=2)
    assert results_of(tmp_path / "x") == reference


SLOW = """
import os, signal, time
from pathlib import Path
from types import SimpleNamespace
import torch
from torchmto import lab
import farm as ready

class Deadly(ready.Fields):
    def __getitem__(self, index):
        mark = Path(os.environ["MARK"])
        if os.getpid() != int(os.environ["MAIN"]) and not mark.exists():
            mark.write_text("killed")
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)

def farm():
    problem = ready.farm()
    problem.train = Deadly(48, 0)
    return problem
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("executor", ["local", "ray"])
def test_the_runs_of_a_killed_worker_are_done_again(tmp_path, reference, monkeypatch, executor):
    pytest.importorskip("ray")
    (tmp_path / "deadly.py").write_text(SLOW)
    monkeypatch.setenv("MARK", str(tmp_path / "mark"))
    monkeypatch.setenv("MAIN", str(os.getpid()))
    monkeypatch.syspath_prepend(str(Path(FARM).parent))
    run(tmp_path / "x", f"{tmp_path / 'deadly.py'}:farm", executor, jobs=2)
    assert (tmp_path / "mark").exists()
    assert list(results_of(tmp_path / "x").values()) == list(reference.values()) or {
        json.dumps(result) for result in results_of(tmp_path / "x").values()
    } == {json.dumps(result) for result in reference.values()}


def test_a_killed_main_process_leaves_whole_results_and_goes_on(tmp_path, reference):
    command = ["compare", "--problem", f"{FARM}:farm", "--methods", ",".join(METHODS), "--seeds", "1", "--epochs", "2"]
    command += ["--batch-size", "16", "--jobs", "2", "--out", str(tmp_path / "x")]
    process = subprocess.Popen([sys.executable, "-m", "torchmto", *command], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while not list((tmp_path / "x").glob("runs/*.json")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 60
    while True:  # its workers end by themselves, and the folder's lock with them
        try:
            run(tmp_path / "x", f"{FARM}:farm")
            break
        except ValueError:
            assert time.monotonic() < deadline
            time.sleep(0.2)
    assert results_of(tmp_path / "x") == reference


def test_a_script_without_a_guard_may_use_several_jobs(tmp_path):
    (tmp_path / "study.py").write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(Path(FARM).parent)!r})\n"
        "import farm\n"
        "from torchmto import lab\n"
        "class Mine(farm.FarmNet):\n    pass\n"
        "problem = farm.farm()\n"
        "problem.model = lambda: Mine(4)\n"
        "result = lab.compare(problem, ['gd'], seeds=1, epochs=1, batch_size=16, jobs=2, out='x', progress=False)\n"
        "print(len(result.table()))\n"
    )
    done = subprocess.run(
        [sys.executable, "study.py"], cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["3"]


METHOD = (
    "import torchmto\n"
    "@torchmto.register_method('{0}')\n"
    "class {0}(torchmto.LossWeighting):\n"
    "    'Of a test. Source: none.'\n"
    "    use, properties = 'x', torchmto.Properties(homogeneity=None)\n"
    "    def objective(self, losses, indices=None):\n"
    "        return {1} * losses.sum()\n"
)


def test_own_methods_are_known_wherever_they_are_defined_and_known_again(tmp_path):
    """In another file, or in the script, whose edit is noticed by the problem, which comes from there, too."""
    (tmp_path / "beside.py").write_text(METHOD.format("Beside", 2))
    script = (
        METHOD.format("Inside", 2) + "import sys\n"
        f"sys.path.insert(0, {str(Path(FARM).parent)!r})\n"
        "import beside, farm\n"
        "from torchmto import lab\n"
        "settings = {'seeds': 1, 'epochs': 1, 'batch_size': 16, 'out': 'x', 'progress': False}\n"
        "print(len(lab.compare(farm.farm(), sys.argv[2:], jobs=int(sys.argv[1]), **settings).table()))\n"
    )
    (tmp_path / "study.py").write_text(script)

    def study(*arguments):
        command = [sys.executable, "study.py", *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False)
        return done.stdout.split(), done.stderr

    assert study("2", "gd", "Inside")[0] == ["4"]
    assert study("2", "gd", "Inside", "Beside")[0] == ["5"]
    assert study("1", "gd", "Inside", "Beside")[0] == ["5"]
    (tmp_path / "beside.py").write_text(METHOD.format("Beside", 3))
    told, said = study("1", "gd", "Inside", "Beside")
    assert told == []
    assert "begun with another version of the file that defines the method Beside" in said
    assert "--changed-source" in said


def test_failures_say_what_went_wrong_and_leave_the_others(tmp_path):
    with pytest.raises(FailedRunsError, match="gd, seed 0: "):
        run(tmp_path / "x", failing())
    assert len(list((tmp_path / "x" / "runs").glob("*.json"))) == 2


def failing():
    """Losses of several tasks together break."""
    problem = load_problem(f"{FARM}:farm", {})
    model = problem.model

    def broken():
        network = model()
        forward = network.forward

        def both(x, tasks):
            if len(tasks) > 1 and network.training:
                raise RuntimeError("both at once")
            return forward(x, tasks)

        network.forward = both
        return network

    problem.model = broken
    return problem


class Killed(BaseException):
    """What no handler catches."""


@pytest.mark.parametrize(("damage", "step"), [("unmarked", 10), ("damaged", 7), ("foreign", 10)])
def test_a_killed_run_goes_on_from_its_newest_whole_checkpoint_and_keeps_its_best(tmp_path, monkeypatch, damage, step):
    """Twelve steps of which the ninth is the best: killed before that is marked, or after it; then files are damaged."""
    third = property(lambda self: Measure("m", "m", lambda _: -abs(self.progress.epoch - 2)))
    monkeypatch.setattr(Trainer, "_measure", third)
    settings = {"data.name": f"{FARM}:farm", "epochs": 4, "batch_size": 16, "checkpoint_every": 99, "threads": 1}
    problem, config = problem_of(config_of(settings))
    job = Job("a", config, {"crop": 0.5, "yield": 1.0}, checkpoints=tmp_path / "straight")
    straight = execute(job, problem).result
    folder = CheckpointFolder(tmp_path / "killed")
    job, began, mark_best = replace(job, checkpoints=folder.folder), [], CheckpointFolder.mark_best

    def marking(self, path):
        if damage == "unmarked" and path.name == "step-00000009.ckpt":
            raise Killed
        mark_best(self, path)

    def stop(number):
        if number == 11:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointFolder, "mark_best", marking)
        with pytest.raises(Killed):
            execute(job, problem, stop)
    last = folder.steps()[-1]
    if damage == "damaged":  # and the best, which is the same file
        last.write_bytes(last.read_bytes()[:-9])
    if damage == "foreign":
        folder.save(50, {**read_checkpoint(last), "baseline": {"crop": 0.1, "yield": 1.0}})
        folder.best.unlink()
        folder.best.write_bytes(b"rubbish")
    resumed = execute(job, problem, began.append).result
    assert began[0] == step
    assert resumed["selected_epoch"] == 2
    for part in ("validation", "test"):
        assert resumed[part] == straight[part]


def test_outcomes_of_jobs_that_cannot_be_done():
    assert Outcome(None, "x").result is None
    assert callable(execute)
    with pytest.raises(ValueError, match="should be one of local, ray, slurm"):
        make_executor("cloud", 1, Path())
    with pytest.raises(ValueError, match="`jobs` should be an int from 1 to 1024"):
        make_executor("local", 0, Path())
    for too_many in ({"seeds": 10**20}, {"tune": 10**20}, {"jobs": 10**400}):
        with pytest.raises(ValueError, match=f"`{next(iter(too_many))}` should be an int from 1 to 1024"):
            lab.compare("digits", **too_many)
    with pytest.raises(ConfigError, match="no effect beside an `executor`"):
        lab.compare("digits", executor=executors.Here(), jobs=2)


def test_ray_leaves_sigterm_as_it_was(tmp_path):
    """Its own answer, set natively, would end the process with a stack."""
    pytest.importorskip("ray")
    former = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with make_executor("ray", 1, tmp_path, None, usual=1), pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, former)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_an_array_job_asks_slurm_for_what_its_runs_need(tmp_path, monkeypatch, device):
    pytest.importorskip("submitit")
    for program in ("sbatch", "srun"):  # a cluster that takes jobs and never runs them
        (tmp_path / program).write_text(f'#!/bin/sh\ncat "$1" > "{tmp_path}/script"\necho Submitted batch job 7\n')
        (tmp_path / program).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    jobs = [Job(str(number), RunConfig(device=device, threads=2), None) for number in range(3)]
    with make_executor("slurm", 2, tmp_path) as slurm:
        assert len(slurm._submit(jobs)) == 3
    asked = [line for line in (tmp_path / "script").read_text().splitlines() if line.startswith("#SBATCH")]
    assert {"#SBATCH --array=0-2%2", "#SBATCH --cpus-per-task=2", "#SBATCH --time=1440"} <= set(asked)
    assert ("#SBATCH --gpus-per-node=1" in asked) == (device == "cuda")


class Cluster:
    """What of Ray an executor needs; tasks end one at a time."""

    exceptions = SimpleNamespace(RayError=OSError)

    def __init__(self):
        self.running, self.most = [], 0

    def remote(self, **_):
        return lambda _: SimpleNamespace(remote=self.begin)

    def begin(self, job):
        self.running.append(job.key)
        self.most = max(self.most, len(self.running))
        return job.key

    def wait(self, refs, **_):
        assert sorted(refs) == sorted(self.running)
        return [self.running.pop()], self.running

    def get(self, key):
        return key


@pytest.mark.parametrize(("jobs", "address", "most"), [(None, "a:1", 5), (2, "a:1", 2), (2, None, 2), (None, None, 3)])
def test_as_many_runs_at_a_time_on_a_cluster_as_are_asked_for(monkeypatch, tmp_path, jobs, address, most):
    cluster, done = Cluster(), {}
    monkeypatch.setattr(executors, "needed", lambda *_: cluster)
    executor = make_executor("ray", jobs, tmp_path, address, usual=3)
    problem = load_problem(f"{FARM}:farm", {})
    executor.run([Job(str(key), config_of({}), None) for key in range(5)], problem, print, done.__setitem__)
    assert done == {key: key for key in "01234"}
    assert cluster.most == most


def test_by_default_runs_share_the_cores_wherever_there_is_no_accelerator(monkeypatch):
    monkeypatch.setattr(executors, "device_of", lambda name: torch.device("cpu" if name == "auto" else name))
    monkeypatch.setattr(executors.os, "sched_getaffinity", lambda _: range(3), raising=False)
    assert [executors.default_jobs(name) for name in ("auto", "cpu", "meta")] == [3, 3, 1]
