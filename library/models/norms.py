"""Where a branch of a block enters and leaves the stream, in one pass over memory each way.

A branch sees its stream normalised, scaled and shifted; what it makes of that is added to the stream by its gate:

    enter   y = (x - mean) / sqrt(variance + epsilon) * (1 + scale) + shift        of each token of x
    leave   x + gate * branch

Where one branch follows another both are one pass. Backward the gradient that comes along the stream joins the one that
comes through the branch in the pass that makes the latter, and that pass also sums over tokens what shift, scale and
gate get, where something trained is behind them. A compiler makes several kernels of it, which read again what the last
one wrote. Compiled blocks on an NVIDIA GPU take the kernels of `library.models.norms_kernel`; the same operators are
plain arithmetic elsewhere, which is what tests hold the kernels against. Numbers are float32 within, and rounded once.

Operators can also round what a Linear layer will see to 8 bits, as `library.models.rounding` would, while they have it
at hand: `rounded` asks for it, and the last two results, empty else, are rows [B L, D] and their scales [B L, 1]. Only
`library.models.rounding_pass` asks.

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

from library.models import norms_formulas
from library.models.heads import EPSILON
from library.models.kernels import trusted
from library.models.rounding import FP8, SMALLEST_SCALE, round_rows

_FIRST_WITH_FP8 = (8, 9)


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
        y, mean, size, _, _ = torch.ops.polyrank.enter(x, shift, scale, False)
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
        stream, y, mean, size, _, _ = torch.ops.polyrank.leave_and_enter(x, gate, branch, shift, scale, False)
        ctx.save_for_backward(stream, gate, branch, scale, mean, size)
        return stream, y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        _, gate_trained, _, *trained = ctx.needs_input_grad
        trained = (*trained, gate_trained)
        grad_x, grad_branch, sums, _, _ = torch.ops.polyrank.leave_and_enter_backward(
            *grads, *ctx.saved_tensors, any(trained), False, None
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
        grad_branch, sums, _, _ = torch.ops.polyrank.leave_backward(grad, gate, branch, False, None)
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
            wanted = norms_formulas.enter(x, *before, shift, scale, EPSILON)
            saved = (grad_stream, grad_y, wanted[0], *before, scale, *wanted[2:])
            back, formula = (
                kernels.enter_backward(*saved, with_sums=True),
                norms_formulas.enter_backward(*saved),
            )
            pairs += [*zip(made, wanted, strict=True), *zip(back, formula, strict=True)]
        left = (grad_y, gate, branch)
        pairs += zip(kernels.leave_backward(*left), norms_formulas.leave_backward(*left), strict=True)
        if torch.cuda.get_device_capability(device) >= _FIRST_WITH_FP8:
            pairs += _rounded_pairs(kernels, x, gate, branch, scale)
        return [pair for pair in pairs if pair[0] is not None]

    return trusted("library.models.norms_kernel", check)


def _rounded_pairs(
    kernels: Any, x: Tensor, gate: Tensor, branch: Tensor, scale: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """What the kernels round, against what was to be rounded; 8 bits count a quarter, as they are off by up to 4 %."""
    by_column = torch.linspace(0.5, 2, x.shape[-1], device=x.device)[None]
    *_, mean, size = norms_formulas.enter(x, None, None, gate, scale, EPSILON)
    back = (x, branch, x, gate, branch, scale, mean, size)
    options = {"by_column": by_column, "smallest": SMALLEST_SCALE}
    pairs = []
    for made, place, column in (
        (kernels.enter(x, None, None, gate, scale, EPSILON, SMALLEST_SCALE), 1, None),
        (kernels.enter_backward(*back, with_sums=True, **options), 1, by_column),
        (kernels.leave_backward(x, gate, branch, **options), 0, by_column),
    ):
        *_, rounded, scales = made
        wanted = made[place].flatten(0, 1).float()
        wanted = wanted if column is None else wanted * column
        pairs.append(((rounded.float() * scales + 3 * wanted) / 4, wanted))
    return pairs


def _plain(x: Tensor) -> bool:
    return not x.is_cuda or _kernels(x.device) is None


def _enter(x: Tensor, shift: Tensor, scale: Tensor, rounded: bool) -> tuple[Tensor, ...]:
    """y [B, L, D], mean and 1 / deviation [B, L] float32; y rounded."""
    return _entered(x, None, None, shift, scale, rounded)[1:]


def _leave_and_enter(
    x: Tensor, gate: Tensor, branch: Tensor, shift: Tensor, scale: Tensor, rounded: bool
) -> tuple[Tensor, ...]:
    """The stream, y, mean and 1 / deviation; y rounded."""
    return _entered(x, gate, branch, shift, scale, rounded)


def _entered(
    x: Tensor, gate: Tensor | None, branch: Tensor | None, shift: Tensor, scale: Tensor, rounded: bool
) -> tuple[Tensor, ...]:
    if not _plain(x):
        made = _kernels(x.device).enter(
            x, gate, branch, shift, scale, EPSILON, SMALLEST_SCALE if rounded else None
        )
        return made if rounded else (*made, *_not_rounded(x))
    made = norms_formulas.enter(x, gate, branch, shift, scale, EPSILON)
    return *made, *(_round(made[1], None) if rounded else _not_rounded(x))


def _enter_backward(
    grad_stream: Tensor, grad_y: Tensor, x: Tensor, scale: Tensor, mean: Tensor, size: Tensor, with_sums: bool
) -> tuple[Tensor, Tensor]:
    """The gradient of x, and sums over tokens [B, 2, D] float32 for shift and scale, empty unless asked for."""
    saved = (grad_stream, grad_y, x, None, None, scale, mean, size)
    if _plain(x):
        grad_x, _, sums = norms_formulas.enter_backward(*saved)
    else:
        grad_x, _, sums = _kernels(x.device).enter_backward(*saved, with_sums=with_sums)
    return grad_x, sums if with_sums else _no_sums(x)


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
    rounded: bool,
    by_column: Tensor | None,
) -> tuple[Tensor, ...]:
    """Gradients of x and the branch, and sums [B, 3, D] for shift, scale and gate; the branch's rounded."""
    saved = (grad_stream, grad_y, stream, gate, branch, scale, mean, size)
    if _plain(stream):
        grad_x, grad_branch, sums = norms_formulas.enter_backward(*saved)
        low = _round(cast(Tensor, grad_branch), by_column) if rounded else ()
    else:
        grad_x, grad_branch, sums, *low = _kernels(stream.device).enter_backward(
            *saved, with_sums=with_sums, by_column=by_column, smallest=SMALLEST_SCALE if rounded else None
        )
    return (
        grad_x,
        cast(Tensor, grad_branch),
        sums if with_sums else _no_sums(stream),
        *(low or _not_rounded(stream)),
    )


def _leave_backward(
    grad: Tensor, gate: Tensor, branch: Tensor, rounded: bool, by_column: Tensor | None
) -> tuple[Tensor, ...]:
    """The gradient of the branch, and the sum over tokens [B, 1, D] float32 for its gate; the former rounded."""
    if not _plain(grad):
        made = _kernels(grad.device).leave_backward(
            grad, gate, branch, by_column, SMALLEST_SCALE if rounded else None
        )
        return made if rounded else (*made, *_not_rounded(grad))
    made = norms_formulas.leave_backward(grad, gate, branch)
    return *made, *(_round(made[0], by_column) if rounded else _not_rounded(grad))


def _round(x: Tensor, by_column: Tensor | None) -> tuple[Tensor, Tensor]:
    return round_rows(x.flatten(0, 1), FP8, by_column)


def _room_rounded(x: Tensor, rounded: bool) -> tuple[Tensor, Tensor]:
    rows = x.shape[0] * x.shape[1]
    if not rounded:
        return _not_rounded(x)
    return x.new_empty(rows, x.shape[2], dtype=FP8), x.new_empty(rows, 1, dtype=torch.float32)


def _not_rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(0, dtype=FP8), x.new_empty(0, dtype=torch.float32)


def _no_sums(like: Tensor) -> Tensor:
    return like.new_empty(0, dtype=torch.float32)


def _sums(like: Tensor, count: int, wanted: bool) -> Tensor:
    return (
        like.new_empty(like.shape[0], count, like.shape[2], dtype=torch.float32) if wanted else _no_sums(like)
    )


_RESIDUAL = "Tensor gate, Tensor branch"
_ENTERED = "Tensor shift, Tensor scale, bool rounded"
_GRADS = "Tensor grad_stream, Tensor grad_y"
_STATISTICS = "Tensor mean, Tensor size, bool with_sums"
_ROUNDED = "bool rounded, Tensor? by_column"


def _schema(arguments: str, results: int) -> str:
    return f"({arguments}) -> ({', '.join(['Tensor'] * results)})"


_enter_operator = operators.custom_op(
    "polyrank::enter", _enter, mutates_args=(), schema=_schema(f"Tensor x, {_ENTERED}", 5)
)
_leave_and_enter_operator = operators.custom_op(
    "polyrank::leave_and_enter",
    _leave_and_enter,
    mutates_args=(),
    schema=_schema(f"Tensor x, {_RESIDUAL}, {_ENTERED}", 6),
)
_enter_backward_operator = operators.custom_op(
    "polyrank::enter_backward", _enter_backward, mutates_args=(),
    schema=_schema(f"{_GRADS}, Tensor x, Tensor scale, {_STATISTICS}", 2),
)  # fmt: skip
_leave_and_enter_backward_operator = operators.custom_op(
    "polyrank::leave_and_enter_backward", _leave_and_enter_backward, mutates_args=(),
    schema=_schema(f"{_GRADS}, Tensor stream, {_RESIDUAL}, Tensor scale, {_STATISTICS}, {_ROUNDED}", 5),
)  # fmt: skip
_leave_backward_operator = operators.custom_op(
    "polyrank::leave_backward", _leave_backward, mutates_args=(),
    schema=_schema(f"Tensor grad, {_RESIDUAL}, {_ROUNDED}", 4),
)  # fmt: skip


def _room(x: Tensor, rounded: bool) -> tuple[Tensor, ...]:
    mean, size = (x.new_empty(x.shape[:2], dtype=torch.float32) for _ in range(2))
    return x.new_empty(x.shape), mean, size, *_room_rounded(x, rounded)


@_enter_operator.register_fake
def _(x: Tensor, shift: Tensor, scale: Tensor, rounded: bool) -> tuple[Tensor, ...]:
    del shift, scale
    return _room(x, rounded)


@_leave_and_enter_operator.register_fake
def _(
    x: Tensor, gate: Tensor, branch: Tensor, shift: Tensor, scale: Tensor, rounded: bool
) -> tuple[Tensor, ...]:
    del gate, branch, shift, scale
    return x.new_empty(x.shape), *_room(x, rounded)


@_enter_backward_operator.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    x, with_sums = cast(Tensor, arguments[2]), arguments[-1]
    return x.new_empty(x.shape), _sums(x, 2, with_sums)


@_leave_and_enter_backward_operator.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    stream, branch, with_sums, rounded = (arguments[i] for i in (2, 4, 8, 9))
    return (
        stream.new_empty(stream.shape),
        branch.new_empty(branch.shape),
        _sums(stream, 3, with_sums),
        *_room_rounded(branch, rounded),
    )


@_leave_backward_operator.register_fake
def _(
    grad: Tensor, gate: Tensor, branch: Tensor, rounded: bool, by_column: Tensor | None
) -> tuple[Tensor, ...]:
    del gate, by_column
    return branch.new_empty(branch.shape), _sums(grad, 1, True), *_room_rounded(branch, rounded)
