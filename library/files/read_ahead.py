"""Stored tensors to a GPU, in an order known ahead: several threads read, by way of pinned buffers.

One thread takes 2 to 3 GB a second out of a mapped file, even where the file is in memory already, and a copy out of
memory that is not pinned waits for it. A few threads with buffers of their own are limited by the disk or the bus.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

import torch
from torch import Tensor

from library.errors import CheckpointError
from library.files.safetensors import Header, TensorInfo

_THREADS = min(8, os.cpu_count() or 1)
_CHUNK = 16 << 20  # bytes of one read
_AHEAD = 512 << 20  # bytes on the device that nobody has asked for yet; one tensor may be larger


class _Lane(NamedTuple):
    """What one read at a time uses."""

    buffer: Tensor  # [_CHUNK] uint8, pinned if the device is a GPU
    stream: torch.cuda.Stream | None


class _Coming(NamedTuple):
    """A tensor whose bytes are on their way."""

    info: TensorInfo
    memory: Tensor  # [bytes] uint8, on the device
    parts: list[Future[None]]


def read_ahead(wanted: Sequence[tuple[Header, str]], device: torch.device) -> Generator[Tensor]:
    """The tensors named by file and name, in this order, on `device` in their stored dtypes.

    Raises:
        CheckpointError: a file changed meanwhile.
    """
    lanes: SimpleQueue[_Lane] = SimpleQueue()
    on_gpu = device.type == "cuda"
    for _ in range(_THREADS):
        buffer = torch.empty(_CHUNK, dtype=torch.uint8, pin_memory=on_gpu)
        lanes.put(_Lane(buffer, torch.cuda.Stream(device) if on_gpu else None))  # type: ignore[no-untyped-call]
    pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="weights")
    following = iter(wanted)
    coming: deque[_Coming] = deque()

    def ask() -> bool:
        header, name = next(following, (None, ""))
        if header is not None:
            coming.append(_ask(header.path, header.tensors[name], device, pool, lanes))
        return header is not None

    try:
        while coming or ask():
            while sum(one.memory.numel() for one in coming) < _AHEAD and ask():
                pass
            info, memory, parts = coming.popleft()
            for part in parts:
                part.result()
            yield memory.view(info.torch_dtype).reshape(info.shape)
    finally:
        pool.shutdown(cancel_futures=True)  # before the memory it writes to goes


def _ask(
    path: Path, info: TensorInfo, device: torch.device, pool: ThreadPoolExecutor, lanes: SimpleQueue[_Lane]
) -> _Coming:
    size = info.end - info.start
    memory = torch.empty(size, dtype=torch.uint8, device=device)
    # The memory may still be in use by what was asked of the device before.
    free = torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None
    parts = [
        pool.submit(_transfer, path, info.start + start, memory[start : start + _CHUNK], free, lanes)
        for start in range(0, size, _CHUNK)
    ]
    return _Coming(info, memory, parts)


def _transfer(
    path: Path, start: int, target: Tensor, free: torch.cuda.Event | None, lanes: SimpleQueue[_Lane]
) -> None:
    """Fill `target` [n] uint8 with the file's bytes from `start` on; done when they are there."""
    lane = lanes.get()
    try:
        source = lane.buffer[: target.numel()]
        _read(path, start, source.numpy().data)
        if lane.stream is None or free is None:
            target.copy_(source)
            return
        with torch.cuda.stream(lane.stream):
            lane.stream.wait_event(free)
            target.copy_(source, non_blocking=True)
        lane.stream.synchronize()
    finally:
        lanes.put(lane)


def _read(path: Path, start: int, into: memoryview) -> None:
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        filled = 0
        while filled < len(into):
            count = file.readinto(into[filled:])
            if not count:
                raise CheckpointError(f"{path} changed while it was read; try again.")
            filled += count
