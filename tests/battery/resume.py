"""Run every method for some steps and save everything; or load it, in a new process, and go on. Used by test_resume.py."""

import sys
import warnings
from pathlib import Path

import torch

import torchmto

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from torch import nn

from battery.table import ROWS, build
from toy import Toy, batch, closure

TASKS = ("a", "b", "c")
HALF = 3
VARIANTS = {
    **{name: {} for name in ROWS},
    "wpcgrad, windows of two steps": {"name": "wpcgrad", "options": {"window": 2}},
    "wpcgrad, by a loss weighting": {"name": "wpcgrad", "options": {"priority": "uw"}},
    "pcgrad, weights reused": {"name": "pcgrad", "options": {"refresh_every": 4}},
    "task_groups, grouping": {"name": "task_groups", "options": {"warmup": 1, "measure_last": True}},
    "task_groups, wpcgrad inside": {"name": "task_groups", "options": {"groups": "random", "inner": "wpcgrad"}},
    "connection_strength, both phases": {"name": "connection_strength", "options": {"total_steps": 6}},
    "gradvac, by layers": {"name": "gradvac", "options": {"groups": "layer"}},
    "m_config, in turns": {"name": "m_config", "options": {"num_updates": 1}},
    "pcgrad, with uw": {"name": "pcgrad", "weights": "uw"},
    "sequential, shuffled": {"name": "sequential", "options": {"shuffle": True}},
}


def build_run(key):
    """Model (split norms, dropout), optimizer, scaler and MultiTask of one variant."""
    variant = VARIANTS[key]
    name = variant.get("name", key)
    model = torchmto.structure.split_norms(Toy(TASKS, norm=nn.BatchNorm1d(5), dropout=0.2), TASKS).double()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=2)
    method = torchmto.make_method(name, **variant["options"]) if "options" in variant else build(name, len(TASKS))
    mt = torchmto.MultiTask(
        model, optimizer, tasks=TASKS, method=method, scaler=scaler, weights=variant.get("weights"), seed=11
    )
    return model, optimizer, scaler, mt


def steps(model, mt, first, last):
    """Steps first ... last - 1: some with fewer tasks, some with micro-batches; an epoch ends every second one."""
    infos = []
    for i in range(first, last):
        only = (("b",), TASKS, TASKS, ("a", "c"), TASKS, TASKS)[i % 6]
        source = closure(model, batch(TASKS, seed=i), only=only)
        infos.append(mt.step([source, closure(model, batch(TASKS, seed=50 + i), only=only)] if i % 3 == 2 else source))
        if i % 2:
            mt.report({"a": 0.4 + 0.01 * i, "b": 0.5})
            mt.end_window()
    return [dict(info.losses) for info in infos]


def everything(model, optimizer, scaler, mt, losses):
    return {
        "model": dict(model.state_dict()),
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict(),
        "mt": mt.state_dict(),
        "random": torch.get_rng_state(),
        "losses": losses,
    }


def resume(folder):
    """Load every variant, take the second half of the steps and save again."""
    for key in VARIANTS:
        model, optimizer, scaler, mt = build_run(key)
        saved = torch.load(folder / f"{key}.half.pt", weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        scaler.load_state_dict(saved["scaler"])
        mt.load_state_dict(saved["mt"])
        torch.set_rng_state(saved["random"])
        losses = steps(model, mt, HALF, 2 * HALF)
        torch.save(everything(model, optimizer, scaler, mt, losses), folder / f"{key}.resumed.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    resume(Path(sys.argv[1]))
