"""Backwards without PyTorch's checks in Python give what the public functions give."""

import torch
from torch import nn

from torchmto.gradients import backwards
from torchmto.gradients.backwards import backward, gradients_of


def graph():
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(3)) for _ in range(3)]
    losses = torch.stack([parameters[0].square().sum(), (parameters[0] * parameters[1]).sum()])
    return parameters, losses


def test_the_private_function_is_there():
    assert backwards.run_backward is not None, "PyTorch has renamed it: find its heir, or lose an eighth of small steps"


def test_backward_is_the_public_one():
    parameters, losses = graph()
    backward(losses, torch.tensor([2.0, -1.0]), parameters[:2])
    other, others = graph()
    torch.autograd.backward(others, torch.tensor([2.0, -1.0]), inputs=other[:2])
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(parameters[:2], other[:2], strict=True))


def test_gradients_are_the_public_ones():
    parameters, losses = graph()
    other, others = graph()
    for seed in (None, torch.tensor(0.5)):
        for loss, expected in zip(losses, others, strict=True):
            found = gradients_of(loss, seed, parameters, retain=True)
            wanted = torch.autograd.grad(expected, other, seed, retain_graph=True, allow_unused=True)
            assert [g is None for g in found] == [g is None for g in wanted]
            assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True) if a is not None)
    assert all(parameter.grad is None for parameter in parameters)


class Noted(nn.Parameter):
    """A parameter whose class hears of functions that it is given to."""

    heard: list[str] = []  # noqa: RUF012

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        cls.heard.append(function.__name__)
        return super().__torch_function__(function, types, args, kwargs or {})


def test_subclasses_are_asked():
    parameter = Noted(torch.ones(2))
    loss = torch.ones(2) @ parameter.as_subclass(torch.Tensor)
    Noted.heard.clear()
    gradients_of(loss, None, [parameter], retain=True)
    backward(loss, torch.ones(()), [parameter])
    assert {"grad", "backward"} <= set(Noted.heard)
