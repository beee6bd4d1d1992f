"""Small products beside large ones: a second stream, while a step is recorded.

A recorded step is a graph, and what does not depend on one another in it runs at the same time. A low-rank product
reads as much memory as a layer's own product and computes next to nothing, so beside one another they take little
longer than the large one alone. Launched kernel by kernel a second stream would cost more than it gives: then there is
none.
"""

from __future__ import annotations

from functools import cache
from types import TracebackType

import torch


class Aside:
    """What is launched in its context runs beside what is launched after it; allocate nothing in there."""

    def __init__(self, device: torch.device, *, rows: int) -> None:
        """`rows` is how many rows the products have: with few there is nothing to gain."""
        recording = device.type == "cuda" and rows > _FEW and torch.cuda.is_current_stream_capturing()
        self._main = torch.cuda.current_stream(device) if recording else None
        self._side = _side(device) if recording else None
        self._context: torch.cuda.StreamContext | None = None

    def __enter__(self) -> None:
        if self._main is None or self._side is None:
            return
        self._side.wait_stream(self._main)
        self._context = torch.cuda.stream(self._side)
        self._context.__enter__()  # type: ignore[no-untyped-call]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._context is not None:
            self._context.__exit__(kind, error, trace)
            self._context = None

    def join(self) -> None:
        """What comes next needs what was launched aside; called at the end in any case."""
        if self._main is not None and self._side is not None:
            self._main.wait_stream(self._side)


_FEW = 64


@cache
def _side(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
