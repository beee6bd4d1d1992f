"""Which blocks recompute their activations in the backward pass, and where their inputs wait meanwhile.

One switch a block, never all or nothing: the first blocks of the forward pass are recomputed and the last
ones keep their activations, because those are freed first and so cost the least at the peak. Non-reentrant,
so that gradients reach trained weights inside even when no input needs one.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

Result = TypeVar("Result")

# A conditioning vector is not worth a copy over the bus; a stream of 512 tokens is.
_OFFLOAD_BYTES = 1 << 20
_FEW_ROWS = 64  # a batch of conditioning vectors, against thousands of tokens
# Products: where the two factors are among the arguments, and which axis of the second one the output gets.
_FACTORS = {
    "aten.mm.default": (0, 1, 1),
    "aten.addmm.default": (1, 2, 1),
    "aten._scaled_mm.default": (0, 1, 1),
    "aten._int_mm.default": (0, 1, 1),
    "polyrank.joined.default": (0, 3, 0),
    "polyrank.carried.default": (0, 5, 0),
    "polyrank.few_rows.default": (0, 1, 0),
}
_IN_FLIGHT = 2  # tensors whose copy may be under way in each direction: a double block has two large inputs


@dataclass(frozen=True, slots=True)
class Recomputation:
    """The choice for one transformer.

    `blocks` is how many blocks recompute, counted in forward order, None for all and for the embedders as
    well. With `inputs` the inputs of those blocks are kept in main memory until the backward pass. `cheap_only`:
    compiled blocks keep what `is_dear` names. `chance`: whether blocks draw random numbers, which the recomputation has
    to draw again; if not, the generators are left alone.
    """

    blocks: int | None = None
    inputs: SavedOnHost | None = None
    cheap_only: bool = False
    chance: bool = True

    def covers(self, index: int | None) -> bool:
        """Whether block `index` (over double, then single blocks) recomputes; None is an embedder."""
        return self.blocks is None or (index is not None and index < self.blocks)

    def run(self, function: Callable[..., Result], *arguments: object) -> Result:
        """Call `function` so that its activations are recomputed in the backward pass."""
        with self._where():
            result: Result = checkpoint(
                function, *arguments, use_reentrant=False, preserve_rng_state=self.chance
            )
        return result

    def run_compiled(self, function: Callable[..., Result], *arguments: object) -> Result:
        """Call `function`, compiled from `recompute_cheap`, which sees to the recomputation itself."""
        with self._where():
            return function(*arguments)

    def _where(self) -> AbstractContextManager[object]:
        return nullcontext() if self.inputs is None else self.inputs.hooks()


def recompute_cheap(block: nn.Module, *arguments: object) -> Any:
    """Call `block` so that its activations are recomputed in the backward pass, but for what `is_dear` names.

    To be compiled: uncompiled, operators that work in place forbid it.
    """
    return checkpoint(block, *arguments, use_reentrant=False, context_fn=_contexts)


def _contexts() -> Any:
    return create_selective_checkpoint_contexts(_policy)  # type: ignore[no-untyped-call]


def _policy(_context: object, operator: Any, *arguments: Any, **_options: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if is_dear(operator, arguments) else CheckpointPolicy.PREFER_RECOMPUTE


def is_dear(operator: Any, arguments: Sequence[Any]) -> bool:
    """Whether an operator's output is small for what it costs: attention, and products that narrow or are short.

    Of FLUX's Linear layers these are the ones behind attention and MLP, half of all arithmetic, and those of
    the conditioning vector, which read many weights for one row.
    """
    name = str(operator)
    if "scaled_dot_product" in name:
        return True
    place = _FACTORS.get(name)
    if place is None:
        return False
    rows, inner = arguments[place[0]].shape
    outer = arguments[place[1]].shape[place[2]]
    return bool(outer <= inner or rows <= _FEW_ROWS)


# What tells this choice from another, so that torch may keep what it traced with it for the next start.
_contexts.cache_hash = f"{_FACTORS} {_FEW_ROWS} {is_dear.__code__.co_code!r} {is_dear.__code__.co_consts}"  # type: ignore[attr-defined]


class SavedOnHost:
    """Main memory for large tensors that autograd saves, filled and emptied on streams of their own.

    Tensors come back in the reverse order, so while one is used the ones saved before it are on their way.
    Only what depends on something trained leaves: the rest (rotations, masks) lives on anyway.
    """

    def __init__(self, smallest: int = _OFFLOAD_BYTES) -> None:
        self._smallest = smallest  # bytes
        self._newest: Callable[[], _Waiting | None] = _nothing
        self._leaving: deque[_Waiting] = deque()
        self._streams: dict[torch.device, tuple[torch.cuda.Stream, ...]] = {}

    def hooks(self) -> saved_tensors_hooks:
        """Context in which what autograd saves goes to main memory."""
        return saved_tensors_hooks(self._pack, self._unpack)

    def _pack(self, tensor: Tensor) -> Tensor | _Waiting:
        small = tensor.nbytes < self._smallest
        if small or not tensor.requires_grad or isinstance(tensor, nn.Parameter):
            return tensor
        tensor = tensor.detach()
        host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
        waiting = _Waiting(host, tensor.device, before=self._newest)
        self._newest = weakref.ref(waiting)
        if not tensor.is_cuda:
            host.copy_(tensor)
            return waiting
        # Held until the copy is done: then nothing that computes later can be given its memory too early.
        waiting.here = tensor
        waiting.copied = _copy(tensor, host, self._stream(tensor.device, arriving=False))
        self._leaving.append(waiting)
        if len(self._leaving) > _IN_FLIGHT:
            self._leaving.popleft().let_go()
        return waiting

    def _unpack(self, saved: Tensor | _Waiting) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        if saved.device.type != "cuda":
            return saved.host.to(saved.device)
        tensor = self._fetch(saved)
        assert saved.copied is not None, "it was copied one way or the other"
        torch.cuda.current_stream(saved.device).wait_event(saved.copied)
        self._leaving.clear()  # the last ones saved are the first ones used: no need to fetch them again
        saved.here, saved.used = None, True
        earlier, ahead = saved.before(), 0
        while earlier is not None and ahead < _IN_FLIGHT:
            if not earlier.used:  # what one block saved comes back in the order in which it went
                self._fetch(earlier)
                ahead += 1
            earlier = earlier.before()
        return tensor

    def _fetch(self, waiting: _Waiting) -> Tensor:
        if waiting.here is None:
            waiting.here = torch.empty_like(waiting.host, device=waiting.device)
            waiting.copied = _copy(waiting.host, waiting.here, self._stream(waiting.device, arriving=True))
        return waiting.here

    def _stream(self, device: torch.device, *, arriving: bool) -> torch.cuda.Stream:
        if device not in self._streams:
            self._streams[device] = tuple(torch.cuda.Stream(device) for _ in range(2))  # type: ignore[no-untyped-call]
        return self._streams[device][arriving]


@dataclass
class _Waiting:
    """One saved tensor: its copy in main memory and, while it comes or goes, the tensor itself."""

    host: Tensor
    device: torch.device
    before: Callable[[], _Waiting | None]  # the tensor saved just before, if it is still wanted
    here: Tensor | None = field(default=None, repr=False)
    copied: torch.cuda.Event | None = None
    used: bool = False  # it came back, so the ones before it are next

    def let_go(self) -> None:
        """Give the tensor's memory back to the current stream, which waits for a copy that is under way."""
        if self.here is not None and self.copied is not None:
            torch.cuda.current_stream(self.device).wait_event(self.copied)
            self.here = None

    def __del__(self) -> None:
        self.let_go()  # fetched ahead and never asked for


def _copy(source: Tensor, target: Tensor, stream: torch.cuda.Stream) -> torch.cuda.Event:
    """Copy on `stream`, once what the current stream was given so far is done; returns when that is."""
    device = source.device if source.is_cuda else target.device
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        target.copy_(source, non_blocking=True)
        done: torch.cuda.Event = stream.record_event()
    return done


def _nothing() -> None:
    return None
