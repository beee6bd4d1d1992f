"""Numbers on their way from the device, so that who wants them need not wait for what was asked for later."""

from __future__ import annotations

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
