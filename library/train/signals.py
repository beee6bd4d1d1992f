"""SIGTERM, SIGINT and SIGUSR1 ask a run to stop after the step in hand; a second SIGINT stops it at once.

A launcher of several processes passes Ctrl-C on to processes that had it from the terminal already, so a second
SIGINT counts only when it comes as late as a person's.
"""

from __future__ import annotations

import logging
import signal
import time
from types import FrameType

logger = logging.getLogger(__name__)

# Windows has no SIGUSR1.
STOP_SIGNALS = tuple(
    signal.Signals[name] for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)
)
SAME_KEYPRESS = 1.0  # seconds within which two SIGINT are one


class StopRequest:
    """Remembers whether a stop signal came. Handlers are installed by `install`, never at import."""

    def __init__(self) -> None:
        self._asked: str | None = None  # the first signal's name
        self._said = False
        self._interrupted: float | None = None  # when the first SIGINT came, by the monotonic clock

    def install(self) -> None:
        """Take over the stop signals of this process."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._handle)

    def __call__(self) -> bool:
        """Whether one came; says so the first time it is asked.

        A handler may not: it can come in the middle of writing the very log that it would write to.
        """
        if self._asked is not None and not self._said:
            self._said = True
            logger.warning("%s: finishing this step, then saving the state", self._asked)
        return self._asked is not None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        if number == signal.SIGINT:
            now = time.monotonic()
            if self._interrupted is not None and now - self._interrupted >= SAME_KEYPRESS:
                raise KeyboardInterrupt(
                    "stopped at once by a second Ctrl-C; what was saved before is whole, and --resume auto goes on "
                    "from there"
                )
            self._interrupted = self._interrupted or now
        self._asked = self._asked or signal.Signals(number).name
