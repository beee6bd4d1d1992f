"""Both factors of a product that carries a low-rank one, as Triton kernels; `library.models.carried` imports them.

A row of the first factor is read twice: to make what it gets behind its numbers, and to be written with it. One kernel
that did both took longer, since the first wants many rows at a time and the second one. For the first a library's
product takes three kernels, each of which waits for the one before.
"""

# mypy: ignore-errors
# ruff: noqa: ANN001, ANN202, PLR0913

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _halves(numbers):
    """Each number as the sum of two in fp8; the conversion saturates."""
    high = numbers.to(tl.float8e4nv)
    return high, (numbers - high.to(tl.float32)).to(tl.float8e4nv)


@triton.jit
def _thin(
    x, factor, out, rows, columns, rank, x_stride, rank_stride, factor_stride,
    ROWS: tl.constexpr, PARTS: tl.constexpr, NUMBERS: tl.constexpr, RANK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Some rows of `x` times `factor` [rank, columns]; each of several PARTS of the columns is summed up by itself."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    place, r, part = tl.arange(0, NUMBERS), tl.arange(0, RANK), tl.arange(0, PARTS)
    real, ranks = row < rows, r < rank
    if PARTS == 1:
        product = tl.zeros((ROWS, RANK), tl.float32)
        for start in tl.range(0, columns, NUMBERS, num_stages=STAGES):
            k = start + place
            inside = k < columns
            numbers = tl.load(
                x + row[:, None] * x_stride + k[None], mask=real[:, None] & inside[None], other=0.0
            )
            weights = tl.load(
                factor + k[:, None] * factor_stride + r[None] * rank_stride,
                mask=inside[:, None] & ranks[None], other=0.0,
            )  # fmt: skip
            product = tl.dot(numbers, weights, product)
    else:
        products = tl.zeros((PARTS, ROWS, RANK), tl.float32)
        for start in tl.range(0, columns, PARTS * NUMBERS, num_stages=STAGES):
            begins = start + part * NUMBERS
            along = begins[:, None, None] + place[None, None]
            down = begins[:, None, None] + place[None, :, None]
            numbers = tl.load(
                x + row[None, :, None] * x_stride + along,
                mask=real[None, :, None] & (along < columns),
                other=0.0,
            )
            weights = tl.load(
                factor + down * factor_stride + r[None, None] * rank_stride,
                mask=(down < columns) & ranks[None, None], other=0.0,
            )  # fmt: skip
            products = tl.dot(numbers, weights, products)
        product = tl.sum(products, axis=0)
    tl.store(
        out + row[:, None] * rank + r[None],
        product.to(out.dtype.element_ty),
        mask=real[:, None] & ranks[None],
    )


@triton.jit(do_not_specialize_on_alignment=["balance"])
def _row(
    x, by_column, hidden, made, scales, balance, columns, rank, used, x_stride, made_stride, smallest,
    WEIGHTED: tl.constexpr, FP8: tl.constexpr, BLOCK: tl.constexpr, RANK: tl.constexpr, USED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    place, r, rest = tl.arange(0, BLOCK), tl.arange(0, RANK), tl.arange(0, USED)
    inside, ranks = place < columns, r < rank
    made += row * made_stride
    behind = made + columns
    numbers = tl.load(x + row * x_stride + place, mask=inside, other=0.0)
    product = tl.load(hidden + row * rank + r, mask=ranks, other=0.0)
    if FP8:
        numbers = numbers.to(tl.float32)
        if WEIGHTED:
            numbers *= tl.load(by_column + place, mask=inside, other=0.0).to(tl.float32)
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
        nothing = tl.zeros((USED,), tl.float32).to(tl.float8e4nv)
        tl.store(behind + rest, nothing, mask=(rest >= 3 * rank) & (rest < used))
    else:
        tl.store(made + place, numbers, mask=inside)
        tl.store(behind + r, product, mask=ranks)
        nothing = tl.zeros((USED,), made.dtype.element_ty)
        tl.store(behind + rest, nothing, mask=(rest >= rank) & (rest < used))


@triton.jit
def _factors(
    programs, entries, balances, strengths,
    UP: tl.constexpr, FP8: tl.constexpr, LOW: tl.constexpr, SOURCE: tl.constexpr, BLOCK: tl.constexpr,
    RANK: tl.constexpr, FIELDS: tl.constexpr,
):  # fmt: skip
    """Some rows of one factor of one layer: as the products read it, and beside the layer's weight.

    `up` lies row by row and `down` column by column, and so does what is made of them, but for `down` in fp8.
    """
    program = tl.program_id(0)
    entry = entries + tl.load(programs + 2 * program) * FIELDS
    n = tl.load(programs + 2 * program + 1) * BLOCK + tl.arange(0, BLOCK)
    r = tl.arange(0, RANK)
    source = tl.load(entry).to(tl.pointer_type(SOURCE))
    low = tl.load(entry + 1).to(tl.pointer_type(LOW))
    beside = tl.load(entry + 2)
    scale = tl.load(entry + 3)
    rows, rank, total = tl.load(entry + 4), tl.load(entry + 5), tl.load(entry + 6)
    source_stride, low_stride, stride = tl.load(entry + 7), tl.load(entry + 8), tl.load(entry + 9)
    inside = (n < rows)[:, None] & (r < rank)[None]
    n, r = n[:, None], r[None]
    numbers = tl.load(
        source + (n * source_stride + r if UP else n + r * source_stride), mask=inside, other=0.0
    )
    numbers = numbers.to(tl.float32) * tl.load(strengths + tl.load(entry + 11))
    tl.store(low + (n * low_stride + r if UP else n + r * low_stride), numbers.to(LOW), mask=inside)
    if beside != 0:
        if FP8:
            numbers /= tl.load(balances + tl.load(entry + 10))
            if UP:
                scales = scale.to(tl.pointer_type(tl.float32))
                numbers /= tl.load(scales + n, mask=n < rows, other=1.0)
            high, digits = _halves(numbers)
            eight = beside.to(tl.pointer_type(tl.float8e4nv)) + n * stride + r
            tl.store(eight, high, mask=inside)
            tl.store(eight + total, digits, mask=inside)
            tl.store(eight + 2 * total, high, mask=inside)
        else:
            wide = beside.to(tl.pointer_type(LOW))
            tl.store(wide + (n * stride + r if UP else n + r * stride), numbers.to(LOW), mask=inside)


def thin(x: Tensor, factor: Tensor) -> Tensor:
    """`x` [T, n] times `factor` [r, n]: [T, r]."""
    if x.stride(1) != 1:
        x = x.contiguous()
    count, rank = x.shape[0], factor.shape[0]
    out = torch.empty(count, rank, dtype=x.dtype, device=x.device)
    # Fastest for 3,072 columns on an H200. What is read ahead has to fit into a multiprocessor of this card.
    rows, parts, most = (64, 1, 5) if count >= _MANY else (16, 4, 3)
    padded = max(16, triton.next_power_of_2(rank))
    ahead = parts * _NUMBERS * (rows + padded) * x.element_size()  # bytes
    room = torch.cuda.get_device_properties(x.device).shared_memory_per_block_optin - _RESERVE
    stages = max(1, min(most, room // ahead))
    _thin[(triton.cdiv(count, rows),)](
        x, factor, out, count, x.shape[1], rank, x.stride(0), *factor.stride(),
        ROWS=rows, PARTS=parts, NUMBERS=_NUMBERS, RANK=padded, STAGES=stages, num_warps=4,
    )  # fmt: skip
    return out


def rows(
    x: Tensor,
    by_column: Tensor | None,
    hidden: Tensor,
    more: int,
    used: int,
    balance: Tensor | None,
    smallest: float,
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
        x if balance is None else balance, columns, rank, used, x.stride(0), made.stride(0), smallest,
        WEIGHTED=by_column is not None, FP8=fp8, BLOCK=triton.next_power_of_2(columns),
        RANK=triton.next_power_of_2(rank), USED=triton.next_power_of_2(used), num_warps=4,
    )  # fmt: skip
    return made[:, : columns + used], scales


_MANY = 2048  # rows that keep the GPU busy, 64 to a program
_NUMBERS = 128  # of each row at a time
_RESERVE = 8 * 1024  # bytes of shared memory for anything else
_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
BLOCK = 128  # rows of a factor that a program writes


def write_factors(
    programs: Tensor, entries: Tensor, balances: Tensor, strengths: Tensor, *, up: bool, fp8: bool, rank: int,
    source: torch.dtype, low: torch.dtype,
) -> None:  # fmt: skip
    """What `library.models.carrying` has listed, of one kind of factor; `rank` is the largest of an entry."""
    _factors[(programs.shape[0],)](
        programs, entries, balances, strengths, UP=up, FP8=fp8, LOW=_TYPES[low], SOURCE=_TYPES[source], BLOCK=BLOCK,
        RANK=triton.next_power_of_2(rank), FIELDS=entries.shape[1], num_warps=4,
    )  # fmt: skip
