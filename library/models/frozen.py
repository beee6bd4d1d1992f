"""Products with frozen weights: how a weight is stored, how it is multiplied, what may ride along.

A Linear layer of a block that is prepared here stays an `nn.Linear`, which plug-ins find and wrap, and gets
another `forward` on the instance. After `install_joining` that takes an adapter's product along,

    linear.forward(x, low_rank=(down, up))    x W^T + b + (x down^T) up^T

so that an adapter need not know how the weight is stored. `weight` is one of

- wide: a float dtype that is multiplied as it is;
- narrow: float8_e4m3fn without a scale, as in Kohya's fp8 files, cast up for each product (`fp8_base`);
- scaled: float8_e4m3fn or int8 with one scale for each output row in `weight_scale`; activations, and in the
  backward pass their gradients, get one scale for each token, and the GPU multiplies 8 bits (`base_compute`);
- grouped: int8 with one scale for each output and each few inputs in `group_scale`, for layers that see one row a
  sample (`base_compute`); activations stay as they are.

The arithmetic is in `library.models.products`, `library.models.carried` and `library.models.few_rows`.

Shape letters: T tokens (all leading dimensions of x), r rank.
"""

from __future__ import annotations

from types import MethodType
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from library.models import carried, few_rows
from library.models.products import (
    CarriedProduct,
    GroupedProduct,
    JoinedProduct,
    NarrowProduct,
    ScaledProduct,
    transposed_copy,
)
from library.models.rounding import FP8, LARGEST, SMALLEST_SCALE, to_8_bits

LowRank = tuple[Tensor, Tensor]  # down [r, in] and up [out, r], strength included
Scaled = Literal["fp8", "int8"]

NARROW = FP8
_SCALE_RANGE = 256  # of the rows of one weight that carries; a power of two, like the scales
SCALED_DTYPES: dict[Scaled, torch.dtype] = {"fp8": FP8, "int8": torch.int8}


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
    _set_scale(linear, scale)
    if keep_transposed:
        keep_transposed_copy(linear)
    install(linear)


@torch.no_grad()
def store_grouped(linear: nn.Linear, *, device: torch.device | None = None) -> None:
    """Turn the weight of a layer that sees one row a sample into 8 bits, in place, and `install` it.

    `device` is as in `store_scaled`.
    """
    weight, scale = few_rows.grouped(linear.weight.detach())
    linear.weight = nn.Parameter(weight, requires_grad=False)
    linear.register_buffer("group_scale", scale.to(device or scale.device), persistent=False)
    install(linear)


def keep_transposed_copy(linear: nn.Linear) -> None:
    """Hold the weight transposed as well, which the backward pass of scaled fp8 multiplies with."""
    if is_scaled(linear) and linear.weight.dtype == FP8:
        behind = getattr(linear, "behind", None)
        copy = transposed_copy(linear.weight.detach(), behind)
        linear.register_buffer("weight_transposed", copy, persistent=False)
        if behind is not None:
            linear.register_buffer("behind", copy[:, linear.out_features :], persistent=False)


def transposed_bytes(linear: nn.Linear) -> int:
    """What that copy takes."""
    behind: Tensor | None = getattr(linear, "behind", None)
    return linear.weight.nbytes + (0 if behind is None else behind.nbytes)


@torch.no_grad()
def make_room(linear: nn.Linear, rank: int, dtype: torch.dtype) -> bool:
    """Give a prepared layer's weight room for factors of a low rank, where `library.models.carried` takes them along.

    `dtype` is what the layer computes in. The storage is laid out anew, so this comes before anything refers to it.
    What is in the room, and in the buffers `carried_down` [rank, in] and `carried_up` [out, rank] of that dtype, is the
    business of `library.models.carrying`. Returns whether there is any.
    """
    weight = linear.weight.detach()
    short = tuple(side <= carried.LONGEST for side in (linear.in_features, linear.out_features))
    fp8 = is_scaled(linear) and weight.dtype == FP8
    if rank > carried.MOST or not any(short) or is_grouped(linear) or not (fp8 or weight.dtype == dtype):
        return False
    if fp8:
        weight = _with_like_scales(linear)
    more = carried.columns(rank, weight.dtype)
    out, inner = weight.shape
    room = weight.new_zeros(out + more * (short[1] and not fp8), inner + more * short[0])
    room[:out, :inner] = weight
    linear.weight = nn.Parameter(room[:out, :inner], requires_grad=False)
    buffers = {
        "room": room,
        "carried_down": room.new_zeros(rank, inner, dtype=dtype),
        "carried_up": room.new_zeros(out, rank, dtype=dtype),
    }
    if fp8:
        buffers["balance"] = torch.ones(2, device=room.device)
        if short[1]:
            buffers["behind"] = room.new_zeros(inner, more)
    for name, buffer in buffers.items():
        linear.register_buffer(name, buffer, persistent=False)
    if isinstance(getattr(linear, "weight_transposed", None), Tensor):
        keep_transposed_copy(linear)
    return True


def _with_like_scales(linear: nn.Linear) -> Tensor:
    """The fp8 weight; rows far smaller than the largest one get that row's scale over `_SCALE_RANGE`.

    What is carried along with a row is of a size of its own, and not to leave the range of the row's scale.
    """
    weight, scale = linear.weight.detach(), scale_of(linear)
    limited = scale.clamp(min=scale.max() / _SCALE_RANGE)
    if bool((limited != scale).any()):
        weight = to_8_bits(weight.float() * (scale / limited).to(weight.device).T, FP8)
        _set_scale(linear, limited)
    return weight


def _set_scale(linear: nn.Linear, scale: Tensor) -> None:
    """`weight_scale`, and `weight_of_columns`: the same to be multiplied with a gradient's columns.

    Each row of a gradient reads these again. Powers of two are as exact in half the bytes.
    """
    linear.register_buffer("weight_scale", scale, persistent=False)
    columns = scale.bfloat16() if linear.weight.dtype == FP8 else scale.clone()
    linear.register_buffer("weight_of_columns", columns, persistent=False)


def is_scaled(linear: nn.Linear) -> bool:
    """Whether the weight has a scale for each row."""
    return isinstance(getattr(linear, "weight_scale", None), Tensor)


def carries(linear: nn.Linear) -> bool:
    """Whether there is room for the factors of a low rank."""
    return isinstance(getattr(linear, "carried_up", None), Tensor)


def scale_of(linear: nn.Linear) -> Tensor:
    """The scales [1, out] of a scaled weight."""
    return cast(Tensor, linear.weight_scale)


def room_of(linear: nn.Linear) -> Tensor:
    """The storage of the weight of a layer that carries."""
    return cast(Tensor, linear.room)


def carried_factors(linear: nn.Linear) -> LowRank:
    """Both factors that a layer carries, as its product reads them."""
    return cast(Tensor, linear.carried_down), cast(Tensor, linear.carried_up)


def is_grouped(linear: nn.Linear) -> bool:
    """Whether the weight has a scale for each group of inputs."""
    return isinstance(getattr(linear, "group_scale", None), Tensor)


def _forward(self: nn.Linear, x: Tensor) -> Tensor:
    """`nn.Linear.forward`, in autocast's dtype if on, else in that of `x`."""
    return _joining_forward(self, x)


def _joining_forward(self: nn.Linear, x: Tensor, low_rank: LowRank | None = None) -> Tensor:
    """`nn.Linear.forward` and the low-rank product, in autocast's dtype if on, else in that of `x`.

    A layer that carries multiplies with the factors as `library.models.carrying` last wrote them.
    """
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    x = x.to(dtype)
    bias = None if self.bias is None else self.bias.to(dtype)
    if low_rank is not None and carries(self) and self.carried_up.dtype == dtype:
        return _carrying_linear(self, x, bias, low_rank)
    if is_scaled(self) or is_grouped(self):
        return _scaled_linear(self, x, bias, low_rank)
    if low_rank is not None:
        down, up = (factor.to(dtype) for factor in low_rank)
        out = JoinedProduct.apply(  # type: ignore[no-untyped-call]
            x.reshape(-1, x.shape[-1]), self.weight, bias, down, up
        )
        return cast(Tensor, out.view(*x.shape[:-1], -1))
    if self.weight.dtype == NARROW:
        return cast(Tensor, NarrowProduct.apply(x, self.weight, bias))  # type: ignore[no-untyped-call]
    return F.linear(x, self.weight, bias)


def _scaled_linear(linear: nn.Linear, x: Tensor, bias: Tensor | None, low_rank: LowRank | None) -> Tensor:
    flat = x.reshape(-1, x.shape[-1])
    down, up = (None, None) if low_rank is None else (factor.to(x.dtype) for factor in low_rank)
    out: Tensor
    if is_grouped(linear):
        out = GroupedProduct.apply(  # type: ignore[no-untyped-call]
            flat, linear.weight, linear.group_scale.float(), bias, down, up
        )
    else:
        transposed = getattr(linear, "weight_transposed", None)
        if transposed is not None:
            transposed = transposed[:, : linear.out_features]
        out = ScaledProduct.apply(  # type: ignore[no-untyped-call]
            flat,
            linear.weight,
            linear.weight_scale.float(),
            linear.weight_of_columns,
            transposed,
            bias,
            down,
            up,
        )
    return out.view(*x.shape[:-1], -1)


def _carrying_linear(linear: nn.Linear, x: Tensor, bias: Tensor | None, low_rank: LowRank) -> Tensor:
    out = CarriedProduct.apply(  # type: ignore[no-untyped-call]
        x.reshape(-1, x.shape[-1]), linear.weight, bias, *low_rank, linear.carried_down, linear.carried_up, linear.room,
        getattr(linear, "weight_scale", None), getattr(linear, "weight_of_columns", None),
        getattr(linear, "balance", None), getattr(linear, "weight_transposed", None), getattr(linear, "behind", None),
    )  # fmt: skip
    return cast(Tensor, out.view(*x.shape[:-1], -1))


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
