"""The rounding of rows to fp8 as one Triton kernel; `library.models.rounding` imports it where there is a GPU.

A row is held while its largest number is looked for. The second reading of one too long for that finds it in the GPU's
cache, so that it costs no trip to memory.
"""

# mypy: ignore-errors
# ruff: noqa: ANN001, ANN202, PLR0913

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096  # numbers that a program holds at a time of a row that it cannot hold whole
_HELD = 16384


@triton.jit
def _numbers(x, by_column, place, columns, WEIGHTED: tl.constexpr):
    """Numbers of one row times their weights, float32; zeros behind the row."""
    inside = place < columns
    numbers = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    if WEIGHTED:
        numbers *= tl.load(by_column + place, mask=inside, other=0.0).to(tl.float32)
    return numbers


@triton.jit
def _kernel(
    x, by_column, rounded, scales, columns, x_stride, smallest,
    WEIGHTED: tl.constexpr, BLOCK: tl.constexpr, SHORT: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x += row * x_stride
    rounded += row * columns
    place = tl.arange(0, BLOCK)
    if SHORT:
        numbers = _numbers(x, by_column, place, columns, WEIGHTED)
        scale = tl.maximum(tl.max(tl.abs(numbers), axis=0) / 448.0, smallest)
        # The conversion saturates.
        tl.store(rounded + place, (numbers * (1.0 / scale)).to(tl.float8e4nv), mask=place < columns)
    else:
        largest = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, columns, BLOCK):
            numbers = _numbers(x, by_column, start + place, columns, WEIGHTED)
            largest = tl.maximum(largest, tl.abs(numbers))
        scale = tl.maximum(tl.max(largest, axis=0) / 448.0, smallest)
        inverse = 1.0 / scale
        for start in range(0, columns, BLOCK):
            numbers = _numbers(x, by_column, start + place, columns, WEIGHTED)
            inside = start + place < columns
            tl.store(rounded + start + place, (numbers * inverse).to(tl.float8e4nv), mask=inside)
    tl.store(scales + row, scale)


def round_rows(x: Tensor, by_column: Tensor | None, smallest: float) -> tuple[Tensor, Tensor]:
    """`x` [T, n], times `by_column` [1, n], as float8_e4m3fn, and the scales [T, 1] float32 of its rows."""
    rows, columns = x.shape
    if x.stride(1) != 1:
        x = x.contiguous()
    rounded = torch.empty(rows, columns, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    short = columns <= _HELD
    _kernel[(rows,)](
        x, scales if by_column is None else by_column, rounded, scales, columns, x.stride(0), smallest,
        WEIGHTED=by_column is not None, SHORT=short, BLOCK=triton.next_power_of_2(columns) if short else _BLOCK,
        num_warps=4 if columns <= _BLOCK else 8 if short else 16,
    )  # fmt: skip
    return rounded, scales
