"""Which layers of a model carry their adapter's product within their own, and what keeps their room up to date.

An adapter says what its factors are by a method `factors` of the object that has taken over the layer's `forward`
(networks/layers.py); where there is none, or none for now, the layer's product is joined as it is.

Before a forward pass all factors are written at once to where the products read them: rounded to the dtype that is
computed in, and beside the weights. On a GPU that is one kernel, which finds them by a list of addresses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from library.models import carried, frozen
from library.models.kernels import trusted
from library.models.memory import free_memory
from library.models.rounding import has_fp8
from library.models.scaled_mm import skips_gaps


class Factors(Protocol):
    """A low-rank product's, as the adapter keeps them: `up` times multiplier * alpha / rank is what goes along."""

    @property
    def down(self) -> Tensor:
        """[rank, in]."""
        ...

    @property
    def ups(self) -> Sequence[Tensor]:
        """The blocks of `up` [out, rank], on its diagonal."""
        ...

    @property
    def alpha(self) -> Tensor:
        """Scalar."""
        ...

    @property
    def rank(self) -> int:
        """Of the whole."""
        ...

    @property
    def multiplier(self) -> float:
        """Of the strength."""
        ...


@dataclass(frozen=True, slots=True)
class _Entry:
    """A factor or a block of one, with as many rows as the weight has on that side."""

    source: Tensor  # [n, r]
    low: Tensor  # the same in the dtype of the products
    beside: Tensor | None  # where it belongs beside the weight, from its first column on
    total: int  # rank of the whole
    scale: Tensor | None  # [n] of the weight's rows, which it is divided by
    balance: int  # number of the balance that it is divided by
    strength: int  # number of the strength that it is multiplied with, from the end
    is_up: bool


class Carrying:
    """The factors of all layers that carry, where their products read them."""

    def __init__(self, layers: Sequence[tuple[nn.Linear, Callable[[], Factors | None]]]) -> None:
        """Layers that `frozen.make_room` has given room of one kind, and what says the factors on each."""
        self._linears = [linear for linear, _ in layers]
        self._factors = [factors for _, factors in layers]
        device = self._linears[0].weight.device
        self._fp8 = frozen.is_scaled(self._linears[0])
        self._balances = torch.ones(len(layers), 2, device=device)
        self._smallest_scales = torch.ones(len(layers), device=device)
        if self._fp8:
            scales = [frozen.scale_of(linear).min() for linear in self._linears]
            self._smallest_scales = torch.stack(scales).to(device)
        sides = [(linear.in_features, linear.out_features) for linear in self._linears]
        self._inner = torch.tensor(sides, device=device)
        # Not as what autograd keeps for the backward pass: it may be written again, the same, before that.
        for linear, balance in zip(self._linears, self._balances, strict=True):
            if self._fp8:
                linear.register_buffer("balance", balance.data, persistent=False)
        self._kernels = _kernels(device) if device.type == "cuda" else None
        self._newest: tuple[object, _Table] | None = None
        self._recorded: list[_Table] = []  # a recorded step reads these again

    def write(self) -> None:
        """Write all factors as they are now; before a forward pass.

        Where no adapter has a strength, and none is trained now, nothing is touched: a backward pass of one that had
        may be ahead.
        """
        found = [factors() for factors in self._factors]
        strengths = [one.multiplier for one in found if one is not None]
        if not strengths or not (any(strengths) or torch.is_grad_enabled()):
            return
        places = tuple(_places(linear, one) for linear, one in zip(self._linears, found, strict=True))
        with torch.no_grad():
            if self._newest is None or self._newest[0] != places:
                self._newest = places, _Table(self._linears, found, self._kernels)
            table = self._newest[1]
            table.set_strengths()
            if self._fp8:
                table.set_balances(self._balances, self._smallest_scales, self._inner)
            table.write(self._balances, fp8=self._fp8)
        if self._balances.is_cuda and torch.cuda.is_current_stream_capturing():
            self._recorded.append(table)


def _places(linear: nn.Linear, factors: Factors | None) -> object:
    """What a table depends on: where everything is, and how strong."""
    if factors is None:
        return None
    behind = getattr(linear, "behind", None)
    return (
        factors.down.data_ptr(), *(up.data_ptr() for up in factors.ups), factors.alpha.data_ptr(), factors.multiplier,
        None if behind is None else behind.data_ptr(),
    )  # fmt: skip


class _Table:
    """Where factors come from and go to, for as long as nothing moves."""

    def __init__(self, linears: Sequence[nn.Linear], found: Sequence[Factors | None], kernels: Any) -> None:
        """`kernels` is the module of kernels, or None for plain torch."""
        device = linears[0].weight.device
        numbers = [number for number, one in enumerate(found) if one is not None]
        self._factors = [one for one in found if one is not None]
        self._numbers = torch.tensor(numbers, device=device)
        self._ratios = torch.tensor([one.multiplier / one.rank for one in self._factors], device=device)
        self._strengths = torch.ones(len(numbers) + 1, device=device)  # and one for what has none
        counts = [len(one.ups) for one in self._factors]
        # Which of the `ups` are whose: as many columns as the most blocks, of which some stand twice.
        owned = [
            [end - count + i % count for i in range(max(counts))]
            for end, count in zip(accumulate(counts), counts, strict=True)
        ]
        self._owned = torch.tensor(owned, device=device)
        self._entries = [
            entry
            for place, (number, one) in enumerate(zip(numbers, self._factors, strict=True))
            for entry in _entries(linears[number], one, balance=2 * number, strength=place - len(numbers) - 1)
        ]
        self._kernels = kernels
        kinds = [[entry for entry in self._entries if entry.is_up == up] for up in (False, True)]
        self._kinds = [
            (kind, *_addresses(kind, strengths=len(numbers) + 1, block=kernels.BLOCK, device=device))
            for kind in kinds
            if kernels is not None
        ]

    @property
    def targets(self) -> list[Tensor]:
        """All that is written to."""
        beside = [entry.beside for entry in self._entries if entry.beside is not None]
        return [entry.low for entry in self._entries] + beside

    def set_strengths(self) -> None:
        """Take up each adapter's alpha."""
        torch.mul(torch.stack([one.alpha for one in self._factors]), self._ratios, out=self._strengths[:-1])

    def set_balances(self, balances: Tensor, smallest_scales: Tensor, inner: Tensor) -> None:
        """Set those of layers in the table by the largest numbers of their factors."""
        down = torch.stack(torch._foreach_norm([one.down for one in self._factors], torch.inf)).float()
        ups = torch._foreach_norm([up for one in self._factors for up in one.ups], torch.inf)
        up = torch.stack(ups).float()[self._owned].amax(dim=1)
        up = up * self._strengths[:-1].abs() / smallest_scales[self._numbers]
        first, second = torch.stack((down, up), dim=1), torch.stack((up, down), dim=1)
        balances.index_copy_(0, self._numbers, carried.balanced(first, second, inner[self._numbers]))

    def write(self, balances: Tensor, *, fp8: bool) -> None:
        """Write all of the table."""
        if self._kernels is None:
            for entry in self._entries:
                _write_by_formula(entry, balances.flatten(), self._strengths)
            return
        for entries, programs, addresses in self._kinds:
            first = entries[0]
            self._kernels.write_factors(
                programs, addresses, balances, self._strengths, up=first.is_up, fp8=fp8,
                rank=max(entry.source.shape[1] for entry in entries), source=first.source.dtype, low=first.low.dtype,
            )  # fmt: skip


def _entries(linear: nn.Linear, factors: Factors, *, balance: int, strength: int) -> Iterable[_Entry]:
    """`down` and the blocks of `up` of a layer; `balance` is the number of its first one."""
    out, inner = linear.out_features, linear.in_features
    room, fp8 = frozen.room_of(linear), frozen.is_scaled(linear)
    assert linear.weight.data_ptr() == room.data_ptr(), "a model whose layers carry is not moved or copied"
    behind: Tensor | None = getattr(linear, "behind", None)
    if not fp8 and room.shape[0] > out:
        behind = room[out:, :inner].t()
    down, up = (factor.data for factor in frozen.carried_factors(linear))
    yield _Entry(
        factors.down.detach().t(), down.t(), behind, factors.rank, None, balance + 1, -1, is_up=False
    )
    row = column = 0
    for block in factors.ups:
        rows, columns = slice(row, row + block.shape[0]), slice(column, column + block.shape[1])
        beside = room[rows, inner + column :] if room.shape[1] > inner else None
        scale = frozen.scale_of(linear).flatten()[rows] if fp8 else None
        yield _Entry(
            block.detach(), up[rows, columns], beside, factors.rank, scale, balance, strength, is_up=True
        )
        row, column = rows.stop, columns.stop


def _addresses(
    entries: Sequence[_Entry], *, strengths: int, block: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """What each program of the kernel does, and the entries as it reads them: tables of whole numbers."""
    along = 0 if entries[0].is_up else 1  # `down` lies column by column
    programs = [
        (number, part)
        for number, entry in enumerate(entries)
        for part in range(-(-entry.source.shape[0] // block))
    ]
    fields = [
        (
            entry.source.data_ptr(), entry.low.data_ptr(), _pointer(entry.beside), _pointer(entry.scale),
            *entry.source.shape, entry.total,
            entry.source.stride(along), entry.low.stride(along), _step(entry.beside, along), entry.balance,
            entry.strength % strengths,
        )
        for entry in entries
    ]  # fmt: skip
    return torch.tensor(programs, device=device), torch.tensor(fields, device=device)


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _step(beside: Tensor | None, along: int) -> int:
    """From row to row, or from column to column; in 8 bits rows are always what lies together."""
    if beside is None:
        return 0
    return beside.stride(0 if beside.dtype == frozen.NARROW else along)


def _write_by_formula(entry: _Entry, balances: Tensor, strengths: Tensor) -> None:
    numbers = entry.source.float() * strengths[entry.strength]
    entry.low.copy_(numbers)
    if entry.beside is None:
        return
    rank = numbers.shape[1]
    # Not as a change of the weight, which autograd keeps for the backward pass.
    beside = entry.beside.data
    if beside.dtype != frozen.NARROW:
        beside[:, :rank] = numbers
        return
    numbers = numbers / balances[entry.balance]
    high, low = carried.halves(numbers if entry.scale is None else numbers / entry.scale[:, None])
    for start, part in ((0, high), (entry.total, low), (2 * entry.total, high)):
        beside[:, start : start + rank] = part


class _Sample(NamedTuple):
    """Factors to try the kernels with."""

    down: Tensor
    ups: Sequence[Tensor]
    alpha: Tensor
    rank: int
    multiplier: float


@cache
def _kernels(device: torch.device) -> Any:
    """The kernels of an NVIDIA GPU, or None where they cannot be trusted."""

    def check(kernels: Any) -> list[tuple[Tensor, Tensor]]:
        rank, out, inner = 6, 130, 80
        numbers = (torch.arange(rank * (out + inner), device=device) * 0.7).sin()
        down, ups = numbers[: rank * inner].view(rank, inner), numbers[rank * inner :].view(2, out // 2, rank)
        factors = _Sample(
            down, [up[:, : rank // 2].contiguous() for up in ups], torch.tensor(3.0, device=device), rank, 1.0
        )
        pairs = []
        for fp8 in (False, True)[: 1 + has_fp8(device)]:
            linear = nn.Linear(inner, out, bias=False, device="meta")  # draws nothing
            ones = torch.ones(out, inner, device=device, dtype=torch.bfloat16)
            linear.weight = nn.Parameter(ones, requires_grad=False)
            if fp8:
                frozen.store_scaled(linear, "fp8", keep_transposed=True)
            frozen.make_room(linear, rank, torch.bfloat16)
            made = []
            for ways in (kernels, None):
                table = _Table([linear], [factors], ways)
                table.set_strengths()
                table.write(torch.full((1, 2), 0.5, device=device), fp8=fp8)
                made.append([_values(target, rank) for target in table.targets])
            pairs += list(zip(*made, strict=True))
        return pairs

    return carried.kernel(device) and trusted("library.models.carried_kernel", check)


def _values(target: Tensor, rank: int) -> Tensor:
    """What has been written: in fp8 a rounding of the first number is made good by the second."""
    wide = target.float()
    return wide[:, :rank] + wide[:, rank : 2 * rank] if target.dtype == frozen.NARROW else wide


def _works(device: torch.device, *, fp8: bool) -> bool:
    """Whether products may carry there: without kernels of its own a GPU is better off without."""
    if device.type == "cpu":
        return True
    return device.type == "cuda" and _kernels(device) is not None and not (fp8 and skips_gaps(device))


def _nothing() -> None:
    return None


def carry(linears: Iterable[nn.Linear], *, dtype: torch.dtype) -> Callable[[], None] | None:
    """Make room in all layers whose adapter says its factors; None where there is none.

    Else what is to be called before each forward pass, `Carrying.write`. `dtype` is what the layers compute in. After
    the network is applied, before anything is compiled.
    """
    layers: list[tuple[nn.Linear, Callable[[], Factors | None]]] = []
    for linear in linears:
        says: Callable[[], Factors | None] = getattr(
            getattr(linear.forward, "__self__", None), "factors", _nothing
        )
        factors = says()
        if factors is None or not _works(linear.weight.device, fp8=frozen.is_scaled(linear)):
            continue
        if frozen.make_room(linear, factors.rank, dtype):
            layers.append((linear, says))
    if not layers:
        return None
    free_memory()  # what held the weights before
    return Carrying(layers).write
