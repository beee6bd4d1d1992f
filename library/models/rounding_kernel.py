"""The rounding of long rows to fp8 as one Triton kernel; `library.models.rounding` imports it where there is a GPU.

A row of FLUX's wide activations (12,288 to 21,504 numbers) is read once and kept in registers between finding its
largest number and rounding; what a compiler makes of the same arithmetic reads it twice.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit  # type: ignore[untyped-decorator]
def _kernel(  # type: ignore[no-untyped-def]  # noqa: PLR0913 (a kernel's arguments)
    x,  # noqa: ANN001
    by_column,  # noqa: ANN001
    rounded,  # noqa: ANN001
    scales,  # noqa: ANN001
    columns,  # noqa: ANN001
    x_stride,  # noqa: ANN001
    smallest,  # noqa: ANN001
    WEIGHTED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK)
    inside = place < columns
    numbers = tl.load(x + row * x_stride + place, mask=inside, other=0.0).to(tl.float32)
    if WEIGHTED:
        numbers *= tl.load(by_column + place, mask=inside, other=0.0)
    scale = tl.maximum(tl.max(tl.abs(numbers), axis=0) / 448.0, smallest)
    tl.store(scales + row, scale)
    # The conversion saturates.
    tl.store(rounded + row * columns + place, (numbers * (1.0 / scale)).to(tl.float8e4nv), mask=inside)


def round_rows(x: Tensor, by_column: Tensor | None, smallest: float) -> tuple[Tensor, Tensor]:
    """`x` [T, n], times `by_column` [1, n] float32, as float8_e4m3fn, and the scales [T, 1] float32 of its rows."""
    rows, columns = x.shape
    if x.stride(1) != 1:
        x = x.contiguous()
    rounded = torch.empty(rows, columns, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(columns)
    _kernel[(rows,)](
        x, by_column, rounded, scales, columns, x.stride(0), smallest,
        WEIGHTED=by_column is not None, BLOCK=block, num_warps=min(max(block // 1024, 1), 32),
    )  # fmt: skip
    return rounded, scales
