"""The quick check that gradients are finite."""

import math

import pytest
import torch

from torchmto.gradients import all_finite, finite_mark

SHAPES = [(3,), (50, 50), (2,), (), (64, 64)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_bad_entry_anywhere_is_found(dtype: torch.dtype, value: float) -> None:
    for bad in range(len(SHAPES)):
        gradients = [torch.ones(shape).to(dtype) for shape in SHAPES]
        assert all_finite(gradients)
        gradients[bad].view(-1)[-1] = value
        assert not finite_mark(gradients).isfinite()
        assert not all_finite(gradients)


def test_infinities_of_both_signs_do_not_cancel() -> None:
    assert not all_finite([torch.tensor([math.inf, -math.inf]), torch.full((50, 50), math.inf)])


@pytest.mark.parametrize("value", [3e38, 6e4])
def test_a_sum_that_overflows_is_no_alarm(value: float) -> None:
    dtype = torch.float32 if value > 1e5 else torch.float16
    assert all_finite([torch.full(shape, value, dtype=dtype) for shape in SHAPES])


def test_dtypes_may_differ_and_nothing_is_finite() -> None:
    assert all_finite([torch.ones(3), torch.ones(50, 50, dtype=torch.float64), torch.ones(2, dtype=torch.bfloat16)])
    assert all_finite([])
    assert finite_mark([]) == 0
