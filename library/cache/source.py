"""What identifies an image file's content, cheaply when nothing changed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

_BLOCK = 1 << 20  # bytes


def describe(path: Path) -> dict[str, object]:
    """Size, time and hash of a file's bytes."""
    status = path.stat()
    state = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            state.update(block)
    return {"bytes": status.st_size, "mtime_ns": status.st_mtime_ns, "blake2b": state.hexdigest()}


def unchanged(path: Path, noted: Mapping[str, object]) -> bool:
    """Whether the file still has the noted content: same size and time, or, if only the time differs, same
    hash.
    """
    status = path.stat()
    if status.st_size != noted.get("bytes"):
        return False
    return status.st_mtime_ns == noted.get("mtime_ns") or describe(path)["blake2b"] == noted.get("blake2b")
