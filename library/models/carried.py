"""Products that carry a low-rank product within: a few more columns of both factors, and one GEMM.

    x W^T + (x down^T) up^T = [x, x down^T] [W, up]^T          dy W + (dy up) down = [dy, dy up] [W; down]

An output as wide as a block's MLP is not gone through a second time to add what an adapter makes of it, which on a GPU
takes a fifth of the product. What it takes instead is room beside the weight:

    kind    forward: `room`             backward
    wide    [out + more, in + more]     the same storage
    fp8     [out, in + more]            [in, out + more], the transposed copy

What lies there, and both factors in the dtype of x, follow the adapter's own numbers when `library.models.carrying` is
told to, once for all layers before a forward pass: hundreds of small kernels would take as long as what is won.

For fp8 the scales of the rows of x and W hold for the additional columns too. There each number is two, of which the
second is what the first is off by, so that they have the 8 bits that bfloat16 has. With first factor (p, p') and
second (u, u') the columns are [p, p, p'] and [u, u', u]: all products but the smallest. `balance` [2] float32, for
forward and backward, moves size from one factor to the other, as 8 bits span little: the first is multiplied by it and
the second divided. A row whose product would leave the range nevertheless gets a larger scale.

Shape letters: T tokens, r rank, P additional columns.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch import library as operators
from torch.nn import functional as F

from library.models.aside import Aside
from library.models.kernels import trusted
from library.models.rounding import FP8, LARGEST, SMALLEST_SCALE, has_fp8, to_8_bits
from library.models.scaled_mm import multiply

LONGEST = 4096  # of a row of the first factor: it is copied, and the product of long ones is narrow
_ALIGNMENT = 128  # bytes: of the rows of factors that a GPU reads at full speed
_LEAST = 16  # bytes: products of rows of such multiples have fast kernels
_CREST = 6  # the largest of many numbers is some 3 to 6 times their root mean square
_NOTHING = 1e-30
_LEAST_CAPABILITY = (8, 0)  # of an NVIDIA GPU whose tensor cores have bfloat16
MOST = 64  # ranks: beyond, the columns are no longer few


def columns(rank: int, dtype: torch.dtype) -> int:
    """P for a low rank, beside a weight of that dtype."""
    return _up_to(rank, dtype, _ALIGNMENT)


def used_columns(rank: int, dtype: torch.dtype) -> int:
    """How many of them are multiplied."""
    return _up_to(rank, dtype, _LEAST)


def _up_to(rank: int, dtype: torch.dtype, multiple: int) -> int:
    numbers, aligned = 3 * rank if dtype == FP8 else rank, multiple // dtype.itemsize
    return -(-numbers // aligned) * aligned


def balanced(first: Tensor, second: Tensor, inner: Tensor) -> Tensor:
    """The balance for largest numbers of the factors, in units of the scales; `inner` numbers make a product.

    Such that both factors are about as large, as far as that can be known without x; and the second is in range.
    """
    largest = LARGEST[FP8]
    reach = first * (largest * inner**0.5 / _CREST)
    even = (second / reach.clamp(min=_NOTHING)).sqrt()
    return torch.maximum(even, second / largest).clamp(min=_NOTHING)


def halves(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Each number, float32, as the sum of two in fp8."""
    high = to_8_bits(numbers, FP8)
    return high, to_8_bits(numbers - high.float(), FP8)


def thin(x: Tensor, factor: Tensor) -> Tensor:
    """x [T, n] times a low rank's `factor` [r, n], transposed."""
    found = kernel(x.device) if x.is_cuda and x.dtype.itemsize == 2 else None
    product: Tensor = x @ factor.t() if found is None else found.thin(x, factor)
    return product


def rows(
    x: Tensor, by_column: Tensor | None, hidden: Tensor, more: int, balance: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The first factor of x [T, n], times `by_column` [1, n], and its product [T, r].

    It has as many columns more as are multiplied, in rows as far apart as n + `more`. With `balance`, one number, it is
    fp8, and scales [T, 1] float32 come with it.
    """
    used = used_columns(hidden.shape[1], x.dtype if balance is None else FP8)
    found = kernel(x.device) if x.is_cuda else None
    if found is not None:
        made: tuple[Tensor, Tensor | None] = found.rows(
            x, by_column, hidden, more, used, balance, SMALLEST_SCALE
        )
        return made
    return _by_formula(x, by_column, hidden, more, used, balance)


def _by_formula(
    x: Tensor, by_column: Tensor | None, hidden: Tensor, more: int, used: int, balance: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    scale = None
    parts: tuple[Tensor, ...]
    if balance is None:
        parts = (x, hidden)
    else:
        wide = x.float() if by_column is None else x.float() * by_column
        product = hidden.float() * balance
        largest = torch.maximum(*(part.abs().amax(dim=1, keepdim=True) for part in (wide, product)))
        scale = (largest / LARGEST[FP8]).clamp(min=SMALLEST_SCALE)
        high, low = halves(product * scale.reciprocal())
        parts = (to_8_bits(wide * scale.reciprocal(), FP8), high, high, low)
    made = torch.zeros(x.shape[0], x.shape[1] + more, dtype=parts[0].dtype, device=x.device)
    start = 0
    for part in parts:
        made[:, start : start + part.shape[1]] = part
        start += part.shape[1]
    return made[:, : x.shape[1] + used], scale


@cache
def kernel(device: torch.device) -> Any:
    """The kernels of an NVIDIA GPU, or None where they cannot be trusted."""
    if torch.cuda.get_device_capability(device) < _LEAST_CAPABILITY:
        return None

    def check(kernel: Any) -> list[tuple[Tensor, Tensor]]:
        pairs: list[tuple[Tensor, Tensor]] = []
        for count in (100, 2100):  # few rows and many
            x, first = (
                (torch.arange(n * 300, device=device) * 0.7).sin().view(n, -1).to(torch.bfloat16)
                for n in (count, 20)
            )
            pairs += [(kernel.thin(x, one), x @ one.t()) for one in (first, first.t().contiguous().t())]
        x = torch.linspace(-3, 5, 4 * 80, device=device).view(4, -1).to(torch.bfloat16)
        hidden = torch.linspace(-40, 60, 20, device=device).view(4, -1).to(torch.bfloat16)
        for balance in (None, torch.full((1,), 0.5, device=device))[: 1 + has_fp8(device)]:
            dtype = torch.bfloat16 if balance is None else FP8
            widths = columns(hidden.shape[1], dtype), used_columns(hidden.shape[1], dtype)
            by_column = None if balance is None else torch.linspace(0.5, 2, 80, device=device)[None]
            made, by_row = kernel.rows(x, by_column, hidden, *widths, balance, SMALLEST_SCALE)
            wanted, wanted_by_row = _by_formula(x, by_column, hidden, *widths, balance)
            if by_row is None or wanted_by_row is None:
                pairs.append((made, wanted))
                continue
            # What is off by a rounding of the first number is made good by the second.
            for one, other in ((0, 80), (80, 85)):
                found, expected = (
                    (m[:, one:other].float() + (m[:, 90:95].float() if one else 0)) * s
                    for m, s in ((made, by_row), (wanted, wanted_by_row))
                )
                pairs.append((found, expected))
        return pairs

    return trusted("library.models.carried_kernel", check)


def _carried(
    x: Tensor, room: Tensor, by_column: Tensor | None, bias: Tensor | None, down: Tensor, up: Tensor,
    balance: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The sum [T, out], and x down^T [T, r]. `by_column` [1, out] are the scales of an fp8 weight.

    Of `up` [out, r] only the shape is used: its numbers are in the room.
    """
    factor = room[: up.shape[0]]
    hidden = thin(x, down)
    made, by_row = rows(
        x, None, hidden, factor.shape[1] - x.shape[1], None if balance is None else balance[:1]
    )
    factor = factor[:, : made.shape[1]]
    if by_row is None:
        return F.linear(made, factor, bias), hidden
    return multiply(made, by_row, factor.t(), by_column, bias).to(x.dtype), hidden


def _carried_backward(
    grad: Tensor, room: Tensor, by_column: Tensor | None, x: Tensor, hidden: Tensor, up: Tensor,
    balance: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, and of down and up in float32, from that of the sum [T, out]. `down` is in the room."""
    inner = grad.shape[1]
    factor = room[:, : x.shape[1]] if balance is None else room.t()  # [out + more, in]
    grad_hidden = thin(grad, up.t())
    grad_down, grad_up = _empty_gradients(x, hidden, up)
    aside = Aside(x.device, rows=x.shape[0])
    with aside:
        _into(grad_hidden.t(), x, grad_down)
        _into(grad.t(), hidden, grad_up)
    more = factor.shape[0] - inner
    made, by_row = rows(grad, by_column, grad_hidden, more, None if balance is None else balance[1:])
    factor = factor[: made.shape[1]]
    grad_x = made @ factor if by_row is None else multiply(made, by_row, factor, None, None)
    aside.join()
    return grad_x.to(grad.dtype), grad_down, grad_up


def _empty_gradients(x: Tensor, hidden: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Of down and up, float32."""
    down = x.new_empty(hidden.shape[1], x.shape[1], dtype=torch.float32)
    return down, x.new_empty(up.shape, dtype=torch.float32)


def _into(first: Tensor, second: Tensor, out: Tensor) -> None:
    """The product of two matrices, rounded to `out` alone."""
    if first.is_cuda and first.dtype != out.dtype:
        torch.mm(first, second, out_dtype=out.dtype, out=out)
    else:
        torch.mm(first.to(out.dtype), second.to(out.dtype), out=out)


PLAIN = {"carried": _carried, "carried_backward": _carried_backward}


_carried_operator = operators.custom_op(
    "polyrank::carried", _carried, mutates_args=(),
    schema="(Tensor x, Tensor room, Tensor? by_column, Tensor? bias, Tensor down, Tensor up, Tensor? balance) "
    "-> (Tensor, Tensor)",
)  # fmt: skip
_carried_backward_operator = operators.custom_op(
    "polyrank::carried_backward", _carried_backward, mutates_args=(),
    schema="(Tensor grad, Tensor room, Tensor? by_column, Tensor x, Tensor hidden, Tensor up, Tensor? balance) "
    "-> (Tensor, Tensor, Tensor)",
)  # fmt: skip


@_carried_operator.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    x, down, up = arguments[0], arguments[4], arguments[5]
    return x.new_empty(x.shape[0], up.shape[0]), x.new_empty(x.shape[0], down.shape[0])


@_carried_backward_operator.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    grad, x, hidden, up = arguments[0], arguments[3], arguments[4], arguments[5]
    return grad.new_empty(x.shape), *_empty_gradients(x, hidden, up)
