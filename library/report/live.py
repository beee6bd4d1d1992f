"""A report that is written again while its run goes on, by a thread of its own, and that never stops the run."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from library.files.atomic import write_text
from library.report.content import Composer, Known
from library.report.page import render
from library.train.run_log import Line, Record, Stepped, Warned

logger = logging.getLogger(__name__)

SHARE = 0.01  # of the time that writing may take while the run goes on
PATIENCE = 60.0  # seconds that the end of a run waits for its last report


class LiveReport:
    """Takes the records of a run; writes the page every `every` steps, and when something else happens.

    `known` is called in the thread, once: it may read pictures. A failure is one warning and the report's end.
    """

    def __init__(
        self,
        path: Path,
        known: Callable[[], Known],
        *,
        every: int,
        earlier: Sequence[Line] = (),
        on_step: Callable[[], None] = lambda: None,  # called where steps are told of, before a report is due
    ) -> None:
        self._path, self._known, self._every, self._on_step = path, known, every, on_step
        self._lines = list(earlier)
        self._news = threading.Condition()
        self._due, self._closing, self._written = False, False, False
        self._thread = threading.Thread(target=self._work, name="report", daemon=True)
        self._thread.start()

    def write(self, record: Record) -> None:
        """Take one record."""
        steps = isinstance(record, Stepped) and record.step % self._every == 0
        if steps:
            self._on_step()
        with self._news:
            self._lines.append(Line(time.time(), record))
            if steps or not isinstance(record, Stepped | Warned):
                self._due = True
                self._news.notify()

    def close(self) -> None:
        """Write the last report and wait for it, not for ever; safe to call twice."""
        with self._news:
            self._due = self._due or not self._closing
            self._closing = True
            self._news.notify()
        self._thread.join(PATIENCE)
        if self._thread.is_alive():
            logger.warning("the report %s is not finished after %d s and is left", self._path, PATIENCE)
        elif self._written:
            logger.info("report %s", self._path)
            self._written = False  # said once

    def _work(self) -> None:
        try:
            self._write_until_closed(Composer(self._known()))
        except Exception as error:  # noqa: BLE001 - whatever is wrong with a report, training goes on
            reason = str(error).strip().split("\n", 1)[0] or type(error).__name__
            logger.warning("the report %s is written no more, training goes on: %s", self._path, reason)

    def _write_until_closed(self, composer: Composer) -> None:
        pause = 0.0
        while True:
            with self._news:
                self._news.wait_for(lambda: self._closing, timeout=pause)
                self._news.wait_for(lambda: self._due or self._closing)
                if not self._due:
                    return
                self._due = False
                lines = list(self._lines)
            began = time.monotonic()
            write_report(self._path, composer, lines)
            self._written = True
            pause = (time.monotonic() - began) / SHARE


def write_report(path: Path, composer: Composer, lines: Sequence[Line]) -> None:
    """Write the page of a run whose log holds `lines`."""
    content = composer.content(lines)
    write_text(path, render(content, kind="report", title=f"{composer.name} - training report"))
