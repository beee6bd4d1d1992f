"""Both factors of a product that carries a low-rank one, as Triton kernels; `library.models.carried` imports them.

A row of the first factor is read once. What it gets behind its numbers comes from a product that a library makes: one
kernel that made it as well took twice as long as both.
"""

# mypy: ignore-errors
# ruff: noqa: ANN001, ANN202, PLR0913

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_OUTPUTS = 128  # rows of the second factor that a program writes


@triton.jit
def _halves(numbers):
    """Each number as the sum of two in fp8; the conversion saturates."""
    high = numbers.to(tl.float8e4nv)
    return high, (numbers - high.to(tl.float32)).to(tl.float8e4nv)


@triton.jit(do_not_specialize_on_alignment=["balance"])
def _row(
    x, by_column, hidden, made, scales, balance, columns, rank, more, x_stride, smallest,
    WEIGHTED: tl.constexpr, FP8: tl.constexpr, BLOCK: tl.constexpr, RANK: tl.constexpr, MORE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    place, r, rest = tl.arange(0, BLOCK), tl.arange(0, RANK), tl.arange(0, MORE)
    inside, ranks = place < columns, r < rank
    made += row * (columns + more)
    behind = made + columns
    numbers = tl.load(x + row * x_stride + place, mask=inside, other=0.0)
    product = tl.load(hidden + row * rank + r, mask=ranks, other=0.0)
    if FP8:
        numbers = numbers.to(tl.float32)
        if WEIGHTED:
            numbers *= tl.load(by_column + place, mask=inside, other=0.0)
        product = product.to(tl.float32) * tl.load(balance)
        largest = tl.maximum(tl.max(tl.abs(numbers), axis=0), tl.max(tl.abs(product), axis=0))
        scale = tl.maximum(largest / 448.0, smallest)
        tl.store(scales + row, scale)
        inverse = 1.0 / scale
        tl.store(made + place, (numbers * inverse).to(tl.float8e4nv), mask=inside)
        high, low = _halves(product * inverse)
        tl.store(behind + r, high, mask=ranks)
        tl.store(behind + rank + r, high, mask=ranks)
        tl.store(behind + 2 * rank + r, low, mask=ranks)
        nothing = tl.zeros((MORE,), tl.float32).to(tl.float8e4nv)
        tl.store(behind + rest, nothing, mask=(rest >= 3 * rank) & (rest < more))
    else:
        tl.store(made + place, numbers, mask=inside)
        tl.store(behind + r, product, mask=ranks)
        nothing = tl.zeros((MORE,), made.dtype.element_ty)
        tl.store(behind + rest, nothing, mask=(rest >= rank) & (rest < more))


@triton.jit(do_not_specialize_on_alignment=["balance"])
def _second(
    second, scale, balance, beside, outputs, rank, second_stride, second_rank_stride, beside_stride, beside_rank_stride,
    SCALED: tl.constexpr, FP8: tl.constexpr, OUTPUTS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    r = tl.arange(0, RANK)
    inside = (n < outputs)[:, None] & (r < rank)[None]
    place = n.to(tl.int64)[:, None]
    numbers = tl.load(second + place * second_stride + r[None] * second_rank_stride, mask=inside, other=0.0)
    beside += place * beside_stride + r[None] * beside_rank_stride
    if FP8:
        numbers = numbers.to(tl.float32) / tl.load(balance)
        if SCALED:
            numbers /= tl.load(scale + n, mask=n < outputs, other=1.0)[:, None]
        high, low = _halves(numbers)
        tl.store(beside, high, mask=inside)
        tl.store(beside + rank * beside_rank_stride, low, mask=inside)
        tl.store(beside + 2 * rank * beside_rank_stride, high, mask=inside)
    else:
        tl.store(beside, numbers, mask=inside)


def rows(
    x: Tensor, by_column: Tensor | None, hidden: Tensor, more: int, balance: Tensor | None, smallest: float
) -> tuple[Tensor, Tensor | None]:
    """As `library.models.carried.rows`."""
    if x.stride(1) != 1:
        x = x.contiguous()
    (count, columns), rank, fp8 = x.shape, hidden.shape[1], balance is not None
    dtype = torch.float8_e4m3fn if fp8 else x.dtype
    made = torch.empty(count, columns + more, dtype=dtype, device=x.device)
    scales = torch.empty(count, 1, dtype=torch.float32, device=x.device) if fp8 else None
    _row[(count,)](
        x, x if by_column is None else by_column, hidden, made, x if scales is None else scales,
        x if balance is None else balance, columns, rank, more, x.stride(0), smallest,
        WEIGHTED=by_column is not None, FP8=fp8, BLOCK=triton.next_power_of_2(columns),
        RANK=triton.next_power_of_2(rank), MORE=triton.next_power_of_2(more), num_warps=4,
    )  # fmt: skip
    return made, scales


def fill(beside: Tensor, second: Tensor, scale: Tensor | None, balance: Tensor | None) -> None:
    """As `library.models.carried.fill`."""
    outputs, rank = second.shape
    _second[(triton.cdiv(outputs, _OUTPUTS),)](
        second, beside if scale is None else scale, beside if balance is None else balance, beside, outputs, rank,
        *second.stride(), *beside.stride(),
        SCALED=scale is not None, FP8=balance is not None, OUTPUTS=_OUTPUTS, RANK=triton.next_power_of_2(rank),
        num_warps=4,
    )  # fmt: skip
