"""What headers said, remembered outside the data set: a large folder is looked at in seconds the second time.

One JSON file for each image folder lies in the user's cache folder, keyed by name, size and time of each image.
It is written whole, so of several writers the last one wins; a damaged file, or one that cannot be written, only costs
the time to read the headers again. The least recently used files go when all of them are larger than a limit.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from library.data.headers import Header
from library.files import atomic
from library.files.user_cache import cache_folder
from library.randomness import digest

logger = logging.getLogger(__name__)

FEWEST = 200  # images of a folder worth a file: fewer headers are read in a moment
MOST_BYTES = 1 << 28  # of all files together
_VERSION = 1


class Noted(NamedTuple):
    """A header and the stamp its file had."""

    stamp: tuple[int, int]  # bytes, modification time in ns
    header: Header


def file_of(folder: Path) -> Path:
    """Where the headers of a folder's images are remembered."""
    return cache_folder() / "image-sizes" / f"{digest(os.path.realpath(folder)).hex()}.json"


def read(folder: Path, count: int) -> dict[str, Noted]:
    """What is remembered of a folder of `count` images; nothing if that cannot be read."""
    if count < FEWEST:
        return {}
    path = file_of(folder)
    try:
        content = json.loads(path.read_bytes())
        if content["version"] != _VERSION:
            return {}
        os.utime(path)
        return {
            name: Noted((size, time), Header((width, height), orientation, bool(alpha)))
            for name, (size, time, width, height, orientation, alpha) in content["images"].items()
        }
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def write(folder: Path, images: Mapping[str, Noted]) -> None:
    """Remember the headers of a folder's images, by name, in place of what was remembered of it."""
    if len(images) < FEWEST:
        return
    rows = {
        name: [*noted.stamp, *noted.header.size, noted.header.orientation, int(noted.header.alpha)]
        for name, noted in images.items()
    }
    content = {"version": _VERSION, "folder": os.path.realpath(folder), "images": rows}
    path = file_of(folder)
    try:
        atomic.write_text(path, json.dumps(content, separators=(",", ":")))
        _forget_oldest(path.parent)
    except OSError as error:
        logger.debug("the sizes of the images in %s are not remembered: %s", folder, error)


def _forget_oldest(folder: Path) -> None:
    files = []
    for path in folder.glob("*.json"):
        try:
            status = path.stat()
        except FileNotFoundError:  # another process was quicker
            continue
        files.append((status.st_mtime_ns, status.st_size, path))
    room = MOST_BYTES
    for _, size, path in sorted(files, reverse=True):
        room -= size
        if room < 0:
            path.unlink(missing_ok=True)
