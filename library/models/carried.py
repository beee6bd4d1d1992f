"""Products that carry a low-rank product within: a few more columns of both factors, and one GEMM.

    x W^T + (x down^T) up^T = [x, x down^T] [W, up]^T          dy W + (dy up) down = [dy, dy up] [W; down]

An output as wide as a block's MLP is not gone through a second time to add what an adapter makes of it, which on a GPU
takes a fifth of the product. What it takes instead is room: `room` is the storage of a frozen weight, which has more
columns, or rows, than the weight. What lies there belongs to the product, which writes it before it reads it.

    kind    forward                     backward
    wide    [out + more, in + more]     the same storage
    fp8     [out, in + more]            [in, out + more], the transposed copy

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
from library.models.rounding import FP8, LARGEST, SMALLEST_SCALE, to_8_bits
from library.models.scaled_mm import multiply

LONGEST = 4096  # of a row of the first factor: it is copied, and the product of long ones is narrow
_ALIGNMENT = 128  # bytes: of the rows of factors that a GPU reads at full speed
_SIXTHS = 6  # the largest of many numbers is some 3 to 6 times their root mean square


def columns(rank: int, dtype: torch.dtype) -> int:
    """P for a low rank, beside a weight of that dtype."""
    numbers = 3 * rank if dtype == FP8 else rank
    aligned = _ALIGNMENT // dtype.itemsize
    return -(-numbers // aligned) * aligned


def balanced(first: Tensor, second: Tensor, inner: Tensor) -> Tensor:
    """The balance for largest numbers of the factors, in units of the scales; `inner` numbers make a product.

    Such that both factors are about as large, as far as that can be known without x; and the second is in range.
    """
    largest = LARGEST[FP8]
    reach = first * (largest * inner**0.5 / _SIXTHS)
    even = (second / reach.clamp(min=_NOTHING)).sqrt()
    return torch.maximum(even, second / largest).clamp(min=_NOTHING)


_NOTHING = 1e-30


def rows(
    x: Tensor, by_column: Tensor | None, hidden: Tensor, more: int, balance: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The first factor [T, n + more] of x [T, n], times `by_column` [1, n], and its product [T, r].

    With `balance`, one number, it is fp8, and scales [T, 1] float32 come with it.
    """
    kernel = _kernel(x.device) if x.is_cuda else None
    if kernel is not None:
        made: tuple[Tensor, Tensor | None] = kernel.rows(x, by_column, hidden, more, balance, SMALLEST_SCALE)
        return made
    return _rows_by_formula(x, by_column, hidden, more, balance)


def fill(beside: Tensor, second: Tensor, scale: Tensor | None, balance: Tensor | None) -> None:
    """Write the low rank's second factor [n, r], over `scale` [1, n], to its place [n, P] beside the weight."""
    kernel = _kernel(beside.device) if beside.is_cuda else None
    if kernel is not None:
        kernel.fill(beside, second, scale, balance)
    else:
        _fill_by_formula(beside, second, scale, balance)


def _rows_by_formula(
    x: Tensor, by_column: Tensor | None, hidden: Tensor, more: int, balance: Tensor | None
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
        high, low = _halves(product * scale.reciprocal())
        parts = (to_8_bits(wide * scale.reciprocal(), FP8), high, high, low)
    made = torch.zeros(x.shape[0], x.shape[1] + more, dtype=parts[0].dtype, device=x.device)
    _write(made, parts)
    return made, scale


def _fill_by_formula(beside: Tensor, second: Tensor, scale: Tensor | None, balance: Tensor | None) -> None:
    parts: tuple[Tensor, ...]
    if balance is None:
        parts = (second,)
    else:
        divisor = balance if scale is None else balance * scale.view(-1, 1)
        high, low = _halves(second.float() / divisor)
        parts = (high, low, high)
    # Not as a change of the weight, which autograd keeps for the backward pass.
    _write(beside.data, parts)


def _halves(numbers: Tensor) -> tuple[Tensor, Tensor]:
    high = to_8_bits(numbers, FP8)
    return high, to_8_bits(numbers - high.float(), FP8)


def _write(target: Tensor, parts: tuple[Tensor, ...]) -> None:
    """Parts beside one another, from the first column on."""
    start = 0
    for part in parts:
        target[:, start : start + part.shape[1]] = part
        start += part.shape[1]


@cache
def _kernel(device: torch.device) -> Any:
    """The kernels, or None where they cannot be trusted."""
    fp8 = torch.cuda.get_device_capability(device) >= (8, 9)

    def check(kernel: Any) -> list[tuple[Tensor, Tensor]]:
        pairs = []
        x = torch.linspace(-3, 5, 4 * 80, device=device).view(4, -1).to(torch.bfloat16)
        hidden = torch.linspace(-40, 60, 20, device=device).view(4, -1).to(torch.bfloat16)
        second = torch.linspace(-1, 2, 650, device=device).view(130, -1).to(torch.bfloat16)
        column = torch.linspace(0.5, 2, 130, device=device)[None]
        for balance in (None, torch.full((1,), 0.5, device=device))[: 1 + fp8]:
            dtype = torch.bfloat16 if balance is None else FP8
            more = columns(hidden.shape[1], dtype)
            by_column, scale = (None, None) if balance is None else (column[:, :80].contiguous(), column)
            made, by_row = kernel.rows(x, by_column, hidden, more, balance, SMALLEST_SCALE)
            wanted, wanted_by_row = _rows_by_formula(x, by_column, hidden, more, balance)
            if by_row is not None and wanted_by_row is not None:
                pairs.append((by_row, wanted_by_row))
            pairs.append((made, wanted))
            places = torch.zeros(2, 130, more, dtype=dtype, device=device)
            kernel.fill(places[0], second, scale, balance)
            _fill_by_formula(places[1], second, scale, balance)
            # What is off by a rounding of the first number is made good by the second.
            rank = second.shape[1]
            found, expected = (place.float()[:, : 2 * rank].view(130, -1, rank).sum(1) for place in places)
            pairs.append((found, expected))
        return pairs

    return trusted("library.models.carried_kernel", check)


def works(device: torch.device) -> bool:
    """Whether products may carry there: without kernels of its own a GPU is better off without."""
    return device.type == "cpu" or (device.type == "cuda" and _kernel(device) is not None)


def _carried(
    x: Tensor,
    room: Tensor,
    by_column: Tensor | None,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    balance: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The sum [T, out], and x down^T [T, r]. `by_column` [1, out] are the scales of an fp8 weight."""
    inner, factor = x.shape[1], room[: up.shape[0]]
    one = None if balance is None else balance[:1]
    hidden = x.new_empty(x.shape[0], down.shape[0])
    aside = Aside(x.device, rows=x.shape[0])
    with aside:
        fill(factor[:, inner:], up, by_column, one)
    torch.mm(x, down.t(), out=hidden)
    made, by_row = rows(x, None, hidden, factor.shape[1] - inner, one)
    aside.join()
    if by_row is None:
        return F.linear(made, factor, bias), hidden
    return multiply(made, by_row, factor.t(), by_column, bias).to(x.dtype), hidden


def _carried_backward(  # noqa: PLR0913 (what one operator takes)
    grad: Tensor,
    room: Tensor,
    by_column: Tensor | None,
    x: Tensor,
    hidden: Tensor,
    down: Tensor,
    up: Tensor,
    balance: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, down and up, from that of the sum [T, out]."""
    inner = grad.shape[1]
    one = None if balance is None else balance[1:]
    factor = room[:, : x.shape[1]] if balance is None else room.t()  # [out + more, in]
    grad_hidden = grad.new_empty(grad.shape[0], up.shape[1])
    grad_down, grad_up = torch.empty_like(down), torch.empty_like(up)
    aside = Aside(x.device, rows=x.shape[0])
    with aside:
        fill(factor[inner:].t(), down.t(), None, one)
    torch.mm(grad, up, out=grad_hidden)
    aside.join()
    with aside:
        torch.mm(grad_hidden.t(), x, out=grad_down)
        torch.mm(grad.t(), hidden, out=grad_up)
    made, by_row = rows(grad, by_column, grad_hidden, factor.shape[0] - inner, one)
    grad_x = made @ factor if by_row is None else multiply(made, by_row, factor, None, None)
    aside.join()
    return grad_x.to(grad.dtype), grad_down, grad_up


PLAIN = {"carried": _carried, "carried_backward": _carried_backward}


_carried_operator = operators.custom_op(
    "polyrank::carried", _carried, mutates_args=(),
    schema="(Tensor x, Tensor room, Tensor? by_column, Tensor? bias, Tensor down, Tensor up, Tensor? balance) "
    "-> (Tensor, Tensor)",
)  # fmt: skip
_carried_backward_operator = operators.custom_op(
    "polyrank::carried_backward", _carried_backward, mutates_args=(),
    schema="(Tensor grad, Tensor room, Tensor? by_column, Tensor x, Tensor hidden, Tensor down, Tensor up, "
    "Tensor? balance) -> (Tensor, Tensor, Tensor)",
)  # fmt: skip


@_carried_operator.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor]:
    x, down, up = arguments[0], arguments[4], arguments[5]
    return x.new_empty(x.shape[0], up.shape[0]), x.new_empty(x.shape[0], down.shape[0])


@_carried_backward_operator.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    grad, x, down, up = arguments[0], arguments[3], arguments[5], arguments[6]
    return grad.new_empty(x.shape), torch.empty_like(down), torch.empty_like(up)
