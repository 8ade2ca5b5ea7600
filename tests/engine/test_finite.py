"""The quick check that gradients are finite."""

import math

import pytest
import torch

from torchmto.gradients.finite import finite_mark

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
