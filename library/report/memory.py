"""What the memory of the first GPU is used for, as far as torch's own counts tell it apart."""

from __future__ import annotations

import torch

Json = dict[str, object]


class MemoryMeter:
    """Looks between steps, when activations are gone."""

    def __init__(self) -> None:
        self._kept: int | None = None  # least bytes in use that were seen between steps

    def look(self) -> None:
        """Take note of the bytes in use now."""
        if torch.cuda.is_available():
            now = torch.cuda.memory_allocated()
            self._kept = now if self._kept is None else min(self._kept, now)

    def rows(self) -> list[Json]:
        """Bytes by what holds them; empty without a GPU."""
        if self._kept is None:
            return []
        peak, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        return [
            {"name": "weights and optimizer", "value": self._kept},
            {"name": "activations and gradients", "value": max(0, peak - self._kept)},
            {"name": "held by torch, unused", "value": max(0, reserved - peak)},
        ]
