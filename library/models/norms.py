"""Where a branch of a block enters and leaves the stream, in one pass over memory each way.

A branch sees its stream normalised, scaled and shifted; what it makes of that is added to the stream by its gate:

    enter   y = (x - mean) / sqrt(variance + epsilon) * (1 + scale) + shift        of each token of x
    leave   x + gate * branch

Where one branch follows another both are one pass. Backward the gradient that comes along the stream joins the one that
comes through the branch in the pass that makes the latter, and that pass also sums over tokens what shift, scale and
gate get, where something trained is behind them. A compiler makes several kernels of it, which read again what the last
one wrote. Compiled blocks on an NVIDIA GPU take the kernels of `library.models.norms_kernel`; the same operators are
plain arithmetic elsewhere, which is what tests hold the kernels against. Numbers are float32 within, and rounded once.

Shape letters: B batch, L tokens, D hidden size. Streams and branches are [B, L, D], shift, scale and gate [B, 1, D].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch import library as operators

from library.models.heads import EPSILON
from library.models.kernels import trusted


def fits(norms: Sequence[nn.Module]) -> bool:
    """Whether the operators do what these normalisations of streams do: nothing has replaced or extended them."""
    return all(
        type(norm) is nn.LayerNorm
        and not norm.elementwise_affine
        and norm.eps == EPSILON
        and "forward" not in norm.__dict__
        and not norm._forward_hooks
        and not norm._forward_pre_hooks
        for norm in norms
    )


def enter(x: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The stream, to go on with, and what the branch sees of it."""
    return _pair(_Enter.apply(x, shift, scale))  # type: ignore[no-untyped-call]


def leave_and_enter(
    x: Tensor, gate: Tensor, branch: Tensor, shift: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """The stream after `branch`, and what the next branch sees of it."""
    return _pair(_LeaveAndEnter.apply(x, gate, branch, shift, scale))  # type: ignore[no-untyped-call]


def leave(x: Tensor, gate: Tensor, branch: Tensor) -> Tensor:
    """The stream after `branch`."""
    out: Tensor = _Leave.apply(x, gate, branch)  # type: ignore[no-untyped-call]
    return out


def _pair(made: Any) -> tuple[Tensor, Tensor]:
    stream, seen = made
    return stream, seen


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        y, mean, size = torch.ops.polyrank.enter(x, shift, scale)
        ctx.save_for_backward(x, scale, mean, size)
        return x.view_as(x), y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, mean, size = ctx.saved_tensors
        _, *trained = ctx.needs_input_grad
        grad_x, sums = torch.ops.polyrank.enter_backward(*grads, x, scale, mean, size, any(trained))
        return grad_x, *_shares(sums, trained, scale.dtype)


class _LeaveAndEnter(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gate: Tensor, branch: Tensor, shift: Tensor, scale: Tensor
    ) -> tuple[Tensor, Tensor]:
        stream, y, mean, size = torch.ops.polyrank.leave_and_enter(x, gate, branch, shift, scale)
        ctx.save_for_backward(stream, gate, branch, scale, mean, size)
        return stream, y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        _, gate_trained, _, *trained = ctx.needs_input_grad
        trained = (*trained, gate_trained)
        grad_x, grad_branch, sums = torch.ops.polyrank.leave_and_enter_backward(
            *grads, *ctx.saved_tensors, any(trained)
        )
        shift, scale, gate = _shares(sums, trained, ctx.saved_tensors[1].dtype)
        return grad_x, gate, grad_branch, shift, scale


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, branch: Tensor) -> Tensor:
        ctx.save_for_backward(gate, branch)
        return torch.addcmul(x, gate, branch)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        gate, branch = ctx.saved_tensors
        if not ctx.needs_input_grad[1]:
            return grad, None, gate * grad
        grad_branch, sums = torch.ops.polyrank.leave_backward(grad, gate, branch)
        return grad, sums.to(gate.dtype), grad_branch


def _shares(sums: Tensor, trained: Sequence[bool], dtype: torch.dtype) -> list[Tensor | None]:
    """Each parameter's [B, 1, D] of the sums [B, n, D], where something trained is behind it."""
    return [sums[:, i : i + 1].to(dtype) if wanted else None for i, wanted in enumerate(trained)]


@cache
def _kernels(device: torch.device) -> Any:
    """The kernels, or None where they cannot be trusted."""

    def check(kernels: Any) -> list[tuple[Tensor, Tensor]]:
        shape = (2, 301, 48)
        places = torch.arange(math.prod(shape), device=device).view(shape)
        x, branch, grad_stream, grad_y = (
            (places * step).sin().to(torch.bfloat16) for step in (0.5, 0.7, 1.1, 1.3)
        )
        gate, shift, scale = (x[:, i : i + 1] for i in range(3))
        pairs: list[Any] = []
        residuals: list[tuple[Tensor | None, Tensor | None]] = [(None, None), (gate, branch)]
        for before in residuals:
            made = kernels.enter(x, *before, shift, scale, EPSILON)
            wanted = _plain_enter(x, *before, shift, scale)
            saved = (grad_stream, grad_y, wanted[0], *before, scale, *wanted[2:])
            back, formula = kernels.enter_backward(*saved, with_sums=True), _plain_enter_backward(*saved)
            pairs += [*zip(made, wanted, strict=True), *zip(back, formula, strict=True)]
        left = (grad_y, gate, branch)
        pairs += zip(kernels.leave_backward(*left), _plain_leave_backward(*left), strict=True)
        return [pair for pair in pairs if pair[0] is not None]

    return trusted("library.models.norms_kernel", check)


def _plain(x: Tensor) -> bool:
    return not x.is_cuda or _kernels(x.device) is None


def _plain_enter(
    x: Tensor, gate: Tensor | None, branch: Tensor | None, shift: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The stream (without a branch x itself), y, and the stream's mean and 1 / deviation [B, L], by the formulas."""
    stream = x
    if gate is not None and branch is not None:
        stream = torch.addcmul(x.float(), gate.float(), branch.float()).to(x.dtype)
    normal, mean, size = torch.native_layer_norm(stream.float(), x.shape[-1:], None, None, EPSILON)
    y = torch.addcmul(shift.float(), 1 + scale.float(), normal).to(x.dtype)
    return stream, y, mean.squeeze(-1), size.squeeze(-1)


def _plain_enter_backward(  # noqa: PLR0913 (what one operator takes)
    grad_stream: Tensor,
    grad_y: Tensor,
    stream: Tensor,
    gate: Tensor | None,
    branch: Tensor | None,
    scale: Tensor,
    mean: Tensor,
    size: Tensor,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Gradients of x and the branch, and of shift, scale and gate [B, 2 or 3, D] float32, by the formulas."""
    mean, size = mean[..., None], size[..., None]
    normal, wide = (stream.float() - mean) * size, grad_y.float()
    back = wide * (1 + scale.float())
    along = (back * normal).mean(dim=-1, keepdim=True)
    total = grad_stream.float() + size * (back - back.mean(dim=-1, keepdim=True) - normal * along)
    sums = [wide.sum(dim=1), (wide * normal).sum(dim=1)]
    grad_branch = None
    if gate is not None and branch is not None:
        sums.append((total * branch.float()).sum(dim=1))
        grad_branch = (total * gate.float()).to(branch.dtype)
    return total.to(stream.dtype), grad_branch, torch.stack(sums, dim=1)


def _plain_leave_backward(grad: Tensor, gate: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
    wide = grad.float()
    sums = (wide * branch.float()).sum(dim=1, keepdim=True)
    return (wide * gate.float()).to(branch.dtype), sums


def _enter(x: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """y [B, L, D], and mean and 1 / deviation [B, L] float32."""
    if _plain(x):
        return _plain_enter(x, None, None, shift, scale)[1:]
    made: tuple[Tensor, Tensor, Tensor] = _kernels(x.device).enter(x, None, None, shift, scale, EPSILON)[1:]
    return made


def _leave_and_enter(
    x: Tensor, gate: Tensor, branch: Tensor, shift: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The stream, y, and mean and 1 / deviation."""
    if _plain(x):
        return _plain_enter(x, gate, branch, shift, scale)
    made: tuple[Tensor, Tensor, Tensor, Tensor] = _kernels(x.device).enter(
        x, gate, branch, shift, scale, EPSILON
    )
    return made


def _enter_backward(
    grad_stream: Tensor, grad_y: Tensor, x: Tensor, scale: Tensor, mean: Tensor, size: Tensor, with_sums: bool
) -> tuple[Tensor, Tensor]:
    """The gradient of x, and sums over tokens [B, 2, D] float32 for shift and scale, empty unless asked for."""
    grad_x, _, sums = _backward((grad_stream, grad_y, x, None, None, scale, mean, size), with_sums)
    return grad_x, sums


def _leave_and_enter_backward(  # noqa: PLR0913 (what one operator takes)
    grad_stream: Tensor,
    grad_y: Tensor,
    stream: Tensor,
    gate: Tensor,
    branch: Tensor,
    scale: Tensor,
    mean: Tensor,
    size: Tensor,
    with_sums: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x and the branch, and sums [B, 3, D] for shift, scale and gate, empty unless asked for."""
    grad_x, grad_branch, sums = _backward(
        (grad_stream, grad_y, stream, gate, branch, scale, mean, size), with_sums
    )
    return grad_x, cast(Tensor, grad_branch), sums


def _backward(saved: tuple[Any, ...], with_sums: bool) -> tuple[Tensor, Tensor | None, Tensor]:
    stream = saved[2]
    if _plain(stream):
        grad_x, grad_branch, sums = _plain_enter_backward(*saved)
        return grad_x, grad_branch, sums if with_sums else _no_sums(stream)
    grad_x, grad_branch, sums = _kernels(stream.device).enter_backward(*saved, with_sums=with_sums)
    return grad_x, grad_branch, sums if with_sums else _no_sums(stream)


def _leave_backward(grad: Tensor, gate: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of the branch, and the sum over tokens [B, 1, D] float32 for its gate."""
    if _plain(grad):
        return _plain_leave_backward(grad, gate, branch)
    made: tuple[Tensor, Tensor] = _kernels(grad.device).leave_backward(grad, gate, branch)
    return made


def _no_sums(like: Tensor) -> Tensor:
    return like.new_empty(0, dtype=torch.float32)


def _sums(like: Tensor, count: int, wanted: bool) -> Tensor:
    return (
        like.new_empty(like.shape[0], count, like.shape[2], dtype=torch.float32) if wanted else _no_sums(like)
    )


_SEEN = "Tensor shift, Tensor scale"
_GRADS = "Tensor grad_stream, Tensor grad_y"
_STATISTICS = "Tensor mean, Tensor size, bool with_sums"

_enter_operator = operators.custom_op(
    "polyrank::enter", _enter, mutates_args=(), schema=f"(Tensor x, {_SEEN}) -> (Tensor, Tensor, Tensor)"
)
_leave_and_enter_operator = operators.custom_op(
    "polyrank::leave_and_enter", _leave_and_enter, mutates_args=(),
    schema=f"(Tensor x, Tensor gate, Tensor branch, {_SEEN}) -> (Tensor, Tensor, Tensor, Tensor)",
)  # fmt: skip
_enter_backward_operator = operators.custom_op(
    "polyrank::enter_backward", _enter_backward, mutates_args=(),
    schema=f"({_GRADS}, Tensor x, Tensor scale, {_STATISTICS}) -> (Tensor, Tensor)",
)  # fmt: skip
_leave_and_enter_backward_operator = operators.custom_op(
    "polyrank::leave_and_enter_backward", _leave_and_enter_backward, mutates_args=(),
    schema=f"({_GRADS}, Tensor stream, Tensor gate, Tensor branch, Tensor scale, {_STATISTICS}) "
    "-> (Tensor, Tensor, Tensor)",
)  # fmt: skip
_leave_backward_operator = operators.custom_op(
    "polyrank::leave_backward", _leave_backward, mutates_args=(),
    schema="(Tensor grad, Tensor gate, Tensor branch) -> (Tensor, Tensor)",
)  # fmt: skip


def _room(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    mean, size = (x.new_empty(x.shape[:2], dtype=torch.float32) for _ in range(2))
    return x.new_empty(x.shape), mean, size


@_enter_operator.register_fake
def _(x: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    del shift, scale
    return _room(x)


@_leave_and_enter_operator.register_fake
def _(x: Tensor, *others: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    del others
    return x.new_empty(x.shape), *_room(x)


@_enter_backward_operator.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    x, with_sums = cast(Tensor, arguments[2]), arguments[-1]
    return x.new_empty(x.shape), _sums(x, 2, with_sums)


@_leave_and_enter_backward_operator.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    stream, branch, with_sums = arguments[2], arguments[4], arguments[-1]
    return stream.new_empty(stream.shape), branch.new_empty(branch.shape), _sums(stream, 3, with_sums)


@_leave_backward_operator.register_fake
def _(grad: Tensor, gate: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
    del gate
    return branch.new_empty(branch.shape), _sums(grad, 1, True)
