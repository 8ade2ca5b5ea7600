"""What a step adds to a small model: a number of Python calls, which doesn't depend on the machine."""

import sys
from pathlib import Path

import pytest
import torch

import torchmto
from toy import Toy, batch, closure

PACKAGE = str(Path(torchmto.__file__).parent)
TASKS = ("a", "b", "c", "d")


def passed(work):
    """The package's functions that ``work`` calls, with repeats, comprehensions left out."""
    calls = []

    def note(frame, event, _):
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(PACKAGE) and not code.co_name.startswith("<"):
            calls.append((code.co_filename, code.co_qualname))

    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
    return calls


@pytest.mark.cpu  # where small tensors are looked at in plain numbers
@pytest.mark.parametrize(
    ("method", "options", "limit", "distinct"),
    [
        ("gd", {}, 62, 60),
        ("uw", {}, 85, 83),
        ("pcgrad", {"gradients": "parameters"}, 135, 85),
        ("sequential", {}, 320, 80),
    ],
)
def test_a_step_takes_few_calls(method, options, limit, distinct, monkeypatch):
    # Other tests compile, after which every step keeps what compiled backwards need.
    monkeypatch.setattr("torchmto.multitask.may_compile", lambda: False)
    model = Toy(TASKS)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    mt = torchmto.MultiTask(model, optimizer, tasks=TASKS, method=method, **options)
    losses = closure(model, batch(TASKS))
    mt.step(losses)
    calls = passed(lambda: mt.step(losses))
    assert len(calls) <= limit
    assert len(set(calls)) <= distinct
