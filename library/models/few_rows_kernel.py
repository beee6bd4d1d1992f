"""Few rows times a weight in 8 bits with a scale for each group of inputs, as one Triton kernel.

`library.models.few_rows` imports it where there is a GPU. Weights are read once, which is what takes the time; the
tensor cores multiply all rows at once and add up in float32, a group at a time.
"""

# mypy: ignore-errors
# ruff: noqa: ANN001, ANN202, PLR0913

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_OUTPUTS = 32  # of one program
_WARPS = 4
_STAGES = 5  # loads of so many groups are under way at a time
_LEAST_ROWS = 16  # what the tensor cores multiply at once


@triton.jit
def _kernel(
    x, weight, scale, bias, out, rows, inputs, outputs, groups,
    BIASED: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr, GROUP: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    o = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    b = tl.arange(0, ROWS)
    k = tl.arange(0, GROUP)
    real = o < outputs
    start = weight + o.to(tl.int64)[:, None] * inputs
    total = tl.zeros((OUTPUTS, ROWS), tl.float32)
    for group in tl.range(0, groups, num_stages=STAGES):
        place = group * GROUP + k
        inside = place < inputs
        numbers = tl.load(
            start + place[None, :], mask=real[:, None] & inside[None, :], other=0,
            eviction_policy="evict_first",
        )  # fmt: skip
        columns = tl.load(
            x + b[None, :] * inputs + place[:, None], mask=inside[:, None] & (b < rows)[None, :], other=0.0
        )
        by_row = tl.load(scale + group * outputs + o, mask=real, other=0.0)
        total += tl.dot(numbers.to(columns.dtype), columns) * by_row[:, None]
    if BIASED:
        total += tl.load(bias + o, mask=real, other=0.0).to(tl.float32)[:, None]
    tl.store(out + b[None, :] * outputs + o[:, None], total, mask=real[:, None] & (b < rows)[None, :])


def few_rows(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, group: int) -> Tensor:
    """`x` [B, in] times `weight` [out, in] int8 with `scale` [groups, out] float32, plus `bias` [out].

    `x` and the result [B, out] have 16 bits a number.
    """
    (rows, inputs), outputs = x.shape, weight.shape[0]
    x, out = x.contiguous(), x.new_empty(rows, outputs)
    _kernel[(triton.cdiv(outputs, _OUTPUTS),)](
        x, weight, scale, out if bias is None else bias, out, rows, inputs, outputs, scale.shape[0],
        BIASED=bias is not None, ROWS=max(_LEAST_ROWS, triton.next_power_of_2(rows)), OUTPUTS=_OUTPUTS,
        GROUP=group, STAGES=_STAGES, num_warps=_WARPS,
    )  # fmt: skip
    return out
