"""Products with frozen weights, alone and with an adapter's low-rank product added in place.

For a weight W [out, in], a bias b and factors down [r, in] and up [out, r]:

    forward     y = x W^T + b + (x down^T) up^T
    backward    dx = dy W + (dy up) down,   d down = (dy up)^T x,   d up = dy^T (x down^T)

The low-rank part is added by a GEMM into the base product's own memory: no further pass over activations. Under
torch.compile all of it is one operator each way, which inductor does not take apart, and whose small products run
beside the large one.

Shape letters: T tokens, r rank.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch import library as operators
from torch.nn import functional as F

from library.models import carried, few_rows
from library.models.aside import Aside
from library.models.rounding import FP8, round_rows
from library.models.scaled_mm import multiply


class NarrowProduct(torch.autograd.Function):
    """x W^T + b with a narrow weight; for the backward pass it keeps that, not a wider copy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return F.linear(x, weight.to(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        (grad,) = grads
        (weight,) = ctx.saved_tensors
        needs_input, _, needs_bias = ctx.needs_input_grad
        return (
            grad @ weight.to(grad.dtype) if needs_input else None,
            None,
            grad.flatten(0, -2).sum(0) if needs_bias else None,
        )


class JoinedProduct(torch.autograd.Function):
    """The sum of both for x [T, in] and a wide or narrow W; keeps x and x down^T [T, r] and nothing of [T, out]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor) -> Tensor:
        out, hidden = _operator("joined")(x, None, None, weight, None, bias, down, up)
        ctx.save_for_backward(x, weight, hidden, down, up)
        return cast(Tensor, out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, weight, hidden, down, up = ctx.saved_tensors
        needs_input, _, needs_bias, _, _ = ctx.needs_input_grad
        grad_x, grad_down, grad_up = _operator("joined_backward")(
            grad, None, None, weight, x, hidden, down, up, needs_input
        )
        grad_bias = grad.sum(0) if needs_bias else None
        return grad_x if needs_input else None, None, grad_bias, grad_down, grad_up


class ScaledProduct(torch.autograd.Function):
    """The product of x [T, in] with a scaled W, which is multiplied in 8 bits both ways, and the sum with factors.

    Without factors it keeps nothing of x, with them x and x down^T [T, r]. `scale` is [1, out], and so is `columns`,
    the same for a gradient's columns; `transposed` [in, out] is the weight's second copy, or None.
    """

    @staticmethod
    def forward(  # noqa: PLR0913 (what one operator takes)
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        scale: Tensor,
        columns: Tensor,
        transposed: Tensor | None,
        bias: Tensor | None,
        down: Tensor | None,
        up: Tensor | None,
    ) -> Tensor:
        rounded, by_token = round_rows(x, weight.dtype)
        if down is None or up is None:
            ctx.save_for_backward(weight, columns, transposed, None, None, None, None)
            return multiply(rounded, by_token, weight.t(), scale, bias).to(x.dtype)
        out, hidden = _operator("joined")(x, rounded, by_token, weight, scale, bias, down, up)
        ctx.save_for_backward(weight, columns, transposed, x, hidden, down, up)
        return cast(Tensor, out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        weight, columns, transposed, x, hidden, down, up = ctx.saved_tensors
        needs_input = ctx.needs_input_grad[0]
        grad_bias = grad.sum(0) if ctx.needs_input_grad[5] else None
        rounded = by_token = grad_x = grad_down = grad_up = None
        if needs_input:
            if weight.dtype == FP8:  # cuBLAS multiplies fp8 with a second factor that lies column by column
                weight = (transposed_copy(weight) if transposed is None else transposed).t()
            # The rows' scales belong to the inner dimension here, so they join the gradient before it is rounded.
            rounded, by_token = round_rows(grad, weight.dtype, columns)
        if up is not None:
            grad_x, grad_down, grad_up = _operator("joined_backward")(
                grad, rounded, by_token, weight, x, hidden, down, up, needs_input
            )
        elif rounded is not None and by_token is not None:
            grad_x = multiply(rounded, by_token, weight, None, None).to(grad.dtype)
        return grad_x if needs_input else None, None, None, None, None, grad_bias, grad_down, grad_up


class CarriedProduct(torch.autograd.Function):
    """The sum of both for a wide or an fp8 W with room for the factors, as in `library.models.carried`.

    `low_down` and `low_up` are the factors as they are multiplied, which are in the room as well; of `down` and `up`
    themselves only the gradients are made. `room` is W's storage. An fp8 W has `scale` [1, out], the same as `columns`
    of a gradient, `balance`, maybe its second copy `transposed` with room of its own, and `behind` [in, P], what is or
    is to be in that room. Where a side is too long there is none for that direction, and the product is joined.
    """

    @staticmethod
    def forward(  # noqa: PLR0913 (what one operator takes)
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        down: Tensor,
        up: Tensor,
        low_down: Tensor,
        low_up: Tensor,
        room: Tensor,
        scale: Tensor | None,
        columns: Tensor | None,
        balance: Tensor | None,
        transposed: Tensor | None,
        behind: Tensor | None,
    ) -> Tensor:
        if room.shape[1] > x.shape[1]:
            out, hidden = _operator("carried")(x, room, scale, bias, low_down, low_up, balance)
        else:
            rounded, by_token = (None, None) if scale is None else round_rows(x, weight.dtype)
            out, hidden = _operator("joined")(x, rounded, by_token, weight, scale, bias, low_down, low_up)
        ctx.save_for_backward(x, weight, hidden, low_down, low_up, room, columns, balance, transposed, behind)
        ctx.dtypes = down.dtype, up.dtype
        return cast(Tensor, out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, weight, hidden, down, up, room, columns, balance, transposed, behind = ctx.saved_tensors
        needs_input = ctx.needs_input_grad[0]
        rounded = by_token = None
        if columns is not None:
            if needs_input and transposed is None:
                transposed = transposed_copy(weight, behind)
            room = None if behind is None else transposed
        elif room.shape[0] == grad.shape[1]:
            room = None
        if room is not None and needs_input:
            grad_x, grad_down, grad_up = _operator("carried_backward")(
                grad, room, columns, x, hidden, up, balance
            )
        else:
            if columns is not None and needs_input:
                weight = transposed.t()
                rounded, by_token = round_rows(grad, weight.dtype, columns)
            grad_x, grad_down, grad_up = _operator("joined_backward")(
                grad, rounded, by_token, weight, x, hidden, down, up, needs_input
            )
        return (
            grad_x if needs_input else None,
            None,
            grad.sum(0) if ctx.needs_input_grad[2] else None,
            grad_down.to(ctx.dtypes[0]),
            grad_up.to(ctx.dtypes[1]),
            *[None] * 8,
        )


class GroupedProduct(torch.autograd.Function):
    """The product of few rows x [B, in] with a grouped W, and the sum with factors; `scale` is [groups, out].

    Without factors it keeps nothing of x, with them x and x down^T [B, r].
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        down: Tensor | None,
        up: Tensor | None,
    ) -> Tensor:
        if down is None or up is None:
            ctx.save_for_backward(weight, scale, None, None, None, None)
            return cast(Tensor, _operator("few_rows")(x, weight, scale, bias))
        out, hidden = _operator("joined")(x, None, None, weight, scale, bias, down, up)
        ctx.save_for_backward(weight, scale, x, hidden, down, up)
        return cast(Tensor, out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        weight, scale, x, hidden, down, up = ctx.saved_tensors
        needs_input = ctx.needs_input_grad[0]
        grad_bias = grad.sum(0) if ctx.needs_input_grad[3] else None
        grad_x = grad_down = grad_up = None
        if needs_input:  # only where something before the blocks is trained
            weight = few_rows.widened(weight, scale, grad.dtype)
        if up is not None:
            grad_x, grad_down, grad_up = _operator("joined_backward")(
                grad, None, None, weight, x, hidden, down, up, needs_input
            )
        elif needs_input:
            grad_x = grad @ weight
        return grad_x if needs_input else None, None, None, grad_bias, grad_down, grad_up


def transposed_copy(weight: Tensor, behind: Tensor | None = None) -> Tensor:
    """An fp8 weight [out, in] as [in, out], with `behind` [in, P] in columns behind."""
    if behind is None:
        return weight.t().contiguous()
    # As integers, which every device can join.
    integers = (weight.view(torch.uint8).t(), behind.view(torch.uint8))
    return torch.cat(integers, dim=1).view(weight.dtype)


def _joined(  # noqa: PLR0913 (what one operator takes)
    x: Tensor,
    rounded: Tensor | None,
    by_row: Tensor | None,
    weight: Tensor,
    by_column: Tensor | None,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
) -> tuple[Tensor, Tensor]:
    """The sum [T, out], and x down^T [T, r]. `rounded` is x in 8 bits for a scaled weight, else None.

    `by_column` are the scales of a scaled weight, [1, out], or of a grouped one, [groups, out].
    """
    hidden = x.new_empty(x.shape[0], down.shape[0])
    aside = Aside(x.device, rows=x.shape[0])
    with aside:
        torch.mm(x, down.t(), out=hidden)
    if rounded is not None and by_row is not None:
        out = multiply(rounded, by_row, weight.t(), by_column, bias).to(x.dtype)
    elif by_column is not None:
        out = few_rows.multiply(x, weight, by_column, bias)
    else:
        out = F.linear(x, weight.to(x.dtype), bias)
    aside.join()
    return out.addmm_(hidden, up.t()), hidden


def _joined_backward(  # noqa: PLR0913 (what one operator takes)
    grad: Tensor,
    rounded: Tensor | None,
    by_row: Tensor | None,
    weight: Tensor,
    x: Tensor,
    hidden: Tensor,
    down: Tensor,
    up: Tensor,
    needs_input: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x (empty unless asked for), down and up.

    `rounded` is the gradient [T, out] in 8 bits; then `weight` [out, in] lies as `multiply` wants it.
    """
    grad_hidden = grad.new_empty(grad.shape[0], up.shape[1])
    grad_down, grad_up = torch.empty_like(down), torch.empty_like(up)
    aside = Aside(x.device, rows=x.shape[0])
    with aside:
        torch.mm(grad, up, out=grad_hidden)
        torch.mm(grad_hidden.t(), x, out=grad_down)
        torch.mm(grad.t(), hidden, out=grad_up)
    if not needs_input:
        aside.join()
        return x.new_empty(0), grad_down, grad_up
    if rounded is None or by_row is None:
        grad_x = grad @ weight.to(grad.dtype)
    else:
        grad_x = multiply(rounded, by_row, weight, None, None).to(grad.dtype)
    aside.join()
    return grad_x.addmm_(grad_hidden, down), grad_down, grad_up


def _operator(name: str) -> Any:
    """The operator for a compiler, which costs a trip through the dispatcher that only it wants; else the function."""
    if torch.compiler.is_compiling():
        return getattr(torch.ops.polyrank, name)
    return _PLAIN[name]


_PLAIN = {
    "joined": _joined,
    "joined_backward": _joined_backward,
    "few_rows": few_rows.multiply,
    **carried.PLAIN,
}


_joined_operator = operators.custom_op(
    "polyrank::joined", _joined, mutates_args=(),
    schema="(Tensor x, Tensor? rounded, Tensor? by_row, Tensor weight, Tensor? by_column, Tensor? bias, Tensor down, "
    "Tensor up) -> (Tensor, Tensor)",
)  # fmt: skip
_joined_backward_operator = operators.custom_op(
    "polyrank::joined_backward", _joined_backward, mutates_args=(),
    schema="(Tensor grad, Tensor? rounded, Tensor? by_row, Tensor weight, Tensor x, Tensor hidden, Tensor down, "
    "Tensor up, bool needs_input) -> (Tensor, Tensor, Tensor)",
)  # fmt: skip


@_joined_operator.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    x, weight, down = arguments[0], arguments[3], arguments[6]
    return x.new_empty(x.shape[0], weight.shape[0]), x.new_empty(x.shape[0], down.shape[0])


@_joined_backward_operator.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    grad, x, down, up, needs_input = arguments[0], arguments[4], arguments[6], arguments[7], arguments[8]
    return grad.new_empty(x.shape if needs_input else (0,)), torch.empty_like(down), torch.empty_like(up)
