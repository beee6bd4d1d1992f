"""Where the trainer keeps what it can make again: a folder of the user's, outside data and output."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """$POLYRANK_CACHE, or ~/.cache/polyrank."""
    return Path(os.environ.get("POLYRANK_CACHE") or "~/.cache/polyrank").expanduser()
