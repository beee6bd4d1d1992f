"""Triton kernels of `library.models.norms`, which imports this where there is a GPU.

A program holds a row, a token's numbers, in registers: what is needed of it is read once, and each result written once.
Backward a program goes through many rows, so that the sums over tokens stay in registers as well; what the programs
have summed is added up by a second kernel in a fixed order, which makes sums the same bit for bit each time.
"""

# mypy: ignore-errors
# ruff: noqa: ANN001, ANN202, PLR0913

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Fastest for 3,072 columns on an H200. Backward: warps, and how many rows a program has at hand, read or being read.
ENTER_WARPS = 4
ENTER_BACKWARD = (4, 4)
LEAVE_AND_ENTER_BACKWARD = (8, 4)
LEAVE_BACKWARD = (8, 5)
# That share the rows of a batch backward: one for each multiprocessor of a large card. Each has some rows, so that
# there are few sums to add up.
PROGRAMS = 128
_FEWEST_ROWS = 4
_RESERVE = 16 * 1024  # bytes of shared memory that rows read ahead leave for sums along a row
_ADDED = 32  # columns at once where sums are added up


@triton.jit
def _enter(
    x, gate, branch, shift, scale, stream, y, means, sizes,
    columns, x_batch, x_row, gate_batch, branch_batch, branch_row, shift_batch, scale_batch, epsilon,
    RESIDUAL: tl.constexpr, BLOCK: tl.constexpr,
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
        rounded = wide.to(stream.dtype.element_ty)
        tl.store(stream + row * columns + place, rounded, mask=inside)
        wide = rounded.to(tl.float32)  # normalised is what the backward pass will find
    mean = tl.sum(wide, axis=0) / columns
    centred = tl.where(inside, wide - mean, 0.0)
    size = tl.rsqrt(tl.sum(centred * centred, axis=0) / columns + epsilon)
    tl.store(means + row, mean)
    tl.store(sizes + row, size)
    factor = 1 + tl.load(scale + batch * scale_batch + place, mask=inside, other=0.0).to(tl.float32)
    term = tl.load(shift + batch * shift_batch + place, mask=inside, other=0.0).to(tl.float32)
    seen = centred * size * factor + term
    tl.store(y + row * columns + place, seen.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _enter_backward(
    grad_stream, grad_y, stream, gate, branch, scale, means, sizes, grad_x, grad_branch, sums,
    tokens, columns, stream_batch, stream_row, gate_batch, branch_batch, branch_row, scale_batch,
    grad_stream_batch, grad_stream_row, grad_y_batch, grad_y_row,
    RESIDUAL: tl.constexpr, SUMS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
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
    grad, gate, branch, grad_branch, sums,
    tokens, columns, grad_batch, grad_row, gate_batch, branch_batch, branch_row,
    BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    programs = tl.num_programs(0)
    batch = tl.program_id(1).to(tl.int64)
    place = tl.arange(0, BLOCK)
    inside = place < columns
    strength = tl.load(gate + batch * gate_batch + place, mask=inside, other=0.0).to(tl.float32)
    of_gate = tl.zeros((BLOCK,), tl.float32)
    for token in tl.range(tl.program_id(0), tokens, programs, num_stages=STAGES):
        wide = tl.load(grad + batch * grad_batch + token * grad_row + place, mask=inside, other=0.0).to(
            tl.float32
        )
        added = tl.load(branch + batch * branch_batch + token * branch_row + place, mask=inside, other=0.0)
        row = batch * tokens + token
        back_there = (wide * strength).to(grad_branch.dtype.element_ty)
        tl.store(grad_branch + row * columns + place, back_there, mask=inside)
        of_gate += wide * added.to(tl.float32)
    tl.store(sums + (batch * programs + tl.program_id(0)) * columns + place, of_gate, mask=inside)


@triton.jit
def _add_up(sums, out, programs, columns, ROWS: tl.constexpr, SIDE: tl.constexpr):
    """`sums` [B, programs, columns] over the programs, at most ROWS: `out` [B, columns]."""
    batch = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * SIDE + tl.arange(0, SIDE)[None, :]
    which = tl.arange(0, ROWS)[:, None]
    inside = column < columns
    place = (batch * programs + which) * columns + column
    numbers = tl.load(sums + place, mask=inside & (which < programs), other=0.0)
    tl.store(out + batch * columns + column, tl.sum(numbers, axis=0)[None, :], mask=inside)


def enter(
    x: Tensor, gate: Tensor | None, branch: Tensor | None, shift: Tensor, scale: Tensor, epsilon: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `library.models.norms_formulas.enter`."""
    batches, tokens, columns = x.shape
    x, shift, scale = _rows(x), _rows(shift), _rows(scale)
    residual = gate is not None
    gate, branch = (_rows(gate), _rows(branch)) if residual else (x, x)
    y = torch.empty((batches, tokens, columns), dtype=x.dtype, device=x.device)
    stream = torch.empty_like(y) if residual else x
    means, sizes = (torch.empty(batches, tokens, dtype=torch.float32, device=x.device) for _ in range(2))
    _enter[(tokens, batches)](
        x, gate, branch, shift, scale, stream, y, means, sizes,
        columns, *x.stride()[:2], gate.stride(0), *branch.stride()[:2], shift.stride(0), scale.stride(0), epsilon,
        RESIDUAL=residual, BLOCK=triton.next_power_of_2(columns), num_warps=ENTER_WARPS,
    )  # fmt: skip
    return stream, y, means, sizes


def enter_backward(
    grad_stream: Tensor, grad_y: Tensor, stream: Tensor, gate: Tensor | None, branch: Tensor | None, scale: Tensor,
    means: Tensor, sizes: Tensor, with_sums: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:  # fmt: skip
    """As `library.models.norms_formulas.enter_backward`."""
    batches, tokens, columns = stream.shape
    grad_stream, grad_y, stream, scale = (_rows(tensor) for tensor in (grad_stream, grad_y, stream, scale))
    residual = gate is not None
    gate, branch = (_rows(gate), _rows(branch)) if residual else (stream, stream)
    grad_x = torch.empty((batches, tokens, columns), dtype=stream.dtype, device=stream.device)
    grad_branch = torch.empty_like(grad_x, dtype=branch.dtype) if residual else None
    programs = _programs(tokens, batches)
    sums = _partial(stream, programs, 3 if residual else 2) if with_sums else sizes.new_empty(0)
    warps, stages = LEAVE_AND_ENTER_BACKWARD if residual else ENTER_BACKWARD
    block = triton.next_power_of_2(columns)
    read = (grad_stream, grad_y, stream, branch)[: 4 if residual else 3]
    _enter_backward[(programs, batches)](
        grad_stream, grad_y, stream, gate, branch, scale, means, sizes, grad_x, grad_branch, sums,
        tokens, columns, *stream.stride()[:2], gate.stride(0), *branch.stride()[:2], scale.stride(0),
        *grad_stream.stride()[:2], *grad_y.stride()[:2],
        RESIDUAL=residual, SUMS=with_sums, BLOCK=block, STAGES=_stages(stages, block, read), num_warps=warps,
    )  # fmt: skip
    return grad_x, grad_branch, _added_up(sums) if with_sums else sums


def leave_backward(grad: Tensor, gate: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
    """As `library.models.norms_formulas.leave_backward`."""
    batches, tokens, columns = grad.shape
    grad, gate, branch = _rows(grad), _rows(gate), _rows(branch)
    grad_branch = torch.empty((batches, tokens, columns), dtype=branch.dtype, device=branch.device)
    programs = _programs(tokens, batches)
    sums = _partial(branch, programs, 1)
    warps, stages = LEAVE_BACKWARD
    block = triton.next_power_of_2(columns)
    _leave_backward[(programs, batches)](
        grad, gate, branch, grad_branch, sums,
        tokens, columns, *grad.stride()[:2], gate.stride(0), *branch.stride()[:2],
        BLOCK=block, STAGES=_stages(stages, block, (grad, branch)), num_warps=warps,
    )  # fmt: skip
    return grad_branch, _added_up(sums)


def _stages(most: int, block: int, read: tuple[Tensor, ...]) -> int:
    """How many rows of all that is read a program may have at hand on this card."""
    row = block * sum(tensor.element_size() for tensor in read)
    room = torch.cuda.get_device_properties(read[0].device).shared_memory_per_block_optin - _RESERVE
    return max(1, min(most, 1 + room // row))


def _rows(x: Tensor) -> Tensor:
    """`x` with the numbers of a row side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _programs(tokens: int, batches: int) -> int:
    """How many share the tokens of each batch."""
    return min(triton.cdiv(tokens, _FEWEST_ROWS), triton.cdiv(PROGRAMS, batches))


def _partial(like: Tensor, programs: int, count: int) -> Tensor:
    return torch.empty(like.shape[0], programs, count, like.shape[2], dtype=torch.float32, device=like.device)


def _added_up(sums: Tensor) -> Tensor:
    batches, programs, count, columns = sums.shape
    out = torch.empty(batches, count, columns, dtype=torch.float32, device=sums.device)
    _add_up[(triton.cdiv(count * columns, _ADDED), batches)](
        sums, out, programs, count * columns, ROWS=triton.next_power_of_2(programs), SIDE=_ADDED, num_warps=4
    )
    return out
