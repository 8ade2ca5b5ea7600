"""Gradients as what is handed to an optimizer, and the quick check that they are finite."""

import math

import pytest
import torch

from torchmto.gradients.finite import finite_mark, like, real

SHAPES = [(3,), (50, 50), (2,), (), (64, 64)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_bad_entry_anywhere_is_found(dtype: torch.dtype, value: float) -> None:
    for bad in range(len(SHAPES)):
        gradients = [torch.ones(shape).to(dtype) for shape in SHAPES]
        assert finite_mark(gradients).isfinite()
        gradients[bad].view(-1)[-1] = value
        assert not finite_mark(gradients).isfinite()


def test_infinities_of_both_signs_do_not_cancel() -> None:
    assert not finite_mark([torch.tensor([math.inf, -math.inf]), torch.full((50, 50), math.inf)]).isfinite()


def test_dtypes_may_differ_and_nothing_is_finite() -> None:
    mixed = [torch.ones(3), torch.ones(50, 50, dtype=torch.float64), torch.ones(2, dtype=torch.bfloat16)]
    assert finite_mark(mixed).isfinite()
    assert finite_mark([]) == 0


PARAMETERS = {
    "rows": torch.randn(4, 3),
    "columns": torch.randn(3, 4).T,
    "channels last": torch.randn(4, 3, 2, 5).to(memory_format=torch.channels_last),
    "permuted": torch.randn(2, 3, 4).permute(2, 0, 1),
    "gaps": torch.randn(8, 3)[::2],
    "complex": torch.randn(3, 4, dtype=torch.cfloat).T,
    "half": torch.randn(3, 4).half().T,
    "scalar": torch.randn(()),
}


@pytest.mark.parametrize("kind", PARAMETERS)
@pytest.mark.parametrize("given", ["rows", "columns", "expanded", "flat"])
def test_like_is_what_autograd_accumulates(kind: str, given: str) -> None:
    parameter = PARAMETERS[kind].detach().requires_grad_()
    place = real(parameter.detach())
    numbers = torch.randn(place.shape)
    if given == "columns":
        numbers = numbers.mT.contiguous().mT if place.dim() > 1 else numbers
    elif given == "expanded" and place.dim():
        numbers = numbers[:1].expand(place.shape)
    found = like(numbers.flatten() if given == "flat" else numbers, parameter)
    numbers = numbers.to(place.dtype).contiguous()
    cotangent = torch.view_as_complex(numbers) if parameter.is_complex() else numbers
    (parameter * 1).backward(cotangent)
    assert parameter.grad is not None
    assert torch.equal(found, parameter.grad)
    assert (found.dtype, found.stride()) == (parameter.grad.dtype, parameter.grad.stride())
    assert not found.requires_grad
