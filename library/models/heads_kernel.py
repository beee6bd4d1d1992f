"""Triton kernels of `library.models.heads`, which imports this where there is a GPU.

One program works on one part of a token's row: its queries, keys or values (all heads), or as many numbers of the MLP.
What a part needs is read once, and the result written once.
"""

# mypy: ignore-errors
# ruff: noqa: ANN001, ANN202, PLR0913

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _turned(x, cos, sin, DIRECTION: tl.constexpr):
    """Adjacent pairs of `x` [heads, width] turned by angles [1, width / 2], or back."""
    heads: tl.constexpr = x.shape[0]
    width: tl.constexpr = x.shape[1]
    first, second = tl.split(tl.reshape(x, (heads, width // 2, 2)))
    sin = sin * DIRECTION
    return tl.reshape(tl.join(cos * first - sin * second, sin * first + cos * second), (heads, width))


@triton.jit
def _forward(
    qkv, q_scale, k_scale, cos, sin, q, k, v, tokens, first, row_stride, batch_stride, epsilon,
    HEADS: tl.constexpr, SPACE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    batch = tl.program_id(1).to(tl.int64)
    part = tl.program_id(2)
    head = tl.arange(0, SPACE)[:, None]
    place = tl.arange(0, WIDTH)[None, :]
    inside = head < HEADS
    within = head * WIDTH + place
    position = batch * tokens + first + token
    x = tl.load(
        qkv + batch * batch_stride + token * row_stride + part * HEADS * WIDTH + within,
        mask=inside,
        other=0.0,
    )
    out = position * HEADS * WIDTH + within
    if part == 2:
        tl.store(v + out, x, mask=inside)
    else:
        scale = tl.load((q_scale if part == 0 else k_scale) + place).to(tl.float32)
        wide = x.to(tl.float32)
        wide *= tl.rsqrt(tl.sum(wide * wide, axis=1) / WIDTH + epsilon)[:, None] * scale
        half = tl.arange(0, WIDTH // 2)[None, :] + position * (WIDTH // 2)
        turned = _turned(wide, tl.load(cos + half), tl.load(sin + half), 1)
        tl.store((q if part == 0 else k) + out, turned.to(x.dtype), mask=inside)


@triton.jit
def _backward(
    grad_q, grad_k, grad_v, grad_mlp, inner, q_scale, k_scale, cos, sin, grad_inner,
    tokens, first, row_stride, batch_stride, out_row_stride, out_batch_stride,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token, mlp_batch, mlp_token, mlp_width,
    epsilon, linear, cubic,
    HEADS: tl.constexpr, SPACE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    batch = tl.program_id(1).to(tl.int64)
    part = tl.program_id(2)
    head = tl.arange(0, SPACE)[:, None]
    place = tl.arange(0, WIDTH)[None, :]
    inside = head < HEADS
    within = head * WIDTH + place
    position = first + token
    start = part * HEADS * WIDTH
    row = inner + batch * batch_stride + token * row_stride + start
    out = grad_inner + batch * out_batch_stride + token * out_row_stride + start
    if part == 2:
        grad = tl.load(grad_v + batch * v_batch + head * v_head + position * v_token + place, mask=inside)
        tl.store(out + within, grad, mask=inside)
    elif part < 2:
        if part == 0:
            grad = tl.load(
                grad_q + batch * q_batch + head * q_head + position * q_token + place, mask=inside, other=0.0
            )
            scale = tl.load(q_scale + place).to(tl.float32)
        else:
            grad = tl.load(
                grad_k + batch * k_batch + head * k_head + position * k_token + place, mask=inside, other=0.0
            )
            scale = tl.load(k_scale + place).to(tl.float32)
        half = tl.arange(0, WIDTH // 2)[None, :] + (batch * tokens + position) * (WIDTH // 2)
        back = _turned(grad.to(tl.float32), tl.load(cos + half), tl.load(sin + half), -1) * scale
        x = tl.load(row + within, mask=inside, other=0.0)
        wide = x.to(tl.float32)
        size = tl.rsqrt(tl.sum(wide * wide, axis=1) / WIDTH + epsilon)[:, None]
        normal = wide * size
        along = (tl.sum(back * normal, axis=1) / WIDTH)[:, None]
        tl.store(out + within, (size * (back - normal * along)).to(x.dtype), mask=inside)
    else:
        column = start - 3 * HEADS * WIDTH + within
        here = inside & (column < mlp_width)
        x = tl.load(row + within, mask=here, other=0.0)
        grad = tl.load(grad_mlp + batch * mlp_batch + token * mlp_token + column, mask=here, other=0.0)
        wide = x.to(tl.float32)
        square = wide * wide
        share = tl.sigmoid(wide * (linear + cubic * square))
        slope = share + wide * share * (1 - share) * (linear + 3 * cubic * square)
        tl.store(out + within, (grad.to(tl.float32) * slope).to(x.dtype), mask=here)


def forward(
    qkv: Tensor, q_scale: Tensor, k_scale: Tensor, cos: Tensor, sin: Tensor,
    q: Tensor, k: Tensor, v: Tensor | None, *, heads: int, first: int, epsilon: float,
) -> None:  # fmt: skip
    """Fill q, k and v [B, L, heads, width] from token `first` on from `qkv` [B, T, 3 heads width + ...]."""
    batch, length, _, width = q.shape
    grid = (qkv.shape[1], batch, 2 if v is None else 3)
    _forward[grid](
        qkv, q_scale, k_scale, cos, sin, q, k, q if v is None else v, length, first, qkv.stride(1), qkv.stride(0),
        epsilon,
        HEADS=heads, SPACE=triton.next_power_of_2(heads), WIDTH=width, num_warps=4,
    )  # fmt: skip


def backward(
    grads: tuple[Tensor, Tensor, Tensor], grad_mlp: Tensor | None, inner: Tensor,
    q_scale: Tensor, k_scale: Tensor, cos: Tensor, sin: Tensor,
    *, heads: int, first: int, epsilon: float, gelu: tuple[float, float],
) -> Tensor:  # fmt: skip
    """The gradient of `inner` [B, T, 3 heads width + m] from those of q, k, v [B, heads, L, width] and gelu(mlp) [B, T, m]."""  # noqa: E501
    batch, tokens, columns = inner.shape
    length, width = grads[0].shape[2:]
    grads = tuple(grad if grad.stride(3) == 1 else grad.contiguous() for grad in grads)
    if grad_mlp is not None and grad_mlp.stride(2) != 1:
        grad_mlp = grad_mlp.contiguous()
    out = torch.empty(inner.shape, dtype=inner.dtype, device=inner.device)
    mlp = columns - 3 * heads * width
    mlp_strides = (0, 0) if grad_mlp is None else grad_mlp.stride()[:2]
    strides = (stride for grad in grads for stride in grad.stride()[:3])
    _backward[(tokens, batch, 3 + triton.cdiv(mlp, heads * width))](
        *grads, grads[0] if grad_mlp is None else grad_mlp, inner, q_scale, k_scale, cos, sin, out,
        length, first, inner.stride(1), inner.stride(0), out.stride(1), out.stride(0),
        *strides, *mlp_strides, mlp, epsilon, *gelu,
        HEADS=heads, SPACE=triton.next_power_of_2(heads), WIDTH=width, num_warps=4,
    )  # fmt: skip
    return out
