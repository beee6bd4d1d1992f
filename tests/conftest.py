"""What every test stands on: one thread (two runs share two cores), a cache of its own for the embedded model."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

# Before torch is imported anywhere: spinning threads of two test workers would starve each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# One cache for all workers of a test run, so that the embedded model is made once.
os.environ.setdefault("POLYRANK_CACHE", str(Path(tempfile.gettempdir()) / f"polyrank-tests-{os.getuid()}"))


@pytest.fixture(scope="session")
def repository() -> Path:
    """The folder of the project."""
    return Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _loggers_as_they_were() -> Iterator[None]:
    """A run in this process sets up the loggers for itself; the next test finds them as they were."""
    loggers = [logging.getLogger(name) for name in ("library", "networks")]
    before = [(one, list(one.handlers), one.level, one.propagate) for one in loggers]
    yield
    for one, handlers, level, propagate in before:
        one.handlers[:] = handlers
        one.setLevel(level)
        one.propagate = propagate


class Messages(logging.Handler):
    """Keeps the text of every record."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


@pytest.fixture
def our_warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What we warn of and worse, whatever a run in this process has made of the loggers before."""
    logger, messages = logging.getLogger("library"), Messages()
    monkeypatch.setattr(logger, "handlers", [messages])
    monkeypatch.setattr(logger, "propagate", False)
    messages.setLevel(logging.WARNING)
    return messages.texts
