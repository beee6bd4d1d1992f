"""Triton kernels of `library.models.norms`, which imports this where there is a GPU.

A program holds a row, a token's numbers, in registers: what is needed of it is read once, and each result written once.
Backward a program goes through many rows, so that the sums over tokens stay in registers as well; what the programs
have summed is added up by a second kernel in a fixed order, which makes sums the same bit for bit each time.
"""

# mypy: ignore-errors
# ruff: noqa: ANN001, ANN202, C901, PLR0913

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

FORWARD_WARPS = 4
BACKWARD_WARPS = 8
# That share the rows of a batch backward: as many as a large card holds at once, which is one a multiprocessor with a
# residual. Each has some rows, so that there are few sums to add up.
PROGRAMS = 256
PROGRAMS_WITH_RESIDUAL = 128
_FEWEST_ROWS = 4
STAGES = 3  # backward: how many rows a program has at hand, read or being read
_RESERVE = 16 * 1024  # bytes of shared memory that rows read ahead leave for sums along a row
_ADDED = 32  # columns and rows at once where sums are added up


@triton.jit
def _round(numbers, rounded, scales, row, columns, inside, smallest):
    """A row of float32 numbers to 8 bits, and its scale: what `library.models.rounding` makes of it."""
    scale = tl.maximum(tl.max(tl.abs(numbers), axis=0) / 448.0, smallest)
    tl.store(scales + row, scale)
    place = row * columns + tl.arange(0, numbers.shape[0])
    tl.store(rounded + place, (numbers * (1.0 / scale)).to(rounded.dtype.element_ty), mask=inside)


@triton.jit
def _enter(
    x, gate, branch, shift, scale, stream, y, means, sizes, rounded, row_scales,
    columns, x_batch, x_row, gate_batch, branch_batch, branch_row, shift_batch, scale_batch, epsilon, smallest,
    RESIDUAL: tl.constexpr, ROUND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    batch = tl.program_id(1).to(tl.int64)
    row = batch * tl.num_programs(0) + token
    place = tl.arange(0, BLOCK)
    inside = place < columns
    wide = tl.load(x + batch * x_batch + token * x_row + place, mask=inside, other=0.0).to(tl.float32)
    if RESIDUAL:
        added = tl.load(branch + batch * branch_batch + token * branch_row + place, mask=inside, other=0.0)
        strength = tl.load(gate + batch * gate_batch + place, mask=inside, other=0.0)
        wide += strength.to(tl.float32) * added.to(tl.float32)
        narrow = wide.to(stream.dtype.element_ty)
        tl.store(stream + row * columns + place, narrow, mask=inside)
        wide = narrow.to(tl.float32)  # normalised is what the backward pass will find
    mean = tl.sum(wide, axis=0) / columns
    centred = tl.where(inside, wide - mean, 0.0)
    size = tl.rsqrt(tl.sum(centred * centred, axis=0) / columns + epsilon)
    tl.store(means + row, mean)
    tl.store(sizes + row, size)
    factor = 1 + tl.load(scale + batch * scale_batch + place, mask=inside, other=0.0).to(tl.float32)
    term = tl.load(shift + batch * shift_batch + place, mask=inside, other=0.0).to(tl.float32)
    seen = (centred * size * factor + term).to(y.dtype.element_ty)
    tl.store(y + row * columns + place, seen, mask=inside)
    if ROUND:
        _round(seen.to(tl.float32), rounded, row_scales, row, columns, inside, smallest)


@triton.jit
def _enter_backward(
    grad_stream, grad_y, stream, gate, branch, scale, means, sizes, grad_x, grad_branch, sums,
    by_column, rounded, row_scales, smallest,
    tokens, columns, stream_batch, stream_row, gate_batch, branch_batch, branch_row, scale_batch,
    grad_stream_batch, grad_stream_row, grad_y_batch, grad_y_row,
    RESIDUAL: tl.constexpr, SUMS: tl.constexpr, ROUND: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    programs = tl.num_programs(0)
    batch = tl.program_id(1).to(tl.int64)
    place = tl.arange(0, BLOCK)
    inside = place < columns
    factor = 1 + tl.load(scale + batch * scale_batch + place, mask=inside, other=0.0).to(tl.float32)
    of_shift = tl.zeros((BLOCK,), tl.float32)
    of_scale = tl.zeros((BLOCK,), tl.float32)
    of_gate = tl.zeros((BLOCK,), tl.float32)
    if RESIDUAL:
        strength = tl.load(gate + batch * gate_batch + place, mask=inside, other=0.0).to(tl.float32)
    if ROUND:
        weight = tl.load(by_column + place, mask=inside, other=0.0)
    for token in tl.range(tl.program_id(0), tokens, programs, num_stages=STAGES):
        row = batch * tokens + token
        wide = tl.load(stream + batch * stream_batch + token * stream_row + place, mask=inside, other=0.0).to(
            tl.float32
        )
        grad = tl.load(grad_y + batch * grad_y_batch + token * grad_y_row + place, mask=inside, other=0.0).to(
            tl.float32
        )
        passed = tl.load(
            grad_stream + batch * grad_stream_batch + token * grad_stream_row + place, mask=inside, other=0.0
        ).to(tl.float32)
        if RESIDUAL:
            added = tl.load(
                branch + batch * branch_batch + token * branch_row + place, mask=inside, other=0.0
            )
        size = tl.load(sizes + row)
        normal = (wide - tl.load(means + row)) * size
        back = grad * factor  # zero outside, as the gradients are
        constant = tl.sum(back, axis=0) / columns
        along = tl.sum(back * normal, axis=0) / columns
        total = passed + size * (back - constant - normal * along)
        tl.store(grad_x + row * columns + place, total.to(grad_x.dtype.element_ty), mask=inside)
        if RESIDUAL:
            back_there = (total * strength).to(grad_branch.dtype.element_ty)
            tl.store(grad_branch + row * columns + place, back_there, mask=inside)
            if ROUND:
                _round(
                    back_there.to(tl.float32) * weight, rounded, row_scales, row, columns, inside, smallest
                )
        if SUMS:
            of_shift += grad
            of_scale += grad * normal
            if RESIDUAL:
                of_gate += total * added.to(tl.float32)
    if SUMS:
        count = 3 if RESIDUAL else 2
        out = sums + (batch * programs + tl.program_id(0)) * count * columns + place
        tl.store(out, of_shift, mask=inside)
        tl.store(out + columns, of_scale, mask=inside)
        if RESIDUAL:
            tl.store(out + 2 * columns, of_gate, mask=inside)


@triton.jit
def _leave_backward(
    grad, gate, branch, grad_branch, sums, by_column, rounded, row_scales, smallest,
    tokens, columns, grad_batch, grad_row, gate_batch, branch_batch, branch_row,
    ROUND: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    programs = tl.num_programs(0)
    batch = tl.program_id(1).to(tl.int64)
    place = tl.arange(0, BLOCK)
    inside = place < columns
    strength = tl.load(gate + batch * gate_batch + place, mask=inside, other=0.0).to(tl.float32)
    of_gate = tl.zeros((BLOCK,), tl.float32)
    if ROUND:
        weight = tl.load(by_column + place, mask=inside, other=0.0)
    for token in tl.range(tl.program_id(0), tokens, programs, num_stages=STAGES):
        wide = tl.load(grad + batch * grad_batch + token * grad_row + place, mask=inside, other=0.0).to(
            tl.float32
        )
        added = tl.load(branch + batch * branch_batch + token * branch_row + place, mask=inside, other=0.0)
        row = batch * tokens + token
        back_there = (wide * strength).to(grad_branch.dtype.element_ty)
        tl.store(grad_branch + row * columns + place, back_there, mask=inside)
        if ROUND:
            _round(back_there.to(tl.float32) * weight, rounded, row_scales, row, columns, inside, smallest)
        of_gate += wide * added.to(tl.float32)
    tl.store(sums + (batch * programs + tl.program_id(0)) * columns + place, of_gate, mask=inside)


@triton.jit
def _add_up(sums, out, programs, columns, SIDE: tl.constexpr):
    """`sums` [B, programs, columns] over the programs: `out` [B, columns]."""
    batch = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * SIDE + tl.arange(0, SIDE)[None, :]
    which = tl.arange(0, SIDE)[:, None]
    inside = column < columns
    total = tl.zeros((SIDE, SIDE), tl.float32)
    for start in range(0, programs, SIDE):
        place = (batch * programs + start + which) * columns + column
        total += tl.load(sums + place, mask=inside & (start + which < programs), other=0.0)
    found = tl.sum(total, axis=0)[None, :]
    tl.store(out + batch * columns + column, found, mask=inside)


def enter(
    x: Tensor, gate: Tensor | None, branch: Tensor | None, shift: Tensor, scale: Tensor, epsilon: float,
    smallest: float | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The stream after its residual (`x` [B, L, D] itself without), y [B, L, D], means and sizes [B, L].

    With the `smallest` scale of a row, also y in 8 bits [B L, D] and its rows' scales [B L, 1].
    """
    batches, tokens, columns = x.shape
    x, shift, scale = _rows(x), _rows(shift), _rows(scale)
    residual = gate is not None
    gate, branch = (_rows(gate), _rows(branch)) if residual else (x, x)
    y = torch.empty((batches, tokens, columns), dtype=x.dtype, device=x.device)
    stream = torch.empty_like(y) if residual else x
    means, sizes = (torch.empty(batches, tokens, dtype=torch.float32, device=x.device) for _ in range(2))
    rounded = _rounded(y, smallest)
    _enter[(tokens, batches)](
        x, gate, branch, shift, scale, stream, y, means, sizes, *(rounded or (y, means)),
        columns, *x.stride()[:2], gate.stride(0), *branch.stride()[:2], shift.stride(0), scale.stride(0),
        epsilon, smallest or 0.0,
        RESIDUAL=residual, ROUND=bool(rounded), BLOCK=triton.next_power_of_2(columns), num_warps=FORWARD_WARPS,
    )  # fmt: skip
    return stream, y, means, sizes, *rounded


def enter_backward(
    grad_stream: Tensor, grad_y: Tensor, stream: Tensor, gate: Tensor | None, branch: Tensor | None, scale: Tensor,
    means: Tensor, sizes: Tensor, *, with_sums: bool, by_column: Tensor | None = None, smallest: float | None = None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of x and of the branch [B, L, D], and sums over tokens [B, 2 or 3, D] float32: shift, scale, gate.

    With the `smallest` scale of a row, also the branch's gradient times `by_column` [1, D] in 8 bits, and scales.
    """
    batches, tokens, columns = stream.shape
    grad_stream, grad_y, stream, scale = (_rows(tensor) for tensor in (grad_stream, grad_y, stream, scale))
    residual = gate is not None
    gate, branch = (_rows(gate), _rows(branch)) if residual else (stream, stream)
    grad_x = torch.empty((batches, tokens, columns), dtype=stream.dtype, device=stream.device)
    grad_branch = torch.empty_like(grad_x, dtype=branch.dtype) if residual else grad_x
    programs = _programs(tokens, batches, PROGRAMS_WITH_RESIDUAL if residual else PROGRAMS)
    sums = _partial(stream, programs, 3 if residual else 2) if with_sums else sizes
    rounded = _rounded(grad_branch, smallest)
    read = (grad_stream, grad_y, stream, branch)[: 4 if residual else 3]
    block = triton.next_power_of_2(columns)
    _enter_backward[(programs, batches)](
        grad_stream, grad_y, stream, gate, branch, scale, means, sizes, grad_x, grad_branch, sums,
        _weights(by_column, sizes, rounded), *(rounded or (grad_x, sizes)), smallest or 0.0,
        tokens, columns, *stream.stride()[:2], gate.stride(0), *branch.stride()[:2], scale.stride(0),
        *grad_stream.stride()[:2], *grad_y.stride()[:2],
        RESIDUAL=residual, SUMS=with_sums, ROUND=bool(rounded), BLOCK=block, STAGES=_stages(block, read),
        num_warps=BACKWARD_WARPS,
    )  # fmt: skip
    return grad_x, grad_branch if residual else None, _added_up(sums) if with_sums else None, *rounded


def leave_backward(
    grad: Tensor, gate: Tensor, branch: Tensor, by_column: Tensor | None = None, smallest: float | None = None
) -> tuple[Tensor, ...]:
    """The gradient of the branch [B, L, D], and the sum over tokens [B, 1, D] float32 for its gate.

    With the `smallest` scale of a row, also that gradient times `by_column` [1, D] in 8 bits, and scales.
    """
    batches, tokens, columns = grad.shape
    grad, gate, branch = _rows(grad), _rows(gate), _rows(branch)
    grad_branch = torch.empty((batches, tokens, columns), dtype=branch.dtype, device=branch.device)
    programs = _programs(tokens, batches, PROGRAMS)
    sums = _partial(branch, programs, 1)
    rounded = _rounded(grad_branch, smallest)
    block = triton.next_power_of_2(columns)
    _leave_backward[(programs, batches)](
        grad, gate, branch, grad_branch, sums,
        _weights(by_column, sums, rounded), *(rounded or (grad_branch, sums)), smallest or 0.0,
        tokens, columns, *grad.stride()[:2], gate.stride(0), *branch.stride()[:2],
        ROUND=bool(rounded), BLOCK=block, STAGES=_stages(block, (grad, branch)), num_warps=BACKWARD_WARPS,
    )  # fmt: skip
    return grad_branch, _added_up(sums), *rounded


def _rounded(like: Tensor, smallest: float | None) -> tuple[Tensor, ...]:
    """Room for a tensor [B, L, D] in 8 bits, [B L, D], and for its rows' scales [B L, 1], if it is to be rounded."""
    if smallest is None:
        return ()
    rows = like.shape[0] * like.shape[1]
    return (
        torch.empty(rows, like.shape[2], dtype=torch.float8_e4m3fn, device=like.device),
        torch.empty(rows, 1, dtype=torch.float32, device=like.device),
    )


def _weights(by_column: Tensor | None, unused: Tensor, rounded: tuple[Tensor, ...]) -> Tensor:
    if not rounded:
        return unused
    numbers, scales = rounded
    return scales.new_ones(numbers.shape[1]) if by_column is None else by_column.contiguous()


def _stages(block: int, read: tuple[Tensor, ...]) -> int:
    """How many rows of all that is read a program may have at hand on this card."""
    row = block * sum(tensor.element_size() for tensor in read)
    room = torch.cuda.get_device_properties(read[0].device).shared_memory_per_block_optin - _RESERVE
    return max(1, min(STAGES, 1 + room // row))


def _rows(x: Tensor) -> Tensor:
    """`x` with the numbers of a row side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _programs(tokens: int, batches: int, most: int) -> int:
    """How many share the tokens of each batch."""
    return min(triton.cdiv(tokens, _FEWEST_ROWS), triton.cdiv(most, batches))


def _partial(like: Tensor, programs: int, count: int) -> Tensor:
    return torch.empty(like.shape[0], programs, count, like.shape[2], dtype=torch.float32, device=like.device)


def _added_up(sums: Tensor) -> Tensor:
    batches, programs, count, columns = sums.shape
    out = torch.empty(batches, count, columns, dtype=torch.float32, device=sums.device)
    _add_up[(triton.cdiv(count * columns, _ADDED), batches)](
        sums, out, programs, count * columns, SIDE=_ADDED, num_warps=4
    )
    return out
