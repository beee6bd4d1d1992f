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
from typing import Any

import torch
from torch import Tensor, nn
from torch import library as operators

from library.models import norms_formulas
from library.models.heads import EPSILON, is_plain
from library.models.kernels import trusted


def fits(norms: Sequence[nn.Module]) -> bool:
    """Whether the operators do what these normalisations of streams do: nothing has replaced or extended them."""
    return all(
        type(norm) is nn.LayerNorm and not norm.elementwise_affine and norm.eps == EPSILON and is_plain(norm)
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
        return torch.addcmul(x, gate, branch)  # which a compiler does at the speed of memory

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

        calls: list[tuple[str, tuple[Any, ...]]] = [("leave_backward", (grad_y, gate, branch))]
        residuals: list[tuple[Tensor | None, Tensor | None]] = [(None, None), (gate, branch)]
        for before in residuals:
            entering = (x, *before, shift, scale, EPSILON)
            stream, _, mean, size = norms_formulas.enter(*entering)
            leaving = (grad_stream, grad_y, stream, *before, scale, mean, size, True)
            calls += [("enter", entering), ("enter_backward", leaving)]
        pairs: list[tuple[Tensor, Tensor]] = []
        for name, arguments in calls:
            found, wanted = (getattr(ways, name)(*arguments) for ways in (kernels, norms_formulas))
            pairs += [pair for pair in zip(found, wanted, strict=True) if pair[0] is not None]
        return pairs

    return trusted("library.models.norms_kernel", check)


def _ways(x: Tensor) -> Any:
    """The module whose functions compute: kernels, or the formulas where there are none."""
    return (x.is_cuda and _kernels(x.device)) or norms_formulas


@operators.custom_op("polyrank::enter", mutates_args=())
def _enter(x: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """y [B, L, D], and mean and 1 / deviation [B, L] float32."""
    _, y, mean, size = _ways(x).enter(x, None, None, shift, scale, EPSILON)
    return y, mean, size


@operators.custom_op("polyrank::leave_and_enter", mutates_args=())
def _leave_and_enter(
    x: Tensor, gate: Tensor, branch: Tensor, shift: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The stream, y, and mean and 1 / deviation."""
    stream, y, mean, size = _ways(x).enter(x, gate, branch, shift, scale, EPSILON)
    return stream, y, mean, size


@operators.custom_op("polyrank::enter_backward", mutates_args=())
def _enter_backward(
    grad_stream: Tensor, grad_y: Tensor, x: Tensor, scale: Tensor, mean: Tensor, size: Tensor, with_sums: bool
) -> tuple[Tensor, Tensor]:
    """The gradient of x, and sums over tokens [B, 2, D] float32 for shift and scale, empty unless asked for."""
    grad_x, _, sums = _ways(x).enter_backward(
        grad_stream, grad_y, x, None, None, scale, mean, size, with_sums
    )
    return grad_x, sums


@operators.custom_op("polyrank::leave_and_enter_backward", mutates_args=())
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
    grad_x, grad_branch, sums = _ways(stream).enter_backward(
        grad_stream, grad_y, stream, gate, branch, scale, mean, size, with_sums
    )
    return grad_x, grad_branch, sums


@operators.custom_op("polyrank::leave_backward", mutates_args=())
def _leave_backward(grad: Tensor, gate: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of the branch, and the sum over tokens [B, 1, D] float32 for its gate."""
    grad_branch, sums = _ways(grad).leave_backward(grad, gate, branch)
    return grad_branch, sums


def _like(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    mean, size = (x.new_empty(x.shape[:2], dtype=torch.float32) for _ in range(2))
    return mean, size


def _sums(x: Tensor, count: int, wanted: bool) -> Tensor:
    return x.new_empty((x.shape[0], count, x.shape[2]) if wanted else (0,), dtype=torch.float32)


@_enter.register_fake
def _(x: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    del others
    return _like(x), *_statistics(x)


@_leave_and_enter.register_fake
def _(x: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    del others
    return _like(x), _like(x), *_statistics(x)


@_enter_backward.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    x, with_sums = arguments[2], arguments[-1]
    return _like(x), _sums(x, 2, with_sums)


@_leave_and_enter_backward.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    stream, branch, with_sums = arguments[2], arguments[4], arguments[-1]
    return _like(stream), _like(branch), _sums(stream, 3, with_sums)


@_leave_backward.register_fake
def _(grad: Tensor, gate: Tensor, branch: Tensor) -> tuple[Tensor, ...]:
    del gate
    return _like(branch), _sums(grad, 1, True)
