"""SIGTERM, SIGINT and SIGUSR1 ask a run to stop after the step in hand; a second SIGINT stops it at once."""

from __future__ import annotations

import logging
import signal
from types import FrameType

logger = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """Remembers whether a stop signal came. Handlers are installed by `install`, never at import."""

    def __init__(self) -> None:
        self._signal: signal.Signals | None = None

    def install(self) -> None:
        """Take over the stop signals of this process."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._handle)

    def __call__(self) -> bool:
        return self._signal is not None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self._signal is signal.SIGINT and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._signal = signal.Signals(number)
        logger.warning("%s: finishing this step, then saving the state", self._signal.name)
