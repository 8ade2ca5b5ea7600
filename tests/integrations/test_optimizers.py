"""Optimizers of other packages, and two at once."""

import pytest
import torch

import torchmto
from toy import Toy, batch, closure, flat

TASKS = ("a", "b", "c")


def train(model, mt, count=40):
    data = batch(TASKS)
    return [sum(mt.step(closure(model, data)).losses.values()) for _ in range(count)]


@pytest.mark.parametrize("method", ["pcgrad", "uw"])
def test_muon_for_matrices_and_adamw_for_the_rest(method):
    """Each optimizer moves its own parameters, as it does when the other is not there."""
    model = Toy(TASKS)
    matrices = [p for p in model.trunk.parameters() if p.ndim == 2]
    rest = [p for p in model.parameters() if all(p is not q for q in matrices)]
    both = [torch.optim.Muon(matrices, lr=0.02), torch.optim.AdamW(rest, lr=0.02)]
    mt = torchmto.MultiTask(model, both, tasks=TASKS, method=method)
    losses = train(model, mt)
    assert losses[-1] < losses[0]
    twin = Toy(TASKS)
    taken = [p for p in twin.trunk.parameters() if p.ndim == 2]
    others = [p for p in twin.parameters() if all(p is not q for q in taken)]
    pair = torch.optim.Muon(taken, lr=0.02), torch.optim.AdamW(others, lr=0.02)
    stepped = torchmto.MultiTask(twin, list(pair), tasks=TASKS, method=method)
    for _ in range(40):
        stepped.backward(closure(twin, batch(TASKS)))
        for optimizer in pair:
            optimizer.step()
    assert torch.equal(flat(model), flat(twin))


def test_schedulefree():
    """Its `train()` and `eval()` stay the user's; the averaged weights are those of plain training."""
    schedulefree = pytest.importorskip("schedulefree")
    found = []
    for plain in (True, False):
        model, data = Toy(TASKS), batch(TASKS)
        optimizer = schedulefree.AdamWScheduleFree(model.parameters(), lr=0.02)
        mt = torchmto.MultiTask(model, optimizer, tasks=TASKS, method="gd")
        optimizer.train()
        for _ in range(20):
            if plain:
                optimizer.zero_grad()
                sum(closure(model, data)(TASKS).values()).backward()
                optimizer.step()
            else:
                mt.step(closure(model, data))
        optimizer.eval()
        found.append(flat(model))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)


def test_prodigy():
    prodigyopt = pytest.importorskip("prodigyopt")
    model = Toy(TASKS, dtype=torch.float32)
    mt = torchmto.MultiTask(model, prodigyopt.Prodigy(model.parameters(), lr=1.0), tasks=TASKS, method="cagrad")
    data = batch(TASKS, dtype=torch.float32)
    losses = [sum(mt.step(closure(model, data)).losses.values()) for _ in range(60)]
    assert losses[-1] < losses[0]


def test_lbfgs_is_refused():
    model = Toy(TASKS)
    lbfgs = torch.optim.LBFGS(model.parameters())
    for optimizer in (lbfgs, [torch.optim.SGD([torch.nn.Parameter(torch.ones(1))]), lbfgs]):
        with pytest.raises(ValueError, match="Found LBFGS, which evaluates the loss several times"):
            torchmto.MultiTask(model, optimizer, tasks=TASKS, method="gd")
