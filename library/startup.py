"""Where the time between a program's start and its first step goes. Imports nothing large: it runs before that."""

from __future__ import annotations

import time
from collections.abc import Callable

SHOWN = 0.05  # seconds; what took less is left out of the line


class StartClock:
    """Seconds by phase, one after another, from the moment it is made."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self._begun = self._last = now()
        self._seconds: dict[str, float] = {}

    def mark(self, phase: str) -> None:
        """What went on since the last mark was `phase`."""
        now = self._now()
        self._seconds[phase] = self._seconds.get(phase, 0.0) + now - self._last
        self._last = now

    @property
    def seconds(self) -> dict[str, float]:
        """By phase, up to the last mark."""
        return dict(self._seconds)

    def line(self) -> str:
        """`started in 9.8 s: imports 2.1, ...`, up to the last mark."""
        parts = [f"{phase} {taken:.1f}" for phase, taken in self._seconds.items() if taken >= SHOWN]
        return f"started in {self._last - self._begun:.1f} s" + (": " + ", ".join(parts) if parts else "")
