"""The rounding of long rows to fp8 as one Triton kernel; `library.models.rounding` imports it where there is a GPU.

The second reading of a row finds it in the GPU's cache, so that it costs no trip to memory.
"""

# mypy: ignore-errors
# ruff: noqa: ANN001, ANN202, PLR0913

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _kernel(
    x, by_column, rounded, scales, columns, x_stride, smallest, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK)
    largest = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, columns, BLOCK):
        inside = start + place < columns
        numbers = tl.load(
            x + row * x_stride + start + place, mask=inside, other=0.0, eviction_policy="evict_last"
        ).to(tl.float32)
        if WEIGHTED:
            numbers *= tl.load(by_column + start + place, mask=inside, other=0.0)
        largest = tl.maximum(largest, tl.abs(numbers))
    scale = tl.maximum(tl.max(largest, axis=0) / 448.0, smallest)
    tl.store(scales + row, scale)
    inverse = 1.0 / scale
    for start in range(0, columns, BLOCK):
        inside = start + place < columns
        numbers = tl.load(x + row * x_stride + start + place, mask=inside, other=0.0).to(tl.float32)
        if WEIGHTED:
            numbers *= tl.load(by_column + start + place, mask=inside, other=0.0)
        # The conversion saturates.
        tl.store(rounded + row * columns + start + place, (numbers * inverse).to(tl.float8e4nv), mask=inside)


def round_rows(x: Tensor, by_column: Tensor | None, smallest: float) -> tuple[Tensor, Tensor]:
    """`x` [T, n], times `by_column` [1, n] float32, as float8_e4m3fn, and the scales [T, 1] float32 of its rows."""
    rows, columns = x.shape
    if x.stride(1) != 1:
        x = x.contiguous()
    rounded = torch.empty(rows, columns, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    _kernel[(rows,)](
        x, scales if by_column is None else by_column, rounded, scales, columns, x.stride(0), smallest,
        WEIGHTED=by_column is not None, BLOCK=4096, num_warps=16,
    )  # fmt: skip
    return rounded, scales
