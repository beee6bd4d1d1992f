"""Between the projections of a block and its attention, in one pass over memory: normalise, rotate, part, join.

What follows a block's first Linear layers is little arithmetic on much memory: queries and keys are normalised and
rotated, streams are joined, the MLP's half gets its activation, and backward all of it comes together again in one
gradient. A compiler makes several kernels of it, each of which reads and writes what the last one wrote. Compiled
blocks on an NVIDIA GPU take the kernels of `library.models.heads_kernel` instead; the same operators are
plain arithmetic elsewhere, which is what tests hold the kernels against.

Shape letters: B batch, T text tokens, N image tokens, L = T + N, D = H d hidden size, H heads, d their width, M that of
the MLP.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch import library as operators
from torch.nn import functional as F

from library.models.gelu import CUBIC, LINEAR, gelu, slope
from library.models.kernels import trusted
from library.models.rope import Rotation, rotate

EPSILON = 1e-6  # of every normalisation in the transformer


class Heads(NamedTuple):
    """What attention takes, each [B, H, L, d]."""

    q: Tensor
    k: Tensor
    v: Tensor


def is_plain(module: nn.Module) -> bool:
    """Whether calling `module` does what its class says: nothing has replaced its forward or looks at its outputs."""
    return not ("forward" in module.__dict__ or module._forward_hooks or module._forward_pre_hooks)


def fits(norms: Sequence[nn.Module]) -> bool:
    """Whether the operators do what these normalisations of queries and keys do: they are frozen, and nothing has
    replaced or extended them.
    """
    scales = [parameter for norm in norms for parameter in norm.parameters()]
    frozen = not any(scale.requires_grad for scale in scales)
    plain = all(is_plain(module) for norm in norms for module in norm.modules())
    return frozen and plain and all(scale.numel().bit_count() == 1 for scale in scales)


def split_inner(
    inner: Tensor, scales: tuple[Tensor, Tensor], rotation: Rotation, heads: int
) -> tuple[Heads, Tensor]:
    """The heads, and gelu(mlp) [B, L, M], of a single block's [B, L, 3 D + M]."""
    q, k, v, mlp = _SplitInner.apply(inner, *scales, *rotation, heads)  # type: ignore[no-untyped-call]
    return Heads(q, k, v), mlp


def join_streams(
    text: Tensor,
    image: Tensor,
    text_scales: tuple[Tensor, Tensor],
    image_scales: tuple[Tensor, Tensor],
    rotation: Rotation,
    heads: int,
) -> Heads:
    """The heads of both streams, text first, from their [B, T, 3 D] and [B, N, 3 D]."""
    return Heads(
        *_JoinStreams.apply(text, image, *text_scales, *image_scales, *rotation, heads)  # type: ignore[no-untyped-call]
    )


class _SplitInner(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, inner: Tensor, q_scale: Tensor, k_scale: Tensor, cos: Tensor, sin: Tensor, heads: int
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(inner, q_scale, k_scale, cos, sin)
        ctx.heads = heads
        width = 3 * heads * q_scale.numel()
        q, k = torch.ops.polyrank.split_heads(inner, q_scale, k_scale, cos, sin, heads)
        v = inner[..., width // 3 * 2 : width].view(*inner.shape[:2], heads, -1).transpose(1, 2)
        return q.transpose(1, 2), k.transpose(1, 2), v, gelu(inner[..., width:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad = torch.ops.polyrank.split_heads_backward(*grads, *ctx.saved_tensors, ctx.heads)
        return grad, None, None, None, None, None


class _JoinStreams(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0913 (what one operator takes)
        ctx: Any,
        text: Tensor,
        image: Tensor,
        text_q: Tensor,
        text_k: Tensor,
        image_q: Tensor,
        image_k: Tensor,
        cos: Tensor,
        sin: Tensor,
        heads: int,
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(text, image, text_q, text_k, image_q, image_k, cos, sin)
        ctx.heads = heads
        joined = torch.ops.polyrank.join_heads(text, image, text_q, text_k, image_q, image_k, cos, sin, heads)
        return tuple(tensor.transpose(1, 2) for tensor in joined)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        text, image = torch.ops.polyrank.join_heads_backward(*grads, *ctx.saved_tensors, ctx.heads)
        return text, image, None, None, None, None, None, None, None


@cache
def _kernels(device: torch.device) -> Any:
    """The kernels, or None where they cannot be trusted."""

    def check(kernels: Any) -> list[tuple[Tensor, Tensor]]:
        heads, width, tokens, mlp = 3, 32, 5, 40
        shape = (2, tokens, 3 * heads * width + mlp)
        count = math.prod(shape)
        inner = torch.linspace(-2, 3, count, device=device).sin().view(shape).to(torch.bfloat16)
        rising = torch.linspace(0.5, 2, width, device=device).to(inner.dtype)
        scales = (rising, rising.flip(0))
        angles = torch.linspace(0, 6, 2 * tokens * width // 2, device=device).view(2, 1, tokens, -1)
        rotation = Rotation(angles.cos(), angles.sin())
        q, k = (_room(inner, tokens, heads, scales[0]) for _ in range(2))
        kernels.forward(inner, *scales, *rotation, q, k, None, heads=heads, first=0, epsilon=EPSILON)
        plain = _plain_heads(inner, *scales, rotation, heads)
        grads, grad_mlp = tuple(one.flip(2) for one in plain), inner[..., -mlp:].flip(1)
        back = kernels.backward(
            grads, grad_mlp, inner, *scales, *rotation,
            heads=heads, first=0, epsilon=EPSILON, gelu=(LINEAR, CUBIC),
        )  # fmt: skip
        wanted = _plain_grad(grads, grad_mlp, inner, scales, rotation, heads=heads, first=0)
        return [(q.transpose(1, 2), plain[0]), (k.transpose(1, 2), plain[1]), (back, wanted)]

    return trusted("library.models.heads_kernel", check)


def _plain(x: Tensor) -> bool:
    return not x.is_cuda or _kernels(x.device) is None


def _plain_heads(
    qkv: Tensor, q_scale: Tensor, k_scale: Tensor, rotation: Rotation, heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [B, heads, T, d] of [B, T, 3 D + ...], by the formulas."""
    width = q_scale.numel()
    q, k, v = (
        part.reshape(*part.shape[:2], heads, width).transpose(1, 2)
        for part in qkv[..., : 3 * heads * width].chunk(3, dim=-1)
    )
    scaled = (
        F.rms_norm(x.float(), (width,), scale.float(), EPSILON) for x, scale in ((q, q_scale), (k, k_scale))
    )
    q, k = (rotate(x, rotation).to(qkv.dtype) for x in scaled)
    return q, k, v


def _part(rotation: tuple[Tensor, Tensor], first: int, count: int) -> Rotation:
    return Rotation(*(angles[:, :, first : first + count] for angles in rotation))


@operators.custom_op("polyrank::split_heads", mutates_args=())
def _split_heads(
    inner: Tensor, q_scale: Tensor, k_scale: Tensor, cos: Tensor, sin: Tensor, heads: int
) -> tuple[Tensor, Tensor]:
    """q and k [B, L, H, d]."""
    if _plain(inner):
        q, k, _ = _plain_heads(inner, q_scale, k_scale, Rotation(cos, sin), heads)
        return q.transpose(1, 2).contiguous(), k.transpose(1, 2).contiguous()
    q, k = (_room(inner, inner.shape[1], heads, q_scale) for _ in range(2))
    _kernels(inner.device).forward(
        inner, q_scale, k_scale, cos, sin, q, k, None, heads=heads, first=0, epsilon=EPSILON
    )
    return q, k


@operators.custom_op("polyrank::split_heads_backward", mutates_args=())
def _split_heads_backward(  # noqa: PLR0913 (what one operator takes)
    grad_q: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
    grad_mlp: Tensor,
    inner: Tensor,
    q_scale: Tensor,
    k_scale: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: int,
) -> Tensor:
    """The gradient of inner [B, L, 3 D + M] from those of q, k, v [B, H, L, d] and gelu(mlp) [B, L, M]."""
    grads = (grad_q, grad_k, grad_v)
    return _grad(grads, grad_mlp, inner, (q_scale, k_scale), Rotation(cos, sin), heads=heads, first=0)


@operators.custom_op("polyrank::join_heads", mutates_args=())
def _join_heads(  # noqa: PLR0913 (what one operator takes)
    text: Tensor,
    image: Tensor,
    text_q: Tensor,
    text_k: Tensor,
    image_q: Tensor,
    image_k: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [B, L, H, d]."""
    length = text.shape[1] + image.shape[1]
    streams = ((text, text_q, text_k, 0), (image, image_q, image_k, text.shape[1]))
    if _plain(text):
        parts = [
            _plain_heads(x, q, k, _part((cos, sin), first, x.shape[1]), heads) for x, q, k, first in streams
        ]
        q, k, v = (torch.cat(pair, dim=2).transpose(1, 2).contiguous() for pair in zip(*parts, strict=True))
        return q, k, v
    q, k, v = (_room(text, length, heads, text_q) for _ in range(3))
    for x, q_scale, k_scale, first in streams:
        _kernels(x.device).forward(
            x, q_scale, k_scale, cos, sin, q, k, v, heads=heads, first=first, epsilon=EPSILON
        )
    return q, k, v


@operators.custom_op("polyrank::join_heads_backward", mutates_args=())
def _join_heads_backward(  # noqa: PLR0913 (what one operator takes)
    grad_q: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
    text: Tensor,
    image: Tensor,
    text_q: Tensor,
    text_k: Tensor,
    image_q: Tensor,
    image_k: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: int,
) -> tuple[Tensor, Tensor]:
    """The gradients of text [B, T, 3 D] and image [B, N, 3 D]."""
    grads, rotation = (grad_q, grad_k, grad_v), Rotation(cos, sin)
    return (
        _grad(grads, None, text, (text_q, text_k), rotation, heads=heads, first=0),
        _grad(grads, None, image, (image_q, image_k), rotation, heads=heads, first=text.shape[1]),
    )


def _grad(
    grads: tuple[Tensor, Tensor, Tensor],
    grad_mlp: Tensor | None,
    inner: Tensor,
    scales: tuple[Tensor, Tensor],
    rotation: Rotation,
    *,
    heads: int,
    first: int,
) -> Tensor:
    """The gradient of one stream's rows, which are tokens `first` and on of what attention saw."""
    if not _plain(inner):
        made: Tensor = _kernels(inner.device).backward(
            grads, grad_mlp, inner, *scales, *rotation,
            heads=heads, first=first, epsilon=EPSILON, gelu=(LINEAR, CUBIC),
        )  # fmt: skip
        return made
    return _plain_grad(grads, grad_mlp, inner, scales, rotation, heads=heads, first=first)


def _plain_grad(
    grads: tuple[Tensor, ...],
    grad_mlp: Tensor | None,
    inner: Tensor,
    scales: tuple[Tensor, ...],
    rotation: Rotation,
    *,
    heads: int,
    first: int,
) -> Tensor:
    """The same by the formulas."""
    count, width = inner.shape[1], scales[0].numel()
    turn = _part(rotation, first, count)
    parts = inner[..., : 3 * heads * width].chunk(3, dim=-1)
    found = []
    for part, grad, scale in zip(parts, grads, (*scales, None), strict=True):
        mine = grad[:, :, first : first + count]
        if scale is not None:
            x = part.reshape(*part.shape[:2], heads, width).transpose(1, 2).float()
            mine = _unnormalised(rotate(mine.float(), Rotation(turn.cos, -turn.sin)) * scale.float(), x)
        found.append(mine.transpose(1, 2).flatten(2).to(inner.dtype))
    if grad_mlp is not None:
        found.append((grad_mlp.float() * slope(inner[..., 3 * heads * width :])).to(inner.dtype))
    return torch.cat(found, dim=-1)


def _unnormalised(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient of `x` from that of x / rms(x), both float32."""
    size = torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + EPSILON)
    normal = x * size
    return size * (grad - normal * (grad * normal).mean(dim=-1, keepdim=True))


def _room(like: Tensor, length: int, heads: int, scale: Tensor) -> Tensor:
    return like.new_empty(like.shape[0], length, heads, scale.numel())


@_split_heads.register_fake
def _(
    inner: Tensor, q_scale: Tensor, k_scale: Tensor, cos: Tensor, sin: Tensor, heads: int
) -> tuple[Tensor, Tensor]:
    del k_scale, cos, sin
    q, k = (_room(inner, inner.shape[1], heads, q_scale) for _ in range(2))
    return q, k


@_split_heads_backward.register_fake
def _(*arguments: Any) -> Tensor:
    inner = cast(Tensor, arguments[4])
    return inner.new_empty(inner.shape)


@_join_heads.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    text, image, scale, heads = arguments[0], arguments[1], arguments[2], arguments[-1]
    length = text.shape[1] + image.shape[1]
    q, k, v = (_room(text, length, heads, scale) for _ in range(3))
    return q, k, v


@_join_heads_backward.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    text, image = cast(Tensor, arguments[3]), cast(Tensor, arguments[4])
    return text.new_empty(text.shape), image.new_empty(image.shape)
