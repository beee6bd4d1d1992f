"""Logging, set up once by the entry point. Modules use `logging.getLogger(__name__)` and lazy `%s`."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.text import Text

ROOT = "library"


class OnceFilter(logging.Filter):
    """Let a record marked `extra={"once": True}` through the first time its text is seen."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        if not getattr(record, "once", False):
            return True
        text = record.getMessage()
        if text in self._seen:
            return False
        self._seen.add(text)
        return True


class ScreenHandler(logging.Handler):
    """Prints records to a terminal, above a progress bar if one is up. The terminal wraps, so paths stay whole."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        text = Text(self.format(record))
        if record.levelno >= logging.WARNING:
            colour = "yellow" if record.levelno == logging.WARNING else "red"
            text = Text.assemble((f"{record.levelname.lower()}: ", colour), text)
        self._console.print(text, soft_wrap=True, highlight=False)


def setup_logging(
    *, is_main: bool, console: Console, level: str = "INFO", file: Path | None = None, simple: bool = False
) -> None:
    """Send the project's records to `console`.

    Other ranks are silent but for errors. The other arguments are Kohya's console_log_*.
    """
    handler: logging.Handler
    if simple or not console.is_terminal:
        # In a file nothing should be wrapped at the width of a screen that is not there.
        handler = logging.StreamHandler(console.file)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S"))
    else:
        handler = ScreenHandler(console)
    handlers: list[logging.Handler] = [handler]
    if file is not None:
        written = logging.FileHandler(file, mode="w", encoding="utf-8")
        written.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        handlers.append(written)
    # On every machine without a GPU it says that a kernel of a package nobody asked for is missing.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    once = OnceFilter()
    for name in (ROOT, "networks"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        for one in handlers:
            one.addFilter(once)
            logger.addHandler(one)
        logger.setLevel(level if is_main else logging.ERROR)
        logger.propagate = False


@contextmanager
def quiet(level: int) -> Iterator[None]:
    """Hold back records up to `level`, of every library, while something is only tried out."""
    before = logging.root.manager.disable
    logging.disable(level)
    try:
        yield
    finally:
        logging.disable(before)


def warn_once(logger: logging.Logger, message: str, *arguments: object) -> None:
    """Warn the first time this text comes up; later times are silent."""
    logger.warning(message, *arguments, extra={"once": True})
