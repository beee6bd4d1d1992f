"""Products with frozen weights: how a weight is stored, how it is multiplied, what may ride along.

A Linear layer of a block that is prepared here stays an `nn.Linear`, which plug-ins find and wrap, and gets
another `forward` on the instance. After `install_joining` that takes an adapter's product along,

    linear.forward(x, low_rank=(down, up))    x W^T + b + (x down^T) up^T

so that an adapter need not know how the weight is stored. `weight` is one of

- wide: a float dtype that is multiplied as it is;
- narrow: float8_e4m3fn without a scale, as in Kohya's fp8 files, cast up for each product (`fp8_base`);
- scaled: float8_e4m3fn or int8 with one scale for each output row in `weight_scale`; activations, and in the
  backward pass their gradients, get one scale for each token, and the GPU multiplies 8 bits (`base_compute`).

The low-rank product is added by a GEMM into the base product's own memory: no further pass over activations.
Under torch.compile both are one operator, which inductor does not take apart.

Shape letters: T tokens (all leading dimensions of x), r rank.
"""

from __future__ import annotations

from types import MethodType
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch import library as operators
from torch.nn import functional as F

from library.models.rounding import FP8, LARGEST, SMALLEST_SCALE, round_rows, to_8_bits

LowRank = tuple[Tensor, Tensor]  # down [r, in] and up [out, r], strength included
Scaled = Literal["fp8", "int8"]

NARROW = FP8
SCALED_DTYPES: dict[Scaled, torch.dtype] = {"fp8": FP8, "int8": torch.int8}
_INT_MM_ROWS = 32  # cuBLAS multiplies int8 from 17 rows on


def install(linear: nn.Linear) -> None:
    """Give one layer a forward that multiplies its weight as it is stored; its class stays."""
    linear.__dict__["forward"] = MethodType(_forward, linear)


def install_joining(linear: nn.Linear) -> None:
    """`install` with the forward that takes a low-rank product along; before an adapter is applied."""
    linear.__dict__["forward"] = MethodType(_joining_forward, linear)


@torch.no_grad()
def store_scaled(
    linear: nn.Linear, kind: Scaled, *, keep_transposed: bool, device: torch.device | None = None
) -> None:
    """Turn the layer's weight into 8 bits with a scale a row, in place, and `install` it.

    fp8 scales are powers of two, so that a weight that was in fp8 already is not rounded again.
    `keep_transposed` holds a second copy of the bytes for the backward pass, which fp8 products want
    transposed; without it they are transposed each time. `device` is where the layer computes, if its weight
    waits elsewhere.
    """
    dtype, wide = SCALED_DTYPES[kind], linear.weight.detach().float()
    largest = wide.abs().amax(dim=1, keepdim=True)
    scale = (largest / LARGEST[dtype]).clamp(min=SMALLEST_SCALE)
    if kind == "fp8":
        scale = scale.log2().ceil().exp2()
    weight = to_8_bits(wide / scale, dtype)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    scale = scale.T.contiguous().to(device or scale.device)  # [1, out] float32
    linear.register_buffer("weight_scale", scale, persistent=False)
    if keep_transposed and kind == "fp8":
        linear.register_buffer("weight_transposed", weight.t().contiguous(), persistent=False)
    install(linear)


def is_scaled(linear: nn.Linear) -> bool:
    """Whether the weight has scales."""
    return isinstance(getattr(linear, "weight_scale", None), Tensor)


def wide_weight(linear: nn.Linear) -> Tensor:
    """The weight [out, in] that the layer multiplies with, in float32."""
    wide = linear.weight.detach().float()
    return wide * cast(Tensor, linear.weight_scale).T if is_scaled(linear) else wide


def _forward(self: nn.Linear, x: Tensor) -> Tensor:
    """`nn.Linear.forward`, in autocast's dtype if on, else in that of `x`."""
    return _joining_forward(self, x)


def _joining_forward(self: nn.Linear, x: Tensor, low_rank: LowRank | None = None) -> Tensor:
    """`nn.Linear.forward` and the low-rank product, in autocast's dtype if on, else in that of `x`."""
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    x = x.to(dtype)
    bias = None if self.bias is None else self.bias.to(dtype)
    if is_scaled(self):
        return _scaled_linear(self, x, bias, low_rank)
    if low_rank is not None:
        down, up = (factor.to(dtype) for factor in low_rank)
        out = _JoinedProduct.apply(  # type: ignore[no-untyped-call]
            x.reshape(-1, x.shape[-1]), self.weight, bias, down, up
        )
        return cast(Tensor, out.view(*x.shape[:-1], -1))
    if self.weight.dtype == NARROW:
        return cast(Tensor, _NarrowProduct.apply(x, self.weight, bias))  # type: ignore[no-untyped-call]
    return F.linear(x, self.weight, bias)


def _scaled_linear(linear: nn.Linear, x: Tensor, bias: Tensor | None, low_rank: LowRank | None) -> Tensor:
    flat = x.reshape(-1, x.shape[-1])
    down, up = (None, None) if low_rank is None else (factor.to(x.dtype) for factor in low_rank)
    transposed = getattr(linear, "weight_transposed", None)
    out: Tensor = _ScaledProduct.apply(  # type: ignore[no-untyped-call]
        flat, linear.weight, linear.weight_scale.float(), transposed, bias, down, up
    )
    return out.view(*x.shape[:-1], -1)


class _NarrowProduct(torch.autograd.Function):
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


class _JoinedProduct(torch.autograd.Function):
    """x W^T + b + (x down^T) up^T of x [T, in], which keeps x and x down^T [T, r] and nothing of [T, out]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor) -> Tensor:
        # The operator costs a trip through the dispatcher that only a compiler wants.
        product = torch.ops.polyrank.joined if torch.compiler.is_compiling() else _joined
        out, hidden = product(x, weight, bias, down, up)
        ctx.save_for_backward(x, weight, hidden, down, up)
        return cast(Tensor, out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        needs_input, _, needs_bias, _, _ = ctx.needs_input_grad
        product: Any = (
            torch.ops.polyrank.joined_backward if torch.compiler.is_compiling() else _joined_backward
        )
        grad_x, grad_down, grad_up = product(grad, *ctx.saved_tensors, needs_input)
        grad_bias = grad.sum(0) if needs_bias else None
        return grad_x if needs_input else None, None, grad_bias, grad_down, grad_up


def _joined(
    x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor
) -> tuple[Tensor, Tensor]:
    """The product [T, out], and x down^T [T, r]."""
    out = F.linear(x, weight.to(x.dtype), bias)
    hidden = x @ down.t()
    return out.addmm_(hidden, up.t()), hidden


def _joined_backward(
    grad: Tensor, x: Tensor, weight: Tensor, hidden: Tensor, down: Tensor, up: Tensor, needs_input: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x (empty unless asked for), down and up."""
    grad_hidden = grad @ up  # [T, r]
    grad_down, grad_up = grad_hidden.t() @ x, grad.t() @ hidden
    if not needs_input:
        return x.new_empty(0), grad_down, grad_up
    return (grad @ weight.to(grad.dtype)).addmm_(grad_hidden, down), grad_down, grad_up


_joined_operator = operators.custom_op(
    "polyrank::joined", _joined, mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? bias, Tensor down, Tensor up) -> (Tensor, Tensor)",
)  # fmt: skip
_joined_backward_operator = operators.custom_op(
    "polyrank::joined_backward", _joined_backward, mutates_args=(),
    schema="(Tensor grad, Tensor x, Tensor weight, Tensor hidden, Tensor down, Tensor up, bool needs_input)"
    " -> (Tensor, Tensor, Tensor)",
)  # fmt: skip


@_joined_operator.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    del bias
    return x.new_empty(x.shape[0], weight.shape[0]), x.new_empty(x.shape[0], down.shape[0])


@_joined_backward_operator.register_fake
def _(
    grad: Tensor, x: Tensor, weight: Tensor, hidden: Tensor, down: Tensor, up: Tensor, needs_input: bool
) -> tuple[Tensor, Tensor, Tensor]:
    del weight, hidden
    return grad.new_empty(x.shape if needs_input else (0,)), torch.empty_like(down), torch.empty_like(up)


class _ScaledProduct(torch.autograd.Function):
    """x W^T + b + (x down^T) up^T for x [T, in] and a scaled weight [out, in]; W is multiplied in 8 bits both ways.

    Without factors it keeps nothing of x, with them x and x down^T [T, r]. `scale` is [1, out]; `transposed`
    [in, out] is the weight's second copy, or None.
    """

    @staticmethod
    def forward(  # noqa: PLR0913 (what one operator takes)
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        scale: Tensor,
        transposed: Tensor | None,
        bias: Tensor | None,
        down: Tensor | None,
        up: Tensor | None,
    ) -> Tensor:
        hidden = None if down is None else x @ down.t()
        kept = (None, None, None, None) if hidden is None else (x, hidden, down, up)
        ctx.save_for_backward(weight, scale, transposed, *kept)
        rounded, by_token = round_rows(x, weight.dtype)
        right = None if up is None else up.t()
        return _product(rounded, by_token, weight.t(), scale, bias, hidden, right, x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        weight, scale, transposed, x, hidden, down, up = ctx.saved_tensors
        grad_hidden = grad_down = grad_up = None
        if up is not None:
            grad_hidden = grad @ up  # [T, r]
            grad_down, grad_up = grad_hidden.t() @ x, grad.t() @ hidden
        grad_bias = grad.sum(0) if ctx.needs_input_grad[4] else None
        if not ctx.needs_input_grad[0]:
            return None, None, None, None, grad_bias, grad_down, grad_up
        if weight.dtype == NARROW:  # cuBLAS multiplies fp8 with a second factor that lies column by column
            weight = (weight.t().contiguous() if transposed is None else transposed).t()
        # The rows' scales belong to the inner dimension here, so they join the gradient before it is rounded.
        rounded, by_token = round_rows(grad, weight.dtype, scale)
        grad_x = _product(rounded, by_token, weight, None, None, grad_hidden, down, grad.dtype)
        return grad_x, None, None, None, grad_bias, grad_down, grad_up


def _product(  # noqa: PLR0913 (what one operator takes)
    x: Tensor,
    by_row: Tensor,
    second: Tensor,
    by_column: Tensor | None,
    bias: Tensor | None,
    left: Tensor | None,
    right: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """`x` [T, k] times `second` [k, n], both 8 bits, with scales [T, 1] and [1, n], plus a bias [n], plus left [T, r]
    right [r, n].
    """
    if left is None or right is None:
        return _multiply(x, by_row, second, by_column, bias).to(dtype)
    product: Any = torch.ops.polyrank.scaled_joined if torch.compiler.is_compiling() else _scaled_joined
    out: Tensor = product(x, by_row, second, by_column, bias, left, right)
    return out


def _scaled_joined(
    x: Tensor,
    by_row: Tensor,
    second: Tensor,
    by_column: Tensor | None,
    bias: Tensor | None,
    left: Tensor,
    right: Tensor,
) -> Tensor:
    return _multiply(x, by_row, second, by_column, bias).to(left.dtype).addmm_(left, right)


_scaled_joined_operator = operators.custom_op(
    "polyrank::scaled_joined", _scaled_joined, mutates_args=(),
    schema="(Tensor x, Tensor by_row, Tensor second, Tensor? by_column, Tensor? bias, Tensor left, Tensor right)"
    " -> Tensor",
)  # fmt: skip


@_scaled_joined_operator.register_fake
def _(
    x: Tensor,
    by_row: Tensor,
    second: Tensor,
    by_column: Tensor | None,
    bias: Tensor | None,
    left: Tensor,
    right: Tensor,
) -> Tensor:
    del by_row, by_column, bias, right
    return left.new_empty(x.shape[0], second.shape[1])


def _multiply(
    x: Tensor, by_row: Tensor, second: Tensor, by_column: Tensor | None, bias: Tensor | None
) -> Tensor:
    """`x` [T, k] times `second` [k, n], both 8 bits, with scales [T, 1] and [1, n], plus a bias [n].

    The result is bfloat16 or float32. Products add up in float32 (fp8) or int32. Without a GPU fp8 is multiplied as
    float32: the same numbers up to the order of the sum.
    """
    if x.dtype != torch.int8 and x.is_cuda:
        by_column = by_row.new_ones(1, second.shape[1]) if by_column is None else by_column
        return torch._scaled_mm(
            x, second, scale_a=by_row, scale_b=by_column, out_dtype=torch.bfloat16, use_fast_accum=True,
            bias=None if bias is None else bias.to(torch.bfloat16),
        )  # fmt: skip
    if x.dtype == torch.int8:
        rows = x.shape[0]
        if x.is_cuda and rows < _INT_MM_ROWS:
            x = F.pad(x, (0, 0, 0, _INT_MM_ROWS - rows))
        out = torch._int_mm(x, second)[:rows] * by_row
    else:
        out = (x.float() @ second.float()) * by_row
    if by_column is not None:
        out = out * by_column
    return out if bias is None else out + bias


def refusal(kind: Scaled, device: torch.device) -> str | None:
    """Why `device` cannot multiply `kind`; None if it can. Found out by doing it, at a size of no weight.

    The CPU computes the same numbers without 8-bit arithmetic, for tests and small models.
    """
    if device.type == "cpu":
        return None
    if device.type != "cuda":
        return "needs an NVIDIA GPU"
    layer = nn.Linear(64, 32, device=device, dtype=torch.bfloat16)
    store_scaled(layer, kind, keep_transposed=False)
    x = torch.ones(1, 64, device=device, dtype=torch.bfloat16, requires_grad=True)
    try:
        layer(x).sum().backward()
        torch.cuda.synchronize(device)
    except (RuntimeError, ValueError, NotImplementedError):
        name = torch.cuda.get_device_name(device)
        major, minor = torch.cuda.get_device_capability(device)
        where = f"{name}, compute capability {major}.{minor}, with torch {torch.__version__}"
        return f"cannot be computed here ({where})"
    return None
