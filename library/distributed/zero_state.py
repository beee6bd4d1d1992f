"""Optimizer state under ZeRO 1 to 3, which lies in flat pieces, to and from whole tensors by parameter.

ZeRO flattens each parameter group and gives every rank a piece of it (stages 1, 2), or a piece of every parameter
(stage 3). The optimizer steps those flat pieces, so its state has their shape. What is saved must not depend on
that: it is put together by adding up, over ranks, what each holds, zeros elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

COUNTS = frozenset({"step"})  # state that is one number for a whole parameter
FLAT = frozenset({"s", "p0"})  # state that Prodigy keeps in one dimension whatever the parameter's shape
ParameterStates = Mapping[Tensor, Mapping[str, object]]


@dataclass(frozen=True, slots=True)
class Piece:
    """What this rank holds of one parameter: `length` numbers from `start` on, at `at` of the flat tensor.

    `room` is what the flat tensor reserves for it; more than `length` where the parameter ends within.
    """

    parameter: nn.Parameter
    numel: int  # of the whole parameter, which itself may be empty here
    shape: torch.Size
    flat: Tensor  # what the optimizer steps
    at: int
    start: int
    length: int
    room: int


@dataclass(frozen=True, slots=True)
class Pieces:
    """A piece, empty ones included, of every trained parameter, in the same order on every rank."""

    pieces: Sequence[Piece]

    @torch.no_grad()
    def clear_padding(self) -> None:
        """Zero what fills up flat tensors; it is left as it was found, and sums over a piece would count it."""
        for piece in self.pieces:
            piece.flat[piece.at + piece.length : piece.at + piece.room].zero_()

    def gather(self, optimizer: Optimizer, *, total: Callable[[Tensor], Tensor]) -> ParameterStates:
        """The optimizer's state of each parameter, whole. All ranks call it; `total` sums over them in place."""
        states: dict[Tensor, dict[str, object]] = {}
        for piece in self.pieces:
            states[piece.parameter] = {
                key: _assemble(key, value, piece, total) if _by_element(key, value, piece.flat) else value
                for key, value in optimizer.state.get(piece.flat, {}).items()
            }
        return states

    def scatter(self, optimizer: Optimizer, states: ParameterStates) -> None:
        """Give the optimizer this rank's pieces of whole states; nothing is changed where there is none."""
        for flat in _unique(piece.flat for piece in self.pieces):
            there = [p for p in self.pieces if p.flat is flat and p.parameter in states]
            keys = dict.fromkeys(key for piece in there for key in states[piece.parameter])
            if keys:
                optimizer.state[flat] = {key: _cut(key, flat, there, states) for key in keys}


def pieces_of(zero: Any, stage: int) -> Pieces:
    """The pieces of DeepSpeed's optimizer of stages 1 and 2, or 3."""
    return Pieces([*(_split_parameters(zero) if stage == 3 else _split_groups(zero))])


def _split_groups(zero: Any) -> Iterable[Piece]:
    for parameters, flat in zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True):
        for parameter in parameters:
            mapping = parameter._hp_mapping
            own = None if mapping is None else mapping.hp_fragment_address
            yield Piece(
                parameter=parameter,
                numel=parameter.numel(),
                shape=parameter.shape,
                flat=flat,
                at=0 if own is None else own.start,
                start=0 if mapping is None else mapping.lp_fragment_address.start,
                length=0 if own is None else own.numel,
                room=0 if own is None else own.numel,
            )


def _split_parameters(zero: Any) -> Iterable[Piece]:
    for parameters in zero.fp16_groups:
        for parameter in parameters:
            index, at, room = zero.grad_position[zero.get_param_id(parameter)]
            start = room * parameter.ds_zero_partition_rank
            yield Piece(
                parameter=parameter,
                numel=parameter.ds_numel,
                shape=parameter.ds_shape,
                flat=zero.fp32_partitioned_groups_flat[index],
                at=at,
                start=start,
                length=max(0, min(room, parameter.ds_numel - start)),
                room=room,
            )


def _by_element(key: str, value: object, of: Tensor) -> bool:
    """Whether a value of the state has one number for each of `of`."""
    return isinstance(value, Tensor) and key not in COUNTS and value.numel() == of.numel()


def _assemble(key: str, value: Tensor, piece: Piece, total: Callable[[Tensor], Tensor]) -> Tensor:
    whole = torch.zeros(piece.numel, dtype=value.dtype, device=piece.parameter.device)
    own = value[piece.at : piece.at + piece.length]
    whole[piece.start : piece.start + piece.length] = own.to(whole.device)
    whole = total(whole)
    return whole if key in FLAT else whole.reshape(piece.shape)


def _cut(key: str, flat: Tensor, pieces: Sequence[Piece], states: ParameterStates) -> object:
    """The state `key` of a flat tensor from those of the parameters that have pieces in it."""
    values = [(piece, states[piece.parameter].get(key)) for piece in pieces]
    example = next(
        (v for p, v in values if isinstance(v, Tensor) and key not in COUNTS and v.numel() == p.numel), None
    )
    if example is None:
        return next(value for _, value in values if value is not None)
    cut = torch.zeros(flat.numel(), dtype=example.dtype, device=flat.device)
    for piece, value in values:
        if isinstance(value, Tensor):
            own = cut[piece.at : piece.at + piece.length]
            # A single number stands for all of them (Prodigy's start of a parameter that began at zero).
            own.copy_(
                value.flatten()[piece.start :][: piece.length] if value.numel() == piece.numel else value
            )
    return cut


def _unique(tensors: Iterable[Tensor]) -> list[Tensor]:
    return list({id(tensor): tensor for tensor in tensors}.values())
