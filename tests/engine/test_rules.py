"""Every formula for K cotangents against PyTorch's own for one."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from torchmto.gradients.factors import TURNING
from torchmto.gradients.rules import RULES
from torchmto.gradients.stack import Stack
from torchmto.gradients.torch_private import places

SPECIAL = [0.0, -0.0, 1.0, -1.0, 2.5, -2.5, 30.0, -30.0, 200.0, -200.0, 1e-40, -1e-40, math.inf, -math.inf, math.nan]
"""What an input may be: where derivatives are zero or infinite, and where their reciprocals overflow."""
NORMAL = [0.3, -1.7, 0.9, 2.2, -0.4]


def _unary(function: Callable[[Tensor], Tensor]) -> Callable[[], Tensor]:
    return lambda: function(torch.tensor(SPECIAL, requires_grad=True))


def _binary(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], Tensor]:
    def made() -> Tensor:
        pairs = torch.cartesian_prod(torch.tensor(SPECIAL), torch.tensor(SPECIAL)).T.contiguous()
        return function(*(part.clone().requires_grad_() for part in pairs))

    return made


def _matrix(function: Callable[[Tensor], Tensor], *shape: int) -> Callable[[], Tensor]:
    def made() -> Tensor:
        values = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
        values.view(-1)[::3] = 0
        return function(values.requires_grad_())

    return made


def _dropped(x: Tensor) -> Tensor:
    torch.manual_seed(0)
    return torch.native_dropout(x, 0.5, True)[0]


CASES: dict[str, list[Callable[[], Tensor]]] = {
    "ReluBackward0": [_unary(torch.relu)],
    "LeakyReluBackward0": [_unary(lambda x, s=s: functional.leaky_relu(x, s)) for s in (0.1, 0.0)],
    "EluBackward0": [_unary(functional.elu), _unary(functional.selu)],
    "GeluBackward0": [_unary(functional.gelu), _unary(lambda x: functional.gelu(x, approximate="tanh"))],
    "SiluBackward0": [_unary(functional.silu)],
    "SoftplusBackward0": [_unary(functional.softplus)],
    "TanhBackward0": [_unary(torch.tanh)],
    "SigmoidBackward0": [_unary(torch.sigmoid)],
    "SinBackward0": [_unary(torch.sin)],
    "CosBackward0": [_unary(torch.cos)],
    "ExpBackward0": [_unary(torch.exp)],
    "PowBackward0": [_unary(lambda x, e=e: x**e) for e in (0, 0.0, 0.5, 1, 2, 3.0, -1, -0.5)],
    "MulBackward0": [_binary(torch.mul), _unary(lambda x: x * 3), _matrix(lambda x: x * x[:, :1], 3, 4)],
    "DivBackward0": [_binary(torch.div), _unary(lambda x: x / 3), _matrix(lambda x: x / x[:, 1:2], 3, 4)],
    "NegBackward0": [_unary(torch.neg)],
    "NativeDropoutBackward0": [_unary(_dropped)],
    "AddBackward0": [_binary(torch.add), _binary(lambda x, y: torch.add(x, y, alpha=0.5)), _unary(lambda x: x + 1)],
    "SubBackward0": [_binary(torch.sub), _binary(lambda x, y: torch.sub(x, y, alpha=0.5)), _unary(lambda x: x - 1)],
    "AddmmBackward0": [
        _matrix(lambda x: torch.addmm(x[0], x, x), 4, 4),
        _matrix(lambda x: torch.addmm(x, x, x, beta=0.5, alpha=2.0), 4, 4),
    ],
    "MmBackward0": [_matrix(lambda x: x @ x, 4, 4)],
    "TBackward0": [_matrix(torch.t, 3, 4), _matrix(torch.t, 3)],
    "TransposeBackward0": [_matrix(lambda x, d=d: x.transpose(*d), 2, 3, 4) for d in ((0, 1), (-1, 0), (2, -2))],
    "PermuteBackward0": [_matrix(lambda x: x.permute(2, 0, 1), 2, 3, 4)],
    "UnsqueezeBackward0": [_matrix(lambda x, d=d: x.unsqueeze(d), 3, 4) for d in (0, 1, -1)],
    "SelectBackward0": [_matrix(lambda x, d=d, i=i: x.select(d, i), 3, 4) for d in (0, -1) for i in (1, -1)],
    "NativeLayerNormBackward0": [
        _matrix(nn.LayerNorm(4), 3, 4),
        _matrix(lambda x: functional.layer_norm(x, (4,)), 3, 4),
    ],
    "ConvolutionBackward0": [
        _matrix(lambda x: functional.conv2d(x, torch.ones(2, 2, 3, 3), padding=1), 2, 2, 4, 4),
        _matrix(lambda x: functional.conv1d(x, torch.ones(2, 2, 3), x[0, 0, :2]), 2, 2, 4),
    ],
    "ViewBackward0": [_matrix(lambda x: x.view(12), 3, 4)],
    "UnsafeViewBackward0": [_matrix(lambda x: torch.ops.aten._unsafe_view(x, [12]), 3, 4)],
    "ReshapeAliasBackward0": [_matrix(lambda x: torch.ops.aten._reshape_alias(x, [12], [1]), 3, 4)],
    "SqueezeBackward0": [_matrix(torch.squeeze, 3, 1, 4)],
    "SqueezeBackward1": [_matrix(lambda x: x.squeeze(1), 3, 1, 4)],
    "CloneBackward0": [_matrix(torch.clone, 3, 4)],
    "ToCopyBackward0": [_matrix(torch.Tensor.double, 3, 4)],
    "AliasBackward0": [_matrix(torch.ops.aten.alias, 3, 4)],
    "ExpandBackward0": [_matrix(lambda x: x.expand(2, 3, 4), 3, 4)],
}
"""A kind of node -> what makes one of that kind."""


def test_every_rule_has_a_case() -> None:
    assert CASES.keys() == RULES.keys() >= TURNING


@pytest.mark.parametrize("arriving", [*SPECIAL, "mixed"], ids=str)
@pytest.mark.parametrize("kind", CASES)
def test_a_rule_gives_what_the_node_does(kind: str, arriving: float | str) -> None:
    """Of cotangents that are infinite or NaN, too: never more of them than there are in PyTorch's result, nor fewer."""
    for made in CASES[kind]:
        node = made().grad_fn
        assert node is not None
        assert node.name() == kind
        place = places(node)[0]
        rows = torch.randn(3, *place.shape, generator=torch.Generator().manual_seed(1), dtype=place.dtype)
        if arriving == "mixed":
            flat = rows[1].view(-1)
            flat[:] = torch.tensor(SPECIAL, dtype=place.dtype).repeat(1 + len(flat) // len(SPECIAL))[: len(flat)]
        else:
            rows[1].view(-1)[::2] = arriving
        needs = [following is not None for following, _ in node.next_functions]
        if kind == "ConvolutionBackward0":
            needs[1] = False
        found = RULES[kind](node, rows, needs)
        assert found is not None
        expected = [node(row) for row in rows]
        expected = [row if isinstance(row, tuple) else (row,) for row in expected]
        for number, (need, stacked) in enumerate(zip(needs, found, strict=True)):
            if need:
                assert stacked is not None
                following, output = node.next_functions[number]
                below = places(following)[output]
                ours = Stack((0, 1, 2), stacked).like(below).values
                theirs = Stack((0, 1, 2), [row[number] for row in expected]).like(below).values
                torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6, equal_nan=True)
