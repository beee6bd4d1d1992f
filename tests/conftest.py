"""What every test stands on: one thread (two runs share two cores), a cache of its own for the embedded model."""

from __future__ import annotations

import os
import tempfile
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
