"""TorchJD's aggregators as methods, and Gramian methods as its aggregators."""

import pytest
import torch

from toy import Toy, batch, closure, flat, make, same

aggregation = pytest.importorskip("torchjd.aggregation")

from torchjd import autojac  # noqa: E402

from torchmto.integrations.torchjd import from_torchjd, to_torchjd  # noqa: E402

TASKS = ("a", "b", "c")


@pytest.mark.parametrize("name", ["UPGrad", "MGDA", "ConFIG", "TrimmedMean", "PCGrad", "GradDrop", "IMTLG", "Random"])
def test_the_update_is_their_aggregation_of_our_rows(name):
    """The shared gradient is theirs of the Jacobian; random ones are repeated from the method's generator."""
    options = {"trim_number": 1} if name == "TrimmedMean" else {}
    aggregator = getattr(aggregation, name)(**options)
    model, _, mt = make(from_torchjd(aggregator))
    state = mt.method.generator.get_state()
    mt.backward(closure(model, batch(TASKS)))
    found = torch.cat([p.grad.flatten() for p in model.trunk.parameters()])
    twin = Toy(TASKS)
    losses = closure(twin, batch(TASKS))(TASKS)
    rows = [torch.autograd.grad(loss, list(twin.trunk.parameters()), retain_graph=True) for loss in losses.values()]
    matrix = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    mt.method.generator.set_state(state)
    torch.manual_seed(int(torch.randint(2**62, (), generator=mt.method.generator)))
    torch.testing.assert_close(found, aggregator(matrix), rtol=1e-6, atol=1e-9)
    heads = {t: torch.autograd.grad(losses[t], twin.heads[t].weight, retain_graph=True)[0] for t in TASKS}
    for task, gradient in heads.items():
        torch.testing.assert_close(model.heads[task].weight.grad, gradient)


def test_random_aggregators_resume_exactly():
    runs = [make(from_torchjd(aggregation.PCGrad())) for _ in range(2)]
    for seed in range(3):
        runs[0][2].step(closure(runs[0][0], batch(TASKS, seed=seed)))
        if seed == 0:
            runs[1][0].load_state_dict(runs[0][0].state_dict())
            runs[1][2].load_state_dict(runs[0][2].state_dict())
        else:
            torch.manual_seed(seed)
            runs[1][2].step(closure(runs[1][0], batch(TASKS, seed=seed)))
    assert same(flat(runs[0][0]), flat(runs[1][0]))


@pytest.mark.parametrize("name", ["cagrad", "upgrad", "wpcgrad", "pcgrad", "aligned_mtl"])
def test_our_methods_in_their_backward(name):
    """Their `mtl_backward` with our aggregator gives the gradients of our step."""
    model, twin = Toy(TASKS), Toy(TASKS)
    x, targets = batch(TASKS)
    features = twin.trunk(x)
    losses = [(twin.heads[t](features) - targets[t]).square().mean() for t in TASKS]
    autojac.mtl_backward(losses, features=features)
    autojac.jac_to_grad(list(twin.trunk.parameters()), to_torchjd(name))
    _, _, mt = make(name, model=model)
    mt.backward(closure(model, (x, targets)))
    for (key, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=key, rtol=1e-6, atol=1e-9)


def test_misuse():
    with pytest.raises(ValueError, match="`method` should be a Gramian method"):
        to_torchjd("uw")
    with pytest.raises(TypeError, match="`aggregator` should be an aggregator"):
        from_torchjd("upgrad")
