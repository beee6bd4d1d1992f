"""Numbers on their way from the device, so that who wants them need not wait for what was asked for later."""

from __future__ import annotations

import time
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor


def peak_gb() -> float | None:
    """The most memory that this process had of its GPU so far, in 10**9 bytes; None without a GPU."""
    return torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else None


class Reading:
    """A few numbers as they are when the device gets there."""

    def __init__(self, numbers: Tensor) -> None:
        """`numbers` [n], on any device; what happens to them later is not seen."""
        self._arrived: torch.cuda.Event | None = None
        if not numbers.is_cuda:
            self._host = numbers.detach().cpu().clone()
            return
        self._host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
        self._host.copy_(numbers.detach(), non_blocking=True)
        self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._arrived.record(torch.cuda.current_stream(numbers.device))

    def wait(self) -> list[float]:
        """The numbers; waits until the device has computed them, and for nothing behind them."""
        if self._arrived is not None:
            self._arrived.synchronize()
        read: list[float] = self._host.tolist()
        return read


class Laps:
    """Seconds by phase, one after another, on the device's own clock. No mark waits for the device.

    What the device waits for before a mark belongs to the phase that the mark ends; what it still has to do from
    before does not. So a wait of the host that lies within the device's work costs nothing here either.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks = [("", self._now())]

    def mark(self, phase: str) -> None:
        """What the device does between the last mark and here is `phase`."""
        self._marks.append((phase, self._now()))

    def seconds(self) -> dict[str, float]:
        """By phase; only once the device is known to have got to the last mark."""
        total: dict[str, float] = {}
        for (_, begun), (phase, ended) in pairwise(self._marks):
            taken = ended - begun if isinstance(ended, float) else begun.elapsed_time(ended) / 1000
            total[phase] = total.get(phase, 0.0) + taken
        return total

    def _now(self) -> Any:  # seconds, or an event on the device
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event
