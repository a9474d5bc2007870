"""Products that go to oneDNN: the module that is written, as XLA reads it, and what it computes."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

OPTIMIZE = True  # of the workers' programs

# Sizes of one byte and of two in the encoding, one row, one column, and leading dims.
SHAPES = [
    ((48, 64), (64, 16)),
    ((300, 129), (129, 5)),
    ((1, 7), (7, 200)),
    ((4, 3, 2, 160), (4, 3, 160, 64)),
    ((130, 1, 5), (130, 5, 1)),
]


@pytest.mark.parametrize(("left", "right"), SHAPES)
def test_a_product_is_a_fusion_of_its_own_and_right(
    workers: Any, left: tuple[int, ...], right: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    operands = torch.randn(left), torch.randn(right)
    text, out = workers[1].call("device_cases:onednn_product", left=operands[0], right=operands[1])
    torch.testing.assert_close(
        out.double(),
        1 + (2 * operands[0].double()) @ (operands[1].double() + 1),
        rtol=1e-5,
        atol=1e-5,
    )
    shapes = [",".join(map(str, shape)) for shape in (left, right, (*left[:-1], right[-1]))]
    fusion = re.search(
        r"ROOT \S+ = f32\[(\S+?)\]\S* "
        r"fusion\(f32\[(\S+?)\]\S* \S+, f32\[(\S+?)\]\S* \S+\), kind=kCustom",
        text,
    )
    assert fusion is not None and list(fusion.groups()) == [shapes[2], *shapes[:2]]
    dims = re.search(r"lhs_contracting_dims={(\d)}, .*rhs_contracting_dims={(\d)}", text)
    assert dims is not None and [int(dim) for dim in dims.groups()] == [
        len(left) - 1,
        len(left) - 2,
    ]
