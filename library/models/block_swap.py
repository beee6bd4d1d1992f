"""Transformer blocks whose weights wait in main memory until their turn: `blocks_to_swap`.

Of every kind of block some stay on the device for good. The others, spread evenly among them, take turns in
two places there: while one computes, the next one's weights are copied in on a stream of their own. Base
weights never change, so a block that leaves is forgotten, not copied back.

One rule decides what is where: *the places hold the next blocks in the direction of travel*. Every block
says when it begins, in the forward pass, when it is recomputed, and when the backward pass asks for a weight;
the numbers rise or fall, so the direction is known, and whatever happened before (a validation, an
interrupted step), a block that begins has its weights. Only its Linear weights travel; adapters, biases and
norms stay on the device.

How many leave for a given number is Kohya's rule, and so is the most that can.
"""

from __future__ import annotations

import logging
import weakref
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from library.errors import ConfigError
from library.models.params import FluxParams

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

PLACES = 2  # of each kind of block, on the device: one computes, one arrives
_ALIGNMENT = 256  # bytes between the starts of weights in one buffer


@dataclass(frozen=True, slots=True)
class SwapPlan:
    """Which blocks travel: their numbers, ascending, counted over double, then single blocks."""

    double: tuple[int, ...]
    single: tuple[int, ...]

    @classmethod
    def of(cls, params: FluxParams, blocks_to_swap: int) -> SwapPlan:
        """The plan for Kohya's number: n // 2 double blocks off the device and twice the rest of single ones.

        Raises:
            ConfigError: fewer than two blocks of a kind would be left.
        """
        most = largest_swap(params)
        if blocks_to_swap > most:
            raise ConfigError(
                f"blocks_to_swap = {blocks_to_swap} is too many for this transformer of {params.depth} double "
                f"and {params.depth_single_blocks} single blocks: give at most {most}"
            )
        double, single = _shares(blocks_to_swap)
        singles = _spread(single, params.depth_single_blocks)
        return cls(_spread(double, params.depth), tuple(params.depth + number for number in singles))

    def covers(self, name: str, depth: int) -> bool:
        """Whether the parameter `name` belongs to a block that travels; the model has `depth` double blocks."""
        kind, _, rest = name.partition(".")
        number = rest.partition(".")[0]
        if kind == "double_blocks":
            return int(number) in self.double
        return kind == "single_blocks" and depth + int(number) in self.single


def largest_swap(params: FluxParams) -> int:
    """The most blocks_to_swap that a model of this size allows; 35 for FLUX.1 of 19 and 38 blocks."""
    double, single = (max(0, depth - PLACES) for depth in (params.depth, params.depth_single_blocks))
    fitting = [n for n in range(params.depth * 2) if _shares(n)[0] <= double and _shares(n)[1] <= single]
    return max(fitting, default=0)


def _shares(blocks_to_swap: int) -> tuple[int, int]:
    """How many double and single blocks are off the device at any time."""
    double = blocks_to_swap // 2
    return double, 2 * (blocks_to_swap - double)


def _spread(away: int, depth: int) -> tuple[int, ...]:
    """Numbers below `depth` of the blocks that travel, evenly spaced, so that copies have equal time."""
    number = away + PLACES if away else 0
    return tuple((2 * i + 1) * depth // (2 * number) for i in range(number))


def check_travellers(blocks: Iterable[nn.Module]) -> None:
    """ConfigError when a network trains the blocks' own weights, as LyCORIS's algo=full does: those must stay."""
    linears = [layer for block in blocks for layer in block.modules() if isinstance(layer, nn.Linear)]
    trained = sum("weight" not in layer._parameters or layer.weight.requires_grad for layer in linears)
    if trained:
        raise ConfigError(
            f"blocks_to_swap: the network trains the weights of {trained} layers themselves (algo=full), so they "
            "cannot wait in main memory; leave blocks_to_swap out, or use another algo"
        )


class BlockSwap:
    """The travelling blocks of one transformer."""

    def __init__(self, blocks: Sequence[nn.Module], plan: SwapPlan, device: torch.device) -> None:
        check_travellers(blocks)
        self.plan = plan
        self._copies: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._at, self._down = 0, False
        self.lanes = [
            _Lane(
                {number: _TravellingBlock(blocks[number], device) for number in numbers}, device, self._copies
            )
            for numbers in (plan.double, plan.single)
            if numbers
        ]
        self._travelling = {number: lane for lane in self.lanes for number in lane.numbers}
        for lane in self.lanes:
            lane.expect(lane.numbers[:PLACES])

    @property
    def resident(self) -> frozenset[int]:
        """The travelling blocks whose weights are on the device now."""
        return frozenset(number for lane in self.lanes for number in lane.resident)

    @property
    def num_blocks(self) -> int:
        """How many blocks travel."""
        return len(self._travelling)

    @property
    def host_bytes(self) -> int:
        """Main memory that the weights of all travelling blocks take."""
        return sum(lane.host_bytes for lane in self.lanes)

    def with_weights(
        self, number: int, block: Callable[..., Result], *, saves: bool
    ) -> Callable[..., Result]:
        """`block` as a function that has its weights in place first.

        `saves`: its activations are kept for the backward pass. Then autograd keeps the name of a weight
        in place of the weight, and asks for it when it gets there.
        """
        lane = self._travelling.get(number)

        def run(*arguments: object) -> Result:
            self._arrive(number, cyclic=not torch.is_grad_enabled())
            if lane is None or not saves or not torch.is_grad_enabled():
                return block(*arguments)
            with saved_tensors_hooks(lambda tensor: lane.ticket(number, tensor), self._redeem):
                return block(*arguments)

        return run

    def restore(self) -> None:
        """Put all weights back on the device, for good."""
        for lane in self.lanes:
            lane.restore()
        self.lanes, self._travelling = [], {}

    def _arrive(self, number: int, *, cyclic: bool) -> None:
        """Block `number` begins: make sure of its weights and send for the next ones.

        `cyclic`: nothing goes backward from here, so behind the last block comes the first one again.
        """
        if number != self._at:
            self._down = number < self._at
        self._at = number
        for lane in self.lanes:
            lane.expect(lane.next_from(number, down=self._down, cyclic=cyclic and not self._down))
        if number in self._travelling:
            self._travelling[number].use(number)

    def _redeem(self, saved: Tensor | _Ticket) -> Tensor:
        """The weight that autograd's ticket stands for; called in the backward pass."""
        if isinstance(saved, Tensor):
            return saved
        self._arrive(saved.number, cyclic=False)
        return self._travelling[saved.number].view(saved)


@dataclass(frozen=True, slots=True)
class _Ticket:
    """A view of a travelling weight, by what it takes to make it again."""

    number: int
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int  # elements from the start of the block's buffer


class _Lane:
    """Blocks of one kind and the places on the device that they share."""

    def __init__(
        self,
        blocks: Mapping[int, _TravellingBlock],
        device: torch.device,
        copies: torch.cuda.Stream | None,
    ) -> None:
        self.numbers = tuple(sorted(blocks))
        self.blocks = blocks
        self._device, self._copies = device, copies
        size = max(block.host.nbytes for block in blocks.values())
        self._free = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(PLACES)]
        self._places: dict[int, Tensor] = {}  # by the block that holds it
        self._copied: dict[int, torch.cuda.Event] = {}

    @property
    def resident(self) -> Iterable[int]:
        """Numbers of the blocks that hold a place."""
        return self._places.keys()

    @property
    def host_bytes(self) -> int:
        """Main memory of this lane's blocks."""
        return sum(block.host.nbytes for block in self.blocks.values())

    def next_from(self, number: int, *, down: bool, cyclic: bool) -> tuple[int, ...]:
        """The blocks needed next, soonest first, when block `number`, of any kind, begins."""
        if down:
            start = max(0, bisect_right(self.numbers, number) - PLACES)
            return self.numbers[start : start + PLACES][::-1]
        start = bisect_left(self.numbers, number)
        if cyclic:
            return (self.numbers * 2)[start : start + PLACES]
        start = min(start, len(self.numbers) - PLACES)
        return self.numbers[start : start + PLACES]

    def expect(self, wanted: Sequence[int]) -> None:
        """Give every block of `wanted` a place; blocks that are not in it leave theirs."""
        missing = [number for number in wanted if number not in self._places]
        if not missing:
            return
        for number in [number for number in self._places if number not in wanted]:
            self.blocks[number].use(self.blocks[number].host)
            self._copied.pop(number, None)
            self._free.append(self._places.pop(number))
        for number in missing:
            self._places[number] = self._free.pop()
        if self._copies is None:
            for number in missing:
                self.blocks[number].copy_to(self._places[number])
            return
        # What computes with the places' old contents is enqueued already: the copies wait for that alone.
        self._copies.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._copies):
            for number in missing:
                self.blocks[number].copy_to(self._places[number])
                self._copied[number] = self._copies.record_event()

    def use(self, number: int) -> None:
        """Compute with block `number`'s place from here on; the stream waits for the copy, the host does not."""
        copied = self._copied.pop(number, None)
        if copied is not None:
            torch.cuda.current_stream(self._device).wait_event(copied)
        self.blocks[number].use(self._places[number])

    def ticket(self, number: int, tensor: Tensor) -> Tensor | _Ticket:
        """A ticket for a view of block `number`'s weights; any other tensor as it is."""
        if tensor.untyped_storage().data_ptr() != self._places[number].untyped_storage().data_ptr():
            return tensor
        return _Ticket(number, tensor.dtype, tensor.size(), tensor.stride(), int(tensor.storage_offset()))

    def view(self, ticket: _Ticket) -> Tensor:
        """The view that a ticket stands for, of the block's present place."""
        place = self._places[ticket.number].view(ticket.dtype)
        return place.as_strided(ticket.size, ticket.stride, ticket.offset)

    def restore(self) -> None:
        """Give every block weights of its own on the device; the lane is of no use afterwards."""
        for block in self.blocks.values():
            own = torch.empty_like(block.host, device=self._device)
            block.copy_to(own)
            block.use(own)
        if self._copies is not None:  # main memory is given back only when the copies are done
            torch.cuda.synchronize(self._device)
        self._free, self._places = [], {}


class _TravellingBlock:
    """The Linear weights of one block: one buffer in main memory, and where its parameters point."""

    def __init__(self, block: nn.Module, device: torch.device) -> None:
        self._weights = [layer.weight for layer in block.modules() if isinstance(layer, nn.Linear)]
        sizes = [-(-weight.nbytes // _ALIGNMENT) * _ALIGNMENT for weight in self._weights]
        *self._starts, total = accumulate(sizes, initial=0)
        self.host = torch.empty(total, dtype=torch.uint8)
        self._used: Tensor | None = None
        if device.type == "cuda":
            _pin(self, self.host, device)
        for weight, view in zip(self._weights, self._views(self.host), strict=True):
            view.copy_(weight)
        self.use(self.host)

    def copy_to(self, place: Tensor) -> None:
        """Copy the weights to `place`, uint8 on the device, on the current stream."""
        place[: len(self.host)].copy_(self.host, non_blocking=True)

    def use(self, buffer: Tensor) -> None:
        """Point the parameters to `buffer`.

        They point to main memory whenever the block is not about to compute: readers of values find them,
        and a layer that would compute with them fails instead of being wrong.
        """
        if self._used is buffer:
            return
        for weight, view in zip(self._weights, self._views(buffer), strict=True):
            weight.data = view
        self._used = buffer

    def _views(self, buffer: Tensor) -> list[Tensor]:
        return [
            buffer[start : start + weight.nbytes].view(weight.dtype).view(weight.shape)
            for start, weight in zip(self._starts, self._weights, strict=True)
        ]


def _pin(owner: object, buffer: Tensor, device: torch.device) -> None:
    """Lock `buffer` in main memory while `owner` lives, so that copies from it run beside computation.

    torch's own pinned memory comes in powers of two, which would waste up to half of it. Where the system
    refuses, copies are slower but right.
    """
    runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    if runtime.cudaHostRegister(buffer.data_ptr(), buffer.nbytes, 0) == runtime.cudaError.success:
        weakref.finalize(owner, _unpin, buffer.data_ptr(), device).atexit = False
        return
    logger.warning("blocks_to_swap: main memory could not be locked, so copies to the GPU take longer")
    try:  # the next kernel would report the refusal as its own error
        torch.zeros(1, device=device)
    except RuntimeError:
        logger.debug("cleared", exc_info=True)


def _unpin(pointer: int, device: torch.device) -> None:
    torch.cuda.synchronize(device)  # a copy may be under way
    torch.cuda.cudart().cudaHostUnregister(pointer)  # type: ignore[no-untyped-call]
